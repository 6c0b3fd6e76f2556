"""Below HTTP and beside it: what is no HTTP, heads without end, pages of other origins."""
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
    """Everything the server says to these bytes before it hangs up."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        answer = b""
        try:
            connection.sendall(raw)
            while piece := connection.recv(65536):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):  # it hung up while we were still talking
            pass
        return answer


@pytest.mark.parametrize("raw", [
    b"\r\n\x00\xff\xfe\r\n\r\n", b"nonsense\r\n\r\n", b"GET /health HTTP/9.9\r\n\r\n", b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnot a length\r\n",
], ids=["binary", "words", "version", "no colon", "negative length", "two lengths", "bad chunk"])
def test_what_is_not_http_gets_openais_error_shape_and_a_closed_connection(live: LiveServer, raw: bytes) -> None:
    head, _, body = exchange(live, raw).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "BadRequestError"
    assert httpx.get(live.url + "/health").status_code == 200


@pytest.mark.parametrize("start, more", [(b"GET /", b"a"), (b"GET / HTTP/1.1\r\nx: ", b"a"), (b"GET / HTTP/1.1\r\n", b"x: y\r\n")],
                         ids=["path", "one header", "many headers"])
def test_a_head_without_end_is_cut_off(live: LiveServer, start: bytes, more: bytes) -> None:
    answer = exchange(live, start + more * (40 * MAX_HEAD // len(more)))
    assert b" 200 " not in answer
    assert httpx.get(live.url + "/health").status_code == 200


def test_a_body_does_not_count_as_head(live: LiveServer) -> None:
    with httpx.Client() as http:
        for _ in range(2):
            response = http.post(live.url + "/v1/completions", json={"prompt": [5], "user": "u" * (3 * MAX_HEAD)})
            assert response.status_code == 200, response.text


def test_without_allowed_origins_no_page_of_another_origin_may_read_an_answer(live: LiveServer) -> None:
    response = httpx.get(live.url + "/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_page_of_an_allowed_origin_may_ask_and_read_and_no_other(tokenizer_folder: Path) -> None:
    origin = "https://page.example"
    with scripted_server(ScriptedEngine(tokenizer_folder), allowed_origins=(origin,), api_key=("key",)) as live:
        asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        leave = httpx.options(live.url + "/v1/completions", headers=asked)
        assert leave.status_code == 200 and leave.headers["access-control-allow-origin"] == origin, "asked without a key"
        answer = httpx.post(live.url + "/v1/completions", json={"prompt": "x", "user": "me"},
                            headers={"origin": origin, "authorization": "Bearer key"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert "x-minivllm-ignored" in answer.headers["access-control-expose-headers"]
        assert httpx.post(live.url + "/v1/completions", json={"prompt": "x"}, headers={"origin": origin}).status_code == 401
        other = httpx.options(live.url + "/v1/completions", headers={**asked, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_origins_are_given_as_words_or_as_vllms_json_list() -> None:
    assert ServerConfig(allowed_origins=("https://a", '["https://b", "https://c"]')).allowed_origins == ("https://a", "https://b", "https://c")
    for wrong in ({"allowed_origins": ("[1]",)}, {"allowed_origins": ("[",)}, {"allowed_methods": ("GET",)},
                  {"allowed_origins": ("*",), "allow_credentials": True}):
        with pytest.raises(InvalidInput):
            ServerConfig(**wrong)  # type: ignore[arg-type]
