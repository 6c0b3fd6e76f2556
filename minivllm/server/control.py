"""Endpoints for operators, under vLLM's paths, and the paths that only other servers have.

    GET  /load                  {"server_load": requests being answered}, and the engine's queue and block use
    POST /reset_prefix_cache    drop all cached prefixes (administrators)
    GET  /ping, /is_sleeping    for load balancers and clients of vLLM: the server's health, and that it never sleeps
    GET  /server_info           version and the engine's constants
    POST /v1/load_lora_adapter, /v1/unload_lora_adapter   see adapters.py (administrators)
    POST /abort_requests        {"request_ids": [...]} or {"all": true}: end the key's running requests with finish reason "abort"; an
                                administrator ends those of all keys
"""
from __future__ import annotations

import dataclasses

from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from minivllm import __version__
from minivllm.server.authentication import ADMIN, OWNER, require_admin
from minivllm.server.errors import json_response
from minivllm.server.frontend import Frontend
from minivllm.server.openapi import body_of
from minivllm.server.protocol import AbortRequest, LoadAdapterRequest, UnloadAdapterRequest

HIDDEN = ("model", "model_folder", "tokenizer_folder", "trust_remote_code")  # constants that /server_info does not show

# First parts of the paths that vLLM's and OpenAI's servers have besides. Naming them says that the client made no typing error.
NOT_BUILT = {
    "/v1/rerank": "reranking (use /score)", "/rerank": "reranking (use /score)",
    "/v2/rerank": "reranking (use /score)", "/v1/messages": "Anthropic's messages",
    "/v1/audio": "audio", "/v1/realtime": "audio", "/v1/images": "images",
    "/v1/videos": "videos", "/pooling": "pooling (use /v1/embeddings)",
    "/classify": "classification", "/sleep": "sleeping", "/wake_up": "sleeping",
    "/api": "Ollama's API (use /v1/chat/completions)", "/completion": "llama.cpp's API (use /v1/completions)",
    "/props": "llama.cpp's API (use /server_info)", "/slots": "llama.cpp's API (use /load)", "/generate": "TGI's API (use /v1/completions)",
    "/pause": "pausing", "/resume": "pausing", "/is_paused": "pausing", "/start_profile": "profiles (use LLM.start_profile)",
    "/stop_profile": "profiles (use LLM.stop_profile)", "/tokenizer_info": "tokenizer settings (they are in the model's folder)",
    "/v1/chat/completions/batch": "several conversations in one request (send one request for each)", "/invocations": "SageMaker",
    "/collective_rpc": "calls to several workers", "/inference": "token-level inference", "/scale_elastic_ep": "elastic parallelism",
    "/v1/chat/completions/render": "prompts without an answer (use /tokenize)", "/v1/completions/render": "prompts without an answer",
    "/v1/batches": "batches (use `minivllm run-batch`)", "/v1/files": "stored files", "/v1/uploads": "stored files",
    "/v1/vector_stores": "stored files", "/v1/moderations": "moderation", "/v1/fine_tuning": "training", "/v1/evals": "evaluation",
    "/v1/assistants": "assistants", "/v1/threads": "assistants", "/v1/conversations": "stored conversations",
    "/v1/responses/input_tokens": "counting tokens (use /tokenize)", "/v1/responses/compact": "compaction",
    "/v1/containers": "containers", "/v1/skills": "skills", "/v1/chatkit": "chats of ChatKit", "/v1/engines": "engines",
}


def add_control(app: FastAPI, frontend: Frontend) -> None:
    @app.get("/load")
    async def load() -> Response:
        """Requests that are being answered, and the use of the engine's queue and blocks."""
        frontend.check_alive()
        stats = frontend.client.stats()
        return json_response({
            "server_load": len(frontend.running), "num_running": stats.num_running, "num_waiting": stats.num_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
        })

    @app.get("/ping")
    @app.post("/ping")
    async def ping() -> Response:
        """As /health, without a body."""
        frontend.check_alive()
        return Response(media_type="text/plain")

    @app.get("/is_sleeping")
    async def is_sleeping() -> Response:
        """Always false: vLLM's sleep mode is not built."""
        return json_response({"is_sleeping": False})

    @app.get("/server_info")
    async def server_info() -> Response:
        """Version, models, and constants of the engine."""
        constants = dataclasses.asdict(frontend.client.info)
        shown = {name: value for name, value in constants.items() if name not in HIDDEN}
        return json_response({"version": __version__, "models": frontend.names, "engine": shown})

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> Response:
        """Drop all cached prefixes. For administrators."""
        require_admin(request)
        frontend.check_alive()
        await frontend.client.reset_prefix_cache()
        return json_response({"status": "ok"})

    @app.post("/abort_requests", openapi_extra=body_of(AbortRequest))
    async def abort_requests(request: Request) -> Response:
        """End running requests of this key, or of all keys for an administrator. They get the finish reason "abort"."""
        body = await frontend.read(request, AbortRequest)
        body.ignored_fields(frontend.config.permissive)
        body.check()
        owner = None if request.scope[ADMIN] else request.scope[OWNER]
        return json_response({"aborted": frontend.running.abort(None if body.all else body.request_ids or [], owner)})


def add_adapters(app: FastAPI, frontend: Frontend) -> None:
    """Answers are plain text, as in vLLM."""

    @app.post("/v1/load_lora_adapter", openapi_extra=body_of(LoadAdapterRequest), response_class=PlainTextResponse)
    async def load(request: Request) -> Response:
        """Load a LoRA adapter, which requests may then name as their model. For administrators."""
        require_admin(request)
        body = await frontend.read(request, LoadAdapterRequest)
        body.ignored_fields(frontend.config.permissive)
        await frontend.adapters.load(body.lora_name, body.lora_path, bool(body.load_inplace))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", openapi_extra=body_of(UnloadAdapterRequest), response_class=PlainTextResponse)
    async def unload(request: Request) -> Response:
        """Unload a LoRA adapter. Its running requests finish with it. For administrators."""
        require_admin(request)
        body = await frontend.read(request, UnloadAdapterRequest)
        body.ignored_fields(frontend.config.permissive)
        await frontend.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def not_built(path: str) -> str | None:
    """What other servers offer at this path and this one does not; None for all other paths."""
    return next((what for start, what in NOT_BUILT.items() if path == start or path.startswith(start + "/")), None)
