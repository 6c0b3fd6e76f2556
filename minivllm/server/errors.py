"""Every failure in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, with the HTTP status that clients expect.

    InvalidInput   400   the request is wrong: the message names the field, the value and the fix; `param` is the dotted field
    QueueFull      429   with Retry-After
    ApiError       ...   its own status: 401, 403, 404, 405, 413, 415
    EngineDead     503   no request can be answered until a restart; EngineRestarting: it has begun, with Retry-After
    anything else  500   a bug in minivllm: its traceback goes to the log and never to a client

Some sentences and codes here are an interface: programs search for them, to shorten a conversation or to leave a field out. A test
restates what they search for.
"""
from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any

from starlette.responses import Response

from minivllm.core.admission import QueueFull
from minivllm.errors import EngineDead, EngineRestarting, InvalidInput, NotSupportedYet, ReplicaLost, UnknownField

log = logging.getLogger(__name__)

RETRY_AFTER = "1"  # seconds; a full queue has room again after about the time of one request
RESTART_RETRY_AFTER = "5"  # seconds; loading a model takes longer
# Limits in characters. Messages quote what the client sent, which may be a megabyte.
MAX_MESSAGE = 600
MAX_QUOTE = 80
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # legal in JSON, but many clients cut server-sent events there, as `str.splitlines` does

_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError", 405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError", 415: "UnsupportedMediaTypeError", 429: "RateLimitError",
    500: "InternalServerError", 503: "ServiceUnavailableError",
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
    """Compact UTF-8 JSON on one line. A lone surrogate, which UTF-8 cannot encode, becomes a question mark."""
    return _one_line(json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)).encode("utf-8", "replace")


def encode_text(head: str, text: str, tail: str) -> bytes:
    """What `encode` gives for an object with one text, whose JSON before and after the text is known."""
    return f"{head}{_one_line(encode_basestring(text))}{tail}".encode("utf-8", "replace")


def _one_line(text: str) -> str:
    """JSON without characters that end a line for some readers. JSON itself escapes the others, such as a newline in a string."""
    return text if text.isascii() else _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def context_error(size: int, limit: int, prompt: str, max_tokens: int = 0, param: str = "", *, unit: str = "tokens") -> ApiError:
    """Prompt and output together are longer than the context. `prompt`: the field with the prompt; `param`: the one with `max_tokens`."""
    need, fix = f"your {prompt} resulted in {size} {unit}", ""
    if max_tokens:
        need = f"you requested {size + max_tokens} tokens ({size} in the {prompt}, {max_tokens} in the completion)"
        fix = f", or lower {param} to {limit - size}" if size < limit else ""
    param = param if size < limit else prompt
    message = f"This model's maximum context length is {limit} tokens. However, {need}. Please reduce the length of the {prompt}{fix}."
    return ApiError(400, message, param=param or prompt, code="context_length_exceeded")


def engine_dead(restarting: bool = False) -> ApiError:
    """The reason is left out, because it may name paths and addresses of this machine. The server's log has it."""
    if restarting:
        return ApiError(503, "the engine has stopped and is being started again, and its running requests have ended: send the request "
                             "again in a few seconds", code="engine_restarting", headers={"retry-after": RESTART_RETRY_AFTER})
    return ApiError(503, "the engine has stopped, and the server ends: it must be started again", code="engine_dead")


def generation_failed() -> ApiError:
    return ApiError(500, "a step of the engine failed, and this request with it: try again; the server's log has the reason",
                    code="generation_failed")


def to_api_error(error: Exception) -> ApiError:
    """The error that a client gets for any exception. An error of the client loses its traceback: the frames in it hold the request's
    body, and a refusal may be delayed.
    """
    if isinstance(error, (ApiError, InvalidInput)):
        error.__traceback__ = error.__context__ = error.__cause__ = None
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, error.message, param=error.param, code="rate_limit_exceeded", headers={"retry-after": RETRY_AFTER})
    if isinstance(error, NotSupportedYet) and error.param is not None:
        return ApiError(400, f"Unsupported parameter: '{error.param}'. {error.message}", param=error.param, code="unsupported_parameter")
    if isinstance(error, InvalidInput):
        return ApiError(400, error.message, param=error.param, code="unknown_parameter" if isinstance(error, UnknownField) else None)
    if isinstance(error, ReplicaLost):
        return ApiError(503, "the replica that computed this request has stopped after the output had begun: send the request again",
                        code="replica_lost", headers={"retry-after": RETRY_AFTER})
    if isinstance(error, EngineDead):
        return engine_dead(isinstance(error, EngineRestarting))
    log.error("a request failed because of a bug", exc_info=error)
    return ApiError(500, "internal error: the server's log has the details")
