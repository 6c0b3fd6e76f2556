"""Tools: what a request may say about them, and what its output must look like.

    tool_choice   the output is                                    enforced by
    none          text; the model does not see the tools
    auto          text, calls in the model's own format, or both   no grammar, except for `strict` tools; a parser finds the calls
    required      a JSON array of calls                            a grammar made of the schemas of all parameters
    a function    a JSON object, its arguments                     a grammar: the schema of its parameters
    allowed_tools as auto or required, with some of the tools      as these

`functions` and `function_call` are OpenAI's older names (2023) with at most one call. They are answered in their own form.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import FailFast, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from minivllm.engine.json_schema import map_parts
from minivllm.engine.tool_schema import CheckBudget, relaxed
from minivllm.errors import InvalidInput, NotSupportedYet, nearest
from minivllm.sampling_params import MAX_NESTING, nested_deeper
from minivllm.server.strict import StrictModel

MAX_TOOLS = 1024
MAX_LEVELS = MAX_NESTING - 6  # of one function's parameters: the schema of all calls has 6 levels around them
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_NO_PARAMETERS = {"type": "object", "properties": {}}


class Function(StrictModel):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # with tool_choice "auto" too, arguments must match the schema


class Tool(StrictModel):
    """An element of `tools`."""

    type: str = "function"
    function: Function | None = None

    def ignored_fields(self, permissive: bool, path: str = "") -> list[str]:
        """A tool that OpenAI's servers run themselves, such as a web search, is left out: this server can run none."""
        if self.type != "function":
            if self.function is not None or nearest(self.type, ("function",)):
                raise InvalidInput(f"{path}type must be 'function' for a function, got {self.type!r}: correct it", path + "type")
            return [path + self.type]
        ignored = super().ignored_fields(permissive, path)
        if self.function is None:
            raise InvalidInput(f"{path}function is required", path + "function")
        return ignored


class CalledFunction(StrictModel):
    """The function of an earlier call. `arguments` is JSON text, as responses have it, or an object."""

    INERT = frozenset({"parsed_arguments"})  # the arguments once more, as an object of the client
    name: str
    arguments: Annotated[Any, WithJsonSchema({"type": ["string", "object", "null"]})] = None

    def for_template(self, path: str) -> dict[str, Any]:
        """Text that is no JSON is accepted: a call that was cut off by the token limit comes back with its conversation."""
        if not isinstance(self.arguments, (str, dict, type(None))):
            where = path + "arguments"
            raise InvalidInput(f"{where} must be a JSON object or its text, got {self.arguments!r}", where)
        return {"name": self.name, "arguments": self.arguments}


class ToolCall(StrictModel):
    """An earlier call, in an assistant's message that the client sends back."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction
    INERT = frozenset({"index", "provider_specific_fields"})

    def ignored_fields(self, permissive: bool, path: str = "") -> list[str]:
        if self.type not in (None, "function"):
            raise NotSupportedYet(f"{path}type {self.type!r} is not supported: send calls of functions", path + "type")
        return super().ignored_fields(permissive, path)


def _check_tool_choice(value: Any) -> str | dict[str, Any] | None:
    if value is None or isinstance(value, (str, dict)):
        return value
    raise PydanticCustomError("tool_choice", "Input should be a string or an object that names a function")


ToolChoice: TypeAlias = Annotated[
    str | dict[str, Any] | None, PlainValidator(_check_tool_choice, json_schema_input_type=str | dict[str, Any] | None),
]
Tools: TypeAlias = Annotated[list[Tool] | None, FailFast()]
Functions: TypeAlias = Annotated[list[Function] | None, FailFast()]
ToolCalls: TypeAlias = Annotated[list[ToolCall] | None, FailFast()]


@dataclass(frozen=True, kw_only=True)
class ToolSpec:
    """The tools of one request, and whether and how the model must call them."""

    mode: Literal["auto", "required", "named"]
    functions: tuple[Function, ...]
    named: str | None = None
    parallel: bool = True
    legacy: bool = False  # the request used `functions`

    @property
    def field(self) -> str:
        """The name of the request's field, for errors."""
        return "functions" if self.legacy else "tools"

    @property
    def first_strict(self) -> int | None:
        """In mode "auto", the index of the first function that sets `strict`; otherwise None."""
        return next((i for i, function in enumerate(self.functions) if function.strict), None) if self.mode == "auto" else None

    @property
    def forced(self) -> bool:
        """Whether the output consists of calls. Their format is the server's own and never content, even if it is cut off."""
        return self.mode != "auto"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    def for_template(self) -> list[dict[str, Any]]:
        """The tools in the form that chat templates expect."""
        return [{"type": "function", "function": {
            "name": f.name, **({} if f.description is None else {"description": f.description}),
            "parameters": {**f.parameters, "type": "object"} if f.parameters and "type" in f.parameters else f.parameters or _NO_PARAMETERS,
        }} for f in self.functions]

    def _needs_schema(self, function: Function) -> bool:
        """Whether a grammar enforces the function's arguments."""
        return bool(function.strict) if self.mode == "auto" else self.named in (None, function.name)

    @cached_property
    def _enforced(self) -> list[tuple[dict[str, Any], str | None]]:
        """For each function the schema that is enforced, and why it is not all of the function's own."""
        budget = CheckBudget()
        return [_enforceable(_arguments(f), budget) if self._needs_schema(f) else ({"type": "object"}, None) for f in self.functions]

    def enforced_schemas(self) -> list[dict[str, Any]]:
        """For each function, the schema of its arguments: any object if they are not enforced."""
        return [schema for schema, _ in self._enforced]

    def left_open(self) -> list[str]:
        """Names of schemas that are not enforced completely. Refuses one that is `strict`."""
        names = []
        for i, (function, (_, why)) in enumerate(zip(self.functions, self._enforced, strict=True)):
            if why is None:
                continue
            names.append(f"{self.field}.{i}.parameters" if self.legacy else f"{self.field}.{i}.function.parameters")
            if function.strict:
                raise InvalidInput(f"{names[-1]} cannot be enforced, and the function is strict: {why}; change it, or leave strict out",
                                   names[-1])
        return names

    def schema(self) -> dict[str, Any] | None:
        """The JSON schema of the whole output; None if the output is free text."""
        if self.mode == "auto":
            return None
        if self.mode == "named":
            return next(schema for f, (schema, _) in zip(self.functions, self._enforced, strict=True) if f.name == self.named)
        calls = self.call_schema("parameters")
        array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls["anyOf"]}}
        if not self.parallel:
            array["maxItems"] = 1
        return {**array, **{name: value for name, value in calls.items() if name == "$defs"}}

    def call_schema(self, key: str) -> dict[str, Any]:
        """The JSON schema of one call, with its arguments under `key`."""
        definitions: dict[str, Any] = {}
        calls = [_call(f, key, _embed(schema, i, definitions))
                 for i, (f, (schema, _)) in enumerate(zip(self.functions, self._enforced, strict=True))]
        return {"anyOf": calls, "$defs": definitions} if definitions else {"anyOf": calls}


