"""The load generator's HTTP client. It does as little work per token as Python allows, so that it measures the server and not itself.

    bytes from the socket ──▶ httptools (HTTP/1.1) ──▶ body ──▶ events (SSE) ──▶ one clock reading per read

httptools, uvicorn's parser, runs inside the socket's callback, so no task wakes up for a token. An event is decoded as JSON only if it
may hold more than text; for all others, nearly all, only the time of arrival is kept. Connections are reused, as real clients do.

Why not aiohttp: it wakes a task for each read, and its work for each request is three times as much. 256 streams against canned
servers on two cores, medians of six runs:

                                               this client     aiohttp 3.14
    400 tokens each, as fast as possible       152,000         153,000 events/s
    1 token each, as fast as possible          7,400           2,300 requests/s
    50 steps/s: time to first token, median    28 ms           69 ms
    50 steps/s: processor time                 13.5 µs         26.7 µs per event

The first two are what `minivllm bench serve --canned` prints with `--random-output-len` 400 and 1.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from typing import cast

import httptools

from minivllm.benchmarks.address import ServerAddress
from minivllm.benchmarks.outcome import RequestOutcome

_NOT_ONLY_TEXT = (b'""', b"[]", b"{}", b'_tokens"', b'"error"')  # an event with text and nothing else contains none of these
_MAX_ERROR = 300  # characters of a server's error that are kept


class HttpError(Exception):
    """The server's status was not 200, or there was no response."""


class ClientConnection(asyncio.Protocol):
    """One connection. It carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[bytes] | None = None
        self.closed = False
        self.answered = False  # whether the current request got any byte back

    def exchange(self, request: bytes, outcome: RequestOutcome) -> asyncio.Future[bytes]:
        """Send a request. The result is the body; of a stream, only what follows its last event."""
        assert self._transport is not None and self._done is None
        self._outcome = outcome
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._body = b""  # of a stream: an event that is not complete
        self._is_stream = self._has_length = self._has_head = self.answered = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    # -- called by the event loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._done is not None and self._has_head and not self._has_length:
            self.on_message_complete()  # such a response ends with the connection
        else:
            self._fail(f"the connection was lost: {error or 'closed by the server'}")

    def data_received(self, data: bytes) -> None:
        if self._done is None:
            self.close()  # no request was sent
            return
        self.answered = True
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the response is not valid HTTP/1.1 with events: {error.__context__ or error}")
            self.close()

    # -- called by the parser -----------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._is_stream = value.startswith(b"text/event-stream")
        elif name in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._has_head = self._parser.get_status_code() >= 200

    def on_body(self, piece: bytes) -> None:
        if not self._is_stream:
            self._body += piece
            return
        *events, self._body = (self._body + piece if self._body else piece).split(b"\n\n")
        for event in events:
            if event[:7] == b"data: {" and not any(mark in event for mark in _NOT_ONLY_TEXT):
                self._outcome.times.append(self._now)
            else:
                self._read_event(event)

    def on_message_complete(self) -> None:
        if not self._has_head:  # 100 Continue: the response follows
            return
        done, self._done = self._done, None
        if not self._parser.should_keep_alive():
            self.close()
        status = self._parser.get_status_code()
        if status != 200:
            self._outcome.error = _error_text(status, self._body)
        if done is not None and not done.done():
            done.set_result(self._body)

    def _read_event(self, event: bytes) -> None:
        """An event that may hold more than text, or none: the first or last of a choice, usage, an error."""
        data = b"\n".join(line[5:].strip() for line in event.replace(b"\r", b"").split(b"\n") if line.startswith(b"data:"))
        if not data or data == b"[DONE]":
            return
        body = json.loads(data)
        if body.get("error"):
            self._outcome.error = _error_text(0, data)
        _record_usage(self._outcome, body)
        for choice in body.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("text") or any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls")):
                self._outcome.times.append(self._now)
                break

    def _fail(self, reason: str) -> None:
        done, self._done = self._done, None
        if done is not None and not done.done():
            done.set_exception(HttpError(reason))


def _record_usage(outcome: RequestOutcome, body: dict[str, object]) -> None:
    usage = body.get("usage")
    if isinstance(usage, dict):
        outcome.prompt_tokens = usage.get("prompt_tokens")
        outcome.output_tokens = usage.get("completion_tokens")


def _error_text(status: int, body: bytes) -> str:
    """The message of an error in OpenAI's shape, or the whole body."""
    text = body.decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError, KeyError, TypeError):  # another shape
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    return (f"HTTP {status}: " if status else "") + text[:_MAX_ERROR]


class LoadClient:
    """Requests to one server, over as many connections as there are requests at the same time."""

    def __init__(self, address: ServerAddress, headers: dict[str, str] | None = None) -> None:
        self._address = address
        self._tls = ssl.create_default_context() if address.secure else None
        lines = {"Host": address.authority, "Accept": "*/*", **(headers or {})}
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[ClientConnection] = []

    async def get(self, path: str) -> bytes:
        """The body at a path; raises `HttpError`."""
        outcome = RequestOutcome()
        body = await self._send(f"GET {self._address.prefix}{path} HTTP/1.1\r\n{self._lines}\r\n".encode(), outcome)
        if outcome.error is not None:
            raise HttpError(outcome.error)
        return body

    def prepare(self, path: str, body: bytes) -> bytes:
        """The bytes of a POST request with a JSON body."""
        head = (f"POST {self._address.prefix}{path} HTTP/1.1\r\n{self._lines}Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        return head.encode() + body

    async def post(self, request: bytes) -> RequestOutcome:
        """Send prepared bytes and read the whole response. Failures are in the outcome."""
        outcome = RequestOutcome(start=time.perf_counter())
        try:
            body = await self._send(request, outcome)
            outcome.end = outcome.times[-1] if outcome.times else time.perf_counter()
            if body and outcome.error is None and not outcome.times:
                _record_usage(outcome, json.loads(body))
        except (HttpError, OSError, ValueError) as error:
            outcome.error = str(error)[:_MAX_ERROR] or type(error).__name__
            outcome.end = time.perf_counter()
        return outcome

    async def _send(self, request: bytes, outcome: RequestOutcome) -> bytes:
        while True:
            connection = self._idle.pop() if self._idle else None
            reused = connection is not None
            if connection is None:
                address = self._address
                _, connection = await asyncio.get_running_loop().create_connection(
                    ClientConnection, address.host, address.port, ssl=self._tls)
            elif connection.closed:  # the server closed it while it was idle
                continue
            try:
                body = await connection.exchange(request, outcome)
            except HttpError:
                if reused and not connection.answered:  # the server closed it just now, before it read the request
                    continue
                raise
            except asyncio.CancelledError:
                connection.close()
                raise
            if not connection.closed:
                self._idle.append(connection)
            return body

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
