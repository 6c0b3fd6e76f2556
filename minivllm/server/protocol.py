"""What a request may say. Strict: a number in quotes is an error, and no field is ever ignored in silence.

Fields fall into four classes:

    honoured      fields of the classes below
    inert         `INERT`: cannot change the text (`user`, `metadata` ...); accepted, and named in a response header
    unsupported   `UNSUPPORTED`: known to OpenAI's or vLLM's clients and not built here; refused, except for null and the
                  values listed with each name, which ask for nothing
    unknown       everything else: refused with the nearest known name (`--permissive`: treated as inert)

Types are checked here; ranges are checked by `SamplingParams`, once for all doors, unless the API's are narrower.
"""
from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import FailFast, Field, PlainValidator, StringConstraints, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from minivllm.errors import InvalidInput, NotSupportedYet, nearest
from minivllm.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutputsParams
from minivllm.server.errors import ApiError, shorten
from minivllm.server.strict import Strict
from minivllm.server.structured import Schema, read_wish, unknown_fields
from minivllm.server.tools import CalledFunction, Choice, Functions, ToolCalls, Tools, ToolUse, read_tools

IGNORED_HEADER = "x-minivllm-ignored"
MAX_CONTAINERS = 65_536  # lists and objects in one body
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # a JSON string, or what should have become one


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names ignored fields. They are the client's words, and a header takes only some characters."""
    if not names:
        return {}
    return {IGNORED_HEADER: ", ".join(re.sub(r"[^A-Za-z0-9_.-]", "?", shorten(name)) for name in names[:50])}


# vLLM's fields that are not built yet, on both endpoints; with the values that ask for nothing.
_VLLM_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,), "length_penalty": (1, 1.0),
    "guided_decoding_backend": ("auto", "guidance"), "logits_processors": (), "spaces_between_special_tokens": (True,),
    "kv_transfer_params": (), "vllm_xargs": (), "repetition_detection": (),
    "thinking_token_budget": (),
}


# Lists are checked here as a whole: pydantic would collect one error per element, of a list that may have a million.

def _integer(value: Any) -> bool:
    return type(value) is int


def _token_ids(value: Any) -> list[int] | None:
    if value is None or (isinstance(value, list) and all(map(_integer, value))):
        return value
    raise PydanticCustomError("token_ids", "Input should be a list of token ids (whole numbers)")


def _strings(value: Any) -> list[str] | None:
    if value is None or (isinstance(value, list) and all(isinstance(s, str) for s in value)):
        return value
    raise PydanticCustomError("strings", "Input should be a list of strings")


def _stop(value: Any) -> str | list[str] | None:
    if value == "":
        raise PydanticCustomError("stop", "Input should be text to stop at, or null for none: every output contains the empty string")
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(s, str) for s in value)):
        return value
    raise PydanticCustomError("stop", "Input should be a string or a list of strings")


def _prompt(value: Any) -> list[str] | list[list[int]]:
    """Any of the four forms of a prompt, as a list of texts or of token lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(p, str) for p in value):
            return value
        if all(map(_integer, value)):
            return [value]
        if all(isinstance(p, list) and p and all(map(_integer, p)) for p in value):
            return value
    raise PydanticCustomError(
        "prompt", "Input should be a string, a list of strings, a list of token ids, or a list of non-empty lists of token ids",
    )


Stop: TypeAlias = Annotated[str | list[str] | None, PlainValidator(_stop, json_schema_input_type=str | list[str] | None)]
Prompt: TypeAlias = Annotated[
    list[str] | list[list[int]], PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
_TEXT_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
Content: TypeAlias = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]})]
TokenIds: TypeAlias = Annotated[list[int] | None, PlainValidator(_token_ids, json_schema_input_type=list[int] | None)]
Strings: TypeAlias = Annotated[list[str] | None, PlainValidator(_strings, json_schema_input_type=list[str] | None)]


class StreamOptions(Strict):
    include_usage: bool | None = None  # one more chunk at the end, with the usage of the whole request
    continuous_usage_stats: bool | None = None  # usage so far in every chunk
    INERT = frozenset({"include_obfuscation"})


class SharedFields(Strict):
    """What every endpoint that generates takes under the same name."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: TokenIds = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    truncate_prompt_tokens: int | None = None  # keep the prompt's last so many tokens; -1: what leaves room for the output
    # The response's id, less its prefix; what /abort_requests takes.
    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None


