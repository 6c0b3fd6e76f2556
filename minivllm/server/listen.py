"""uvicorn with this project's shutdown and errors.

It relies on internals of uvicorn's server and of its httptools protocol, so pyproject.toml pins uvicorn's version and
`tests/server/test_uvicorn_internals.py` says what each of them is used for.
"""
from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from minivllm.config import ServerConfig
from minivllm.server.connections import ConnectionLimit
from minivllm.server.errors import RETRY_AFTER, ApiError, encode
from minivllm.server.running import ENDING_SECONDS, RunningRequests
from minivllm.server.terminal import print_status
from minivllm.server.tls import TlsConnection, server_context

ABORT_SECONDS = 5  # for aborted streams to send their last events; then uvicorn closes the connections
MAX_HEAD = 65_536  # bytes of request line and headers together; also of chunk headers, or of trailers, in a row
HEAD_SECONDS = 20.0  # time limit for a head, from the connection or from its first byte
DISCARDED_BYTES = 2**20  # that a client may still send after an early answer
DISCARDING_SECONDS = 2.0  # and how long it may take to read that answer
READ_SECONDS = 30.0  # for a client to read what the server has written ...
READ_RATE = 65_536  # ... and one second more for so many bytes
MAX_PIPELINED = 8  # requests of one connection that are read before the first is answered
SLICE = 8192  # bytes that are parsed between two looks at the number of requests: a packet may hold thousands of them


class Server(uvicorn.Server):
    """Serves one application made by `create_app`. On shutdown, running requests are drained or aborted, and the exit status is 0.

    `ready` is called once connections are accepted.
    """

    def __init__(self, app: FastAPI, config: ServerConfig, ready: Callable[[], None] = lambda: None) -> None:
        limit = ConnectionLimit(app.state.frontend.max_connections)
        context = None if config.ssl_certfile is None else server_context(config.ssl_certfile, config.ssl_keyfile)

        def protocol(**arguments: Any) -> asyncio.Protocol | TlsConnection:
            http = HttpProtocol(**arguments, limit=limit, max_body_size=config.max_body_size)
            if context is None:
                return http
            http.handshake = TlsConnection(http, context, limit)
            return http.handshake

        super().__init__(uvicorn.Config(
            app, log_config=None, access_log=config.access_log, lifespan="off", ws="none", server_header=False, timeout_keep_alive=65,
            http=protocol,  # type: ignore[arg-type]
        ))
        self.running: RunningRequests = app.state.frontend.running
        self._drain_timeout = config.drain_timeout
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler. Its own version would raise the signal again after the shutdown, so the exit status would not be 0."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.end, sig == signal.SIGTERM)

    def engine_died(self) -> None:
        """Called on any thread. Without its engine the server can only refuse requests, so it ends."""
        if self._loop is None:
            self.should_exit = True
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self.end, False)

    def end(self, drain: bool) -> None:
        """Stop accepting connections and drain or abort running requests. A second call aborts and closes at once."""
        if self.should_exit:
            self.running.stop()
            self.force_exit = True
            return
        self.should_exit = self.running.ending = True
        self.running.limit_body_wait(ENDING_SECONDS)
        timeout = self._drain_timeout if drain else 0.0
        self.config.timeout_graceful_shutdown = int(timeout) + ABORT_SECONDS
        if len(self.running):
            action = f"waiting up to {timeout:g} s for them" if timeout else "aborting them"
            print_status(f"requests still running: {len(self.running)}, {action}")
        if timeout:
            asyncio.get_running_loop().call_later(timeout, self.running.stop)
        else:
            self.running.stop()


class EarlyAnswerCycle(RequestResponseCycle):
    """The response to a request. If it begins before the whole request has arrived, the connection is closed after it."""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and self.more_body:
            closing: Any = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await super().send(closing)
            self.keep_alive = True  # the protocol closes the connection, once the client has had time to read
            return
        await super().send(message)


class Http10Cycle(EarlyAnswerCycle):
    """The response to a request of HTTP/1.0, which has no chunks: without a length, the end of the connection is the end of the body."""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.sized = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not self.sized:
                self.chunked_encoding = False  # None would make uvicorn choose chunks
        elif not self.sized:
            self.expected_content_length = len(message.get("body", b""))  # uvicorn checks each part against it
        await super().send(message)


