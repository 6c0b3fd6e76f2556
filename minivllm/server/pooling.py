"""`/v1/embeddings` and `/score`: from a body to vectors.

    body ──▶ texts as token ids ──▶ an engine request for each, at most MAX_PARALLEL at a time ──▶ vectors ──▶ JSON, vector by vector
"""
from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.engine.pooling import check_dimensions, cosine, floats
from minivllm.engine.prompts import truncate
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput
from minivllm.sampling_params import PoolingParams
from minivllm.server.authentication import OWNER
from minivllm.server.cost import check_inputs, check_vectors
from minivllm.server.errors import ApiError, context_error, encode, generation_failed, to_api_error
from minivllm.server.frontend import Frontend
from minivllm.server.generation import merge_streams, until_disconnect
from minivllm.server.openapi import body_of
from minivllm.server.pooling_protocol import EmbeddingRequest, PoolingRequest, ScoreRequest
from minivllm.server.prepare import Preprocessor
from minivllm.server.protocol import ignored_header

MAX_PARALLEL = 256  # inputs of one HTTP request that are in the engine at a time
LARGE_ANSWER = 65_536  # numbers; a larger answer is written by a thread


@dataclass(frozen=True, kw_only=True)
class PreparedPooling:
    """One HTTP request, ready for the engine."""

    id: str
    owner: str
    model: str
    prompts: tuple[EngineRequest, ...]
    size: int  # numbers of one vector
    ignored: Sequence[str]
    created: int = field(default_factory=lambda: int(time.time()))


