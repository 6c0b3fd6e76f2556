"""The page at `/`, a chat with a live view of the engine, the stream of events that the live view shows, and the page at `/docs`, which
describes the HTTP API from `/openapi.json`.

The page's files hold no data and need no API key. The page's requests send the key that the user typed.
`GET /v1/engine/live` is a stream of server-sent events: first the constants, then each new view of the engine, at most about ten a
second. The engine makes views only while such a stream is open.
"""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse

from minivllm.engine.watch import EngineView
from minivllm.server.authentication import require_admin
from minivllm.server.errors import ApiError
from minivllm.server.formatters import event
from minivllm.server.frontend import Frontend
from minivllm.server.generation import EVENT_STREAM_HEADERS

SCRIPTS = ("api.js", "app.js", "chat.js", "docs.js", "live.js", "markdown.js", "steps.js", "storage.js", "turn.js",
           "vendor/markdown-it.mjs")
FILES = {  # path -> (file, media type)
    "/": ("index.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/static/style.css": ("style.css", "text/css; charset=utf-8"),
    **{f"/static/{name}": (name, "text/javascript; charset=utf-8") for name in SCRIPTS},
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                               "require-trusted-types-for 'script'; trusted-types",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache",
}
POLL_SECONDS = 0.05  # between two checks for a new view
KEEPALIVE_SECONDS = 10.0  # without a new view a comment is sent, so that proxies keep the connection open
MAX_VIEWS = 32


def add_page(app: FastAPI, frontend: Frontend) -> None:
    folder = Path(__file__).parent / "static"
    for path, (name, media_type) in FILES.items():
        _add_file(app, path, (folder / name).read_bytes(), media_type)
    open_views: set[object] = set()

    @app.get("/v1/engine/live", include_in_schema=False)  # OpenAPI cannot describe an endless stream: docs/page.md does
    async def live(request: Request) -> Response:
        if len(frontend.config.keys()) > 1:
            require_admin(request)  # it shows the sequences of all keys
        frontend.check_alive()
        if len(open_views) >= MAX_VIEWS:
            raise ApiError(429, f"{MAX_VIEWS} live views are open already: close one", headers={"retry-after": "5"})
        return StreamingResponse(live_events(frontend, open_views), headers=EVENT_STREAM_HEADERS)


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)


async def live_events(frontend: Frontend, open_views: set[object]) -> AsyncIterator[bytes]:
    """The events of one live view. They end when the engine dies or the server shuts down."""
    this_view = object()
    open_views.add(this_view)
    try:
        with frontend.client.watching() as latest:
            yield event(constants(frontend))
            idle = 0.0  # seconds since the last event
            while frontend.client.dead is None and not frontend.running.ending:
                view = latest()
                if view is not None:
                    idle = 0.0
                    yield event(describe(view, frontend))
                elif idle >= KEEPALIVE_SECONDS:
                    idle = 0.0
                    yield b": keep-alive\n\n"
                idle += POLL_SECONDS
                await asyncio.sleep(POLL_SECONDS)
    finally:
        open_views.discard(this_view)


def constants(frontend: Frontend) -> dict[str, Any]:
    info = frontend.client.info
    return {
        "model": frontend.names[0], "device": info.device, "dtype": info.dtype, "num_blocks": info.num_blocks - 1,
        "block_size": info.block_size, "max_model_len": info.max_model_len, "weight_bytes": info.weight_bytes,
        "kv_cache_bytes": info.kv_cache_bytes,
    }


def describe(view: EngineView, frontend: Frontend) -> dict[str, Any]:
    """A view as JSON. A sequence is [owner, child, prompt tokens, tokens, computed, cached, blocks, preempted]."""
    snapshot, stats, metrics = view.snapshot, frontend.client.stats(frontend.client.watched), frontend.client.metrics

    def rows(sequences: Any) -> list[list[int]]:
        return [[s.owner, s.child, s.num_prompt_tokens, s.num_tokens, s.num_computed, s.num_cached, s.num_blocks, int(s.preempted)]
                for s in sequences]

    return {
        "time": round(view.time, 4), "num_running": snapshot.num_running, "num_waiting": snapshot.num_waiting,
        "running": rows(snapshot.running), "waiting": rows(snapshot.waiting),
        "steps": [[r.step.step_id, [[owner, tokens, int(prompt)] for owner, tokens, prompt in r.step.work],
                   round(1000 * r.seconds, 3), r.used_blocks] for r in view.steps],
        "skipped": view.num_skipped, "per_cell": snapshot.per_cell, "cells": snapshot.cells, "shared": snapshot.shared,
        "used_blocks": stats.used_blocks, "cached_blocks": stats.cached_blocks, "num_steps": stats.num_steps,
        "prompt_tokens": metrics.prompt_tokens, "generation_tokens": metrics.generation_tokens,
        "prefix_queries": stats.prefix_cache_queries, "prefix_hits": stats.prefix_cache_hits, "preemptions": stats.num_preemptions,
        "drafts": None if stats.drafts is None else [stats.drafts.num_steps, stats.drafts.num_drafts, *stats.drafts.accepted_per_position],
    }
