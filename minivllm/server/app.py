"""The application: which path does what. Everything about the engine goes through its client.

    body ──▶ protocol (types, fields) ──▶ prompts as token ids ──▶ SamplingParams (ranges) ──▶ Job ──▶ GenerationResponse
"""
from __future__ import annotations

import asyncio
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from minivllm import __version__
from minivllm.engine.client import EngineClient
from minivllm.engine.prompts import check_vocabulary, truncate
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput, nearest
from minivllm.sampling_params import SamplingParams
from minivllm.server.answers import Answer, CompletionAnswer, Job
from minivllm.server.chat import Chats
from minivllm.server.config import ServerConfig
from minivllm.server.control import AbortRequest, add_control
from minivllm.server.door import Door
from minivllm.server.errors import ApiError, context_error, engine_dead, json_response, shorten, to_api_error
from minivllm.server.generation import GenerationResponse, Running
from minivllm.server.logprobs import NoNames, TokenNames
from minivllm.server.openapi import body_of, describe
from minivllm.server.page import add_page
from minivllm.server.protocol import (
    IGNORED_HEADER,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Strict,
    TokenizeRequest,
    ignored_header,
    parse,
)
from minivllm.server.read_answers import chat_answer
from minivllm.server.reading import Reading
from minivllm.server.responses import ResponsesRequest, respond

MAX_TOKEN_CHARACTERS = 256  # no vocabulary has longer tokens
DEFAULT_OUTPUT = 16  # tokens of a completion that does not say; a chat's answer may fill the context
LONG_TEXT = 4096  # characters: longer texts are tokenized off the event loop, so that streams keep their pace
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # honoured of a generation_config.json

BODIES = (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest, AbortRequest)
Body = TypeVar("Body", bound=Strict)
Result = TypeVar("Result")


