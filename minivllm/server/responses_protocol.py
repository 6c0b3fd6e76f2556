"""The request model of `POST /v1/responses`, OpenAI's newer form of a chat, and its translation to a chat request.

    input, instructions, tools ──▶ ChatRequest ──▶ as in the chat endpoint ──▶ deltas ──▶ output items, or named events
                                                                                          (responses_formatter.py)

A request may continue a stored response (`previous_response_id`) or refer to its items (`response_store.py`), or send the earlier items
again. Both give the same prompt, of which the prefix cache saves most of the computation.
"""
from __future__ import annotations

import json
import re
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from minivllm.errors import InvalidInput, NotSupportedYet, UnknownField, nearest, unknown_field
from minivllm.server.chat_protocol import ChatRequest, message_content, refusals_as_text
from minivllm.server.errors import ApiError
from minivllm.server.parsing import convert
from minivllm.server.protocol import NO_EFFECT, SharedFields, Strings
from minivllm.server.strict import StrictModel

LOGPROBS = "message.output_text.logprobs"  # the value of `include` that requests log-probabilities
# Values of `include` that clients send routinely and that never apply here, so leaving them out of the response is correct.
NOTHING_TO_INCLUDE = frozenset({
    "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
})
_TOOL_OPTIONS = ("allowed_callers", "async", "defer_loading", "output_schema")  # OpenAI's options of a tool; none is built here
_NULL: dict[str, Any] = {"type": "null"}
_OBJECTS: dict[str, Any] = {"type": "array", "items": {"type": "object"}}


class TextConfig(StrictModel):
    """The format of the output text."""

    format: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, _NULL]})] = None
    UNSUPPORTED = types.MappingProxyType({"verbosity": ("medium",)})


