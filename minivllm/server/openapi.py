"""`/openapi.json`: what each path takes and gives, true enough for a machine to test the server against it.

FastAPI lists the paths; bodies are described by the request classes themselves, answers by the schemas below. Answers may carry more
fields than are named here, requests may not.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from minivllm.server.strict import Strict

Schema = dict[str, Any]
_REF = "#/components/schemas/{model}"


def nullable(kind: str) -> Schema:
    return {"type": [kind, "null"]}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def record(required: dict[str, Schema], **more: Schema) -> Schema:
    """An object: fields that are always there, and others."""
    return {"type": "object", "required": list(required), "properties": {**required, **more}}


def ref(name: str) -> Schema:
    return {"$ref": _REF.format(model=name)}


STRING, INTEGER, NUMBER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
_ENDED = {"finish_reason": {"enum": ["stop", "length", "tool_calls", "function_call", "abort"]},
          "stop_reason": {"type": ["string", "integer", "null"]}}
_GENERATED = {"id": STRING, "created": INTEGER, "model": STRING, "usage": ref("Usage")}
_CARD = record({"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING, "root": STRING,
                "parent": nullable("string"), "max_model_len": INTEGER})

COMPONENTS: dict[str, Schema] = {
    "Error": record({"error": record({"message": STRING, "type": STRING, "param": nullable("string"), "code": nullable("string")})}),
    "Usage": record({"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER,
                     "prompt_tokens_details": record({"cached_tokens": INTEGER})}),
    "Completion": record({
        **_GENERATED, "object": {"const": "text_completion"},
        "choices": array(record({"index": INTEGER, "text": STRING, "logprobs": nullable("object"), **_ENDED})),
    }),
    "ChatCompletion": record({
        **_GENERATED, "object": {"const": "chat.completion"},
        "choices": array(record({
            "index": INTEGER, "logprobs": nullable("object"), **_ENDED,
            "message": record({"role": {"const": "assistant"}, "content": nullable("string")}, tool_calls=array({"type": "object"})),
        })),
    }),
    "Response": record({
        "id": STRING, "object": {"const": "response"}, "created_at": INTEGER, "model": STRING, "output": array({"type": "object"}),
        "status": {"enum": ["completed", "incomplete"]}, "error": {"type": "null"}, "incomplete_details": nullable("object"),
        "usage": record({"input_tokens": INTEGER, "output_tokens": INTEGER, "total_tokens": INTEGER}),
    }),
    "Model": _CARD,
}

# Path -> schema of a good answer. A path that is not here answers with something that is no JSON.
ANSWERS: dict[str, Schema] = {
    "/v1/completions": ref("Completion"),
    "/v1/chat/completions": ref("ChatCompletion"),
    "/v1/responses": ref("Response"),
    "/v1/models": record({"object": {"const": "list"}, "data": array(ref("Model"))}),
    "/v1/models/{model}": ref("Model"),
    "/health": record({"status": {"const": "ok"}}),
    "/version": record({"version": STRING}),
    "/tokenize": record({"count": INTEGER, "max_model_len": INTEGER, "tokens": array(INTEGER),
                         "token_strs": {"anyOf": [array(STRING), {"type": "null"}]}}),
    "/detokenize": record({"prompt": STRING}),
    "/load": record({"server_load": INTEGER, "num_running": INTEGER, "num_waiting": INTEGER, "kv_cache_usage": NUMBER}),
    "/reset_prefix_cache": record({"status": {"const": "ok"}}),
    "/abort_requests": record({"aborted": array(STRING)}),
}
STREAMS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})
OTHER_MEDIA = {"/metrics": "text/plain"}
OPEN = frozenset({"/health"})

# Status -> why; of every path, of those that read a body, and of those that generate.
_ALWAYS = {404: "there is no such path or model", 405: "another method is needed", 500: "a bug of ours", 503: "the engine has stopped"}
_WITH_BODY = {400: "the request is wrong; param names the field", 413: "the body is too large", 415: "the body is not JSON"}
_GENERATING = {429: "the queue is full; Retry-After says when to come again", 501: "known elsewhere and not built here"}


def body_of(kind: type[Strict]) -> dict[str, Any]:
    """For a path's `openapi_extra`: it reads a body of this kind itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref(kind.__name__)}}}}


def describe(app: FastAPI, bodies: Iterable[type[Strict]], secured: bool) -> dict[str, Any]:
    """The whole document; `bodies` are all kinds that its paths read."""
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
    if path in ANSWERS:
        content["application/json"] = {"schema": ANSWERS[path]}
    if path in STREAMS:
        content["text/event-stream"] = {"schema": record({"data": STRING}, event=STRING)}  # one event
    if path in OTHER_MEDIA or not content:
        content[OTHER_MEDIA.get(path, "*/*")] = {"schema": STRING}
    errors = {**_ALWAYS, **(_WITH_BODY if has_body else {}), **(_GENERATING if path in STREAMS else {})}
    if secured and path not in OPEN:
        errors[401] = "a valid API key is required"
    return {"200": {"description": "done", "content": content}, **{str(status): _failure(why) for status, why in sorted(errors.items())}}


def _failure(why: str) -> dict[str, Any]:
    return {"description": why, "content": {"application/json": {"schema": ref("Error")}}}


def missing(paths: Iterable[str]) -> set[str]:
    """Documented paths whose answers nobody has described."""
    return set(paths) - ANSWERS.keys() - OTHER_MEDIA.keys()
