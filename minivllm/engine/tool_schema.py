"""Schemas of tools: what cannot be enforced is left open, so that one odd tool does not spoil a request.

    why_not    why a schema cannot be enforced; llguidance compiles it to find out
    relaxed    the schema without what cannot be enforced

Compiling some short schemas takes hours. So schemas of simple keywords are checked in this process, and all others in a trial process
(`grammar_trial.py`), within the seconds that one request may spend on it.
"""
from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from minivllm.engine.grammar_text import invalid_schema
from minivllm.engine.grammar_trial import TrialJob, TrialLimits, TrialProcess
from minivllm.engine.json_schema import closed, map_parts
from minivllm.errors import InvalidInput

NOT_ENFORCED = frozenset({
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames", "dependentRequired",
    "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems",
    "$id",  # may be no URI
})
MAX_PROPERTIES = 64  # of a tool whose properties are tried one by one
MAX_CHECKED = 512  # schemas whose result is kept
CHECK_SECONDS = 3.0  # for all schemas of a request; a usual one takes 1 ms
# Keywords whose compilation takes time in proportion to the text: nothing is intersected, counted or repeated.
SIMPLE = frozenset({"type", "properties", "required", "items", "enum", "const", "description", "title", "default", "examples",
                    "additionalProperties", "anyOf", "$ref", "$defs", "definitions", "nullable"})
SIMPLE_SIZE = 1 << 14  # characters


class SchemaChecker:
    """Checks schemas one at a time, and keeps the results of the last ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[str, str | None] = OrderedDict()
        self._trial = TrialProcess(None)
        self.canceled = False  # of `Ticket`: nothing cancels a check

    def why_not(self, schema: Mapping[str, Any], seconds: float) -> str | None:
        """Why a schema cannot be enforced; None if it can. Raises `TimeoutError` after so many seconds."""
        text = json.dumps(schema, ensure_ascii=False)
        with self._lock:
            if text not in self._found:
                simple = len(text) <= SIMPLE_SIZE and _is_simple(schema)
                self._found[text] = invalid_schema(text) if simple else self._tried(text, seconds)
                if len(self._found) > MAX_CHECKED:
                    self._found.popitem(last=False)
            self._found.move_to_end(text)
            return self._found[text]

    def _tried(self, text: str, seconds: float) -> str | None:
        reply = self._trial.run(TrialJob(text, TrialLimits(seconds)), self)
        if reply.overran:
            raise TimeoutError(reply.error)
        return reply.error


@lru_cache(maxsize=1)
def schema_checker() -> SchemaChecker:
    """The one of this process."""
    return SchemaChecker()


class CheckBudget:
    """The seconds that one request may still spend on checks of its schemas."""

    def __init__(self, seconds: float = CHECK_SECONDS) -> None:
        self._left = self._seconds = seconds

    def why_not(self, schema: Mapping[str, Any]) -> str | None:
        """See `SchemaChecker`. Raises `InvalidInput` when the budget is spent."""
        start = time.perf_counter()
        try:
            with contextlib.suppress(TimeoutError):  # the budget is spent
                if self._left > 0:
                    return schema_checker().why_not(schema, self._left)
        finally:
            self._left -= time.perf_counter() - start
        raise InvalidInput(f"the schemas of tools take more than {self._seconds:g} s to check, or too much memory: make them simpler "
                           "(fewer patterns that apply to one string, smaller repetitions), or send fewer tools", "tools")


def why_not(schema: Mapping[str, Any]) -> str | None:
    """Why a schema cannot be enforced; None if it can."""
    return CheckBudget().why_not(schema)


def _is_simple(schema: Any) -> bool:
    """Whether a schema has simple keywords only, in all of its parts."""
    simple = True

    def visit(part: Any) -> Any:
        nonlocal simple
        simple = simple and part.keys() <= SIMPLE
        return map_parts(part, visit) if simple else part

    visit(schema)
    return simple


def relaxed(schema: dict[str, Any], budget: CheckBudget | None = None) -> tuple[dict[str, Any], str | None]:
    """A schema of an object without what cannot be enforced, and why something was left out.

    budget: of all schemas of a request. Raises `InvalidInput` when it is spent.
    """
    budget = budget or CheckBudget()
    why_not = budget.why_not
    found = why_not(closed(schema))
    if found is None:
        return schema, None
    slim = _without(schema)
    if why_not(closed(slim)) is None:
        return slim, found
    shared = {name: slim[name] for name in ("$defs", "definitions") if name in slim}
    properties = slim.get("properties")
    if isinstance(properties, dict) and len(properties) <= MAX_PROPERTIES:  # leave the properties open that fail
        kept = {name: part if why_not({**shared, "properties": {name: part}}) is None else {} for name, part in properties.items()}
        slim = {**shared, "type": "object", "properties": kept, **{n: slim[n] for n in ("required", "additionalProperties") if n in slim}}
        if why_not(closed(slim)) is None:
            return slim, found
    return {"type": "object"}, found


def _without(schema: Any) -> Any:
    slim = map_parts(schema, _without)
    if "oneOf" in slim and "anyOf" not in slim:
        slim["anyOf"] = slim.pop("oneOf")
    if not isinstance(slim.get("required", []), list):  # an older form: true, in the property itself
        del slim["required"]
    return {key: value for key, value in slim.items() if key not in NOT_ENFORCED}
