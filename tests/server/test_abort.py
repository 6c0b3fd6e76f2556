"""A client's disconnect aborts its requests at once: streamed or complete responses, one prompt or several."""
from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

PATH = "/v1/completions"


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    """Generates without end, one step for each permit of its gate."""
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(0))
    engine.script = lambda prompt, params, child: [((5,), "x")] * 250
    return engine


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


@pytest.fixture
def aborts(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[str]:
    """The ids that the server sends to the engine to abort. The engine handles them between two steps.

    Wait for them before the next step: requests have 200 tokens, and so many steps may pass before the server notices a disconnect."""
    aborts: queue.SimpleQueue[str] = queue.SimpleQueue()
    abort = live.client.abort

    def spy(request_id: str) -> None:
        abort(request_id)
        aborts.put(request_id)

    monkeypatch.setattr(live.client, "abort", spy)
    return aborts


def let_one_step_pass(engine: ScriptedEngine) -> None:
    assert engine.gate is not None
    engine.gate.release()


def test_closing_a_stream_aborts_its_request_within_one_step(
    engine: ScriptedEngine, live: LiveServer, aborts: queue.SimpleQueue[str],
) -> None:
    let_one_step_pass(engine)
    with httpx.stream("POST", live.url + PATH, json={"prompt": "x", "n": 3, "stream": True, "max_tokens": 200}) as response:
        next(response.iter_lines())
        ids = set(engine.requests)
    # The abort arrives during the second step and is handled before the third.
    assert {aborts.get(timeout=30)} == ids
    let_one_step_pass(engine)
    engine.wait_until(lambda: set(engine.aborted) == ids)
    assert engine.steps == 2 and not engine.requests


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_before_the_first_token_is_noticed(
    engine: ScriptedEngine, live: LiveServer, aborts: queue.SimpleQueue[str], stream: bool,
) -> None:
    connection = open_request(live, {"prompt": "x", "stream": stream, "max_tokens": 200})
    engine.wait_until(lambda: len(engine.requests) == 1)
    connection.close()
    aborts.get(timeout=30)
    let_one_step_pass(engine)
    engine.wait_until(lambda: len(engine.aborted) == 1)
    assert engine.steps == 1 and not engine.requests


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_is_noticed_although_requests_are_pipelined(
    engine: ScriptedEngine, live: LiveServer, aborts: queue.SimpleQueue[str], caplog: pytest.LogCaptureFixture, stream: bool,
) -> None:
    """HTTP allows a client to send requests before the first is answered. After a disconnect, none of the waiting ones starts."""
    connection = open_request(live, {"prompt": "x", "stream": stream, "max_tokens": 200}, times=3)
    engine.wait_until(lambda: len(engine.requests) == 1)
    (first,) = engine.requests
    connection.close()
    assert aborts.get(timeout=30) == first
    let_one_step_pass(engine)
    engine.wait_until(lambda: engine.aborted == [first])
    assert httpx.get(live.url + "/load").json()["server_load"] == 0
    assert not engine.requests and caplog.records == []


def test_a_disconnect_aborts_every_prompt_of_a_request(
    engine: ScriptedEngine, live: LiveServer, aborts: queue.SimpleQueue[str],
) -> None:
    connection = open_request(live, {"prompt": [[5], [6], [7], [8]], "n": 2, "max_tokens": 200})
    engine.run_until(lambda: len(engine.requests) == 4)
    ids = set(engine.requests)
    connection.close()
    assert {aborts.get(timeout=30) for _ in ids} == ids
    engine.run_until(lambda: set(engine.aborted) == ids)
    assert not engine.requests


def test_a_disconnect_does_not_affect_other_clients(
    engine: ScriptedEngine, live: LiveServer, aborts: queue.SimpleQueue[str],
) -> None:
    engine.script = lambda prompt, params, child: [((5,), f"{prompt[0]} ")] * (200 if prompt[0] == 8 else 100)
    answers: list[Any] = []
    body = {"prompt": [9], "max_tokens": 100}
    other = threading.Thread(target=lambda: answers.append(httpx.post(live.url + PATH, json=body, timeout=30).json()))
    other.start()
    engine.wait_until(lambda: len(engine.requests) == 1)
    other_ids = set(engine.requests)
    connection = open_request(live, {"prompt": [8], "max_tokens": 200})
    while httpx.get(live.url + "/load").json()["server_load"] < 2:  # otherwise the first could finish before the second arrives
        pass
    engine.run_until(lambda: len(engine.requests) == 2)
    closed = set(engine.requests) - other_ids
    connection.close()
    assert {aborts.get(timeout=30)} == closed
    engine.run_until(lambda: set(engine.aborted) == closed)
    engine.run_until(lambda: not engine.requests)
    other.join(30)
    assert answers[0]["choices"][0]["text"] == "9 " * 100


def test_a_finished_request_is_not_aborted(engine: ScriptedEngine, live: LiveServer) -> None:
    engine.gate = None
    httpx.post(live.url + PATH, json={"prompt": "x", "max_tokens": 3})
    with httpx.stream("POST", live.url + PATH, json={"prompt": "x", "stream": True, "max_tokens": 3}) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")
    assert engine.aborted == []


def test_no_stream_is_left_after_the_last_response(engine: ScriptedEngine, live: LiveServer) -> None:
    engine.gate = None
    for stream in (True, False):
        httpx.post(live.url + PATH, json={"prompt": [[5], [6]], "stream": stream, "max_tokens": 3})
    assert live.client._streams == {}
    assert len(live.server.running) == 0


def open_request(live: LiveServer, body: dict[str, Any], times: int = 1) -> socket.socket:
    """A request over a plain socket, so that the test decides when to close it."""
    raw = json.dumps(body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall((head.encode() + raw) * times)
    return connection
