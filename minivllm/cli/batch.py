"""The work of `run-batch`: passes a file of requests to the server's application, without a server. OpenAI's batch format.

    {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}        one line of input
    {"id": "batch-...", "custom_id": "1", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

A wrong line gets an entry with an error and does not affect the others. The entries have the order of the lines.
"""
from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeAlias

from minivllm.errors import InvalidInput, nearest, unknown_field

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/score", "/score")
_FIELDS = ("custom_id", "method", "url", "body")
Application: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]  # ASGI: scope, receive, send


async def call(app: Application, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """One POST to an application, in the form in which a server passes it on. Returns the status and the JSON of the response."""
    answered = asyncio.Event()
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    status, pieces = 0, []

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await answered.wait()  # the client stays connected until then
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append(message.get("body", b""))

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": None, "server": None,
    }
    try:
        await app(scope, receive, send)
    finally:
        answered.set()
    return status, json.loads(b"".join(pieces))


async def answer_line(app: Application, line: str) -> dict[str, Any]:
    """The output entry for one line of input."""
    from minivllm.server.errors import ApiError

    custom_id: str | None = None
    try:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"the line is not JSON: {error}") from None
        if isinstance(request, dict) and isinstance(request.get("custom_id"), str):
            custom_id = request["custom_id"]
        _check(request)
        status, body = await call(app, request["url"], json.dumps(request["body"]).encode())
    except InvalidInput as error:
        status, body = 400, ApiError(400, error.message, param=error.param).body()
    success = status == 200
    return {
        "id": f"batch-{uuid.uuid4().hex}", "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"batch-req-{uuid.uuid4().hex}", "body": body if success else None},
        "error": None if success else body,
    }


def _check(request: Any) -> None:
    if not isinstance(request, dict):
        raise InvalidInput('a line must be an object such as {"custom_id": "1", "method": "POST", "url": ..., "body": {...}}')
    for name in request:
        if name not in _FIELDS:
            raise InvalidInput(unknown_field(name, name, _FIELDS), name)
    if not isinstance(request.get("custom_id"), str):
        raise InvalidInput("custom_id must be a string: it identifies the response", "custom_id")
    if request.get("method", "POST") != "POST":
        raise InvalidInput(f"method must be POST, got {request['method']!r}", "method")
    if request.get("url") not in URLS:
        url = str(request.get("url"))
        raise InvalidInput(f"url must be one of {', '.join(URLS)}, got {url!r}{nearest(url, URLS)}", "url")
    body = request.get("body")
    if not isinstance(body, dict):
        raise InvalidInput(f"body must be an object, got {body!r}", "body")
    if body.get("stream"):
        raise InvalidInput("body.stream: a batch cannot be streamed; leave it out", "body.stream")


async def answer_lines(
    app: Application, lines: Iterable[str], concurrency: int, done: Callable[[], object] = lambda: None,
) -> AsyncIterator[dict[str, Any]]:
    """The entries for the lines, in their order; blank lines are skipped. `concurrency`: requests at a time. `done` is called for each."""
    tasks: list[asyncio.Task[dict[str, Any]]] = []

    async def answer(line: str) -> dict[str, Any]:
        entry = await answer_line(app, line)
        done()
        return entry

    try:
        for line in lines:
            if not line.strip():
                continue
            tasks.append(asyncio.create_task(answer(line)))
            running = [task for task in tasks if not task.done()]
            if len(running) >= concurrency:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            while tasks and tasks[0].done():
                yield tasks.pop(0).result()
        while tasks:
            yield await tasks.pop(0)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
