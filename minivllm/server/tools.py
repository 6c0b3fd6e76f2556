"""Tools: what a request may say of them, and what that asks of the model.

    tool_choice   the output is                                    enforced by
    none          text; the model is not told of the tools
    auto          text, calls in the model's own format, or both   a parser looks for calls; a grammar only for `strict` tools
    required      a JSON array of calls                            a grammar made of all parameters' schemas
    a function    a JSON object, its arguments                     a grammar: the schema of its parameters

`functions` and `function_call` are OpenAI's names of 2023 for the same, with at most one call; they are answered in their own form.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import FailFast, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from minivllm.errors import InvalidInput, NotSupportedYet, nearest
from minivllm.server.strict import Strict

MAX_TOOLS = 1024
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_NO_PARAMETERS = {"type": "object", "properties": {}}
_WORDS = ("none", "auto", "required")


class Function(Strict):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # arguments must match the schema even where a call is the model's own choice


class Tool(Strict):
    """An element of `tools`."""

    type: str = "function"
    function: Function | None = None

    def extras(self, path: str, permissive: bool) -> list[str]:
        if self.type != "function":
            raise NotSupportedYet(f"{path}type {self.type!r} is not supported: give a function", path + "type")
        names = super().extras(path, permissive)
        if self.function is None:
            raise InvalidInput(f"{path}function is required", path + "function")
        return names + self.function.extras(path + "function.", permissive)


class CalledFunction(Strict):
    """The function of a call that was made; `arguments` is JSON text, as answers have it, or already an object."""

    name: str
    arguments: Annotated[Any, WithJsonSchema({"type": ["string", "object", "null"]})] = None

    def read(self, path: str) -> dict[str, Any]:
        where, value = path + "arguments", self.arguments
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else {}
            except (ValueError, RecursionError):
                raise InvalidInput(f"{where} must be the text of a JSON object, got {self.arguments!r}: correct it", where) from None
        if value is not None and not isinstance(value, dict):
            raise InvalidInput(f"{where} must be a JSON object or its text, got {self.arguments!r}", where)
        return value or {}


class ToolCall(Strict):
    """A call of an assistant's message that is sent back."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction
    INERT = frozenset({"index"})

    def extras(self, path: str, permissive: bool) -> list[str]:
        if self.type not in (None, "function"):
            raise NotSupportedYet(f"{path}type {self.type!r} is not supported: send calls of functions", path + "type")
        return super().extras(path, permissive) + self.function.extras(path + "function.", permissive)


def _choice(value: Any) -> str | dict[str, Any] | None:
    if value is None or isinstance(value, (str, dict)):
        return value
    raise PydanticCustomError("tool_choice", "Input should be a string or an object that names a function")


Choice: TypeAlias = Annotated[
    str | dict[str, Any] | None, PlainValidator(_choice, json_schema_input_type=str | dict[str, Any] | None),
]
Tools: TypeAlias = Annotated[list[Tool] | None, FailFast()]
Functions: TypeAlias = Annotated[list[Function] | None, FailFast()]
ToolCalls: TypeAlias = Annotated[list[ToolCall] | None, FailFast()]


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools of one request, and what is wanted of them."""

    mode: Literal["auto", "required", "named"]
    functions: tuple[Function, ...]
    named: str | None = None
    parallel: bool = True
    legacy: bool = False  # asked for as `functions`

    @property
    def field(self) -> str:
        """What errors call them."""
        return "functions" if self.legacy else "tools"

    @property
    def strict(self) -> int | None:
        """The first function whose schema must be kept to even where the model is free to call or not."""
        return next((i for i, function in enumerate(self.functions) if function.strict), None) if self.mode == "auto" else None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    def for_template(self) -> list[dict[str, Any]]:
        """As chat templates expect them."""
        return [{"type": "function", "function": {
            "name": f.name, **({} if f.description is None else {"description": f.description}),
            "parameters": f.parameters or _NO_PARAMETERS,
        }} for f in self.functions]

    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of the whole output; None if it is free."""
        if self.mode == "auto":
            return None
        if self.mode == "named":
            return next(_arguments(f) for f in self.functions if f.name == self.named)
        definitions: dict[str, Any] = {}
        calls = [_call(f, "parameters", _hoist(f, i, definitions)) for i, f in enumerate(self.functions)]
        array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        if not self.parallel:
            array["maxItems"] = 1
        return {**array, "$defs": definitions} if definitions else array

    def call_schema(self) -> dict[str, Any]:
        """The JSON schema of one call in the Hermes format; arguments of functions that are not strict are any object."""
        definitions: dict[str, Any] = {}
        calls = [_call(f, "arguments", _hoist(f, i, definitions) if f.strict else {"type": "object"})
                 for i, f in enumerate(self.functions)]
        return {"anyOf": calls, "$defs": definitions} if definitions else {"anyOf": calls}


def _call(function: Function, key: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": ["name", key], "additionalProperties": False,
            "properties": {"name": {"enum": [function.name]}, key: arguments}}


