"""Endpoints for operators, under vLLM's paths, and refusals of paths that other servers have.

    GET  /load                  {"server_load": requests being answered}, and the engine's queue and block use
    POST /reset_prefix_cache    drop all cached prefixes
    POST /abort_requests        {"request_ids": [...]} or {"all": true}: end running requests with finish reason "abort"
"""
from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from minivllm.server.errors import ApiError, json_response
from minivllm.server.frontend import Frontend
from minivllm.server.openapi import body_of
from minivllm.server.protocol import AbortRequest

# Paths of vLLM's and OpenAI's servers. They return 501 and not 404, so that a client does not look for a typing error.
NOT_BUILT = {
    "/v1/embeddings": "embeddings", "/v1/score": "scoring", "/score": "scoring", "/v1/rerank": "reranking", "/rerank": "reranking",
    "/v1/messages": "Anthropic's messages", "/v1/load_lora_adapter": "LoRA adapters", "/v1/unload_lora_adapter": "LoRA adapters",
    "/v1/audio/transcriptions": "audio", "/v1/audio/speech": "audio", "/v1/images/generations": "images", "/pooling": "pooling",
    "/classify": "classification", "/sleep": "sleeping", "/wake_up": "sleeping", "/v1/batches": "batches (use `minivllm run-batch`)",
    "/v1/files": "stored files", "/v1/moderations": "moderation",
}


def add_control(app: FastAPI, frontend: Frontend) -> None:
    @app.get("/load")
    async def load() -> Response:
        frontend.check_alive()
        stats = frontend.client.stats()
        return json_response({
            "server_load": len(frontend.running), "num_running": stats.num_running, "num_waiting": stats.num_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
        })

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        frontend.check_alive()
        await frontend.client.reset_prefix_cache()
        return json_response({"status": "ok"})

    @app.post("/abort_requests", openapi_extra=body_of(AbortRequest))
    async def abort_requests(request: Request) -> Response:
        body = await frontend.read(request, AbortRequest)
        body.ignored_fields(frontend.config.permissive)
        body.check()
        return json_response({"aborted": frontend.running.abort(None if body.all else body.request_ids or [])})

    for path, what in NOT_BUILT.items():
        _add_refusal(app, path, what)


def _add_refusal(app: FastAPI, path: str, what: str) -> None:
    @app.api_route(path, methods=["GET", "POST"], include_in_schema=False)
    async def refuse() -> Response:
        raise ApiError(501, f"{path} ({what}) is not supported yet", code="not_supported")