class HttpProtocol(HttpToolsProtocol):
    """One connection. It has errors of the HTTP parser in OpenAI's shape, notices disconnects of pipelined requests, and serves HTTP/1.0.

    It limits the time of a head and all bytes of a request. The code that reads a body limits it. Here the bytes around it are limited:
    the head, chunk headers with their extensions, trailers, and what is sent after an early answer.
    """

    def __init__(self, *args: Any, limit: ConnectionLimit, max_body_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = limit
        self._most_bytes = MAX_HEAD + 2 * max_body_size  # of one request; twice, because small chunks have headers
        self._request_bytes = 0
        self._other_bytes = 0  # received since the last part of a body
        self._in_body = False
        self._discarding: int | None = None  # bytes left that are read and dropped before the connection is closed
        self._timer: asyncio.TimerHandle | None = None  # ends the wait for a head, or the discarding
        self._reading: asyncio.TimerHandle | None = None  # ends the wait for a client that does not read
        self.handshake: TlsConnection | None = None  # the one of HTTPS
        self._unanswered: deque[Any] = deque()  # uvicorn's cycles of requests; several if the client pipelines
        self._held = b""  # received, and parsed once fewer requests are unanswered
        self._fed = b""  # what the parser is parsing
        self._repeated_head = False  # see `_unsupported_upgrade_warning`

    # Called by the event loop.

    def connection_made(self, transport: Any) -> None:
        if self.handshake is not None:
            self.handshake.complete()
        super().connection_made(transport)
        if self._limit.admit():
            self._limit.idle[self] = None
            self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        else:
            self._end(ApiError(503, f"all {self._limit.most} connections are in use: try again later (--max-connections sets the limit)",
                               code="too_many_connections", headers={"retry-after": RETRY_AFTER}))

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.open -= 1
        self._limit.idle.pop(self, None)
        self._stop_timer()
        self._stop_reading_timer()
        super().connection_lost(exc)  # notifies the newest request only
        for cycle in self._unanswered:
            cycle.disconnected = cycle.disconnected or not cycle.response_complete
            cycle.message_event.set()
            cycle.body = bytearray()  # nothing reads it, and uvicorn's objects refer to each other until the garbage collector runs
        self._held = b""

    def data_received(self, data: bytes) -> None:
        data, self._held = self._held + data, b""
        for start in range(0, len(data), SLICE):
            if len(self._unanswered) > MAX_PIPELINED and self._discarding is None:
                self._held = data[start:]
                self._stop_timer()  # the client is not late: it has to wait
                self.flow.pause_reading()
                return
            self._parse(data[start:start + SLICE])

    def _parse(self, data: bytes) -> None:
        if self._discarding is not None:
            self._discarding -= len(data)
            if self._discarding < 0:
                self.transport.abort()
            return
        if self._other_bytes > MAX_HEAD or self._request_bytes > self._most_bytes:
            part = "chunk headers, extensions or trailers" if self._in_body else "request line and headers"
            self.send_400_response(f"{part} are longer than {MAX_HEAD} bytes, or the request than {self._most_bytes}")
            return
        self._other_bytes += len(data)
        self._request_bytes += len(data)
        self._feed(data)
        if self._timer is None and self._other_bytes and not self._in_body:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _feed(self, data: bytes) -> None:
        self._fed = data
        super().data_received(data)
        self._fed = b""

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn calls this for a request with `Upgrade`, such as Java's client sends (to h2c). HTTP allows to ignore that header. But the
        parser takes the request for complete after its head, so a body is parsed as that of a second head, which counts for nothing.
        """
        upgrade = sys.exception()  # HttpParserUpgrade(where the head ends)
        assert upgrade is not None
        rest = self._fed[upgrade.args[0]:]
        framing = [b"%b: %b\r\n" % header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]
        if framing:
            self._repeated_head = self.cycle.more_body = True
            rest = b"POST / HTTP/1.1\r\n%b\r\n%b" % (b"".join(framing), rest)
        if rest:
            self._feed(rest)

    def pause_writing(self) -> None:
        """The client reads too slowly. Everything that its requests still produce is kept in memory, so this must end."""
        super().pause_writing()
        self._stop_reading_timer()
        seconds = READ_SECONDS + self.transport.get_write_buffer_size() / READ_RATE
        self._reading = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_reading_timer()
        super().resume_writing()

    # Called by the HTTP parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # else it is a trailer: nothing here reads one, and it must not look like a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_body, self._other_bytes, self._request_bytes = True, 0, 0
        if self._repeated_head:
            self._repeated_head = False
            return
        self._stop_timer()
        self._limit.idle.pop(self, None)
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.__class__ = EarlyAnswerCycle
        if self.scope["http_version"] == "1.0" and self.cycle is not None:
            self.cycle.__class__ = Http10Cycle
            self.cycle.waiting_for_100_continue = False  # a status that HTTP/1.0 does not have
        self._unanswered.append(self.cycle)
        if 1 < len(self._unanswered) <= MAX_PIPELINED:
            self.flow.resume_reading()  # uvicorn paused it; without reading, a disconnect would go unnoticed

    def on_body(self, body: bytes) -> None:
        self._other_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._other_bytes, self._request_bytes = False, 0, 0
        super().on_message_complete()

    # Ends.

    def on_response_complete(self) -> None:
        if self._in_body and self.cycle.response_complete:  # the rest of the request is not wanted
            self.server_state.total_requests += 1
            self.cycle.body = bytearray()
            self._discard()
            return
        super().on_response_complete()
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()
        if len(self._unanswered) > MAX_PIPELINED:
            self.flow.pause_reading()  # uvicorn has resumed it
        elif self._held and not self.transport.is_closing():
            self.loop.call_soon(self._parse_held)
        if self.cycle.response_complete and not self.transport.is_closing():
            self._limit.idle[self] = None

    def _parse_held(self) -> None:
        if self.parser is not None and not self.transport.is_closing():
            self.data_received(b"")
            if not self._held and len(self._unanswered) <= MAX_PIPELINED:
                self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Send the error and close the connection. In the middle of a response the connection can only be closed."""
        self._end(ApiError(400, msg, code="invalid_http"))

    def give_up(self) -> None:
        """Close an idle connection, because a new one needs its place."""
        self._limit.idle.pop(self, None)
        self.transport.close()

    def _head_is_late(self) -> None:
        self._timer = None
        if self._other_bytes:
            self._end(ApiError(408, f"the request line and headers were not complete after {HEAD_SECONDS:g} s: send them faster"))
        else:
            self.transport.close()

    def _end(self, error: ApiError) -> None:
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()
            return
        body = encode(error.body())
        more = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items())
        head = (f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n{more}connection: close\r\n\r\n")
        self.transport.write(head.encode() + body)
        self._discard()

    def _discard(self) -> None:
        """Read and drop what the client still sends, for a short time: closing at once could destroy the response on its way."""
        self._stop_timer()
        self._discarding = DISCARDED_BYTES
        self._timer = self.loop.call_later(DISCARDING_SECONDS, self.transport.abort)
        self._limit.idle.pop(self, None)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