class ReasoningConfig(StrictModel):
    """The reasoning effort. There are no summaries here: the reasoning itself is an output item."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    INERT = frozenset({"summary", "generate_summary"})
    UNSUPPORTED = types.MappingProxyType({"context": ("auto",), "mode": ("standard",)})


class ResponsesRequest(SharedFields):
    """`POST /v1/responses`."""

    input: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _OBJECTS]})]  # a text, or a list of items
    instructions: str | None = None  # a system message in front of the input
    max_output_tokens: int | None = Field(default=None, ge=1)  # most tokens of the output
    top_logprobs: int | None = Field(default=None, ge=-1)
    include: Strings = None  # message.output_text.logprobs requests log-probabilities
    metadata: dict[str, str] | None = None  # returned with the response
    text: TextConfig | None = None  # the format of the output, as response_format in a chat
    reasoning: ReasoningConfig | None = None  # how much the model reasons, if its chat template can tell it
    tools: Annotated[list[Any] | None, WithJsonSchema({"anyOf": [_OBJECTS, _NULL]})] = None  # functions that the model may call
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, _NULL]})] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None  # keep the response; false: do not
    previous_response_id: str | None = None  # a stored response to continue
    truncation: Literal["auto", "disabled"] | None = None  # auto: OpenAI drops items that do not fit; here they are an error

    INERT = NO_EFFECT | {"max_tool_calls"}  # the latter limits calls of OpenAI's own tools, and there are none here
    UNSUPPORTED = types.MappingProxyType({
        "access_programs": (), "background": (False,), "background_options": (), "image": (), "conversation": (),
        "moderation": (), "prompt": (),
        "context_management": ([],),
        "n": (1,), "prompt_logprobs": (), "return_token_ids": (False,),
    })
    # Fields that the chat request has under the same name.
    SAME: ClassVar[tuple[str, ...]] = (
        *(name for name in SharedFields.model_fields if name != "stream_options"), "parallel_tool_calls", "chat_template_kwargs",
    )

    def ignored_fields(self, permissive: bool, path: str = "") -> list[str]:
        ignored = super().ignored_fields(permissive, path) + (["truncation"] if self.truncation == "auto" else [])
        return ignored + [f"include.{i}" for i, name in enumerate(self.include or ()) if name in NOTHING_TO_INCLUDE]

    def check(self) -> None:
        """Rules that the chat request does not have."""
        super().check()
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            raise NotSupportedYet("stream_options.continuous_usage_stats is not supported here: the last event has the usage",
                                  "stream_options.continuous_usage_stats")
        for i, name in enumerate(self.include or ()):
            if name != LOGPROBS and name not in NOTHING_TO_INCLUDE:
                raise InvalidInput(f"include: unknown value {name!r}{nearest(name, (LOGPROBS, *NOTHING_TO_INCLUDE))}", f"include.{i}")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise InvalidInput(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    def as_chat(self, conversation: Conversation) -> ChatRequest:
        """The same request as a chat request. Raises for everything that the chat endpoint does not support."""
        text_format = None if self.text is None else self.text.format
        fields: dict[str, Any] = {
            **{name: getattr(self, name) for name in self.SAME},
            "messages": conversation.messages, "max_completion_tokens": self.max_output_tokens, "reasoning_effort": self.effort,
            "response_format": None if text_format is None else _chat_format(text_format),
            # An empty list requests no tools.
            "tools": [_chat_tool(tool, f"tools.{i}") for i, tool in enumerate(self.tools)] if self.tools else None,
        }
        if LOGPROBS in (self.include or ()):
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.tool_choice is not None and (self.tools or self.tool_choice not in ("auto", "none")):
            fields["tool_choice"] = _chat_tool_choice(self.tool_choice)
        chat = convert(_TranslatedChatRequest, {name: value for name, value in fields.items() if value is not None})
        conversation.ignored += chat.ignored_fields(permissive=False)
        return chat


class _TranslatedChatRequest(ChatRequest):
    """A chat request made from a responses request."""

    FORMAT: ClassVar[str] = "text.format"


# -- input items as messages ------------------------------------------------------------------------------------------


class Conversation:
    """A chat's messages, made from input items. Adds the names of items without effect to `ignored`."""

    def __init__(self, instructions: str | None, ignored: list[str], find: Callable[[str], dict[str, Any]]) -> None:
        """`find` gives a stored item by its id."""
        self.items: list[dict[str, Any]] = []  # of the request itself, without references
        self._find = find
        self.messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
        self.ignored = ignored
        self._reasoning: tuple[str, str] | None = None  # text and item name of reasoning whose message has not come yet
        self._sources: dict[int, str] = {}  # index of a message -> name of the item that its reasoning came from

    def read(self, earlier: Iterable[dict[str, Any]], value: Any) -> None:
        """The items of an earlier response, and the `input` of a request: a text, or items. An item that is there already is skipped."""
        known: dict[str, dict[str, Any]] = {}  # by id
        for i, item in enumerate(earlier):
            known[item["id"]] = item
            self._add(item, f"previous_response_id.{i}")
        if isinstance(value, str):
            value = [{"type": "message", "role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            raise InvalidInput("input must be a string or a non-empty list of items", "input")
        for i, item in enumerate(value):
            where = f"input.{i}"
            if not isinstance(item, dict):
                raise InvalidInput(f"{where} must be an object such as {{\"role\": \"user\", \"content\": ...}}", where)
            is_reference = item.get("type") == "item_reference" or ("id" in item and not any(v for k, v in item.items() if k != "id"))
            if is_reference:
                self._check_fields(item, where, ("id",))
            name = item.get("id")
            if not isinstance(name, str) and (is_reference or name is not None):
                raise InvalidInput(f"{where}.id must be a string, got {name!r}", where + ".id")
            if name in known and (is_reference or all(known[name].get(key) == v for key, v in item.items() if v is not None)):
                continue
            item = self._find(str(name)) if is_reference else item
            item = {**item, "type": item.get("type") or "message", "id": name or f"item_{uuid.uuid4().hex}"}
            self._add(item, where)
            known[item["id"]] = item
            self.items.append(item)
        self._drop_reasoning()

    def _add(self, item: dict[str, Any], where: str) -> None:
        kind = item["type"]
        if kind == "message":
            self._add_message(item, where)
        elif kind == "function_call":
            self._add_call(item, where)
        elif kind == "function_call_output":
            self._check_fields(item, where, ("call_id", "output"), ("name",))
            name = {"name": item["name"]} if item.get("name") is not None else {}
            content = "" if item["output"] in (None, []) else self._text(item, where, "output")
            self._append({"role": "tool", "tool_call_id": item["call_id"], "content": content, **name})
        elif kind == "reasoning":
            self._add_reasoning(item, where)
        elif kind == "custom_tool_call":  # of a tool whose only argument is a text
            call = {name: value for name, value in item.items() if name != "input"}
            self._add_call({**call, "arguments": json.dumps({"input": item.get("input")})}, where)
        elif kind == "custom_tool_call_output":
            self._add({**item, "type": "function_call_output"}, where)
        else:
            raise NotSupportedYet(f"{where}: items of type {kind!r} are not supported yet", where + ".type")

    def _add_message(self, item: dict[str, Any], where: str) -> None:
        """An assistant's answer may have been empty."""
        is_empty = item.get("role") == "assistant" and item.get("content") in (None, [])
        self._check_fields(item, where, ("role",) if is_empty else ("role", "content"), ("content",))
        if not isinstance(item["role"], str):
            raise InvalidInput(f"{where}.role must be a string", where + ".role")
        item = {**item, "content": refusals_as_text(item.get("content"))}
        self._append({"role": item["role"], "content": None if is_empty else self._text(item, where, "content")})

    def _add_call(self, item: dict[str, Any], where: str) -> None:
        """A function call. Consecutive calls become one message of the assistant."""
        self._check_fields(item, where, ("call_id", "name", "arguments"), ("parsed_arguments",))
        for name in ("call_id", "name", "arguments"):
            if not isinstance(item[name], str):
                raise InvalidInput(f"{where}.{name} must be a string", f"{where}.{name}")
        call = {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
        if self._reasoning is None and self.messages and self.messages[-1]["role"] == "assistant":
            self.messages[-1].setdefault("tool_calls", []).append(call)
        else:
            self._append({"role": "assistant", "content": None, "tool_calls": [call]})

    def _add_reasoning(self, item: dict[str, Any], where: str) -> None:
        """Reasoning of an earlier turn. It goes into the assistant's message that follows it, if the chat template takes it."""
        self._check_fields(item, where, (), ("summary", "content", "encrypted_content"))
        self._drop_reasoning()
        parts = item.get("content") or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise InvalidInput(f"{where}.content must be a list of parts with text", where + ".content")
        self._reasoning = "\n".join(part["text"] for part in parts), where
        if not self._reasoning[0]:
            self._drop_reasoning()

    def _check_fields(self, item: dict[str, Any], where: str, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        """Refuse a missing or an unknown field. Null in an unknown one has no effect."""
        known = (*required, *optional, "type", "id", "status", "phase")  # the last three are in items that this API returned
        for name in required:
            if name not in item:
                raise InvalidInput(f"{where}.{name} is required", f"{where}.{name}")
        for name in item.keys() - known:
            if item[name] is not None:
                raise UnknownField(unknown_field(f"{where}.{name}", name, known), f"{where}.{name}")
            self.ignored.append(f"{where}.{name}")

    def _text(self, item: dict[str, Any], where: str, name: str) -> str | list[dict[str, str]]:
        return message_content(item[name], f"{where}.{name}", self.ignored)

    def _append(self, message: dict[str, Any]) -> None:
        if message["role"] != "assistant":
            self._drop_reasoning()
        elif self._reasoning is not None:
            message["reasoning"], self._sources[len(self.messages)] = self._reasoning
            self._reasoning = None
        self.messages.append(message)

    def _drop_reasoning(self) -> None:
        if self._reasoning is not None:
            self.ignored.append(self._reasoning[1])
            self._reasoning = None

    def item_name(self, name: str) -> str:
        """What an ignored part of the chat request came from."""
        found = re.fullmatch(r"messages\.(\d+)\.reasoning_content", name)
        if found is not None:
            return self._sources[int(found[1])]
        return next((re.sub(pattern, ours, name) for pattern, ours in _NAMES if "." in name and re.match(pattern, name)), name)


# -- other fields as a chat request has them --------------------------------------------------------------------------


def _chat_format(form: Any) -> Any:
    """A chat request has the parts of `{"type": "json_schema", "name": ..., "schema": ...}` one level deeper."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}
    return form


def _chat_tool(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str):
        raise InvalidInput(f'{where}.type is required: a tool is an object such as {{"type": "function", "name": ...}}', where + ".type")
    if kind != "function" and "parameters" not in tool:  # a tool that the chat endpoint leaves out
        return {"type": kind}
    for name in _TOOL_OPTIONS:
        if tool.get(name) not in (None, False):
            raise NotSupportedYet(f"{where}.{name} is not supported: leave it out", f"{where}.{name}")
    return {"type": kind, "function": {name: value for name, value in tool.items() if name not in ("type", *_TOOL_OPTIONS)}}


def _chat_tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    if not isinstance(choice, dict) or choice.get("type") == "function":
        name = choice.get("name") if isinstance(choice, dict) else None
        if not isinstance(name, str) or choice.keys() != {"type", "name"}:
            raise InvalidInput('tool_choice must be a word or {"type": "function", "name": ...}', "tool_choice")
        return {"type": "function", "function": {"name": name}}
    if choice.get("type") == "allowed_tools":
        entries = choice.get("tools")
        tools = [{"type": e.get("type"), "function": {"name": e.get("name")}} if isinstance(e, dict) else e for e in entries] if isinstance(
            entries, list) else entries
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    raise NotSupportedYet(f"tool_choice.type {choice.get('type')!r} is not supported: name a function", "tool_choice.type")


# Patterns of fields of the chat request, and their names here, for errors.
_NAMES = (
    (r"max_completion_tokens", "max_output_tokens"), (r"response_format(\.json_schema)?", "text.format"), (r"logprobs", "include"),
    (r"reasoning_effort", "reasoning.effort"), (r"(tools\.\d+\.)function\.", r"\1"),
    (r"tool_choice\.allowed_tools", "tool_choice"),
)


@contextmanager
def responses_names() -> Iterator[None]:
    """Rename the fields in the chat request's errors to those that the client sent."""
    try:
        yield
    except (InvalidInput, ApiError) as error:
        param = error.param or ""
        if param.startswith("messages"):
            error.param = "input"  # no index: messages and input items are numbered differently
            error.message = re.sub(r"messages\.\d+\.", "input: ", error.message).replace("messages", "input")
        error.message = re.sub(r"\b(the|your) messages\b", r"\1 input", error.message)  # in errors of other fields, such as the limit
        for pattern, name in _NAMES:
            if re.match(pattern, param):
                error.param, error.message = re.sub(pattern, name, param), re.sub(pattern, name, error.message)
        raise
