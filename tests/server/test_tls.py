"""HTTPS, and connections whose TLS handshake never ends. `localhost.pem` is a key and a self-signed certificate for these tests only."""
from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from minivllm.server import tls
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

PEM = str(Path(__file__).with_name("localhost.pem"))


@contextmanager
def https_server(folder: Path, **settings: int) -> Iterator[tuple[LiveServer, httpx.Client, tuple[str, int]]]:
    """A server, a client that trusts it, and its address."""
    with scripted_server(ScriptedEngine(folder), ssl_keyfile=PEM, ssl_certfile=PEM, **settings) as live:
        context = ssl.create_default_context(cafile=PEM)
        with httpx.Client(base_url=live.url, verify=context, timeout=30) as http:
            yield live, http, ("127.0.0.1", httpx.URL(live.url).port or 0)


def test_requests_and_streams_over_https(tokenizer_folder: Path) -> None:
    with https_server(tokenizer_folder) as (live, http, _):
        assert live.url.startswith("https://") and http.get("/health").status_code == 200
        assert http.post("/v1/completions", json={"prompt": [5]}).json()["choices"][0]["text"] == "Paris 0."
        with http.stream("POST", "/v1/completions", json={"prompt": [5], "stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        large = http.post("/tokenize", json={"prompt": "x" * 100_000})
        assert large.json()["count"] > 1000, "a body and an answer of several TLS records"


def test_handshakes_count_as_connections(tokenizer_folder: Path) -> None:
    with https_server(tokenizer_folder, max_connections=2) as (_, http, address), \
            socket.create_connection(address, timeout=30) as first, socket.create_connection(address, timeout=30) as second:
        assert http.get("/health").status_code == 200
        assert first.recv(1) == b"", "the connection that was idle for the longest time is closed"
        second.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while second.recv(100):  # an alert of TLS, then the end
            pass
        assert http.get("/health").status_code == 200
    with https_server(tokenizer_folder, max_connections=1) as (_, http, address):
        for _ in range(4):
            with socket.create_connection(address, timeout=30) as silent:
                silent.sendall(b"\x16\x03")
        assert http.get("/health").status_code == 200, "ended handshakes are not counted"


def test_a_handshake_that_does_not_end_times_out(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.05)
    with https_server(tokenizer_folder) as (_, _, address), socket.create_connection(address, timeout=30) as silent:
        assert silent.recv(1) == b""