class Frontend:
    """What the endpoints share. Holds no state of its own beyond the set of running requests."""

    def __init__(self, client: EngineClient, config: ServerConfig, tokenizer: Tokenizer | None) -> None:
        self.client = client
        self.config = config
        self.tokenizer = tokenizer
        self.chats = Chats(config, tokenizer)
        self.running = Running(client)
        self.created = int(time.time())
        info = client.info
        own = os.path.basename(info.model.rstrip("/\\")) if os.path.isabs(info.model) or info.model.startswith((".", "~")) else info.model
        self.names = config.served_model_name or (own,)
        self.aliases = frozenset() if config.served_model_name else frozenset({info.model})  # a path works too, but is not shown
        self.defaults = {name: info.generation_config[name] for name in MODEL_DEFAULTS if info.generation_config.get(name) is not None}
        build = f"{__version__}|{own}|{info.dtype}|{info.device}|{info.vocab_size}"
        self.fingerprint = "fp_" + hashlib.sha256(build.encode()).hexdigest()[:10]

    # -- reading ------------------------------------------------------------------------------------------------------

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The body, checked for size, content type, JSON and types."""
        self.check_alive()
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
            raise ApiError(415, f"the content type must be application/json, got {media or 'none'!r}")
        if (packed := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
            raise ApiError(415, f"the content encoding {packed!r} is not supported: send the body as it is")
        limit = self.config.max_body_size
        too_large = ApiError(413, f"the body is larger than {limit} bytes: send less, or start the server with a larger --max-body-size")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        raw = bytearray()
        try:
            async with self.running.receiving():
                async for piece in request.stream():
                    raw += piece
                    if len(raw) > limit:
                        raise too_large
        except ClientDisconnect:  # nobody is left to read this
            raise ApiError(400, "the connection was closed before the whole body had come") from None
        return parse(kind, bytes(raw))

    def check_alive(self) -> None:
        if self.client.dead is not None:
            raise engine_dead()

    def check_model(self, name: str | None) -> str:
        """The name to answer under."""
        if name is None or name in self.aliases:
            return self.names[0]
        if name not in self.names:
            raise ApiError(404, f"the model {shorten(name)!r} does not exist; this server has {', '.join(map(repr, self.names))}",
                           param="model", code="model_not_found")
        return name

    async def off_loop(self, size: int, work: Callable[[], Result]) -> Result:
        """Run text work at once if it is short, else in a thread."""
        return work() if size <= LONG_TEXT else await asyncio.to_thread(work)

    def need_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidInput(f"this server has no tokenizer (skip_tokenizer_init): send token ids instead of {param}", param)
        return self.tokenizer

    # -- the two generation endpoints ---------------------------------------------------------------------------------

    async def completion(self, body: CompletionRequest) -> Response:
        ignored = body.ignored(self.config.permissive)
        body.check()
        model = self.check_model(body.model)
        self._limit_choices(len(body.prompt), body.n or 1)
        prompts = [self._truncated(body, prompt, DEFAULT_OUTPUT) for prompt in await self._completion_prompts(body)]
        echo = await self._echo(body, prompts) if body.echo else None
        job = self._job("cmpl-", body, model, prompts, ignored, default_output=DEFAULT_OUTPUT, echo=echo)
        return self._respond(CompletionAnswer, job)

    async def _completion_prompts(self, body: CompletionRequest) -> list[list[int]]:
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        for text in texts:
            self._refuse_hopeless(text, "prompt")
        if not texts:
            prompts = [prompt for prompt in body.prompt if not isinstance(prompt, str)]
            for prompt in prompts:
                check_vocabulary("prompt", prompt, self.client.info.vocab_size)
            return prompts
        tokenizer = self.need_tokenizer("prompt")
        special = body.add_special_tokens is not False
        return await self.off_loop(sum(map(len, texts)), lambda: [tokenizer.encode(text, add_special_tokens=special) for text in texts])

    def _refuse_hopeless(self, text: str, param: str) -> None:
        """A text so long that no tokenizer could make it fit is refused before any time is spent on it."""
        limit = self.client.info.max_model_len
        if len(text) > limit * MAX_TOKEN_CHARACTERS:
            raise ApiError(400, f"the text has {len(text)} characters, far more than a context of {limit} tokens holds: shorten it",
                           param=param, code="context_length_exceeded")

    async def _echo(self, body: CompletionRequest, prompts: Sequence[Sequence[int]]) -> tuple[str, ...]:
        if isinstance(body.prompt[0], str) and body.truncate_prompt_tokens is None:
            return tuple(prompt for prompt in body.prompt if isinstance(prompt, str))
        tokenizer = self.need_tokenizer("echo")
        return tuple(tokenizer.decode(prompt, skip_special_tokens=body.skip_special_tokens is not False) for prompt in prompts)

    async def chat(self, body: ChatRequest) -> Response:
        return self._respond(chat_answer, await self.chat_job(body, body.ignored(self.config.permissive), "chatcmpl-"))

    async def chat_job(self, body: ChatRequest, ignored: list[str], prefix: str) -> Job:
        body.check()
        model = self.check_model(body.model)
        self._limit_choices(1, body.n or 1)
        prompt, reading = await self._chat_prompt(body, ignored)
        prompts = [self._truncated(body, prompt, None)]
        return self._job(prefix, body, model, prompts, ignored, default_output=None, echo=None, reading=reading)

    async def _chat_prompt(self, body: ChatRequest, ignored: list[str]) -> tuple[list[int], Reading | None]:
        draft = self.chats.draft(body, self.need_tokenizer("messages"), ignored)
        self._refuse_hopeless("".join(message["content"] for message in draft.messages), "messages")
        return await self.off_loop(draft.size, draft.write)

    def _limit_choices(self, prompts: int, n: int) -> None:
        limit = self.config.max_choices
        if prompts * n > limit:
            raise InvalidInput(f"{prompts} prompts times n={n} make {prompts * n} completions, and one request may have {limit}: "
                               "send several requests", "n")

    def _job(
        self, prefix: str, body: GenerationRequest, model: str, prompts: Sequence[Sequence[int]], ignored: Sequence[str], *,
        default_output: int | None, echo: tuple[str, ...] | None, reading: Reading | None = None,
    ) -> Job:
        self.check_alive()  # it may have died while the prompt was read
        if body.priority and self.client.info.scheduling_policy != "priority":
            raise InvalidInput("priority changes nothing here: leave it out, or start the server with --scheduling-policy priority",
                               "priority")
        request_id = prefix + (body.request_id or uuid.uuid4().hex)
        now = time.monotonic()
        structure = body.structure()
        defaults = self.defaults if structure is None else {**self.defaults, "structured_outputs": structure}
        requests = tuple(
            EngineRequest(
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}", prompt_token_ids=tuple(prompt),
                params=_params(body, defaults, self._output_limit(body, len(prompt), default_output), reading),
                priority=body.priority or 0, cache_salt=body.cache_salt, arrival_time=now,
            )
            for i, prompt in enumerate(prompts)
        )
        options = body.stream_options
        return Job(
            id=request_id, created=int(time.time()), model=model, fingerprint=self.fingerprint, requests=requests, stream=bool(body.stream),
            include_usage=options is not None and bool(options.include_usage),
            continuous_usage=options is not None and bool(options.continuous_usage_stats),
            return_token_ids=bool(body.return_token_ids), show_prompt_logprobs=body.prompt_logprobs is not None, echo=echo,
            ignored=tuple(dict.fromkeys(ignored)), reading=reading,
        )

    def _truncated(self, body: GenerationRequest, prompt: Sequence[int], default_output: int | None) -> Sequence[int]:
        wanted, _ = body.output_limit()
        return truncate(prompt, body.truncate_prompt_tokens, self.client.info.max_model_len, default_output if wanted is None else wanted)

    def _output_limit(self, body: GenerationRequest, prompt_tokens: int, default: int | None) -> int:
        """The longest output of one prompt: what was asked for if it fits, else the default as far as the context goes."""
        limit = self.client.info.max_model_len
        wanted, field = body.output_limit()
        if prompt_tokens == 0:
            raise InvalidInput("the prompt is empty: send at least one token", "prompt")
        if wanted is not None:
            if prompt_tokens + wanted > limit:
                raise context_error(prompt_tokens, wanted, limit, field)
            return wanted
        room = limit - prompt_tokens
        if room < 1:
            raise context_error(prompt_tokens, None, limit, "messages" if isinstance(body, ChatRequest) else "prompt")
        return room if default is None else min(default, room)

    def _respond(self, kind: Callable[[Job, TokenNames], Answer], job: Job) -> Response:
        return GenerationResponse(self.client, self.running, kind(job, self.tokenizer or NoNames()))

    # -- models, tokens -----------------------------------------------------------------------------------------------

    def card(self, name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": self.created, "owned_by": "minivllm", "root": self.names[0], "parent": None,
            "max_model_len": self.client.info.max_model_len,
        }

    async def tokenize(self, body: TokenizeRequest) -> Response:
        ignored = body.extras("", self.config.permissive)
        self.check_model(body.model)
        tokenizer = self.need_tokenizer("tokens")
        chat = body.chat()
        if chat is not None:
            ignored += chat.ignored(self.config.permissive)
            chat.check()
            tokens, _ = await self._chat_prompt(chat, ignored)
        else:
            text = body.prompt or ""
            special = body.add_special_tokens is not False
            tokens = await self.off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens=special))
        strings = [tokenizer.id_to_token(token) for token in tokens] if body.return_token_strs else None
        return json_response({
            "count": len(tokens), "max_model_len": self.client.info.max_model_len, "tokens": tokens, "token_strs": strings,
        }, headers=ignored_header(ignored))

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        ignored = body.extras("", self.config.permissive)
        self.check_model(body.model)
        tokenizer = self.need_tokenizer("tokens")
        vocabulary = self.client.info.vocab_size
        for token in body.tokens:
            if not 0 <= token < vocabulary:
                raise InvalidInput(f"tokens must be ids from 0 to {vocabulary - 1}, got {token}", "tokens")
        text = await self.off_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens))
        return json_response({"prompt": text}, headers=ignored_header(ignored))


def _params(body: GenerationRequest, defaults: Mapping[str, Any], max_tokens: int, reading: Reading | None) -> SamplingParams:
    params = body.sampling(defaults, max_tokens)
    return params if reading is None else reading.apply(params)


def create_app(client: EngineClient, config: ServerConfig, tokenizer: Tokenizer | None) -> FastAPI:
    """The server's application around a running engine. `app.state.frontend` is its `Frontend`."""
    frontend = Frontend(client, config, tokenizer)
    client.metrics.model = frontend.names[0]  # the label: what clients call the model, not where it lies
    app = FastAPI(
        title="minivllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        middleware=[*_cors(config), Middleware(Door, keys=config.keys())],
    )
    app.state.frontend = frontend
    _add_generation(app, frontend)
    _add_queries(app, frontend)
    add_control(app, frontend)
    add_page(app, frontend)
    _add_errors(app)
    app.openapi = lambda: describe(app, BODIES, bool(config.keys()))  # type: ignore[method-assign]
    return app