class VectorResponse(Response):
    """An ASGI response that computes the vectors itself, because `receive` reports the client's disconnect only here."""

    def __init__(self, frontend: Frontend, prepared: PreparedPooling, write: Callable[[list[bytes]], bytes]) -> None:
        """write: the JSON of `data` from the vectors."""
        self._frontend, self._prepared, self._write = frontend, prepared, write
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(self._answer(scope, receive, send), receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        p, running = self._prepared, self._frontend.running
        room, numbers = self._frontend.client.info.max_queue, len(p.prompts) * p.size
        parallel = MAX_PARALLEL if room is None else min(room, MAX_PARALLEL)
        tokens = sum(len(prompt.prompt_token_ids) for prompt in p.prompts)
        vectors, cached = [b""] * len(p.prompts), 0
        try:
            with (running.charged(p.owner, numbers),
                  running.track(p.owner, p.id, tuple(prompt.request_id for prompt in p.prompts), tokens, parallel)):
                async with aclosing(self._vectors(parallel)) as results:
                    async for index, vector, num_cached in results:
                        vectors[index], cached = vector, cached + num_cached
                head = encode({"id": p.id, "object": "list", "created": p.created, "model": p.model, "usage": {
                    "prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens,
                    "prompt_tokens_details": {"cached_tokens": cached}}})
                data = self._write(vectors) if numbers <= LARGE_ANSWER else await asyncio.to_thread(self._write, vectors)
                response = Response(b'%b,"data":[%b]}' % (head[:-1], data), media_type="application/json",
                                    headers=ignored_header(p.ignored))
        except Exception as error:
            response = to_api_error(error).response()
        await response(scope, receive, send)

    async def _vectors(self, parallel: int) -> AsyncGenerator[tuple[int, bytes, int], None]:
        """(index of the input, its vector, its cached tokens), in the order of arrival."""
        async with aclosing(merge_streams(self._frontend.client, self._prepared.prompts, parallel=parallel)) as stream:
            async for index, deltas in stream:
                for delta in deltas:
                    if delta.finish_reason == "error":
                        raise generation_failed()
                    if delta.finish_reason == "abort":
                        raise ApiError(503, "the request was aborted before it had a result: send it again", code="aborted")
                    if delta.finish_reason is not None:
                        assert delta.pooled is not None
                        yield index, delta.pooled, delta.num_cached_tokens


class PoolingPreprocessor:
    """Prepares the requests of embeddings and scores."""

    def __init__(self, frontend: Frontend, preprocessor: Preprocessor) -> None:
        self._frontend, self._preprocessor = frontend, preprocessor

    async def prepare(
        self, prefix: str, body: PoolingRequest, fields: Sequence[tuple[str, list[Any]]], owner: str,
    ) -> PreparedPooling:
        """fields: the inputs, with the name of the field of each list."""
        frontend, info = self._frontend, self._frontend.client.info
        ignored = body.ignored_fields(frontend.config.permissive)
        model = frontend.check_model(body.model)
        check_inputs(sum(len(inputs) for _, inputs in fields), fields[-1][0])
        params = body.params().complete(info.pooling)
        check_dimensions(params, info.embedding_size)
        size = params.dimensions or info.embedding_size
        check_vectors(sum(len(inputs) for _, inputs in fields), size, fields[-1][0])
        prompts: list[tuple[str, Sequence[int]]] = []
        for name, inputs in fields:
            tokens = await self._preprocessor.encode(
                inputs, owner, param=name, add_special_tokens=body.add_special_tokens is not False,
                keeps_end=body.truncate_prompt_tokens is not None)
            prompts += [(name, truncate(one, body.truncate_prompt_tokens, info.max_model_len, 0)) for one in tokens]
        return await frontend.handle(owner, body.size, lambda: self._prepared(prefix, body, prompts, owner, model, params, size, ignored))

    def _prepared(
        self, prefix: str, body: PoolingRequest, prompts: Sequence[tuple[str, Sequence[int]]], owner: str, model: str,
        params: PoolingParams, size: int, ignored: Sequence[str],
    ) -> PreparedPooling:
        frontend, context = self._frontend, self._frontend.client.info.max_model_len
        frontend.check_alive()  # the engine may have died since the body was read
        for name, prompt in prompts:
            if not prompt:
                raise InvalidInput(f"{name} has an empty text: send at least one token", name)
            if len(prompt) > context:
                raise context_error(len(prompt), context, name)
        request_id, engine_id, salt = self._preprocessor.identity(prefix, body, owner)
        sampling, now, adapter = params.sampling(), time.monotonic(), frontend.lora_request(body.model)
        return PreparedPooling(id=request_id, owner=owner, model=model, size=size, ignored=ignored, prompts=tuple(
            EngineRequest(
                request_id=f"{engine_id}-{i}", prompt_token_ids=tuple(prompt), params=sampling, arrival_time=now,
                priority=body.priority or 0, cache_salt=salt, owner=owner, lora_request=adapter)
            for i, (_, prompt) in enumerate(prompts)))


def add_pooling(app: FastAPI, frontend: Frontend, preprocessor: Preprocessor) -> None:
    pooling = PoolingPreprocessor(frontend, preprocessor)

    @app.post("/v1/embeddings", openapi_extra=body_of(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """A vector for each text."""
        body = await frontend.read(request, EmbeddingRequest)
        prepared = await pooling.prepare("embd-", body, [("input", body.input)], request.scope[OWNER])
        return VectorResponse(frontend, prepared, lambda vectors: b",".join(
            b'{"object":"embedding","index":%d,"embedding":%b}' % (i, _number_list(vector) if body.encoding_format != "base64" else
                                                                  b'"' + base64.b64encode(vector) + b'"')
            for i, vector in enumerate(vectors)))

    @app.post("/score", openapi_extra=body_of(ScoreRequest))
    @app.post("/v1/score", openapi_extra=body_of(ScoreRequest))
    async def score(request: Request) -> Response:
        """How similar texts are: the cosine of their vectors."""
        body = await frontend.read(request, ScoreRequest)
        first, second = body.sides()
        prepared = await pooling.prepare("score-", body, [first, second], request.scope[OWNER])
        count = len(first[1])

        def write(vectors: list[bytes]) -> bytes:
            ones = vectors[:count] if count > 1 else vectors[:1] * len(second[1])
            return b",".join(encode({"index": i, "object": "score", "score": cosine(one, two)})
                             for i, (one, two) in enumerate(zip(ones, vectors[count:], strict=True)))

        return VectorResponse(frontend, prepared, write)


def _number_list(vector: bytes) -> bytes:
    """One vector at a time: the interpreter's lock is free between two of them."""
    return ("[" + ",".join(map(repr, floats(vector))) + "]").encode()
