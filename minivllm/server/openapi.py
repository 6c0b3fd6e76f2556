"""`/openapi.json`: the body and the responses of each path, exact enough for automatic tests of the server.

FastAPI lists the paths, the request models describe bodies, and the schemas below describe responses. A response may have further
fields; a request may not.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from minivllm.server.strict import StrictModel

JsonSchema = dict[str, Any]
_REF = "#/components/schemas/{model}"


def nullable(kind: str) -> JsonSchema:
    return {"type": [kind, "null"]}


def array(items: JsonSchema) -> JsonSchema:
    return {"type": "array", "items": items}


def record(required: dict[str, JsonSchema], **more: JsonSchema) -> JsonSchema:
    """An object: required fields, and optional ones."""
    return {"type": "object", "required": list(required), "properties": {**required, **more}}


def ref(name: str) -> JsonSchema:
    return {"$ref": _REF.format(model=name)}


STRING, INTEGER, NUMBER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
_FINISHED = {"finish_reason": {"enum": ["stop", "length", "tool_calls", "function_call", "abort"]},
          "stop_reason": {"type": ["string", "integer", "null"]}}
_GENERATED = {"id": STRING, "created": INTEGER, "model": STRING, "usage": ref("Usage")}
_CARD = record({"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING, "root": STRING,
                "parent": nullable("string"), "max_model_len": INTEGER})

COMPONENTS: dict[str, JsonSchema] = {
    "Error": record({"error": record({"message": STRING, "type": STRING, "param": nullable("string"), "code": nullable("string")})}),
    "Usage": record({"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER,
                     "prompt_tokens_details": record({"cached_tokens": INTEGER})}),
    "Completion": record({
        **_GENERATED, "object": {"const": "text_completion"},
        "choices": array(record({"index": INTEGER, "text": STRING, "logprobs": nullable("object"), **_FINISHED})),
    }),
    "ChatCompletion": record({
        **_GENERATED, "object": {"const": "chat.completion"},
        "choices": array(record({
            "index": INTEGER, "logprobs": nullable("object"), **_FINISHED,
            "message": record({"role": {"const": "assistant"}, "content": nullable("string")}, tool_calls=array({"type": "object"})),
        })),
    }),
    "Response": record({
        "id": STRING, "object": {"const": "response"}, "created_at": INTEGER, "model": STRING, "output": array({"type": "object"}),
        "status": {"enum": ["completed", "incomplete"]}, "error": {"type": "null"}, "incomplete_details": nullable("object"),
        "usage": record({"input_tokens": INTEGER, "output_tokens": INTEGER, "total_tokens": INTEGER}),
    }),
    "Model": _CARD,
    "Embeddings": record({**_GENERATED, "object": {"const": "list"}, "data": array(record({
        "object": {"const": "embedding"}, "index": INTEGER, "embedding": {"anyOf": [array(NUMBER), STRING]}}))}),
    "Scores": record({**_GENERATED, "object": {"const": "list"}, "data": array(record({
        "object": {"const": "score"}, "index": INTEGER, "score": NUMBER}))}),
}

# Path -> schema of a successful response. Paths that are missing here do not respond with JSON.
RESPONSES: dict[str, JsonSchema] = {
    "/v1/completions": ref("Completion"),
    "/v1/chat/completions": ref("ChatCompletion"),
    "/v1/responses": ref("Response"),
    "/v1/embeddings": ref("Embeddings"),
    "/v1/score": ref("Scores"),
    "/score": ref("Scores"),
    "/v1/responses/{response_id}": {"anyOf": [
        ref("Response"), record({"id": STRING, "object": {"const": "response"}, "deleted": {"const": True}})]},
    "/v1/responses/{response_id}/input_items": record({"object": {"const": "list"}, "data": array({"type": "object"}), "has_more": BOOLEAN,
                                                       "first_id": nullable("string"), "last_id": nullable("string")}),
    "/v1/models": record({"object": {"const": "list"}, "data": array(ref("Model"))}),
    "/v1/models/{model}": ref("Model"),
    "/health": record({"status": {"const": "ok"}}),
    "/version": record({"version": STRING}),
    "/tokenize": record({"count": INTEGER, "max_model_len": INTEGER, "tokens": array(INTEGER),
                         "token_strs": {"anyOf": [array(STRING), {"type": "null"}]}}),
    "/detokenize": record({"prompt": STRING}),
    "/load": record({"server_load": INTEGER, "num_running": INTEGER, "num_waiting": INTEGER, "kv_cache_usage": NUMBER}),
    "/is_sleeping": record({"is_sleeping": {"const": False}}),
    "/server_info": record({"version": STRING, "models": array(STRING), "engine": {"type": "object"}}),
    "/reset_prefix_cache": record({"status": {"const": "ok"}}),
    "/abort_requests": record({"aborted": array(STRING)}),
}
STREAMS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})
QUEUED = STREAMS | {"/v1/embeddings", "/v1/score", "/score"}  # their requests go to the engine
OTHER_MEDIA = dict.fromkeys(("/metrics", "/ping", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"), "text/plain")
OPEN = frozenset({"/health"})

# Status -> description: for every path, for paths that read a body, and for paths that generate.
_ALWAYS = {404: "there is no such path or model", 405: "the path needs another method", 500: "a bug of the server",
           503: "the engine has stopped"}
_WITH_BODY = {400: "the request is wrong; param names the field", 413: "the body is too large", 415: "the body is not JSON"}
_GENERATING = {429: "the queue is full; Retry-After says when to try again"}


_EXAMPLES: dict[str, dict[str, Any]] = {
    "CompletionRequest": {"prompt": "The capital of France is", "max_tokens": 16}, "ResponsesRequest": {"input": "Why is the sky blue?"},
    "ChatRequest": {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64, "stream": True},
    "EmbeddingRequest": {"input": ["The capital of France is Paris."]},
    "ScoreRequest": {"text_1": "Paris", "text_2": ["The capital of France", "A kind of bread"]},
    "TokenizeRequest": {"prompt": "The capital of France is"}, "DetokenizeRequest": {"tokens": [5, 6, 7]}, "AbortRequest": {"all": True},
    "LoadAdapterRequest": {"lora_name": "sql-lora", "lora_path": "/adapters/sql"}, "UnloadAdapterRequest": {"lora_name": "sql-lora"},
}


def body_of(kind: type[StrictModel]) -> dict[str, Any]:
    """The `openapi_extra` of a path that parses a body of this kind itself."""
    content = {"schema": ref(kind.__name__), "example": _EXAMPLES[kind.__name__]}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def describe(app: FastAPI, bodies: Iterable[type[StrictModel]], secured: bool) -> dict[str, Any]:
    """The whole document. `bodies`: the request models of all paths."""
    document = get_openapi(title=app.title, version=app.version, openapi_version="3.1.0", routes=app.routes,
                           description="OpenAI's API, with vLLM's fields.")
    components = {**COMPONENTS}
    for kind in bodies:
        schema = kind.model_json_schema(ref_template=_REF)
        components.update(schema.pop("$defs", {}))
        components[kind.__name__] = schema
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"] = _responses(path, "requestBody" in operation, secured)
            if secured and path not in OPEN:
                operation["security"] = [{"key": []}]
    document["components"] = {"schemas": components}
    if secured:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _responses(path: str, has_body: bool, secured: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if path in RESPONSES:
        content["application/json"] = {"schema": RESPONSES[path]}
    if path in STREAMS:
        content["text/event-stream"] = {"schema": record({"data": STRING}, event=STRING)}  # one event
    if path in OTHER_MEDIA or not content:
        content[OTHER_MEDIA.get(path, "*/*")] = {"schema": STRING}
    errors = {**_ALWAYS, **(_WITH_BODY if has_body else {}), **(_GENERATING if path in QUEUED else {})}
    if secured and path not in OPEN:
        errors[401] = "a valid API key is required"
    return {"200": {"description": "success", "content": content}, **{str(status): _failure(why) for status, why in sorted(errors.items())}}


def _failure(why: str) -> dict[str, Any]:
    return {"description": why, "content": {"application/json": {"schema": ref("Error")}}}
