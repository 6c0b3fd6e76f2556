"""What all endpoints share: the engine's client, settings, tokenizer, model names, and how a request's body is read."""
from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from minivllm import __version__
from minivllm.config import MODEL_DEFAULTS, ServerConfig
from minivllm.engine.client import EngineClient
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import LoRARequest
from minivllm.errors import InvalidInput
from minivllm.server.adapters import ServedAdapters
from minivllm.server.authentication import OWNER
from minivllm.server.connections import connections_possible
from minivllm.server.errors import ApiError, engine_dead, shorten
from minivllm.server.parsing import Model, parse
from minivllm.server.protocol import EngineBody
from minivllm.server.response_store import ResponseStore
from minivllm.server.running import RunningRequests
from minivllm.server.work import TextWorkers

LONG_TEXT = 4096  # characters; longer texts are processed by a thread, so that the event loop keeps serving streams
LONG_BODY = 65_536  # bytes of JSON, the same
Value = TypeVar("Value")


class Frontend:
    """Constant after its construction, except for running requests, stored responses and LoRA adapters."""

    def __init__(self, client: EngineClient, config: ServerConfig, tokenizer: Tokenizer | None) -> None:
        self.client = client
        self.config = config
        self.tokenizer = tokenizer
        self.max_connections = connections_possible(config.max_connections)
        self.running = RunningRequests(client, max(1, self.max_connections // 2))
        self.workers = TextWorkers()
        self.responses = ResponseStore(config.response_store_size, config.response_store_seconds)
        self.created = int(time.time())
        info = client.info
        is_path = os.path.isabs(info.model) or info.model.startswith((".", "~"))
        model_name = os.path.basename(info.model.rstrip("/\\")) if is_path else info.model
        self.names = config.served_model_name or (model_name,)
        self.aliases = frozenset() if config.served_model_name else frozenset({info.model})  # accepted, but not listed
        self.adapters = ServedAdapters(client, config, (*self.names, *self.aliases))
        self.defaults = {name: info.generation_config[name] for name in MODEL_DEFAULTS if info.generation_config.get(name) is not None}
        build = f"{__version__}|{model_name}|{info.dtype}|{info.kv_cache_dtype}|{info.device}|{info.vocab_size}"
        self.fingerprint = "fp_" + hashlib.sha256(build.encode()).hexdigest()[:10]

    async def read(self, request: Request, kind: type[Model]) -> Model:
        """The body, with size, content type, JSON and types checked."""
        self.check_alive()
        if issubclass(kind, EngineBody):
            self.running.check_room(request.scope[OWNER])
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
            raise ApiError(415, f"the content type must be application/json, got {media or 'none'!r}")
        if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
            raise ApiError(415, f"the content encoding {encoding!r} is not supported: send the body without one")
        if (coding := request.headers.get("transfer-encoding", "chunked").strip().lower()) != "chunked":
            raise ApiError(415, f"the transfer encoding {coding!r} is not supported: send the body with chunked alone, or its length")
        limit = self.config.max_body_size
        too_large = ApiError(413, f"the body is larger than {limit} bytes: send less, or start the server with a larger --max-body-size")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        raw, owner = bytearray(), request.scope[OWNER]
        try:
            async with self.running.receiving(owner):
                async for piece in request.stream():
                    self.running.bodies.add(owner, len(piece))
                    raw += piece
                    if len(raw) > limit:
                        raise too_large
            return await self.handle(owner, len(raw), lambda: parse(kind, bytes(raw)))
        except ClientDisconnect:  # the response has no reader
            raise ApiError(400, "the connection was closed before the whole body had arrived") from None
        finally:
            self.running.bodies.release(owner, len(raw))
            raw.clear()  # a refusal, which may be delayed, has no use for it

    async def handle(self, owner: str, size: int, work: Callable[[], Value]) -> Value:
        """Handle the values of a body of `size` bytes: at once if it is short, else by a worker."""
        return work() if size <= LONG_BODY else await self.workers.run(owner, size, work)

    def check_alive(self) -> None:
        if self.client.dead is not None:
            raise engine_dead(self.client.restarting)

    def check_model(self, name: str | None) -> str:
        """The model name for the response."""
        if name is None or name in self.aliases:
            return self.names[0]
        if name not in self.names and self.adapters.get(name) is None:
            known = ', '.join(map(repr, (*self.names, *self.adapters.names)))
            raise ApiError(404, f"The model `{shorten(name)}` does not exist; this server has {known}",
                           param="model", code="model_not_found")
        return name

    def lora_request(self, model: str | None) -> LoRARequest | None:
        """The adapter that a request's model names; None for the base model."""
        adapter = self.adapters.get(model)
        return None if adapter is None else adapter.request

    def need_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidInput(f"this server has no tokenizer (skip_tokenizer_init): send token ids instead of {param}", param)
        return self.tokenizer

    async def tokenize(self, owner: str, size: int, work: Callable[[], Value]) -> Value:
        """Process a text of `size` characters: at once if it is short, else by a worker. Not for chat templates."""
        return work() if size <= LONG_TEXT else await self.workers.run(owner, size, work)
