"""Connections: bytes that are not HTTP, requests without an end, too many connections, pages of other origins."""
from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.errors import InvalidInput
from minivllm.server import listen
from minivllm.server.connections import OTHER_FILES, connections_possible
from minivllm.server.listen import DISCARDED_BYTES, MAX_HEAD
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


BODY = b'{"prompt": [5], "max_tokens": 1}'
# The first request of Java's HTTP client to an address with http://
UPGRADE = (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: Upgrade, HTTP2-Settings\r\n"
           b"http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nupgrade: h2c\r\n")
WITH_LENGTH = UPGRADE + b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
IN_CHUNKS = UPGRADE + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
GET_UPGRADE = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("cut", [1, 7, len(WITH_LENGTH) - 5, 1 << 20])
@pytest.mark.parametrize("requests", [[WITH_LENGTH], [IN_CHUNKS], [GET_UPGRADE], [WITH_LENGTH, GET_UPGRADE, IN_CHUNKS, WITH_LENGTH]],
                         ids=["length", "chunks", "no body", "several"])
def test_a_request_to_upgrade_is_answered_as_if_it_were_none(
    live: LiveServer, requests: list[bytes], cut: int, caplog: pytest.LogCaptureFixture,
) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    raw = b"".join([*requests, LAST])
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(raw), cut):
            connection.sendall(raw[start:start + cut])
        answers = connection.makefile("rb").read()
    assert answers.count(b"HTTP/1.1 200 OK") == len(requests) + 1 == answers.count(b"HTTP/1.1 "), answers
    assert "WebSocket" not in caplog.text


def test_a_body_whose_transfer_is_compressed_is_415(live: LiveServer) -> None:
    raw = IN_CHUNKS.replace(b"chunked", b"gzip, chunked").replace(UPGRADE, UPGRADE.replace(b"upgrade: h2c", b"connection: close"))
    answer = exchange(live, raw)
    assert answer.startswith(b"HTTP/1.1 415") and b"the transfer encoding 'gzip, chunked' is not supported" in answer


@pytest.mark.parametrize("start, more", [(b"GET /", b"a"), (b"GET / HTTP/1.1\r\nx: ", b"a"), (b"GET / HTTP/1.1\r\n", b"x: y\r\n")],
                         ids=["path", "one header", "many headers"])
