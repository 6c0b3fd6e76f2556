"""How a server ends: draining or aborting, with a client that waits or one that does not read."""
from __future__ import annotations

import json
import socket
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


@pytest.mark.parametrize("drain", [False, True])
def test_a_body_that_does_not_come_holds_no_ending_up(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, drain: bool,
) -> None:
    monkeypatch.setattr("minivllm.server.listen.ENDING_SECONDS", 0.05)
    with half_sent(live) as connection:
        live.wait_until(lambda: len(live.server.running._receiving) == 1)
        live.end(drain=drain)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503") and b"shutting down" in answer
        live.thread.join(30)
    assert not live.thread.is_alive() and caplog.records == []


def test_a_body_that_does_not_come_is_waited_for_so_long_and_no_longer(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.server.running.BODY_SECONDS", 0.05)
    with half_sent(live) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # to the end: the server hangs up
    assert answer.startswith(b"HTTP/1.1 408") and b"the body was not complete after" in answer


def half_sent(live: LiveServer) -> socket.socket:
    """The head of a request, and less of its body than the head says."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
    return connection


def until_refused(live: LiveServer) -> None:
    """Until the server no longer listens."""
    while True:
        try:
            httpx.get(live.url + "/health")
        except httpx.TransportError:
            return
