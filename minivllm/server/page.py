"""The page at `/`, a chat with a live view of the engine, and the stream of events that the live view shows.

The page's files hold no data and need no API key. The page's requests send the key that the user typed.
`GET /v1/engine/live` is a stream of server-sent events: first the constants, then each new view of the engine, at most about ten a
second. The engine makes views only while such a stream is open.
"""
from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.engine.watch import EngineView
from minivllm.server.errors import ApiError
from minivllm.server.formatters import event
from minivllm.server.frontend import Frontend
from minivllm.server.generation import EVENT_STREAM_HEADERS, body_message, until_disconnect

FILES = {  # path -> (file, media type)
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/static/live.js": ("live.js", "text/javascript; charset=utf-8"),
    "/static/style.css": ("style.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache",
}
POLL_SECONDS = 0.05  # between two checks for a new view
KEEPALIVE_SECONDS = 10.0  # without a new view a comment is sent, so that proxies keep the connection open
MAX_STREAMS = 32


def add_page(app: FastAPI, frontend: Frontend) -> None:
    folder = Path(__file__).parent / "static"
    for path, (name, media_type) in FILES.items():
        _add_file(app, path, (folder / name).read_bytes(), media_type)
    open_streams: set[LiveResponse] = set()

    @app.get("/v1/engine/live", include_in_schema=False)  # an endless stream is no subject for OpenAPI: docs/page.md describes it
    async def live() -> Response:
        frontend.check_alive()
        if len(open_streams) >= MAX_STREAMS:
            raise ApiError(429, f"{MAX_STREAMS} live views are open already: close one", headers={"retry-after": "5"})
        return LiveResponse(frontend, open_streams)


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)


class LiveResponse(Response):
    """A stream of views. It ends when its client disconnects, when the engine dies or when the server shuts down."""

    def __init__(self, frontend: Frontend, open_streams: set[LiveResponse]) -> None:
        self._frontend = frontend
        self._open_streams = open_streams
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._open_streams.add(self)
        try:
            await until_disconnect(self._stream(send), receive)
        finally:
            self._open_streams.discard(self)

    async def _stream(self, send: Send) -> None:
        frontend = self._frontend
        with frontend.client.watching() as latest:
            await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM_HEADERS]})
            await send(body_message(event(constants(frontend))))
            shown: EngineView | None = None
            idle = 0.0  # seconds since the last message
            while frontend.client.dead is None and not frontend.running.ending:
                view = latest()
                if view is not None and view is not shown:
                    shown, idle = view, 0.0
                    await send(body_message(event(describe(view, frontend))))
                elif idle >= KEEPALIVE_SECONDS:
                    idle = 0.0
                    await send(body_message(b": keep-alive\n\n"))
                idle += POLL_SECONDS
                await asyncio.sleep(POLL_SECONDS)
        await send(body_message(b"", more=False))


def constants(frontend: Frontend) -> dict[str, Any]:
    info = frontend.client.info
    return {
        "model": frontend.names[0], "device": info.device, "dtype": info.dtype, "num_blocks": info.num_blocks - 1,
        "block_size": info.block_size, "max_model_len": info.max_model_len,
    }


def describe(view: EngineView, frontend: Frontend) -> dict[str, Any]:
    """A view as JSON. A sequence is [owner, child, prompt tokens, tokens, computed, cached, blocks, preempted]."""
    snapshot, stats, metrics = view.snapshot, frontend.client.stats(), frontend.client.metrics

    def rows(sequences: Any) -> list[list[int]]:
        return [[s.owner, s.child, s.num_prompt_tokens, s.num_tokens, s.num_computed, s.num_cached, s.num_blocks, int(s.preempted)]
                for s in sequences]

    return {
        "time": round(view.time, 4), "num_running": snapshot.num_running, "num_waiting": snapshot.num_waiting,
        "running": rows(snapshot.running), "waiting": rows(snapshot.waiting),
        "steps": [[step.step_id, [[owner, tokens, int(prompt)] for owner, tokens, prompt in step.work]] for step in view.steps],
        "skipped": view.num_skipped, "per_cell": snapshot.per_cell, "cells": snapshot.cells, "shared": snapshot.shared,
        "used_blocks": stats.used_blocks, "cached_blocks": stats.cached_blocks, "num_steps": stats.num_steps,
        "prompt_tokens": metrics.prompt_tokens, "generation_tokens": metrics.generation_tokens,
        "prefix_queries": stats.prefix_cache_queries, "prefix_hits": stats.prefix_cache_hits, "preemptions": stats.num_preemptions,
    }