class GenerationRequest(SharedFields):
    """What completions and chat completions share."""

    n: int | None = Field(default=None, ge=1)
    include_stop_str_in_output: bool | None = None
    bad_words: Strings = None
    allowed_token_ids: TokenIds = None
    response_format: dict[str, Any] | None = None
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: Strings = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None

    INERT = frozenset({
        "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier",
    })
    UNSUPPORTED = types.MappingProxyType(_VLLM_UNSUPPORTED)

    # Fields that go to `SamplingParams` under the same name.
    SAMPLING: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop",
        "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "logit_bias", "bad_words", "allowed_token_ids",
        "skip_special_tokens", "prompt_logprobs", "truncate_prompt_tokens",
    )

    FORMAT: ClassVar[str] = "response_format"  # what errors call it
    GUIDED: ClassVar[tuple[str, ...]] = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")

    def ignored(self, permissive: bool) -> list[str]:
        """Every field of the request that changes nothing; raises over unsupported and unknown ones."""
        names = self.extras("", permissive)
        names += unknown_fields(self.structured_outputs, self.response_format, self.FORMAT, permissive)
        if self.stream_options is not None:
            names += self.stream_options.extras("stream_options.", permissive)
        return names

    def check(self) -> None:
        """Rules between fields."""
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options is for streams only: leave it out, or set stream to true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidInput("prompt_logprobs cannot be streamed: leave it out, or set stream to false", "prompt_logprobs")

    def top_logprobs_wanted(self) -> int | None:
        """Alternatives per token: None for no log-probabilities at all, 0 for the chosen token's only."""
        raise NotImplementedError

    def output_limit(self) -> tuple[int | None, str]:
        """The longest output asked for, and the name of the field that asks."""
        raise NotImplementedError

    def structure(self) -> StructuredOutputsParams | None:
        """What the output must look like."""
        guided = {name: value for name in self.GUIDED if (value := getattr(self, name)) is not None}
        return read_wish(self.structured_outputs, self.response_format, self.FORMAT, guided, self.guided_whitespace_pattern)

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        """The engine's parameters; `defaults` are the model's own, and the request's `structure`."""
        chosen = {name: value for name in self.SAMPLING if (value := getattr(self, name)) is not None}
        return SamplingParams(**{**defaults, **chosen, "logprobs": self.top_logprobs_wanted(), "max_tokens": max_tokens})


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None  # the prompt's text in front of the output
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    add_special_tokens: bool | None = None  # a BOS token in front of a text prompt, where the model wants one

    UNSUPPORTED = types.MappingProxyType({**_VLLM_UNSUPPORTED, "suffix": ("",), "prompt_embeds": ()})

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise NotSupportedYet(f"best_of ({self.best_of}) other than n ({self.n or 1}) is not supported: leave it out", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidInput("max_tokens is 0, so there would be no output: ask for 1 or more, or set echo to true", "max_tokens")

    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    def output_limit(self) -> tuple[int | None, str]:
        return self.max_tokens, "max_tokens"

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        # With echo the prompt's log-probabilities are part of the answer. An output of no tokens is only defined with them.
        if self.echo and self.prompt_logprobs is None and (self.logprobs is not None or max_tokens == 0):
            defaults = {**defaults, "prompt_logprobs": self.logprobs or 0}
        return super().sampling(defaults, max_tokens)


_ROLES = ("developer", "system", "user", "assistant", "tool", "function")


class Message(Strict):
    """One message of a chat."""

    role: str = Field(json_schema_extra={"enum": list(_ROLES)})
    content: Content = None
    name: str | None = None
    tool_calls: ToolCalls = None  # of an assistant
    tool_call_id: str | None = None  # of a tool: the call whose result this is
    function_call: CalledFunction | None = None  # the old form of tool_calls
    reasoning: str | None = None
    reasoning_content: str | None = None  # another name for it

    INERT = frozenset({"annotations"})
    UNSUPPORTED = types.MappingProxyType({
        "refusal": (), "audio": (),
    })
    ROLES: ClassVar[tuple[str, ...]] = _ROLES
    ONLY_OF: ClassVar[Mapping[str, tuple[str, ...]]] = types.MappingProxyType({
        "tool_calls": ("assistant",), "function_call": ("assistant",), "reasoning": ("assistant",), "reasoning_content": ("assistant",),
        "tool_call_id": ("tool",),
    })

    def extras(self, path: str, permissive: bool) -> list[str]:
        names = super().extras(path, permissive)
        for i, call in enumerate(self.tool_calls or ()):
            names += call.extras(f"{path}tool_calls.{i}.", permissive)
        return names if self.function_call is None else names + self.function_call.extras(path + "function_call.", permissive)

    def check(self, path: str) -> None:
        if self.role not in self.ROLES:
            hint = nearest(self.role, self.ROLES)
            raise InvalidInput(f"{path}role must be one of {', '.join(self.ROLES)}, got {self.role!r}{hint}", path + "role")
        for name, roles in self.ONLY_OF.items():
            if getattr(self, name) and self.role not in roles:
                raise InvalidInput(f"{path}{name} belongs to messages of role {roles[0]}, and this one's is {self.role!r}", path + name)
        if self.tool_calls and self.function_call is not None:
            raise InvalidInput(f"{path}function_call is the old name of tool_calls: send one of them", path + "function_call")
        if self.role == "function" and not self.name:
            raise InvalidInput(f"{path}name is required: the function whose result this is", path + "name")

    def calls(self, path: str) -> list[dict[str, Any]]:
        """The calls of an assistant's message, as chat templates want them: arguments are objects."""
        if self.function_call is not None:
            function = self.function_call
            return [{"type": "function", "function": {"name": function.name, "arguments": function.read(path + "function_call.")}}]
        return [
            {**({} if call.id is None else {"id": call.id}), "type": "function",
             "function": {"name": call.function.name, "arguments": call.function.read(f"{path}tool_calls.{i}.function.")}}
            for i, call in enumerate(self.tool_calls or ())
        ]

    def plain(self, path: str, ignored: list[str]) -> dict[str, Any]:
        """As a chat template wants it."""
        calls, thought = self.calls(path), self.reasoning_content or self.reasoning
        empty = self.content is None and self.role == "assistant" and (calls or thought)
        entry: dict[str, Any] = {"role": "tool" if self.role == "function" else self.role,
                                 "content": "" if empty else self.text(path, ignored)}
        more = {"name": self.name, "tool_calls": calls or None, "tool_call_id": self.tool_call_id, "reasoning_content": thought or None}
        return {**entry, **{name: value for name, value in more.items() if value is not None}}

    def text(self, path: str, ignored: list[str]) -> str:
        """The content as one string; parts are joined by newlines."""
        where = path + "content"
        if isinstance(self.content, str):
            return self.content
        if not isinstance(self.content, list) or not self.content:
            raise InvalidInput(f"{where} must be a string or a non-empty list of text parts, got {self.content!r}", where)
        return "\n".join(_part_text(part, f"{where}.{i}", ignored) for i, part in enumerate(self.content))


def _part_text(part: Any, where: str, ignored: list[str]) -> str:
    if not isinstance(part, dict):
        raise InvalidInput(f"{where} must be an object such as {{\"type\": \"text\", \"text\": ...}}, got {part!r}", where)
    kind = part.get("type")
    if kind != "text":
        raise NotSupportedYet(f"{where}: this model takes text only, and the part's type is {kind!r}", where + ".type")
    if not isinstance(part.get("text"), str):
        raise InvalidInput(f"{where}.text must be a string, got {part.get('text')!r}", where + ".text")
    for name in part.keys() - {"type", "text"}:
        if name not in ("prompt_cache_breakpoint", "cache_control"):
            raise InvalidInput(f"unknown field '{where}.{name}'{nearest(name, ('type', 'text'))}", f"{where}.{name}")
        ignored.append(f"{where}.{name}")
    return part["text"]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], FailFast()] = Field(json_schema_extra={"minItems": 1})
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)  # the newer name; wins
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None  # open the assistant's answer; on unless the final message is continued
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None  # if the server trusts its clients with that
    tools: Tools = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None  # false: at most one call
    functions: Functions = None  # OpenAI's names of 2023 for tools and tool_choice
    function_call: Choice = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None  # false: reasoning is split off and dropped

    TEMPLATE_OWN: ClassVar[frozenset[str]] = frozenset({
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "self",
    })
    UNSUPPORTED = types.MappingProxyType({
        **_VLLM_UNSUPPORTED,
        "audio": (), "modalities": (["text"],), "moderation": (), "prediction": (), "web_search_options": (), "verbosity": ("medium",),
        "echo": (False,),
        "add_special_tokens": (False,), "documents": (), "mm_processor_kwargs": (), "best_of": (1,),
    })

    def ignored(self, permissive: bool) -> list[str]:
        names = super().ignored(permissive)
        for i, message in enumerate(self.messages):
            names += message.extras(f"messages.{i}.", permissive)
        for i, tool in enumerate(self.tools or ()):
            names += tool.extras(f"tools.{i}.", permissive)
        for i, function in enumerate(self.functions or ()):
            names += function.extras(f"functions.{i}.", permissive)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            names.append("max_tokens")
        return names

    def check(self) -> None:
        super().check()
        if not self.messages:
            raise InvalidInput("messages is empty: send at least one message", "messages")
        for i, message in enumerate(self.messages):
            message.check(f"messages.{i}.")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs: set logprobs to true, or leave top_logprobs out", "top_logprobs")
        for name in self.chat_template_kwargs or ():
            if name in self.TEMPLATE_OWN:
                raise InvalidInput(f"chat_template_kwargs must not set {name!r}: the request has its own field for it, or none",
                                   f"chat_template_kwargs.{name}")

    def conversation(self, ignored: list[str]) -> list[dict[str, Any]]:
        """The messages as a chat template wants them; a tool's result also has the name of its function."""
        plain: list[dict[str, Any]] = []
        called: dict[str, str] = {}
        for i, message in enumerate(self.messages):
            entry = message.plain(f"messages.{i}.", ignored)
            called |= {call["id"]: call["function"]["name"] for call in entry.get("tool_calls", ()) if "id" in call}
            if entry["role"] == "tool" and entry.get("tool_call_id") in called:
                entry.setdefault("name", called[entry["tool_call_id"]])
            plain.append(entry)
        return plain

    def tool_use(self) -> ToolUse | None:
        """What is wanted of the tools; None if the model is to know of none."""
        return read_tools(self.tools, self.tool_choice, self.parallel_tool_calls, self.functions, self.function_call)

    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def output_limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