def _call(function: Function, key: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": ["name", key], "additionalProperties": False,
            "properties": {"name": {"enum": [function.name]}, key: arguments}}


def _arguments(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments: always an object, an empty one if the function has no parameters."""
    schema = {**(function.parameters or {}), "type": "object"}
    open_keys = ("properties", "patternProperties", "additionalProperties", "$ref", "allOf", "anyOf", "oneOf")
    return schema if any(name in schema for name in open_keys) else {**schema, "properties": {}}


def _enforceable(schema: dict[str, Any], budget: CheckBudget) -> tuple[dict[str, Any], str | None]:
    """What a grammar can enforce of a schema, and why that is not all of it."""
    if not nested_deeper(schema, MAX_LEVELS):
        return relaxed(schema, budget)
    properties = schema.get("properties")
    if isinstance(properties, Mapping):  # leave the properties open that are too deep
        schema = {**schema, "properties": {name: {} if isinstance(part, Mapping) and nested_deeper(part, MAX_LEVELS - 2) else part
                                           for name, part in properties.items()}}
    slim = {"type": "object"} if nested_deeper(schema, MAX_LEVELS) else relaxed(schema, budget)[0]
    return slim, f"it is nested deeper than {MAX_LEVELS} levels"


def _embed(schema: dict[str, Any], index: int, definitions: dict[str, Any]) -> dict[str, Any]:
    """A function's schema as a part of another schema. If it refers to its own root ("#..."), it becomes a definition in `definitions`."""
    name = f"tool{index}"
    moved = _with_root({k: v for k, v in schema.items() if k != "$id"}, f"#/$defs/{name}")
    if moved == schema:
        return schema
    definitions[name] = moved
    return {"$ref": f"#/$defs/{name}"}


def _with_root(schema: dict[str, Any], root: str) -> dict[str, Any]:
    """The schema with references to its own root changed to `root`."""
    moved = map_parts(schema, lambda part: _with_root(part, root))
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = root + reference[1:]
    return moved


def tool_spec(
    tools: Sequence[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None,
    functions: Sequence[Function] | None = None, function_call: str | dict[str, Any] | None = None,
) -> ToolSpec | None:
    """The tools of a request; None if the model sees none."""
    legacy, kept = tools is None and choice is None, dict(enumerate(functions or ()))
    field, choice_field = ("functions", "function_call") if legacy else ("tools", "tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed_tools(tools or (), choice)
    if legacy:
        choice = function_call
    else:
        kept = {i: tool.function for i, tool in enumerate(tools or ()) if tool.type == "function" and tool.function is not None}
        newer = None if tools is None else list(kept.values())
        called: Any = {"type": "function", "function": function_call} if isinstance(function_call, Mapping) else function_call
        if functions not in (None, newer) or called not in (None, choice or "auto"):
            raise InvalidInput("functions and function_call are the old names of tools and tool_choice: send one pair", "functions")
        functions = newer if newer or not tools else None
    if functions is None:
        if choice in (None, "none", "auto"):
            return None
        _check_kind(choice, choice_field)
        if tools:  # all of them are of other types
            raise InvalidInput(f"{choice_field} needs a function, and this server has no tool of type {tools[0].type!r}: send a function, "
                               f"or leave {choice_field} out", choice_field)
        raise InvalidInput(f"{choice_field} needs {field}: send both, or leave {choice_field} out", choice_field)
    names = _check_functions(kept, field)
    words = ("none", "auto") if legacy else ("none", "auto", "required")
    named = _named_function(choice, choice_field, names, legacy) if isinstance(choice, Mapping) else None
    if isinstance(choice, str) and choice not in words:
        raise InvalidInput(f"{choice_field} must be {', '.join(words)} or name a function, got {choice!r}{nearest(choice, words)}",
                           choice_field)
    if choice == "none":
        return None
    mode: Literal["auto", "required", "named"] = "named" if named is not None else "required" if choice == "required" else "auto"
    return ToolSpec(mode=mode, functions=tuple(functions), named=named, parallel=not legacy and parallel is not False, legacy=legacy)


def _allowed_tools(tools: Sequence[Tool], choice: Mapping[str, Any]) -> tuple[list[Tool], str]:
    """OpenAI's choice among some of the tools: these tools, and the mode. The model sees no others."""
    where = "tool_choice.allowed_tools"
    allowed = choice.get("allowed_tools")
    listed: Any = allowed.get("tools") if isinstance(allowed, Mapping) else None
    if not isinstance(allowed, Mapping) or not isinstance(listed, list) or choice.keys() | allowed.keys() != {
            "type", "allowed_tools", "mode", "tools"}:
        raise InvalidInput(f'{where} must be {{"mode": ..., "tools": [{{"type": "function", "function": {{"name": ...}}}}]}}', where)
    mode = allowed["mode"]
    if mode not in ("auto", "required"):
        raise InvalidInput(f"{where}.mode must be auto or required, got {mode!r}", f"{where}.mode")
    known = {tool.function.name for tool in tools if tool.function is not None}
    names = set()
    for i, entry in enumerate(listed):
        function = entry.get("function") if isinstance(entry, Mapping) and _check_kind(entry, f"{where}.tools.{i}") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in known:
            raise InvalidInput(f"{where}.tools.{i} names {name!r}, which is not in tools{nearest(str(name), known)}", f"{where}.tools.{i}")
        names.add(name)
    if not names:
        raise InvalidInput(f"{where}.tools is empty: name a function, or set tool_choice to none", f"{where}.tools")
    return [tool for tool in tools if tool.function is None or tool.function.name in names], mode


def _check_functions(functions: Mapping[int, Function], field: str) -> set[str]:
    """The names of the functions. They come with their index in the field."""
    if not functions:
        raise InvalidInput(f"{field} is empty: list at least one function, or leave it out", field)
    if len(functions) > MAX_TOOLS:
        raise InvalidInput(f"{field} has {len(functions)} elements, and at most {MAX_TOOLS} are allowed: leave some out", field)
    names: set[str] = set()
    for i, function in functions.items():
        where = f"{field}.{i}.name" if field == "functions" else f"{field}.{i}.function.name"
        if not _NAME.fullmatch(function.name):
            raise InvalidInput(f"{where} must be 1 to 256 letters, digits or _.:/-, got {function.name!r}", where)
        if function.name in names:
            raise InvalidInput(f"{where}: two functions have the name {function.name!r}: rename one", where)
        names.add(function.name)
        schema = function.parameters
        kind = schema.get("type") if schema else None
        if kind not in (None, "object") and not (isinstance(kind, list) and "object" in kind):  # arguments are never null: see _arguments
            where = where.removesuffix("name") + "parameters"
            raise InvalidInput(f"{where} must be the schema of an object, got type {kind!r}", where)
    return names


def _check_kind(choice: Any, field: str) -> Any:
    """The type of a tool choice. The only tools that can be called here are functions."""
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if isinstance(kind, str) and kind != "function":
        raise NotSupportedYet(f"{field}.type {kind!r} is not supported: name a function", field + ".type")
    return kind


def _named_function(choice: Mapping[str, Any], field: str, names: set[str], legacy: bool) -> str:
    """The function named by {"type": "function", "function": {"name": ...}}, or by {"name": ...} in the older form."""
    inner: Any = choice
    if not legacy:
        kind = _check_kind(choice, field)
        inner = choice.get("function")
        unknown = choice.keys() - {"type", "function"}
        if kind not in (None, "function") or not isinstance(inner, Mapping) or unknown:
            raise InvalidInput(f'{field} must be a word or {{"type": "function", "function": {{"name": ...}}}}, got {dict(choice)!r}',
                               field)
    name = inner.get("name")
    if not isinstance(name, str) or inner.keys() != {"name"}:
        raise InvalidInput(f"{field} must name a function and nothing else, got {dict(choice)!r}", field)
    if name not in names:
        raise InvalidInput(f"{field} names {name!r}, which is not one of the functions{nearest(name, names)}", field)
    return name