def _arguments(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments: an object in any case, and an empty one if it has no parameters."""
    return {**function.parameters, "type": "object"} if function.parameters else {**_NO_PARAMETERS, "additionalProperties": False}


def _hoist(function: Function, index: int, definitions: dict[str, Any]) -> dict[str, Any]:
    """A function's schema as a part of another. One that refers to itself ("#...") becomes a definition, and its references follow."""
    schema = _arguments(function)
    name = f"tool{index}"
    moved = _moved({k: v for k, v in schema.items() if k != "$id"}, f"#/$defs/{name}")
    if moved == schema:
        return schema
    definitions[name] = moved
    return {"$ref": f"#/$defs/{name}"}


_NAMED_PARTS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")  # no schemas: what looks like a reference in them is none


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to its own root lead to `root`."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = root + value[1:]
        elif key in _NAMED_PARTS and isinstance(value, dict):
            moved[key] = {name: _moved(part, root) for name, part in value.items()}
        else:
            moved[key] = value if key in _VALUES else _moved(value, root)
    return moved


def read_tools(
    tools: Sequence[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None,
    functions: Sequence[Function] | None = None, function_call: str | dict[str, Any] | None = None,
) -> ToolUse | None:
    """What a request asks for; None if the model is to know of no tools."""
    if functions is not None or function_call not in (None, "none", "auto"):
        if tools is not None or choice is not None:
            raise InvalidInput("functions and function_call are the old names of tools and tool_choice: send one pair", "functions")
        return _use(functions, "functions", function_call, "function_call", parallel=False, legacy=True)
    listed = None if tools is None else [tool.function for tool in tools if tool.function is not None]
    return _use(listed, "tools", choice, "tool_choice", parallel=parallel is not False, legacy=False)


def _use(
    functions: Sequence[Function] | None, field: str, choice: str | Mapping[str, Any] | None, choice_field: str, *,
    parallel: bool, legacy: bool,
) -> ToolUse | None:
    if functions is None:
        if choice in (None, "none", "auto"):
            return None
        raise InvalidInput(f"{choice_field} needs {field}: send some, or leave {choice_field} out", choice_field)
    names = _check_functions(functions, field)
    words = ("none", "auto") if legacy else _WORDS
    named = None
    if isinstance(choice, Mapping):
        named = _named(choice, choice_field, names, legacy)
    elif choice is not None and choice not in words:
        raise InvalidInput(f"{choice_field} must be {', '.join(words)} or name a function, got {choice!r}{nearest(choice, words)}",
                           choice_field)
    if choice == "none":
        return None
    mode: Literal["auto", "required", "named"] = "named" if named is not None else "required" if choice == "required" else "auto"
    return ToolUse(mode=mode, functions=tuple(functions), named=named, parallel=parallel, legacy=legacy)


def _check_functions(functions: Sequence[Function], field: str) -> set[str]:
    if not functions:
        raise InvalidInput(f"{field} is empty: list at least one, or leave it out", field)
    if len(functions) > MAX_TOOLS:
        raise InvalidInput(f"{field} has {len(functions)} elements, and at most {MAX_TOOLS} are allowed: leave some out", field)
    names: set[str] = set()
    for i, function in enumerate(functions):
        where = f"{field}.{i}.name" if field == "functions" else f"{field}.{i}.function.name"
        if not _NAME.fullmatch(function.name):
            raise InvalidInput(f"{where} must be 1 to 256 letters, digits or _.:/-, got {function.name!r}", where)
        if function.name in names:
            raise InvalidInput(f"{where}: two functions are called {function.name!r}: rename one", where)
        names.add(function.name)
        schema = function.parameters
        if schema and schema.get("type", "object") != "object":
            where = where.removesuffix("name") + "parameters"
            raise InvalidInput(f"{where} must be the schema of an object, got type {schema['type']!r}", where)
    return names


def _named(choice: Mapping[str, Any], field: str, names: set[str], legacy: bool) -> str:
    """The function that {"type": "function", "function": {"name": ...}} names, or {"name": ...} of old."""
    inner: Any = choice
    if not legacy:
        kind = choice.get("type")
        if kind in ("allowed_tools", "custom"):
            raise NotSupportedYet(f"{field}.type {kind!r} is not supported: name a function", field + ".type")
        inner = choice.get("function")
        unknown = choice.keys() - {"type", "function"}
        if kind not in (None, "function") or not isinstance(inner, Mapping) or unknown:
            raise InvalidInput(f'{field} must be a word or {{"type": "function", "function": {{"name": ...}}}}, got {dict(choice)!r}',
                               field)
    name = inner.get("name")
    if not isinstance(name, str) or inner.keys() != {"name"}:
        raise InvalidInput(f"{field} must name a function and nothing else, got {dict(choice)!r}", field)
    if name not in names:
        raise InvalidInput(f"{field} names {name!r}, which is not among the functions{nearest(name, names)}", field)
    return name