def _cors(config: ServerConfig) -> list[Middleware]:
    """In front of the door: a browser asks for leave without the key."""
    if not config.allowed_origins:
        return []
    return [Middleware(
        CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=config.allowed_methods or ("*",),
        allow_headers=config.allowed_headers or ("*",), allow_credentials=config.allow_credentials,
        expose_headers=("x-request-id", IGNORED_HEADER, "retry-after"),
    )]


def _add_generation(app: FastAPI, frontend: Frontend) -> None:
    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await frontend.completion(await frontend.read(request, CompletionRequest))

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await frontend.chat(await frontend.read(request, ChatRequest))

    @app.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
    async def responses(request: Request) -> Response:
        return await respond(frontend, await frontend.read(request, ResponsesRequest))


def _add_queries(app: FastAPI, frontend: Frontend) -> None:
    client = frontend.client

    @app.get("/v1/models")
    async def models() -> Response:
        frontend.check_alive()
        return json_response({"object": "list", "data": [frontend.card(name) for name in frontend.names]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        frontend.check_alive()
        return json_response(frontend.card(frontend.check_model(model)))

    @app.head("/health", include_in_schema=False)  # what some load balancers send
    @app.get("/health")
    async def health() -> Response:
        frontend.check_alive()
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(client.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        return await frontend.tokenize(await frontend.read(request, TokenizeRequest))

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        return await frontend.detokenize(await frontend.read(request, DetokenizeRequest))


def _add_errors(app: FastAPI) -> None:
    paths = [route.path for route in app.routes if hasattr(route, "path")]

    async def known(request: Request, error: Exception) -> Response:
        return to_api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = shorten(request.url.path)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {path!r}{nearest(path, paths)}"
        elif error.status_code == 405:
            message = f"{request.method} is not allowed at {path!r}: use {(error.headers or {}).get('Allow', 'another method')}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(InvalidInput, known)
