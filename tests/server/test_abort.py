"""A client that goes away frees what it used, at once: streaming or not, one prompt or many."""
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
    """Talks for ever, a step for each permit of its gate."""
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(0))
    engine.script = lambda prompt, params, child: [((5,), "x")] * 250
    return engine


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


@pytest.fixture
def told(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[str]:
    """The ids of aborted requests, as the server tells the engine; the engine obeys between two steps."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    abort = live.client.abort

    def spy(request_id: str) -> None:
        abort(request_id)
        told.put(request_id)

    monkeypatch.setattr(live.client, "abort", spy)
    return told


def let_one_step_pass(engine: ScriptedEngine) -> None:
    assert engine.gate is not None
    engine.gate.release()


def test_closing_a_stream_aborts_its_request_within_one_step(
    engine: ScriptedEngine, live: LiveServer, told: queue.SimpleQueue[str],
) -> None:
    let_one_step_pass(engine)
    with httpx.stream("POST", live.url + PATH, json={"prompt": "x", "n": 3, "stream": True, "max_tokens": 200}) as response:
        next(response.iter_lines())
        ids = set(engine.requests)
    # The engine is inside its second step when it is told; it obeys before the third.
    assert {told.get(timeout=30)} == ids
    let_one_step_pass(engine)
    engine.wait_until(lambda: set(engine.aborted) == ids)
    assert engine.steps == 2 and not engine.requests


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_is_noticed(
    engine: ScriptedEngine, live: LiveServer, told: queue.SimpleQueue[str], stream: bool,
) -> None:
    connection = open_request(live, {"prompt": "x", "stream": stream, "max_tokens": 200})
    engine.wait_until(lambda: len(engine.requests) == 1)
    connection.close()
    told.get(timeout=30)
    let_one_step_pass(engine)
    engine.wait_until(lambda: len(engine.aborted) == 1)
    assert engine.steps == 1 and not engine.requests


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_noticed_though_it_sent_more_than_one_request(
    engine: ScriptedEngine, live: LiveServer, caplog: pytest.LogCaptureFixture, stream: bool,
) -> None:
    """HTTP lets a client send requests without waiting for answers; none of those that waited is begun then."""
    connection = open_request(live, {"prompt": "x", "stream": stream, "max_tokens": 200}, times=3)
    engine.wait_until(lambda: len(engine.requests) == 1)
    (first,) = engine.requests
    connection.close()
    engine.run_until(lambda: engine.aborted == [first])
    assert httpx.get(live.url + "/load").json()["server_load"] == 0
    assert not engine.requests and caplog.records == []


def test_leaving_aborts_every_prompt_of_a_request(engine: ScriptedEngine, live: LiveServer) -> None:
    connection = open_request(live, {"prompt": [[5], [6], [7], [8]], "n": 2, "max_tokens": 200})
    engine.run_until(lambda: len(engine.requests) == 4)
    ids = set(engine.requests)
    connection.close()
    engine.run_until(lambda: set(engine.aborted) == ids)
    assert not engine.requests


def test_other_clients_are_untouched_by_one_that_leaves(engine: ScriptedEngine, live: LiveServer) -> None:
    engine.script = lambda prompt, params, child: [((5,), f"{prompt[0]} ")] * (200 if prompt[0] == 8 else 100)
    answers: list[Any] = []
    body = {"prompt": [9], "max_tokens": 100}
    stays = threading.Thread(target=lambda: answers.append(httpx.post(live.url + PATH, json=body, timeout=30).json()))
    stays.start()
    engine.wait_until(lambda: len(engine.requests) == 1)
    stayer = set(engine.requests)
    connection = open_request(live, {"prompt": [8], "max_tokens": 200})
    while httpx.get(live.url + "/load").json()["server_load"] < 2:  # or the first could be finished before the second comes
        pass
    engine.run_until(lambda: len(engine.requests) == 2)
    leaver = set(engine.requests) - stayer
    connection.close()
    engine.run_until(lambda: set(engine.aborted) == leaver)
    engine.run_until(lambda: not engine.requests)
    stays.join(30)
    assert answers[0]["choices"][0]["text"] == "9 " * 100


def test_a_finished_request_is_not_aborted(engine: ScriptedEngine, live: LiveServer) -> None:
    engine.gate = None
    httpx.post(live.url + PATH, json={"prompt": "x", "max_tokens": 3})
    with httpx.stream("POST", live.url + PATH, json={"prompt": "x", "stream": True, "max_tokens": 3}) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")
    assert engine.aborted == []


def test_no_task_is_left_when_all_is_done(engine: ScriptedEngine, live: LiveServer) -> None:
    engine.gate = None
    for stream in (True, False):
        httpx.post(live.url + PATH, json={"prompt": [[5], [6]], "stream": stream, "max_tokens": 3})
    assert live.client._streams == {}
    assert len(live.server.running) == 0


def open_request(live: LiveServer, body: dict[str, Any], times: int = 1) -> socket.socket:
    """A request over a bare socket, so that the test decides when it is closed."""
    raw = json.dumps(body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall((head.encode() + raw) * times)
    return connection
