"""The page at `/` and what it looks at: a chat, and beside it what the engine is doing.

The page's three files hold no data and need no API key; everything they show they ask for, with the key that is typed in.
`GET /v1/engine/live` is a stream of server-sent events: first what is constant, then a view of the engine whenever there is a new
one, at most about ten a second. The engine makes views only while such a stream is open.
"""
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.engine.watch import EngineView
from minivllm.server.answers import event
from minivllm.server.errors import ApiError
from minivllm.server.generation import while_listening

if TYPE_CHECKING:
    from minivllm.server.app import Frontend

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
LOOK_SECONDS = 0.05  # how often a stream looks for a new view
QUIET_SECONDS = 10.0  # without a view: a comment, so that nobody in between takes the connection for dead
MOST_WATCHERS = 32


def add_page(app: FastAPI, frontend: Frontend) -> None:
    folder = Path(__file__).parent / "static"
    for path, (name, media_type) in FILES.items():
        _add_file(app, path, (folder / name).read_bytes(), media_type)
    watchers = Watchers(frontend)

    @app.get("/v1/engine/live", include_in_schema=False)  # its answer has no end: docs/page.md describes it
    async def live(request: Request) -> Response:
        frontend.check_alive()
        if watchers.count >= MOST_WATCHERS:
            raise ApiError(429, f"{MOST_WATCHERS} others watch the engine already: close one", headers={"retry-after": "5"})
        return LiveResponse(watchers)


class Watchers:
    """Those who watch."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        self.count = 0

    @contextmanager
    def one_more(self) -> Iterator[Callable[[], EngineView | None]]:
        self.count += 1
        try:
            with self.frontend.client.watching() as latest:
                yield latest
        finally:
            self.count -= 1


class LiveResponse(Response):
    """A stream of views, which ends with its client, its engine or its server."""

    def __init__(self, watchers: Watchers) -> None:
        self._watchers = watchers
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_listening(self._stream(send), receive)

    async def _stream(self, send: Send) -> None:
        frontend = self._watchers.frontend
        with self._watchers.one_more() as latest:
            await send({"type": "http.response.start", "status": 200, "headers": [
                (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
            ]})
            await send(_piece(event(constants(frontend))))
            shown: EngineView | None = None
            quiet = 0.0
            while frontend.client.dead is None and not frontend.running.ending:
                view = latest()
                if view is not None and view is not shown:
                    shown, quiet = view, 0.0
                    await send(_piece(event(describe(view, frontend))))
                elif quiet >= QUIET_SECONDS:
                    quiet = 0.0
                    await send(_piece(b": nothing new\n\n"))
                quiet += LOOK_SECONDS
                await asyncio.sleep(LOOK_SECONDS)
        await send(_piece(b"", more=False))


def _piece(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)


def constants(frontend: Frontend) -> dict[str, Any]:
    info = frontend.client.info
    return {
        "model": frontend.names[0], "device": info.device, "dtype": info.dtype, "num_blocks": info.num_blocks - 1,
        "block_size": info.block_size, "max_model_len": info.max_model_len,
    }


def describe(view: EngineView, frontend: Frontend) -> dict[str, Any]:
    """A view as JSON. Sequences: [owner, child, prompt tokens, tokens, computed, cached, blocks, preempted]."""
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