class TokenizeRequest(Strict):
    """`POST /tokenize`: a text, or messages through the chat template, as the endpoints themselves would read them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FailFast()] = Field(default=[])
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    return_token_strs: bool | None = None

    UNSUPPORTED = types.MappingProxyType({"mm_processor_kwargs": ()})
    OF_A_CHAT: ClassVar[tuple[str, ...]] = (
        "add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs", "chat_template",
    )

    def chat(self) -> ChatRequest | None:
        """The messages as a chat; None if this is a text."""
        if (self.prompt is None) == (not self.messages):
            raise InvalidInput("send exactly one of prompt and messages", "prompt")
        fields = {name: value for name in self.OF_A_CHAT if (value := getattr(self, name)) is not None}
        if not self.messages:
            for name in fields:
                raise InvalidInput(f"{name} is for messages, and this is a prompt: leave it out", name)
            return None
        if self.add_special_tokens:
            raise InvalidInput("add_special_tokens is for prompts: a chat template writes special tokens itself; leave it out",
                               "add_special_tokens")
        if self.tools is not None:
            fields["tool_choice"] = "required"  # how calls are to be read does not matter here
        return ChatRequest(messages=self.messages, **fields)


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(json_schema_extra={"minimum": 0})]], FailFast()]


Request = TypeVar("Request", bound=Strict)


def parse(kind: type[Request], raw: bytes) -> Request:
    """The body of a request, checked for types. Raises `ApiError` naming the first field that is wrong."""
    _limit_containers(raw)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _describe(error.errors(include_url=False, include_context=False)[0]) from None


def convert(kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """A request made of another one's fields, checked as if a client had sent it."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _describe(error.errors(include_url=False, include_context=False)[0]) from None


def _limit_containers(raw: bytes) -> None:
    """Refuse what takes long to read: a body of megabytes is quickly read unless it is a million little lists.

    Reading JSON holds Python's lock to its end, so a thread would not keep the event loop free; a limit does. Brackets inside
    strings do not count. (The pattern never looks at a byte twice, however the quotes and backslashes are set.)
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
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param} {message.removeprefix('Input ')}, got {shorten(repr(got))}", param=param)
