"""`POST /v1/responses`, stateless: OpenAI's newer shape of a chat, told as a chat to everything behind it.

    input, instructions, tools ──▶ ChatRequest ──▶ the chat endpoint's Job ──▶ deltas ──▶ output items, or named events
                                                                                          (responses_answer.py)

Nothing is stored, so what refers to an earlier response (`previous_response_id`, `conversation`, items by reference) is refused;
send the earlier items again: the prefix cache finds their tokens.
"""
from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from minivllm.errors import InvalidInput, NotSupportedYet, nearest
from minivllm.sampling_params import MAX_LOGPROBS
from minivllm.server.errors import ApiError
from minivllm.server.protocol import ChatRequest, SharedFields, Strict, Strings, convert
from minivllm.server.responses_answer import ResponsesAnswer

if TYPE_CHECKING:
    from starlette.responses import Response

    from minivllm.server.app import Frontend

LOGPROBS = "message.output_text.logprobs"  # what `include` must name for log-probabilities
# What clients send routinely and what this server has nothing of, so that leaving it out of the answer is right.
NOTHING_TO_INCLUDE = frozenset({
    "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
})


# What a tool of OpenAI's may have beside its function; none of it is for a model that runs here.
_TOOL_OPTIONS = ("allowed_callers", "async", "defer_loading", "output_schema")


class TextConfig(Strict):
    """The shape of the answer's text."""

    format: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]})] = None
    UNSUPPORTED = types.MappingProxyType({"verbosity": ("medium",)})


class ReasoningConfig(Strict):
    """How much to think. A summary of the reasoning is nobody's to give here; the reasoning itself comes as an item."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    INERT = frozenset({"summary", "generate_summary"})
    UNSUPPORTED = types.MappingProxyType({"context": ("auto",), "mode": ("standard",)})


class ResponsesRequest(SharedFields):
    """`POST /v1/responses`."""

    input: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include: Strings = None
    metadata: dict[str, str] | None = None  # given back with the response
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: Annotated[list[Any] | None, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]})] = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]})] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    INERT = frozenset({"user", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
                       "safety_identifier"})
    UNSUPPORTED = types.MappingProxyType({
        "access_programs": (), "background": (False,), "background_options": (), "image": (), "conversation": (),
        "previous_response_id": (), "max_tool_calls": (), "moderation": (), "prompt": (),
        "truncation": ("disabled",), "context_management": ([],),
        "n": (1,), "prompt_logprobs": (), "return_token_ids": (False,),
    })
    # Names here -> names of the chat request.
    RENAMED: ClassVar[dict[str, str]] = {"max_output_tokens": "max_completion_tokens"}
    SAME: ClassVar[tuple[str, ...]] = (
        *(name for name in SharedFields.model_fields if name != "stream_options"), "parallel_tool_calls", "chat_template_kwargs",
    )

    def ignored(self, permissive: bool) -> list[str]:
        names = self.extras("", permissive)
        if self.text is not None:
            names += self.text.extras("text.", permissive)
        if self.reasoning is not None:
            names += self.reasoning.extras("reasoning.", permissive)
        if self.stream_options is not None:
            names += self.stream_options.extras("stream_options.", permissive)
        names += [f"include.{i}" for i, name in enumerate(self.include or ()) if name in NOTHING_TO_INCLUDE]
        return names

    def check(self) -> None:
        """Rules that the chat request does not have."""
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidInput("stream_options is for streams only: leave it out, or set stream to true", "stream_options")
            if self.stream_options.continuous_usage_stats:
                raise NotSupportedYet("stream_options.continuous_usage_stats is not supported here: usage comes with the last event",
                                      "stream_options.continuous_usage_stats")
        for i, name in enumerate(self.include or ()):
            if name != LOGPROBS and name not in NOTHING_TO_INCLUDE:
                raise InvalidInput(f"include: unknown value {name!r}{nearest(name, (LOGPROBS, *NOTHING_TO_INCLUDE))}", f"include.{i}")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise InvalidInput(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    def as_chat(self, conversation: Conversation) -> ChatRequest:
        """The same request in the chat endpoint's words."""
        fields: dict[str, Any] = {name: value for name in self.SAME if (value := getattr(self, name)) is not None}
        fields |= {chat: value for own, chat in self.RENAMED.items() if (value := getattr(self, own)) is not None}
        fields["messages"] = conversation.messages
        if self.effort is not None:
            fields["reasoning_effort"] = self.effort
        if self.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = _chat_format(self.text.format)
        if self.tools:  # an empty list asks for nothing
            fields["tools"] = [_chat_tool(tool, f"tools.{i}") for i, tool in enumerate(self.tools)]
        if self.tool_choice is not None and (self.tools or self.tool_choice not in ("auto", "none")):
            fields["tool_choice"] = _chat_tool_choice(self.tool_choice)
        return convert(_Chat, fields)


