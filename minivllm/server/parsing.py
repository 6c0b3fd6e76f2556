"""From the bytes of a body to a request model, with types checked. Errors name the first wrong field."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from minivllm.server.errors import ApiError, shorten
from minivllm.server.strict import StrictModel

MAX_CONTAINERS = 65_536  # lists and objects in one body
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # a JSON string, complete or cut off
Model = TypeVar("Model", bound=StrictModel)


def parse(kind: type[Model], raw: bytes) -> Model:
    """The body of a request, with types checked. Raises `ApiError` naming the first wrong field."""
    _limit_containers(raw)
    try:
        model = kind.model_validate_json(raw)
    except ValidationError as error:
        raise _describe(error.errors(include_url=False, include_context=False)[0]) from None
    _refuse_duplicates(raw)
    model._size = len(raw)
    return model


def _refuse_duplicates(raw: bytes) -> None:
    """Refuse an object that has a key twice: pydantic would ignore all but the last value. `raw` is valid JSON of moderate depth."""
    def check(pairs: list[tuple[str, Any]]) -> None:
        if len(pairs) > 1 and len(dict(pairs)) != len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ApiError(400, f"the key {shorten(name)!r} occurs more than once in an object: send it once", param=shorten(name),
                           code="duplicate_key")

    try:
        json.loads(raw, object_pairs_hook=check)
    except (ValueError, RecursionError):  # Python's limits for the digits of a number and for nesting are lower than pydantic's
        raise ApiError(400, "the body has a number of thousands of digits, or is nested too deeply: send a simpler one",
                       code="invalid_json") from None


def convert(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """A request made from another request's fields, checked as if a client had sent it."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _describe(error.errors(include_url=False, include_context=False)[0]) from None


def _limit_containers(raw: bytes) -> None:
    """Refuse bodies with too many lists and objects: a body of a few megabytes parses fast unless it is a million small lists.

    Parsing JSON holds the GIL, so a thread would not keep the event loop responsive; a limit does. Brackets inside strings do not
    count. (The pattern reads each byte once, whatever the quotes and backslashes are.)
    """
    def count(text: bytes) -> int:
        return text.count(b"[") + text.count(b"{")

    if count(raw) > MAX_CONTAINERS and count(_STRING.sub(b"", raw)) > MAX_CONTAINERS:
        raise ApiError(400, f"the body has more than {MAX_CONTAINERS} lists and objects: send several requests", code="too_many_values")


def _describe(first: ErrorDetails) -> ApiError:
    kind, message, got = first["type"], first["msg"], first["input"]
    param = ".".join(str(part) for part in first["loc"]) or None
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}", code="invalid_json")
    if param is None:
        return ApiError(400, "the body must be a JSON object")
    if kind == "too_long":
        return ApiError(400, f"{param} {message.removeprefix('List ').partition(' after')[0]}: send fewer", param=param)
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param} {re.sub('^(Input|String) ', '', message)}, got {shorten(repr(got))}", param=param)