def test_an_endless_head_is_refused(live: LiveServer, start: bytes, more: bytes) -> None:
    answer = exchange(live, start + more * (40 * MAX_HEAD // len(more)))
    assert b" 200 " not in answer
    assert httpx.get(live.url + "/health").status_code == 200


def test_a_packet_of_very_many_requests_is_parsed_part_by_part(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is answered, in order, although few are parsed before the first is answered."""
    most, unpatched = 0, listen.HttpProtocol._parse

    def counted(protocol: listen.HttpProtocol, data: bytes) -> None:
        nonlocal most
        unpatched(protocol, data)
        most = max(most, len(protocol._unanswered))

    monkeypatch.setattr(listen.HttpProtocol, "_parse", counted)
    count, request = 2000, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    answer = exchange(live, request * count + request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    assert answer.count(b"HTTP/1.1 200") == count + 1
    assert most <= listen.MAX_PIPELINED + listen.SLICE // len(request) + 1


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("start, more", [
    (b"2\r\n{}\r\n0\r\n", b"x: y\r\n"), (b"2\r\n{}\r\n0\r\nx: ", b"y"), (b"2;x=", b"y"), (b"", b"1;x=" + b"y" * 1000 + b"\r\n \r\n"),
], ids=["trailers", "one trailer", "one chunk extension", "many chunk extensions"])
def test_all_bytes_of_a_request_are_limited(tokenizer_folder: Path, start: bytes, more: bytes) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), max_body_size=100_000) as live:
        head, _, body = exchange(live, CHUNKED + start + more * (20 * MAX_HEAD // len(more))).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"
        assert httpx.get(live.url + "/health").status_code == 200


def test_after_an_early_answer_the_rest_is_dropped_and_the_connection_closed(tokenizer_folder: Path) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), api_key=("key",)) as live:
        for request in (CHUNKED + b"9\r\nendless: \r\n", CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n", CHUNKED):
            head, _, body = exchange(live, request).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 401") and b"connection: close" in head.lower() and json.loads(body)["error"]
        exchange(live, CHUNKED + b"9\r\nendless: \r\n" * (4 * DISCARDED_BYTES // 14))  # returns: the server closed it
        smuggled = CHUNKED.replace(b"host: x", b"host: x\r\nconnection: close") + b"2\r\n{}\r\n0\r\nauthorization: Bearer key\r\n\r\n"
        assert exchange(live, smuggled).startswith(b"HTTP/1.1 401"), "a trailer is no header"


@pytest.mark.parametrize("raw, status", [
    (b"", b""), (b"GET /health HTT", b"HTTP/1.1 408"), (b"GET /health HTTP/1.1\r\nx: y\r\n", b"HTTP/1.1 408"),
], ids=["silent", "half a line", "half a head"])
def test_a_head_that_does_not_arrive_times_out(live: LiveServer, monkeypatch: pytest.MonkeyPatch, raw: bytes, status: bytes) -> None:
    monkeypatch.setattr(listen, "HEAD_SECONDS", 0.05)
    answer = exchange(live, raw)
    assert answer.startswith(status) and (bool(answer) == bool(raw))
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # the time of a second head begins with its first byte
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_beyond_the_limit_idle_connections_are_closed_for_new_ones(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(0))
    with scripted_server(engine, max_connections=2) as live:
        host, port = live.url.removeprefix("http://").split(":")
        address = (host, int(port))
        with socket.create_connection(address, timeout=30) as first, socket.create_connection(address, timeout=30) as second:
            live.wait_until(lambda: len(live.server.server_state.connections) == 2)
            assert httpx.get(live.url + "/health").status_code == 200
            assert first.recv(1) == b"", "the connection that was idle for the longest time is closed"
            raw = json.dumps({"prompt": [5], "stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
            second.sendall(head.encode() + raw)
            live.wait_until(lambda: len(live.server.running) == 1)
            with socket.create_connection(address, timeout=30) as third:
                third.sendall(head.encode() + raw)
                live.wait_until(lambda: len(live.server.running) == 2)
                refused = httpx.get(live.url + "/health")
                assert refused.status_code == 503 and "max-connections" in refused.json()["error"]["message"]
                engine.gate.release(100)  # type: ignore[union-attr]
                assert second.recv(12) == third.recv(12) == b"HTTP/1.1 200"
        assert [record.levelname for record in caplog.records if "max-connections" in record.message] == ["WARNING"]


def test_unfinished_bodies_of_one_key_leave_connections_to_others(tokenizer_folder: Path) -> None:
    def head(key: str) -> bytes:
        return (f"POST /tokenize HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
                "content-length: 15\r\nconnection: close\r\n\r\n").encode()

    with scripted_server(ScriptedEngine(tokenizer_folder), api_key=("hostile", "other"), max_connections=4) as live, ExitStack() as stack:
        host, port = live.url.removeprefix("http://").split(":")
        running = live.server.running
        for count in (1, 2):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            connection.sendall(head("hostile") + b"{")
            while len(running._receiving) < count:
                pass
        assert exchange(live, head("hostile")).startswith(b"HTTP/1.1 429")
        assert exchange(live, head("other") + b'{"prompt": "x"}').startswith(b"HTTP/1.1 200")


def test_bytes_of_bodies_are_charged_while_they_arrive(tokenizer_folder: Path) -> None:
    def head(key: str, length: int) -> bytes:
        return (f"POST /tokenize HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
                f"content-length: {length}\r\nconnection: close\r\n\r\n").encode()

    with scripted_server(ScriptedEngine(tokenizer_folder), api_key=("hostile", "other")) as live:
        host, port = live.url.removeprefix("http://").split(":")
        ledger = live.server.running.bodies
        ledger._limit = 50_000
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head("hostile", 50_000) + b" " * 40_000)
            while sum(ledger._kept.values()) < 40_000:
                pass
            answer = exchange(live, head("hostile", 50_000) + b" " * 40_000)
            assert answer.startswith(b"HTTP/1.1 429") and b"hold 50000 bytes of bodies" in answer
            assert exchange(live, head("other", 20_000) + b'{"prompt": "x"}'.ljust(20_000)).startswith(b"HTTP/1.1 200")
        while ledger._kept:  # the server notices that the client has left
            pass


def test_a_client_that_does_not_read_is_disconnected(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its requests produce would be kept in memory, without a limit."""
    monkeypatch.setattr(listen, "READ_SECONDS", 0.05)
    monkeypatch.setattr(listen, "READ_RATE", 1e9)
    engine = ScriptedEngine(tokenizer_folder, max_model_len=1000)
    engine.script = lambda prompt, params, child: [((5,), "a" * 50_000)] * 400
    with scripted_server(engine) as live:
        host, port = live.url.removeprefix("http://").split(":")
        for stream in (True, False):
            raw = json.dumps({"prompt": [5], "max_tokens": 400, "stream": stream}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(head.encode() + raw)
                live.wait_until(lambda: len(live.server.server_state.connections) == 1)
                live.wait_until(lambda: not live.server.server_state.connections)
        assert len(engine.seen) == 2
        assert httpx.get(live.url + "/health").status_code == 200


def test_connections_leave_files_for_the_rest_of_the_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    limits = [256, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.__setitem__(0, values[0]))
    assert connections_possible(500) == 500 and limits[0] == 500 + OTHER_FILES
    assert connections_possible(4096) == 1024 - OTHER_FILES and "ulimit" in caplog.text


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
