"""The application: which path does what. The endpoints reach the engine only through its client.

    Frontend        client, settings, tokenizer; reads bodies
    Preprocessor    body ──▶ PreparedRequest
    formatters      the engine's deltas ──▶ the response
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Route

from minivllm import __version__
from minivllm.config import ServerConfig
from minivllm.engine.client import EngineClient
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, nearest
from minivllm.server.authentication import OWNER, AccessRules, AuthenticationMiddleware
from minivllm.server.chat_protocol import ChatRequest, TokenizeRequest
from minivllm.server.control import add_adapters, add_control, not_built
from minivllm.server.cost import check_tokenized
from minivllm.server.errors import ApiError, json_response, shorten, to_api_error
from minivllm.server.formatters import ChatFormatter, CompletionFormatter, PreparedRequest, ResponseFormatter
from minivllm.server.frontend import Frontend
from minivllm.server.generation import GenerationResponse
from minivllm.server.logprobs import NumberedTokens
from minivllm.server.openapi import body_of, describe
from minivllm.server.page import FILES, add_page
from minivllm.server.parsed_chat import ParsedChatFormatter
from minivllm.server.pooling import add_pooling
from minivllm.server.pooling_protocol import EmbeddingRequest, ScoreRequest
from minivllm.server.prepare import Preprocessor
from minivllm.server.protocol import (
    IGNORED_HEADER,
    AbortRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    ignored_header,
)
from minivllm.server.responses import add_responses
from minivllm.server.responses_protocol import ResponsesRequest

BODIES = (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest, AbortRequest,
          LoadAdapterRequest, UnloadAdapterRequest, EmbeddingRequest, ScoreRequest)


def create_app(client: EngineClient, config: ServerConfig, tokenizer: Tokenizer | None) -> FastAPI:
    """The server's application for a running engine. `app.state.frontend` is its `Frontend`."""
    frontend = Frontend(client, config, tokenizer)
    preprocessor = Preprocessor(frontend)
    client.metrics.model = frontend.names[0]  # label metrics with the served name, not with a path on this machine
    app = FastAPI(
        title="minivllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        # Open: load balancers send no key to /health, and the page's files hold no data.
        middleware=[*_cors(config), Middleware(
            AuthenticationMiddleware, rules=AccessRules.of(config, {"/health", *FILES}), most_delayed=frontend.max_connections // 4)],
    )
    app.root_path = config.root_path  # a proxy may keep this prefix or remove it
    app.state.frontend = frontend
    _add_generation(app, frontend, preprocessor)
    add_responses(app, frontend, preprocessor)
    add_pooling(app, frontend, preprocessor)
    _add_tokenization(app, frontend, preprocessor)
    _add_queries(app, frontend)
    add_control(app, frontend)
    add_adapters(app, frontend)
    add_page(app, frontend)
    _add_errors(app)
    app.openapi = lambda: describe(app, BODIES, config.needs_key)  # type: ignore[method-assign]
    return app


def _cors(config: ServerConfig) -> list[Middleware]:
    """Comes before authentication, because browsers send preflight requests without the key."""
    if not config.allowed_origins:
        return []
    return [Middleware(
        CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=config.allowed_methods or ("*",),
        allow_headers=config.allowed_headers or ("*",), allow_credentials=config.allow_credentials,
        expose_headers=("x-request-id", IGNORED_HEADER, "retry-after"),
    )]


def _add_generation(app: FastAPI, frontend: Frontend, preprocessor: Preprocessor) -> None:
    names = frontend.tokenizer or NumberedTokens()

    def respond(formatter: Callable[..., ResponseFormatter], request: PreparedRequest) -> Response:
        return GenerationResponse(frontend.client, frontend.running, partial(formatter, request, names))

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a prompt."""
        body = await frontend.read(request, CompletionRequest)
        return respond(CompletionFormatter, await preprocessor.completion(body, request.scope[OWNER]))

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await frontend.read(request, ChatRequest)
        prepared = await preprocessor.chat(body, body.ignored_fields(frontend.config.permissive), "chatcmpl-", request.scope[OWNER])
        formatter = ChatFormatter if prepared.output is None else ParsedChatFormatter
        return respond(formatter, prepared)


def _add_tokenization(app: FastAPI, frontend: Frontend, preprocessor: Preprocessor) -> None:
    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt, or of messages with the chat template."""
        body, owner, context = await frontend.read(request, TokenizeRequest), request.scope[OWNER], frontend.client.info.max_model_len
        ignored = body.ignored_fields(frontend.config.permissive)
        frontend.check_model(body.model)
        tokenizer = frontend.need_tokenizer("tokens")
        chat = body.chat()
        if chat is not None:
            chat.check()
            tokens, _ = await preprocessor.chat_prompt(chat, ignored, owner)
        else:
            text, special = body.prompt or "", body.add_special_tokens is not False
            check_tokenized(len(text), context, "prompt", "characters")
            tokens = await frontend.tokenize(owner, len(text), lambda: tokenizer.encode(text, add_special_tokens=special))

        def respond() -> Response:
            strings = [tokenizer.id_to_token(token) for token in tokens] if body.return_token_strs else None
            return json_response({"count": len(tokens), "max_model_len": context, "tokens": tokens, "token_strs": strings},
                                 headers=ignored_header(ignored))

        return await frontend.tokenize(owner, len(tokens), respond)

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body = await frontend.read(request, DetokenizeRequest)
        ignored = body.ignored_fields(frontend.config.permissive)
        frontend.check_model(body.model)
        tokenizer = frontend.need_tokenizer("tokens")
        check_tokenized(len(body.tokens), frontend.client.info.max_model_len, "tokens", "tokens")
        vocabulary = frontend.client.info.vocab_size
        for token in body.tokens:
            if not 0 <= token < vocabulary:
                raise InvalidInput(f"tokens must be ids from 0 to {vocabulary - 1}, got {token}", "tokens")
        text = await frontend.tokenize(request.scope[OWNER], len(body.tokens), lambda: tokenizer.decode(body.tokens))
        return json_response({"prompt": text}, headers=ignored_header(ignored))


def _add_queries(app: FastAPI, frontend: Frontend) -> None:
    client = frontend.client

    def card(name: str) -> dict[str, object]:
        adapter = frontend.adapters.get(name)
        created, root = (frontend.created, frontend.names[0]) if adapter is None else (adapter.created, adapter.folder)
        return {
            "id": name, "object": "model", "created": created, "owned_by": "minivllm", "root": root,
            "parent": None if adapter is None else frontend.names[0], "max_model_len": client.info.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """The served model, and its LoRA adapters."""
        frontend.check_alive()
        return json_response({"object": "list", "data": [card(name) for name in (*frontend.names, *frontend.adapters.names)]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """One of them."""
        frontend.check_alive()
        return json_response(card(frontend.check_model(model)))

    @app.get("/health")
    async def health() -> Response:
        """Status 200 while the engine runs, else 503. With several replicas: while one of them runs, with their number and states: stopped,
        starting, live, silent, draining, stopping, restarting or dead. Needs no key."""
        frontend.check_alive()
        if client.num_engines == 1:
            return json_response({"status": "ok"})
        return json_response({"status": "ok", "replicas": client.num_wanted, "live": client.num_live, "states": client.replica_states})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return Response(client.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> Response:
        """This package's version."""
        return json_response({"version": __version__})


def _methods(app: FastAPI, request: Request) -> list[str]:
    """The methods of the request's path. (Starlette names only those of one of its routes.)"""
    found = [route for route in app.routes if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE]
    return sorted(set[str]().union(*(route.methods or () for route in found)))


def _add_errors(app: FastAPI) -> None:
    paths = [str(getattr(route, "path", "")) for route in app.routes]
    named = [path for path in paths if path and not path.startswith("/static")]  # in hints

    async def known(request: Request, error: Exception) -> Response:
        return to_api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = shorten(request.url.path)
        message, headers, code = str(error.detail), error.headers, None
        if error.status_code in (404, 405) and (what := not_built(path)):
            message, headers, code = f"{path} ({what}) is not supported yet", {"x-should-retry": "false"}, "not_supported"
            error.status_code = 404
        elif error.status_code == 404:
            message = f"there is nothing at {path!r}{nearest(path, named)}"
        elif error.status_code == 405:
            allowed = _methods(app, request)
            message, headers = f"{request.method} is not allowed at {path!r}: use {' or '.join(allowed)}", {"allow": ", ".join(allowed)}
        return ApiError(error.status_code, message, headers=headers, code=code).response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(InvalidInput, known)
