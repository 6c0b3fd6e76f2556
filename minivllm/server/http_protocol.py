"""One HTTP connection: errors of the HTTP parser in OpenAI's shape, a limit for headers, and disconnects of pipelined requests.

uvicorn does everything else. This class relies on internals of uvicorn's httptools protocol, so pyproject.toml pins uvicorn's version
and `tests/server/test_uvicorn_internals.py` says what each of them is used for.
"""
from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from minivllm.server.errors import ApiError, encode

MAX_HEAD = 65_536  # bytes of request line and headers together
MAX_PIPELINED = 8  # requests of one connection that are read before the first is answered


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

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
