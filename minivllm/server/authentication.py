"""The outermost middleware: request ids, API keys, HEAD, and a response for errors that no handler caught."""
from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Container, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minivllm.server.errors import ApiError, to_api_error

OWNER = "minivllm.owner"  # scope key of the digest of the request's API key; empty if the server has no keys
RAW_SEND = "minivllm.send"  # scope key of a `send` for body messages that skips the middleware, which only changes headers
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class AuthenticationMiddleware:
    """ASGI middleware that checks API keys. Every response carries `x-request-id`: the client's own if it sent one."""

    def __init__(self, app: ASGIApp, keys: Iterable[str] = (), open_paths: Container[str] = ()) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._open_paths = open_paths  # need no key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] == "HEAD":  # the response to GET without its body
            scope, send = {**scope, "method": "GET"}, _head_only(send)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if self._digests and path not in self._open_paths and not self._is_authorized(headers.get("authorization", "")):
            refusal = ApiError(
                401, "Incorrect API key provided: send a valid one as 'Authorization: Bearer KEY'", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await refusal.response()(scope, receive, send_with_id)
            return
        scope[RAW_SEND] = send
        scope[OWNER] = _digest(_bearer_token(headers.get("authorization", ""))) if self._digests else b""
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            await to_api_error(error).response()(scope, receive, send_with_id)

    def _is_authorized(self, authorization: str) -> bool:
        """Compare with every key, each in constant time, so that the duration reveals nothing about the keys."""
        digest = _digest(_bearer_token(authorization))
        known = False
        for key_digest in self._digests:
            known |= hmac.compare_digest(digest, key_digest)
        return known and authorization.partition(" ")[0].lower() == "bearer"


def _head_only(send: Send) -> Send:
    """End a response after its head, even a stream that would never end."""
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})

    return send_head


def _bearer_token(authorization: str) -> str:
    return authorization.partition(" ")[2].strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