class _Chat(ChatRequest):
    """A chat that was asked for here."""

    FORMAT: ClassVar[str] = "text.format"


# Names of the chat request -> names here, for errors.
_CHAT_NAMES = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input", "logprobs": "include",
               "reasoning_effort": "reasoning.effort"}
_TOOL = re.compile(r"(tools\.\d+\.)function\.")  # one level deeper in a chat


@contextmanager
def own_names() -> Iterator[None]:
    """Errors of the chat request, about the fields that the client sent."""
    try:
        yield
    except (InvalidInput, ApiError) as error:
        first, dot, rest = (error.param or "").partition(".")
        if first == "tools" and error.param is not None:
            error.param, error.message = _TOOL.sub(r"\1", error.param), _TOOL.sub(r"\1", error.message)
        elif first in _CHAT_NAMES:
            error.param = _CHAT_NAMES[first] + (dot + rest if first != "messages" else "")  # messages are numbered otherwise than items
            error.message = re.sub(r"messages\.\d+\.", "input: ", error.message).replace(first, _CHAT_NAMES[first])
        raise


# -- input items as messages --------------------------------------------------------------------------------------------------


class Conversation:
    """A chat's messages, made of items one after the other."""

    def __init__(self, ignored: list[str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self._ignored = ignored
        self._reasoning: dict[int, str] = {}  # message -> the item that its reasoning was
        self._thought: tuple[str, str] | None = None  # text and item of reasoning that waits for what came of it

    def read(self, value: Any) -> None:
        """The `input` of a request: a text, or items."""
        if isinstance(value, str):
            self.messages.append({"role": "user", "content": value})
            return
        if not isinstance(value, list) or not value:
            raise InvalidInput("input must be a string or a non-empty list of items", "input")
        for i, item in enumerate(value):
            where = f"input.{i}"
            if not isinstance(item, dict):
                raise InvalidInput(f"{where} must be an object such as {{\"role\": \"user\", \"content\": ...}}", where)
            self._add(item, where)
        self._drop_thought()

    def _add(self, item: dict[str, Any], where: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._add_message(item, where)
        elif kind == "function_call":
            self._add_call(item, where)
        elif kind == "function_call_output":
            _fields(item, where, ("call_id", "output"), ("name",))
            self._drop_thought()
            content = _content(item["output"], where + ".output", self._ignored)
            name = {"name": item["name"]} if item.get("name") is not None else {}
            self.messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content, **name})
        elif kind == "reasoning":
            self._add_reasoning(item, where)
        else:
            raise NotSupportedYet(f"{where}: items of type {kind!r} are not supported yet", where + ".type")

    def _add_message(self, item: dict[str, Any], where: str) -> None:
        _fields(item, where, ("role", "content"))
        if not isinstance(item["role"], str):
            raise InvalidInput(f"{where}.role must be a string", where + ".role")
        message = {"role": item["role"], "content": _content(item["content"], where + ".content", self._ignored)}
        if item["role"] == "assistant":
            self._assistant(message)
        else:
            self._drop_thought()
            self.messages.append(message)

    def _add_call(self, item: dict[str, Any], where: str) -> None:
        """A call of a function; calls in a row are one message of the assistant."""
        _fields(item, where, ("call_id", "name", "arguments"))
        for name in ("call_id", "name", "arguments"):
            if not isinstance(item[name], str):
                raise InvalidInput(f"{where}.{name} must be a string", f"{where}.{name}")
        call = {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
        if self._thought is None and self.messages and self.messages[-1]["role"] == "assistant":
            self.messages[-1].setdefault("tool_calls", []).append(call)
        else:
            self._assistant({"role": "assistant", "content": None, "tool_calls": [call]})

    def _add_reasoning(self, item: dict[str, Any], where: str) -> None:
        """Of an earlier turn: for the assistant's message that it led to, as far as the chat template takes it."""
        _fields(item, where, (), ("summary", "content", "encrypted_content"))
        self._drop_thought()
        parts = item.get("content") or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise InvalidInput(f"{where}.content must be a list of parts with text", where + ".content")
        self._thought = "\n".join(part["text"] for part in parts), where
        if not self._thought[0]:
            self._drop_thought()

    def _assistant(self, message: dict[str, Any]) -> None:
        if self._thought is not None:
            message["reasoning"], self._reasoning[len(self.messages)] = self._thought
            self._thought = None
        self.messages.append(message)

    def _drop_thought(self) -> None:
        if self._thought is not None:
            self._ignored.append(self._thought[1])
            self._thought = None

    def own_name(self, name: str) -> str:
        """An ignored part of the messages, as the item that it came from."""
        found = re.fullmatch(r"messages\.(\d+)\.reasoning_content", name)
        return name if found is None else self._reasoning[int(found[1])]


def _fields(item: dict[str, Any], where: str, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    known = (*required, *optional, "type", "id", "status", "phase")  # the last three: of items that this API gave out
    for name in required:
        if name not in item:
            raise InvalidInput(f"{where}.{name} is required", f"{where}.{name}")
    for name, value in item.items():
        if name not in known and value is not None:
            raise InvalidInput(f"unknown field '{where}.{name}'{nearest(name, known)}", f"{where}.{name}")


def _content(content: Any, where: str, ignored: list[str]) -> str | list[dict[str, str]]:
    """Text parts under the names that they have in a chat."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidInput(f"{where} must be a string or a non-empty list of text parts", where)
    parts = []
    for i, part in enumerate(content):
        here = f"{where}.{i}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text"):
            raise NotSupportedYet(f"{here}: this model takes text only, and the part's type is {kind!r}", here + ".type")
        if not isinstance(part.get("text"), str):
            raise InvalidInput(f"{here}.text must be a string", here + ".text")
        for name in part.keys() - {"type", "text"}:
            if name not in ("annotations", "logprobs", "prompt_cache_breakpoint"):
                raise InvalidInput(f"unknown field '{here}.{name}'{nearest(name, ('type', 'text'))}", f"{here}.{name}")
            if part[name]:
                ignored.append(f"{here}.{name}")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _chat_format(form: Any) -> Any:
    """`{"type": "json_schema", "name": ..., "schema": ...}` here is one level deeper in a chat."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}
    return form


def _chat_tool(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise NotSupportedYet(f"{where}: only tools of type 'function' are supported, got {kind!r}", where + ".type")
    for name in _TOOL_OPTIONS:
        if tool.get(name) not in (None, False):
            raise NotSupportedYet(f"{where}.{name} is not supported: leave it out", f"{where}.{name}")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name not in ("type", *_TOOL_OPTIONS)}}


def _chat_tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    if not isinstance(choice, dict) or choice.get("type") == "function":
        name = choice.get("name") if isinstance(choice, dict) else None
        if not isinstance(name, str) or choice.keys() != {"type", "name"}:
            raise InvalidInput('tool_choice must be a word or {"type": "function", "name": ...}', "tool_choice")
        return {"type": "function", "function": {"name": name}}
    raise NotSupportedYet(f"tool_choice.type {choice.get('type')!r} is not supported: name a function", "tool_choice.type")


# -- answering ----------------------------------------------------------------------------------------------------------------


async def respond(frontend: Frontend, body: ResponsesRequest) -> Response:
    """Answer one request."""
    from minivllm.server.generation import GenerationResponse
    from minivllm.server.logprobs import NoNames

    ignored = body.ignored(frontend.config.permissive)
    body.check()
    conversation = Conversation(ignored)
    if body.instructions is not None:
        conversation.messages.append({"role": "system", "content": body.instructions})
    conversation.read(body.input)
    with own_names():
        chat = body.as_chat(conversation)
        chat.ignored(False)  # raises over what the chat endpoint does not support
        job = await frontend.chat_job(chat, ignored, "resp_")
    job = dataclasses.replace(job, ignored=tuple(map(conversation.own_name, job.ignored)))
    return GenerationResponse(frontend.client, frontend.running, ResponsesAnswer(job, frontend.tokenizer or NoNames(), body))
