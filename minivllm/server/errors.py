"""Every failure in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, with the HTTP status that clients expect.

    InvalidInput   400   the request is wrong: the message names the field, the value and the fix; `param` is the dotted field
    QueueFull      429   with Retry-After
    ApiError       ...   its own status: 401, 404, 405, 413, 415; 501 for paths of other servers that are not built here
    EngineDead     503   no request can be answered until a restart
    anything else  500   a bug in minivllm: its traceback goes to the log and never to a client
"""
from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from minivllm.core.admission import QueueFull
from minivllm.errors import EngineDead, InvalidInput

log = logging.getLogger(__name__)

RETRY_AFTER = "1"  # seconds; a full queue has room again after about the time of one request
# Limits in characters. Messages quote what the client sent, which may be a megabyte.
MAX_MESSAGE = 600
MAX_QUOTE = 80

_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowedError", 408: "RequestTimeoutError",
    413: "PayloadTooLargeError", 415: "UnsupportedMediaTypeError", 429: "RateLimitError",
    500: "InternalServerError", 501: "NotImplementedError", 503: "ServiceUnavailableError",
}


def shorten(text: str, limit: int = MAX_QUOTE) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


class ApiError(Exception):
    """A failure with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shorten(message, MAX_MESSAGE)
        self.param = None if param is None else shorten(param)
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(body), status, dict(headers or {}), media_type="application/json")


def encode(body: Any) -> bytes:
    """Compact UTF-8 JSON. A lone surrogate, which UTF-8 cannot encode, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def context_error(prompt_tokens: int, max_tokens: int | None, limit: int, param: str) -> ApiError:
    """Prompt and output together are longer than the context."""
    if max_tokens is None:
        message = f"the context is {limit} tokens, and the prompt has {prompt_tokens}: shorten it, so that an output fits"
    else:
        room = limit - prompt_tokens
        fix = f"shorten the prompt, or lower {param} to {room}" if room > 0 else "shorten the prompt"
        message = (f"the context is {limit} tokens, and the request needs {prompt_tokens + max_tokens}: {prompt_tokens} for the prompt "
                   f"and {max_tokens} for the output; {fix}")
    return ApiError(400, message, param=param, code="context_length_exceeded")


def engine_dead() -> ApiError:
    """The reason is left out, because it may name paths and addresses of this machine. The server's log has it."""
    return ApiError(503, "the engine has stopped: the server must be restarted", code="engine_dead")


def generation_failed() -> ApiError:
    return ApiError(500, "a step of the engine failed, and this request with it: try again; the server's log has the reason",
                    code="generation_failed")


def to_api_error(error: Exception) -> ApiError:
    """The error that a client gets for any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, error.message, param=error.param, code="queue_full", headers={"retry-after": RETRY_AFTER})
    if isinstance(error, InvalidInput):
        return ApiError(400, error.message, param=error.param)
    if isinstance(error, EngineDead):
        return engine_dead()
    log.error("a request failed because of a bug", exc_info=error)
    return ApiError(500, "internal error: the server's log has the details")
