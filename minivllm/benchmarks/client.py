"""A load generator's HTTP client: as little work per token as Python allows, so that it measures the server and not itself.

    bytes from the socket ──▶ head ──▶ chunks of the body ──▶ events (SSE) ──▶ one clock reading each

HTTP/1.1 is parsed by hand: status, length or chunks, nothing else. Only events that may hold something other than text are
decoded as JSON; of the others (nearly all) only the time of arrival is kept. Connections are used again, as a real client does.
"""
from __future__ import annotations

import asyncio
import json
import ssl
import time
from array import array
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from minivllm.errors import InvalidInput

_NOT_PLAIN = (b'""', b"[]", b"{}", b'_tokens"', b'"error"')  # what an event with text and nothing else never holds
_MAX_ERROR = 300  # characters of a server's error that are kept


@dataclass(slots=True)
class Outcome:
    """What one request brought. Times are readings of `time.perf_counter` of one machine."""

    start: float = 0.0
    end: float = 0.0  # of the last text, or of the whole answer if it was not streamed
    times: array[float] = field(default_factory=lambda: array("d"))  # arrival of each event with text
    prompt_tokens: int | None = None  # as the server counts them
    output_tokens: int | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the answer; without the server's own count, one per event."""
        return len(self.times) if self.output_tokens is None else self.output_tokens


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is: scheme, host, port, and the path in front of /v1."""

    host: str
    port: int
    secure: bool = False
    prefix: str = ""

    @classmethod
    def of(cls, url: str) -> Address:
        """From a base URL, with or without a /v1 at its end."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise InvalidInput(f"base_url {url!r} is not a URL ({error}): write it like http://127.0.0.1:8000", "base_url") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InvalidInput(f"base_url {url!r} is not a server's address: write it like http://127.0.0.1:8000", "base_url")
        secure = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if secure else 80), secure, parts.path.rstrip("/").removesuffix("/v1"))


class HttpError(Exception):
    """The server answered with something else than 200, or not at all."""


class Connection(asyncio.Protocol):
    """One connection: a request goes out, its answer comes in; then it is free for the next one."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[bytes] | None = None
        self._outcome = Outcome()
        self._buffer = b""
        self.closed = False
        self.answered = False  # whether the present request got any byte back

    def exchange(self, request: bytes, outcome: Outcome) -> asyncio.Future[bytes]:
        """Send a request. The result is the body of an answer that was not streamed; of a stream, what came after its last event."""
        assert self._transport is not None and self._done is None
        self._outcome, self._buffer, self.answered = outcome, b"", False
        self._status = 0  # 0: the head is not complete
        self._left: int | None = None  # bytes of body still to come; None: it comes in chunks
        self._body = b""  # of a stream: its last, unfinished event
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    # -- called by the event loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._done is not None and self._status and self._left == -1:
            self._finish()  # neither a length nor chunks: the answer ends with the connection
        else:
            self._fail(f"the connection was lost: {error or 'closed by the server'}")

    def data_received(self, data: bytes) -> None:
        if self._done is None:
            self.close()  # nothing was asked
            return
        self.answered = True
        now = time.perf_counter()
        self._buffer = self._buffer + data if self._buffer else data
        try:
            if not self._status and not self._read_head():
                return
            if self._left is None:
                self._read_chunks(now)
            else:
                self._read_plain(now)
        except ValueError as error:
            self._fail(f"the answer is not HTTP/1.1: {error}")
            self.close()

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read_head(self) -> bool:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        status, *lines = head.split(b"\r\n")
        words = status.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1."):
            raise ValueError(f"it begins with {status[:40]!r}")
        self._buffer = rest
        if words[1] == b"100":  # continue: the real head follows
            return self._read_head()
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
            self._left = None
        else:
            self._left = int(headers.get(b"content-length", b"-1"))
        self._events = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        self._last = headers.get(b"connection", b"").lower() == b"close" or self._left == -1
        self._status = int(words[1])
        return True

    def _read_chunks(self, now: float) -> None:
        buffer, at = self._buffer, 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            size = int(buffer[at:end].partition(b";")[0], 16)
            start = end + 2
            if len(buffer) < start + size + 2:
                break
            if size == 0:
                self._finish()
                return
            self._take(buffer[start:start + size], now)
            at = start + size + 2
        self._buffer = buffer[at:]

    def _read_plain(self, now: float) -> None:
        assert self._left is not None
        piece, self._buffer = self._buffer, b""
        if self._left >= 0:
            self._left -= len(piece)
        self._take(piece, now)
        if self._left == 0:
            self._finish()

    def _take(self, piece: bytes, now: float) -> None:
        """A piece of the body; whole events are dealt with at once."""
        if not self._events:
            self._body += piece
            return
        *events, self._body = (self._body + piece if self._body else piece).split(b"\n\n")
        for event in events:
            if event[:7] == b"data: {" and not any(mark in event for mark in _NOT_PLAIN):
                self._outcome.times.append(now)
            else:
                self._read_event(event, now)

    def _read_event(self, event: bytes, now: float) -> None:
        """An event that may hold more than text, or none: an opening, an end, a count, an error."""
        data = b"\n".join(line[5:].strip() for line in event.replace(b"\r", b"").split(b"\n") if line.startswith(b"data:"))
        if not data or data == b"[DONE]":
            return
        body = json.loads(data)
        if body.get("error"):
            self._outcome.error = _error_text(0, data)
        _note_usage(self._outcome, body)
        for choice in body.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("text") or any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls")):
                self._outcome.times.append(now)
                break

    def _finish(self) -> None:
        done, self._done = self._done, None
        if self._last:
            self.close()
        assert done is not None
        if self._status != 200:
            self._outcome.error = _error_text(self._status, self._body)
        if not done.done():
            done.set_result(self._body)

    def _fail(self, reason: str) -> None:
        done, self._done = self._done, None
        if done is not None and not done.done():
            done.set_exception(HttpError(reason))


def _note_usage(outcome: Outcome, body: dict[str, object]) -> None:
    usage = body.get("usage")
    if isinstance(usage, dict):
        outcome.prompt_tokens = usage.get("prompt_tokens")
        outcome.output_tokens = usage.get("completion_tokens")


def _error_text(status: int, body: bytes) -> str:
    """The message of an error in OpenAI's shape, or whatever came."""
    text = body.decode("utf-8", "replace").strip()
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        pass
    return (f"HTTP {status}: " if status else "") + text[:_MAX_ERROR]


