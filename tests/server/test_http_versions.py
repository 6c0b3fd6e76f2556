"""HTTP/1.0, HEAD, `Connection: close` and `Expect: 100-continue`, byte by byte."""
from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

CLOSE = "connection: close\r\n"


@pytest.fixture(scope="module")
def live(tokenizer_folder: Path) -> Iterator[LiveServer]:
    with scripted_server(ScriptedEngine(tokenizer_folder)) as live:
        yield live


def connect(live: LiveServer) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def exchange(live: LiveServer, head: str, body: object = None) -> tuple[str, bytes]:
    """The head and the body of the response, read until the server closes the connection."""
    raw = b"" if body is None else json.dumps(body).encode()
    kind = "" if body is None else f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n"
    with connect(live) as connection:
        connection.sendall(f"{head}\r\n{kind}\r\n".encode() + raw)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    start, _, rest = answer.partition(b"\r\n\r\n")
    return start.decode().lower(), rest


def text_of(data: dict[str, Any]) -> str:
    """The text of one event of any endpoint."""
    if isinstance(delta := data.get("delta", ""), str) and "choices" not in data:
        return delta
    return "".join(choice.get("text") or choice.get("delta", {}).get("content", "") for choice in data["choices"])


@pytest.mark.parametrize("header", ["", "connection: keep-alive\r\n", "connection: close\r\n", "expect: 100-continue\r\n"])
@pytest.mark.parametrize("path, body", [
    ("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ("/v1/responses", {"input": "x"}),
])
def test_a_stream_over_http_1_0_has_no_chunks_and_ends_with_the_connection(
    live: LiveServer, path: str, body: dict[str, object], header: str,
) -> None:
    start, rest = exchange(live, f"POST {path} HTTP/1.0\r\n{header}".rstrip("\r\n"), {**body, "stream": True})
    assert start.startswith("http/1.1 200") and "transfer-encoding" not in start and "content-length" not in start
    assert "connection: close" in start
    events = rest.decode().split("\n\n")
    assert events.pop() == "" and all(event.startswith(("data: ", "event: ")) for event in events), rest
    assert "Paris 0." in "".join(text_of(json.loads(event.rpartition("data: ")[2])) for event in events if event != "data: [DONE]")


def test_responses_with_a_length_over_http_1_0_keep_it(live: LiveServer) -> None:
    for head, body in (("GET /health HTTP/1.0", None), ("POST /v1/completions HTTP/1.0", {"prompt": "x"}), ("GET /nothing HTTP/1.0", None)):
        start, rest = exchange(live, head, body)
        assert f"content-length: {len(rest)}" in start and "transfer-encoding" not in start and json.loads(rest)


def test_a_stream_over_http_1_0_that_the_engine_refuses_is_a_complete_error(live: LiveServer) -> None:
    start, rest = exchange(live, "POST /v1/completions HTTP/1.0", {"prompt": [5] * 300, "stream": True})
    assert start.startswith("http/1.1 400") and json.loads(rest)["error"]["code"] == "context_length_exceeded"


def test_a_stream_over_http_1_1_that_closes_has_chunks(live: LiveServer) -> None:
    start, rest = exchange(live, f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{CLOSE}".rstrip("\r\n"), {"prompt": "x", "stream": True})
    assert "transfer-encoding: chunked" in start and "connection: close" in start and rest.endswith(b"0\r\n\r\n")


def test_a_client_that_waits_for_100_continue_gets_it_once_before_the_body_is_sent(live: LiveServer) -> None:
    body = b'{"prompt": "x"}'
    with connect(live) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\nconnection: close\r\n"
                           b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200") and b"100 Continue" not in answer


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/org/fake-model", "/version", "/metrics", "/", "/openapi.json",
                                  "/load", "/v1/engine/live"])
def test_head_gives_what_get_gives_without_the_body(live: LiveServer, path: str, version: str) -> None:
    start, rest = exchange(live, f"HEAD {path} HTTP/{version}\r\nhost: x\r\n{CLOSE}".rstrip("\r\n"))
    assert start.startswith("http/1.1 200") and rest == b""
    if path != "/v1/engine/live":  # that one is an endless stream
        assert f"content-length: {len(httpx.get(live.url + path).content)}" in start or path in ("/metrics", "/load")


def test_a_connection_is_usable_after_head(live: LiveServer) -> None:
    with httpx.Client(base_url=live.url) as http:
        assert http.head("/v1/engine/live").status_code == 200
        assert http.head("/v1/completions").status_code == 405
        assert http.head("/nothing").status_code == 404
        assert http.get("/health").json() == {"status": "ok"}
