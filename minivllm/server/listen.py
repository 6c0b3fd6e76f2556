"""uvicorn with this project's shutdown and errors.

It relies on internals of uvicorn's server and of its httptools protocol, so pyproject.toml pins uvicorn's version and
`tests/server/test_uvicorn_internals.py` says what each of them is used for.
"""
from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from minivllm.config import ServerConfig
from minivllm.server.errors import ApiError, encode
from minivllm.server.running import ENDING_SECONDS, RunningRequests
from minivllm.server.terminal import print_status

ABORT_SECONDS = 5  # for aborted streams to send their last events; then uvicorn closes the connections
MAX_HEAD = 65_536  # bytes of request line and headers together
MAX_PIPELINED = 8  # requests of one connection that are read before the first is answered


class Server(uvicorn.Server):
    """Serves one application made by `create_app`. On shutdown, running requests are drained or aborted, and the exit status is 0.

    `ready` is called once connections are accepted.
    """

    def __init__(self, app: FastAPI, config: ServerConfig, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(uvicorn.Config(
            app, log_config=None, access_log=config.access_log, lifespan="off", ws="none", server_header=False, timeout_keep_alive=65,
            http=HttpProtocol, ssl_keyfile=config.ssl_keyfile, ssl_certfile=config.ssl_certfile,
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


class Http10Cycle(RequestResponseCycle):
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
    """One connection: errors of the HTTP parser in OpenAI's shape, a limit for headers, disconnects of pipelined requests, HTTP/1.0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0  # received of a head that is not complete
        self._in_body = False
        self._unanswered: list[Any] = []  # uvicorn's cycles of requests; several if the client pipelines

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            before, self._head_bytes = self._head_bytes, self._head_bytes + len(data)
            if before > MAX_HEAD:
                self.send_400_response(f"the request line and headers are longer than {MAX_HEAD} bytes")
                return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Send the error and close the connection. In the middle of a response the connection can only be closed."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = encode(ApiError(400, msg, code="invalid_http").body())
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._in_body, self._head_bytes = True, 0
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0" and self.cycle is not None:
            self.cycle.__class__ = Http10Cycle
            self.cycle.waiting_for_100_continue = False  # a status that HTTP/1.0 does not have
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        if all(cycle is not self.cycle for cycle in self._unanswered):
            self._unanswered.append(self.cycle)
        if 1 < len(self._unanswered) <= MAX_PIPELINED:
            self.flow.resume_reading()  # uvicorn paused it; without reading, a disconnect would go unnoticed

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # notifies the newest request only
        for cycle in self._unanswered:
            cycle.disconnected = cycle.disconnected or not cycle.response_complete
            cycle.message_event.set()