class Client:
    """Requests to one server, over as many connections as are needed at once."""

    def __init__(self, address: Address, headers: dict[str, str] | None = None) -> None:
        self._address = address
        self._tls = ssl.create_default_context() if address.secure else None
        lines = {"Host": f"{address.host}:{address.port}", "Accept": "*/*", **(headers or {})}
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._free: list[Connection] = []

    async def get(self, path: str) -> bytes:
        """The body at a path; raises `HttpError`."""
        outcome = Outcome()
        body = await self._send(f"GET {self._address.prefix}{path} HTTP/1.1\r\n{self._lines}\r\n".encode(), outcome)
        if outcome.error is not None:
            raise HttpError(outcome.error)
        return body

    def prepare(self, path: str, body: bytes) -> bytes:
        """A POST of JSON, ready to be sent."""
        head = (f"POST {self._address.prefix}{path} HTTP/1.1\r\n{self._lines}Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        return head.encode() + body

    async def post(self, request: bytes) -> Outcome:
        """Send what `prepare` made and read the whole answer. Whatever goes wrong is in the outcome."""
        outcome = Outcome(start=time.perf_counter())
        try:
            body = await self._send(request, outcome)
            outcome.end = outcome.times[-1] if outcome.times else time.perf_counter()
            if body and outcome.error is None and not outcome.times:
                _note_usage(outcome, json.loads(body))
        except (HttpError, OSError, ValueError) as error:
            outcome.error = str(error)[:_MAX_ERROR] or type(error).__name__
            outcome.end = time.perf_counter()
        return outcome

    async def _send(self, request: bytes, outcome: Outcome) -> bytes:
        while True:
            connection = self._free.pop() if self._free else None
            used_before = connection is not None
            if connection is None:
                address = self._address
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, address.host, address.port, ssl=self._tls)
            elif connection.closed:  # the server hung up while it was idle
                continue
            try:
                body = await connection.exchange(request, outcome)
            except HttpError:
                if used_before and not connection.answered:  # it hung up in this very moment: that is no answer
                    continue
                raise
            except asyncio.CancelledError:
                connection.close()
                raise
            if not connection.closed:
                self._free.append(connection)
            return body

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()
