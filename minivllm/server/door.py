"""The first and last thing a request meets: its id, the API key, and a net under our own bugs."""
from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.server.errors import ApiError, to_api_error

RAW_SEND = "minivllm.send"  # in the scope: a `send` for the many pieces of a body, past the layers that only look at its head
# Answered without a key: load balancers have none, and the page's files hold no data (see `page`; a test compares the two).
OPEN_PATHS = frozenset({"/health", "/", "/static/app.js", "/static/live.js", "/static/style.css"})
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Door:
    """ASGI middleware: every response carries `x-request-id` (the client's own, if it sent one); keys are checked."""

    def __init__(self, app: ASGIApp, keys: Iterable[str] = ()) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if self._digests and scope["path"] not in OPEN_PATHS and not self._admits(headers.get("authorization", "")):
            refusal = ApiError(
                401, "a valid API key is required: send it as 'Authorization: Bearer KEY'", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await refusal.response()(scope, receive, send_named)
            return
        scope[RAW_SEND] = send
        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            if started:
                raise
            await to_api_error(error).response()(scope, receive, send_named)

    def _admits(self, authorization: str) -> bool:
        """Compares with every key, each in constant time, so that the time taken tells nothing about any of them."""
        scheme, _, token = authorization.partition(" ")
        digest = _digest(token.strip())
        admitted = False
        for known in self._digests:
            admitted |= hmac.compare_digest(digest, known)
        return admitted and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
