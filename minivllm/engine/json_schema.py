"""JSON schemas as the grammar compiler takes them.

    closed     objects with `properties` have no other keys, unless the schema says `additionalProperties`. JSON Schema allows any key
               there, which a model would fill with invented ones. (xgrammar's strict mode, vLLM's default, does the same.)
               A `format` that is only an annotation (`path`, `password`) is left out: JSON Schema does not require that it is checked.

`tool_schema.py` has what schemas of tools need besides.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

NAMED_PARTS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
VALUES = ("const", "enum", "default", "examples", "example", "required")  # these hold values, not schemas: a "$ref" inside is data
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})  # enforced


def map_parts(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of a schema in which `change` was applied to each schema directly inside it."""
    def parts(value: Any) -> Any:
        if isinstance(value, list):
            return [change(part) if isinstance(part, dict) else part for part in value]
        return change(value) if isinstance(value, dict) else value

    return {key: value if key in VALUES else {name: parts(part) for name, part in value.items()}
            if key in NAMED_PARTS and isinstance(value, dict) else parts(value) for key, value in schema.items()}


# -- declared keys only -----------------------------------------------------------------------------------------------


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with declared keys only, and without annotations that the compiler does not know."""
    open_parts: set[str] = set()  # definitions that describe a part of an object: its other keys are declared elsewhere
    found = _close(schema, open_parts, False)
    if "#" in open_parts:
        found = _close(schema, open_parts, True)
    done = {"#"}
    while todo := open_parts - done:
        done |= todo
        for pointer in todo:
            _replace(found, schema, pointer, open_parts)
    return found


def _close(schema: Mapping[str, Any], open_parts: set[str], partial: bool) -> dict[str, Any]:
    """`partial`: the schema describes only a part of an object. Adds references from partial schemas to `open_parts`."""
    own = "properties" in schema or "patternProperties" in schema
    branches = list(_branches(schema))
    alternatives = sum(any(key == name and _describes(part) for key, part in branches) for name in ("anyOf", "oneOf"))
    pieces = own + alternatives + ("$ref" in schema) + sum(key == "allOf" and _describes(part) for key, part in branches)
    partial_below = partial or pieces > 1
    if partial_below and isinstance(schema.get("$ref"), str):
        open_parts.add(schema["$ref"])
    inside = [part for _, part in branches]
    found = map_parts(schema, lambda part: _close(part, open_parts, partial_below and any(part is other for other in inside)))
    found.pop("$schema", None)
    if found.get("format") not in FORMATS and "string" in (found.get("type", "string"), *_as_list(found.get("type"))):
        found.pop("format", None)
    if found.get("unevaluatedProperties") is True:
        found.setdefault("additionalProperties", True)
        del found["unevaluatedProperties"]
    if own and pieces == 1 and not partial and "additionalProperties" not in found:
        if found.get("unevaluatedProperties") is False:
            del found["unevaluatedProperties"]
        if "unevaluatedProperties" not in found:
            found["additionalProperties"] = False
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _branches(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in ("allOf", "anyOf", "oneOf"):
        yield from ((key, part) for part in _as_list(schema.get(key)) if isinstance(part, dict))


def _describes(schema: Mapping[str, Any]) -> bool:
    """Whether a schema declares keys of its object."""
    return any(name in schema for name in ("properties", "patternProperties", "$ref")) or any(_describes(p) for _, p in _branches(schema))


def _replace(found: dict[str, Any], schema: Mapping[str, Any], pointer: str, open_parts: set[str]) -> None:
    """Put the open form of a definition at its place in `found`."""
    steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer.removeprefix("#/").split("/")]
    target: Any = found
    source: Any = schema
    for step in steps[:-1]:
        target = target.get(step) if isinstance(target, dict) else None
        source = source.get(step) if isinstance(source, Mapping) else None
    if isinstance(target, dict) and isinstance(source, Mapping) and isinstance(source.get(steps[-1]), dict):
        target[steps[-1]] = _close(source[steps[-1]], open_parts, True)
