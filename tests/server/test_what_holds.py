"""Attacks that the server has always withstood: request smuggling, forged log lines, patterns that backtrack, clients that do not read."""
from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from minivllm.server.parsing import MAX_CONTAINERS
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SECOND = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(tokenizer_folder, max_model_len=100_000)


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


def connect(live: LiveServer) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize("framing", [
    b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
    b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"content-length: 2, 2\r\n\r\n{}", b"content-length: +2\r\n\r\n{}", b"content-length: 0x2\r\n\r\n{}",
    b"content-length : 2\r\n\r\n{}", b"x: y\r\n content-length: 2\r\n\r\n",
])
def test_a_request_whose_end_is_ambiguous_hides_no_second_one(live: LiveServer, framing: bytes) -> None:
    with connect(live) as connection:
        connection.sendall(HEAD + framing + SECOND)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400") or answer.count(b"HTTP/1.1") == 2, "refused, or read as the two requests that it is"
    assert httpx.get(live.url + "/health").status_code == 200


def test_a_request_cannot_forge_a_log_line(tokenizer_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from minivllm.config import ServerConfig
    from minivllm.server.listen import Server

    with scripted_server(ScriptedEngine(tokenizer_folder)) as live:
        live.server.config.access_log = True
        assert isinstance(live.server, Server) and ServerConfig().access_log
        with caplog.at_level(logging.INFO, "uvicorn.access"):
            httpx.get(live.url + "/nothing%0aINFO%20forged?x=%0d%0aforged")
            httpx.post(live.url + "/v1/completions", json={"prompt": "x", "model": "a\nINFO forged"})
    assert all("\n" not in record.getMessage() and "\r" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("raw", [
    b'"' + b"\\" * 1_000_000, b'"\\' * 500_000, b"[" * 200_000 + b'"' + b'\\"' * 300_000, b'{"a": "' + b'\\\\"' * 300_000,
    b'{"prompt": "' + b"[" * (MAX_CONTAINERS + 10) + b'", "max_tokens": 1}',
], ids=["backslashes", "open strings", "brackets", "escaped quotes", "brackets in a string"])
def test_no_pattern_takes_more_than_linear_time(live: LiveServer, raw: bytes) -> None:
    response = httpx.post(live.url + "/v1/completions", content=raw, headers={"content-type": "application/json"}, timeout=30)
    assert response.status_code in (200, 400), response.text


def test_a_client_that_does_not_read_delays_no_other_and_keeps_only_its_own_text(engine: ScriptedEngine, live: LiveServer) -> None:
    engine.seen.clear()
    engine.script = lambda prompt, params, child: [((5,), "x" * 20_000)] * 300  # 6 MB
    raw = json.dumps({"prompt": [5], "stream": True, "max_tokens": 300}).encode()
    with connect(live) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(HEAD + f"content-length: {len(raw)}\r\n\r\n".encode() + raw)
        live.wait_until(lambda: len(live.server.running) == 1)
        engine.wait_until(lambda: bool(engine.seen) and not engine.requests)  # the engine has generated all of it
        response = httpx.post(live.url + "/v1/completions", json={"prompt": [6], "max_tokens": 2}, timeout=60)
        assert response.status_code == 200 and len(live.server.running) == 1
        protocols = list(live.server.server_state.connections)
        assert max(p.transport.get_write_buffer_size() for p in protocols) < 2**23, "its own text"  # type: ignore[union-attr]
    live.wait_until(lambda: len(live.server.running) == 0)
