"""Structured output: OpenAI's `response_format`, vLLM's `structured_outputs`, and vLLM's older `guided_*` fields.

    response_format      {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}
    structured_outputs   {"json": schema} or regex, choice, grammar, json_object: the fields of `StructuredOutputsParams`
    guided_json ...      one field each

A request may use one of them. Each becomes a `StructuredOutputsParams` that keeps the client's field name for errors. A schema is always
enforced, so `strict` has no effect.
"""
from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import WithJsonSchema

from minivllm.errors import InvalidInput, NotSupportedYet, nearest
from minivllm.sampling_params import STRUCTURES, StructuredOutputsParams

SchemaField: TypeAlias = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]})]

_TYPES = ("text", "json_object", "json_schema")
_OPTIONS = ("disable_any_whitespace", "whitespace_pattern")
_NOT_BUILT = ("structural_tag", "disable_fallback", "disable_additional_properties", "backend")  # fields of vLLM
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def unknown_fields(outputs: Mapping[str, Any] | None, form: Mapping[str, Any] | None, form_name: str, permissive: bool) -> list[str]:
    """Unknown names inside `structured_outputs` and `response_format`: returned if the server is permissive, else refused."""
    parts: list[tuple[str, Mapping[str, Any], Collection[str]]] = []
    if outputs is not None:
        parts.append(("structured_outputs", outputs, (*STRUCTURES, *_OPTIONS)))
    if form is not None:
        parts.append((form_name, form, ("type", "json_schema") if form.get("type") == "json_schema" else ("type",)))
        inner = form.get("json_schema")
        if isinstance(inner, Mapping):
            parts.append((_inner(form_name), inner, ("name", "description", "schema", "strict")))
    ignored = []
    for where, part, known in parts:
        for name in part.keys() - known:
            if part[name] is None:
                continue
            if name in _NOT_BUILT:
                raise NotSupportedYet(f"{where}.{name} is not supported yet: leave it out", f"{where}.{name}")
            if not permissive:
                raise InvalidInput(f"unknown field '{where}.{name}'{nearest(name, known)}", f"{where}.{name}")
            ignored.append(f"{where}.{name}")
    return ignored


def _inner(where: str) -> str:
    """The field that holds the schema and its name. A chat request has it one level deeper than `/v1/responses`."""
    return f"{where}.json_schema" if where == "response_format" else where


def read_format(form: Mapping[str, Any], where: str) -> StructuredOutputsParams | None:
    """The structure that `response_format` requests. `where` is the endpoint's name for that field."""
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True, origin=where)
    if kind != "json_schema":
        hint = nearest(kind, _TYPES) if isinstance(kind, str) else ""
        raise InvalidInput(f"{where}.type must be one of {', '.join(_TYPES)}, got {kind!r}{hint}", f"{where}.type")
    where = _inner(where)
    inner = form.get("json_schema")
    if not isinstance(inner, Mapping):
        raise InvalidInput(f"{where} must be an object with name and schema, got {inner!r}", where)
    name = inner.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInput(f"{where}.name must be 1 to 64 letters, digits or _.-, got {name!r}", f"{where}.name")
    if not isinstance(inner.get("schema"), Mapping):
        raise InvalidInput(f"{where}.schema must be a JSON schema (an object), got {inner.get('schema')!r}", f"{where}.schema")
    for field, kinds in (("strict", bool), ("description", str)):
        if not isinstance(inner.get(field), (kinds, type(None))):
            raise InvalidInput(f"{where}.{field} must be {'true or false' if kinds is bool else 'a string'}, got {inner[field]!r}",
                               f"{where}.{field}")
    return StructuredOutputsParams(json=inner["schema"], origin=f"{where}.schema")


def structured_output(
    outputs: Mapping[str, Any] | None, form: Mapping[str, Any] | None, form_name: str, guided: Mapping[str, Any], whitespace: str | None,
) -> StructuredOutputsParams | None:
    """The structure that a request's fields define; None if there is none. `guided`: the `guided_*` fields that were sent."""
    found: dict[str, StructuredOutputsParams] = {}
    if form is not None and (structure := read_format(form, form_name)) is not None:
        found[form_name] = structure
    if outputs is not None:
        given = {name: value for name, value in outputs.items() if value is not None and name in (*STRUCTURES, *_OPTIONS)}
        found["structured_outputs"] = StructuredOutputsParams.of(given)
    for name, value in guided.items():
        pattern = whitespace if name == "guided_json" else None
        found[name] = StructuredOutputsParams(**{name.removeprefix("guided_"): value}, whitespace_pattern=pattern, origin=name)
    if len(found) > 1:
        first, second = list(found)[:2]
        raise InvalidInput(f"{first} and {second} both define the structure of the output: send one of them", second)
    if whitespace is not None and "guided_json" not in found:
        raise InvalidInput("guided_whitespace_pattern belongs to guided_json: leave it out", "guided_whitespace_pattern")
    return next(iter(found.values()), None)
