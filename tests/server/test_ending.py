"""How a server ends: draining or aborting, with a client that waits or one that does not read."""
from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    """Every answer has three tokens; a step for each permit of the gate."""
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(1))
    engine.script = lambda prompt, params, child: [((5,), "one "), ((6,), "two "), ((7,), "three")]
    return engine


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


def events(lines: Iterator[str]) -> list[Any]:
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line]


def test_draining_lets_a_running_request_finish_and_takes_no_other(engine: ScriptedEngine, live: LiveServer) -> None:
    with httpx.stream("POST", live.url + "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        live.end(drain=True)
        until_refused(live)
        assert engine.gate is not None
        engine.gate.release(2)
        rest = events(lines)
    assert [choice["text"] for choice in rest[:-1]] == ["two ", "three"]
    assert rest[-2]["finish_reason"] == "length" and rest[-1] == "data: [DONE]" and engine.aborted == []
    live.thread.join(30)
    assert not live.thread.is_alive()


def test_ending_at_once_aborts_and_every_stream_hears_it(engine: ScriptedEngine, live: LiveServer) -> None:
    with httpx.stream("POST", live.url + "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        live.end(drain=False)
        until_refused(live)
        assert engine.gate is not None
        engine.gate.release(1)  # the step that is running; the abort comes after it
        rest = events(lines)
    assert [choice["finish_reason"] for choice in rest[:-1]][-1] == "abort" and rest[-1] == "data: [DONE]"
    assert len(engine.aborted) == 1
    live.thread.join(30)
    assert not live.thread.is_alive()


def test_asking_twice_ends_a_drain(engine: ScriptedEngine, live: LiveServer) -> None:
    with httpx.stream("POST", live.url + "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        next(response.iter_lines())
        live.end(drain=True)
        live.end(drain=True)
        live.thread.join(30)
        assert not live.thread.is_alive()


def test_a_request_that_arrives_while_draining_on_an_open_connection_gets_503_or_a_closed_connection(
    engine: ScriptedEngine, live: LiveServer,
) -> None:
    live.server.running.stop()
    response = httpx.post(live.url + "/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503 and "shutting down" in response.json()["error"]["message"]


def until_refused(live: LiveServer) -> None:
    """Until the server no longer listens."""
    while True:
        try:
            httpx.get(live.url + "/health")
        except httpx.TransportError:
            return
