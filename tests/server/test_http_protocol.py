"""Connections: bytes that are not HTTP, endless headers, pages of other origins."""
from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.errors import InvalidInput
from minivllm.server.listen import MAX_HEAD
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server


@pytest.fixture(scope="module")
def live(tokenizer_folder: Path) -> Iterator[LiveServer]:
    with scripted_server(ScriptedEngine(tokenizer_folder)) as live:
        yield live


def exchange(live: LiveServer, raw: bytes) -> bytes:
    """Everything that the server sends in response to these bytes, until it closes the connection."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        answer = b""
        try:
            connection.sendall(raw)
            while piece := connection.recv(65536):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):  # it closed the connection while the client was still sending
            pass
        return answer


@pytest.mark.parametrize("raw", [
    b"\r\n\x00\xff\xfe\r\n\r\n", b"nonsense\r\n\r\n", b"GET /health HTTP/9.9\r\n\r\n", b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnot a length\r\n",
], ids=["binary", "words", "version", "no colon", "negative length", "two lengths", "bad chunk"])
def test_bytes_that_are_not_http_get_an_error_in_openais_shape_and_a_closed_connection(live: LiveServer, raw: bytes) -> None:
    head, _, body = exchange(live, raw).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "BadRequestError"
    assert httpx.get(live.url + "/health").status_code == 200


@pytest.mark.parametrize("start, more", [(b"GET /", b"a"), (b"GET / HTTP/1.1\r\nx: ", b"a"), (b"GET / HTTP/1.1\r\n", b"x: y\r\n")],
                         ids=["path", "one header", "many headers"])
def test_an_endless_head_is_refused(live: LiveServer, start: bytes, more: bytes) -> None:
    answer = exchange(live, start + more * (40 * MAX_HEAD // len(more)))
    assert b" 200 " not in answer
    assert httpx.get(live.url + "/health").status_code == 200


def test_a_body_does_not_count_toward_the_limit_for_heads(live: LiveServer) -> None:
    with httpx.Client() as http:
        for _ in range(2):
            response = http.post(live.url + "/v1/completions", json={"prompt": [5], "user": "u" * (3 * MAX_HEAD)})
            assert response.status_code == 200, response.text


def test_without_allowed_origins_pages_of_other_origins_cannot_read_responses(live: LiveServer) -> None:
    response = httpx.get(live.url + "/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_only_pages_of_allowed_origins_may_send_requests_and_read_responses(tokenizer_folder: Path) -> None:
    origin = "https://page.example"
    with scripted_server(ScriptedEngine(tokenizer_folder), allowed_origins=(origin,), api_key=("key",)) as live:
        preflight = {"origin": origin, "access-control-request-method": "POST",
                     "access-control-request-headers": "authorization,content-type"}
        response = httpx.options(live.url + "/v1/completions", headers=preflight)
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == origin, "without a key"
        answer = httpx.post(live.url + "/v1/completions", json={"prompt": "x", "user": "me"},
                            headers={"origin": origin, "authorization": "Bearer key"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert "x-minivllm-ignored" in answer.headers["access-control-expose-headers"]
        assert httpx.post(live.url + "/v1/completions", json={"prompt": "x"}, headers={"origin": origin}).status_code == 401
        other = httpx.options(live.url + "/v1/completions", headers={**preflight, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_origins_are_words_or_a_json_list_as_in_vllm() -> None:
    assert ServerConfig(allowed_origins=("https://a", '["https://b", "https://c"]')).allowed_origins == ("https://a", "https://b", "https://c")
    for wrong in ({"allowed_origins": ("[1]",)}, {"allowed_origins": ("[",)}, {"allowed_methods": ("GET",)},
                  {"allowed_origins": ("*",), "allow_credentials": True}):
        with pytest.raises(InvalidInput):
            ServerConfig(**wrong)  # type: ignore[arg-type]
