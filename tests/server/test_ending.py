"""The server's shutdown: draining or aborting, with clients that wait and clients that do not send or read."""
from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    """Every output has three tokens, one step for each permit of the gate."""
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(1))
    engine.script = lambda prompt, params, child: [((5,), "one "), ((6,), "two "), ((7,), "three")]
    return engine


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


def events(lines: Iterator[str]) -> list[Any]:
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line]


def test_draining_finishes_running_requests_and_accepts_no_others(engine: ScriptedEngine, live: LiveServer) -> None:
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


def test_a_drain_under_load_finishes_all_streams_although_other_clients_misbehave(
    engine: ScriptedEngine, live: LiveServer, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minivllm.server.listen.ENDING_SECONDS", 0.05)
    host, port = live.url.removeprefix("http://").split(":")

    def stream(_: int) -> list[Any]:
        with httpx.stream("POST", live.url + "/v1/completions", json={"prompt": "x", "stream": True}, timeout=60) as response:
            return events(response.iter_lines())

    with ThreadPoolExecutor(20) as pool, ExitStack() as stack:
        streams = [pool.submit(stream, i) for i in range(20)]
        for _ in range(5):
            stack.enter_context(half_sent(live))
            silent = stack.enter_context(socket.create_connection((host, int(port))))
            silent.sendall(b"GET /he")
        live.wait_until(lambda: len(live.server.running) == 20 and len(live.server.running._receiving) == 5)
        live.end(drain=True)
        until_refused(live)
        assert engine.gate is not None
        engine.gate.release(100)
        assert all(found.result(60)[-2]["finish_reason"] == "length" for found in streams)
        live.thread.join(30)
    assert not live.thread.is_alive() and engine.aborted == []


def test_an_immediate_shutdown_aborts_and_every_stream_ends_with_that_reason(engine: ScriptedEngine, live: LiveServer) -> None:
    with httpx.stream("POST", live.url + "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        live.end(drain=False)
        until_refused(live)
        assert engine.gate is not None
        engine.gate.release(1)  # the current step; the abort is handled after it
        rest = events(lines)
    assert [choice["finish_reason"] for choice in rest[:-1]][-1] == "abort" and rest[-1] == "data: [DONE]"
    assert len(engine.aborted) == 1
    live.thread.join(30)
    assert not live.thread.is_alive()


def test_a_second_signal_ends_a_drain(engine: ScriptedEngine, live: LiveServer) -> None:
    with httpx.stream("POST", live.url + "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        next(response.iter_lines())
        live.end(drain=True)
        live.end(drain=True)
        live.thread.join(30)
        assert not live.thread.is_alive()


def test_a_request_that_arrives_during_the_shutdown_gets_503(
    engine: ScriptedEngine, live: LiveServer,
) -> None:
    live.server.running.stop()
    response = httpx.post(live.url + "/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503 and "shutting down" in response.json()["error"]["message"]


@pytest.mark.parametrize("drain", [False, True])
def test_a_body_that_does_not_arrive_does_not_delay_the_shutdown(
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


def test_a_body_that_does_not_arrive_times_out(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.server.running.BODY_SECONDS", 0.05)
    with half_sent(live) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # until the server closes the connection
    assert answer.startswith(b"HTTP/1.1 408") and b"the body was not complete after" in answer


def half_sent(live: LiveServer) -> socket.socket:
    """Send the head of a request and only a part of its body."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
    return connection


def until_refused(live: LiveServer) -> None:
    """Wait until the server no longer accepts connections."""
    while True:
        try:
            httpx.get(live.url + "/health")
        except httpx.TransportError:
            return
