"""Random bytes: whatever arrives over a socket, the server answers the next request and keeps no block."""
from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.config import EngineConfig
from minivllm.engine.tokenizer import Tokenizer
from minivllm.server.run import start_engine
from tests.server.scripted import LiveServer, serving

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_batched_tokens": 64, "num_gpu_blocks_override": 64}
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize", "/abort_requests")
VALID = {"prompt": "the cat", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}], "input": "x", "tokens": [5]}

numbers = st.one_of(st.integers(), st.integers(-(10**400), 10**400), st.floats())
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20))
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4))
NAMES = ("prompt", "messages", "input", "tokens", "max_tokens", "temperature", "n", "stop", "logit_bias", "logprobs", "stream", "seed",
         "tools", "tool_choice", "response_format", "structured_outputs", "stop_token_ids", "bad_words", "echo", "chat_template_kwargs",
         "request_ids", "truncate_prompt_tokens", "stream_options", "text", "include")
objects = st.dictionaries(st.sampled_from(NAMES), values, max_size=5).map(
    lambda wrong: json.dumps({**VALID, **wrong}).encode())  # with NaN and Infinity, which Python writes
nested = st.builds(lambda depth, sign: b'{"prompt":' + sign * depth, st.integers(1, 60_000), st.sampled_from([b"[", b'{"a":', b'[{"b":']))
bodies = st.one_of(
    objects, nested, st.binary(max_size=300), objects.flatmap(lambda raw: st.integers(0, len(raw)).map(lambda end: raw[:end])),
    st.builds(lambda raw, at, byte: raw[:at] + bytes([byte]) + raw[at:], objects, st.integers(0, 60), st.integers(128, 255)),  # bad UTF-8
)
lengths = st.one_of(st.just(None), st.sampled_from([b"0", b"-1", b"1e3", b"99999999999999999999", b"+5", b"5, 6", b"\xb2"]))
header_bytes = st.binary(max_size=40)


@pytest.fixture(scope="module")
def live(tiny_llama: Callable[..., Path]) -> Iterator[LiveServer]:
    folder = tiny_llama()
    client = start_engine(EngineConfig(model=str(folder), **SETTINGS), process=False, log_level="error")
    try:
        with serving(client, Tokenizer(folder), served_model_name=("tiny",)) as live:
            yield live
    finally:
        client.close()


def exchange(live: LiveServer, raw: bytes, *, complete: bool) -> bytes:
    """Send the bytes. If `complete`, signal the end of input and return the response; else close the connection."""
    host, port = live.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(raw)
            if not complete:
                return b""
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                answer += piece
        except TimeoutError:
            raise
        except OSError:  # the server has already closed the connection
            pass
    return answer


def check_alive_and_empty(live: LiveServer) -> None:
    answer = httpx.post(live.url + "/v1/completions", json={"prompt": "the cat", "max_tokens": 2, "temperature": 0}, timeout=60)
    assert answer.status_code == 200
    while len(live.server.running):  # requests of clients that disconnected are being aborted
        assert httpx.get(live.url + "/health").status_code == 200
    assert httpx.post(live.url + "/reset_prefix_cache").status_code == 200  # handled after all earlier commands to the engine
    stats = live.client.stats()
    assert (stats.used_blocks, stats.num_running, stats.num_waiting, stats.num_failed_steps) == (0, 0, 0, 0)
    assert live.client._streams == {}


@settings(max_examples=60)
@given(path=st.sampled_from(PATHS), body=bodies)
def test_any_body_gets_a_response_or_an_error_in_openais_shape(live: LiveServer, path: str, body: bytes) -> None:
    answer = httpx.post(live.url + path, content=body, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and "Traceback" not in answer.text and len(answer.content) < 4000
    check_alive_and_empty(live)


@settings(max_examples=30)
@given(method=st.sampled_from([b"POST", b"GET", b"PUT", b"\x00", b"post"]),
       path=st.one_of(st.sampled_from([path.encode() for path in PATHS]), header_bytes),
       name=header_bytes, value=header_bytes, length=lengths, body=bodies, complete=st.booleans())
def test_the_server_answers_after_any_request_bytes(
    live: LiveServer, method: bytes, path: bytes, name: bytes, value: bytes, length: bytes | None, body: bytes, complete: bool,
) -> None:
    declared = str(len(body)).encode() if length is None else length
    raw = method + b" " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + name + b": " + value
    answer = exchange(live, raw + b"\r\ncontent-length: " + declared + b"\r\n\r\n" + body, complete=complete)
    assert not answer.startswith(b"HTTP/1.1 5"), answer
    check_alive_and_empty(live)


@settings(max_examples=20)
@given(raw=st.binary(max_size=2000), complete=st.booleans())
def test_the_server_answers_after_bytes_that_are_not_http(live: LiveServer, raw: bytes, complete: bool) -> None:
    assert not exchange(live, raw, complete=complete).startswith(b"HTTP/1.1 5")
    check_alive_and_empty(live)
