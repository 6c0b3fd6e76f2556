"""The HTTP parser's edges: what is not HTTP is told so in OpenAI's shape, and a request's head has a limit.

Everything else about HTTP is uvicorn's; with httptools installed it reads with that (C), else with h11 (Python).
"""
from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from minivllm.server.errors import ApiError, encode

MAX_HEAD = 65_536  # bytes of request line and headers together
MAX_PIPELINED = 8  # requests of one connection that are read before the first is answered
NEEDS_LIMIT = hasattr(AutoHTTPProtocol, "on_headers_complete")  # httptools has none; h11 has


def answer_400(protocol: Any, message: str) -> None:
    """Say what is wrong and hang up. In the middle of a response nothing can be said any more."""
    cycle = protocol.cycle
    if cycle is None or cycle.response_complete or not cycle.response_started:
        body = encode(ApiError(400, message, code="invalid_http").body())
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        protocol.transport.write(head.encode() + body)
    protocol.transport.close()


class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One connection."""

    _head = 0  # bytes of a head that is not complete
    _in_body = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unanswered: list[Any] = []  # the cycles of requests; more than one if a client does not wait for answers

    def data_received(self, data: bytes) -> None:
        if NEEDS_LIMIT and not self._in_body:
            before, self._head = self._head, self._head + len(data)
            if before > MAX_HEAD:
                answer_400(self, f"the request line and headers are longer than {MAX_HEAD} bytes")
                return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        answer_400(self, msg)

    def on_headers_complete(self) -> None:  # called by httptools only
        self._in_body, self._head = True, 0
        super().on_headers_complete()
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        if all(cycle is not self.cycle for cycle in self._unanswered):
            self._unanswered.append(self.cycle)
        if 1 < len(self._unanswered) <= MAX_PIPELINED:
            self.flow.resume_reading()  # who does not read does not notice that the client goes away

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # tells the latest request only
        for cycle in self._unanswered:
            cycle.disconnected = cycle.disconnected or not cycle.response_complete
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()
