"""The request models. They are strict: a number in quotes is an error, and no field is silently ignored.

Fields fall into four classes:

    honored       the fields of the classes below
    inert         `INERT`: cannot change the output (`user`, `metadata` ...); accepted, and named in a response header
    unsupported   `UNSUPPORTED`: fields of OpenAI or vLLM that are not built here; refused, except for null and for the listed
                  values, which request nothing
    unknown       all others: refused with the nearest known name (with `--permissive`: treated as inert)

These classes check types. `SamplingParams` checks ranges, once for the server and for Python callers, unless the HTTP API's are narrower.
"""
from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import FailFast, Field, PlainValidator, StringConstraints, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from minivllm.errors import InvalidInput, NotSupportedYet, UnknownField, nearest, unknown_field
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams
from minivllm.server.errors import ApiError, shorten
from minivllm.server.strict import StrictModel
from minivllm.server.structured import ResponseFormat, SchemaField, StructuredOutputsFields
from minivllm.server.tools import CalledFunction, Functions, ToolCalls, ToolChoice, Tools, ToolSpec, tool_spec

IGNORED_HEADER = "x-minivllm-ignored"
NO_EFFECT = frozenset({  # OpenAI's fields that cannot change an output here, on all generating endpoints
    "user", "client_metadata", "service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
})
MAX_CONTAINERS = 65_536  # lists and objects in one body
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # a JSON string, complete or cut off

# vLLM's fields that are not built yet, on both endpoints, with the values that request nothing.
_VLLM_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,), "length_penalty": (1, 1.0),
    "guided_decoding_backend": ("auto", "guidance"), "logits_processors": (), "spaces_between_special_tokens": (True,),
    "kv_transfer_params": (), "vllm_xargs": (), "repetition_detection": (),
    "thinking_token_budget": (),
}


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names ignored fields. The names come from the client, so characters that a header cannot hold are replaced."""
    if not names:
        return {}
    return {IGNORED_HEADER: ", ".join(re.sub(r"[^A-Za-z0-9_.-]", "?", shorten(name)) for name in [*dict.fromkeys(names)][:50])}


# -- types of fields --------------------------------------------------------------------------------------------------
# Each list is checked as a whole: pydantic would collect one error per element, and a list may have a million elements.


def _accepts(test: Callable[[Any], bool], expected: str, schema: Any) -> PlainValidator:
    """A field whose values are null and what `test` accepts."""
    def check(value: Any) -> Any:
        if value is None or test(value):
            return value
        raise PydanticCustomError("unexpected_value", f"Input should be {expected}")

    return PlainValidator(check, json_schema_input_type=schema)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(element) is kind for element in value)


def _check_prompt(value: Any) -> list[str] | list[list[int]]:
    """A prompt in any of its four forms, as a list of texts or a list of token lists."""
    if isinstance(value, str) or (value and _is_list(value, int)):
        return [value]
    if value and (_is_list(value, str) or (isinstance(value, list) and all(p and _is_list(p, int) for p in value))):
        return value
    raise PydanticCustomError(
        "prompt", "Input should be a string, a list of strings, a list of token ids, or a list of non-empty lists of token ids",
    )


StopField: TypeAlias = Annotated[str | list[str] | None, _accepts(
    lambda value: (isinstance(value, str) and value != "") or _is_list(value, str),
    "a non-empty string, a list of strings, or null for none", str | list[str] | None,
)]
PromptField: TypeAlias = Annotated[
    list[str] | list[list[int]], PlainValidator(_check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
_TEXT_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
ContentField: TypeAlias = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]}),
]
TokenIds: TypeAlias = Annotated[list[int] | None, _accepts(
    lambda value: _is_list(value, int), "a list of token ids (whole numbers)", list[int] | None,
)]
Strings: TypeAlias = Annotated[list[str] | None, _accepts(lambda value: _is_list(value, str), "a list of strings", list[str] | None)]


# -- what the generating endpoints share ------------------------------------------------------------------------------


class StreamOptions(StrictModel):
    include_usage: bool | None = None  # one more chunk at the end, with the usage of the whole request
    continuous_usage_stats: bool | None = None  # the usage so far in every chunk
    INERT = frozenset({"include_obfuscation"})


class SharedFields(StrictModel):
    """The fields that all generating endpoints take under the same name."""

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
    stop: StopField = None
    stop_token_ids: TokenIds = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputsFields | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    truncate_prompt_tokens: int | None = None  # keep only the last so many prompt tokens; -1: as many as leave room for the output
    # The response's id without its prefix. `/abort_requests` takes it.
    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None

    def check(self) -> None:
        """Rules between fields."""
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options is for streams only: leave it out, or set stream to true", "stream_options")


class GenerationRequest(SharedFields):
    """The common part of completions and chat completions."""

    n: int | None = Field(default=None, ge=1)
    include_stop_str_in_output: bool | None = None
    bad_words: Strings = None
    allowed_token_ids: TokenIds = None
    response_format: ResponseFormat | None = None
    guided_json: SchemaField = None
    guided_regex: str | None = None
    guided_choice: Strings = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None

    INERT = NO_EFFECT | {"metadata", "store"}
    UNSUPPORTED = types.MappingProxyType(_VLLM_UNSUPPORTED)

    # Fields that go to `SamplingParams` under the same name.
    SAMPLING: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop",
        "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "logit_bias", "bad_words", "allowed_token_ids",
        "skip_special_tokens", "prompt_logprobs", "truncate_prompt_tokens",
    )

    FORMAT: ClassVar[str] = "response_format"  # that field's name in errors

    def check(self) -> None:
        super().check()
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidInput("prompt_logprobs cannot be streamed: leave it out, or set stream to false", "prompt_logprobs")

    def num_logprobs(self) -> int | None:
        """Alternatives per token. None: no log-probabilities; 0: those of the sampled tokens only."""
        raise NotImplementedError

    def output_limit(self) -> tuple[int | None, str]:
        """The requested maximum of output tokens, and the name of its field."""
        raise NotImplementedError

    def structure(self) -> StructuredOutputsParams | None:
        """The structure that the output must have; None if it is free text. Several fields can define it, but only in the same way."""
        found = {
            self.FORMAT: None if self.response_format is None else self.response_format.structure(self.FORMAT),
            "structured_outputs": None if self.structured_outputs is None else self.structured_outputs.structure(),
        }
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
            if (value := getattr(self, name)) is not None:
                pattern = self.guided_whitespace_pattern if name == "guided_json" else None
                found[name] = StructuredOutputsParams(**{name.removeprefix("guided_"): value}, whitespace_pattern=pattern, origin=name)
        names = [name for name, structure in found.items() if structure is not None]
        for name in names[1:]:  # the same value under two names is one value
            if found[name] != found[names[0]]:
                raise InvalidInput(f"{names[0]} and {name} both define the structure of the output: send one of them", name)
        if self.guided_whitespace_pattern is not None and "guided_json" not in names:
            raise InvalidInput("guided_whitespace_pattern belongs to guided_json: leave it out", "guided_whitespace_pattern")
        return found[names[0]] if names else None

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        """The engine's parameters. `defaults`: the model's own sampling defaults, and the request's `structure`."""
        chosen = {name: value for name in self.SAMPLING if (value := getattr(self, name)) is not None}
        return SamplingParams(**{**defaults, **chosen, "logprobs": self.num_logprobs(), "max_tokens": max_tokens})


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: PromptField
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None  # put the prompt's text in front of the output
    logprobs: int | None = Field(default=None, ge=-1)
    best_of: int | None = None
    add_special_tokens: bool | None = None  # put a BOS token in front of a text prompt, if the model uses one

    UNSUPPORTED = types.MappingProxyType({**_VLLM_UNSUPPORTED, "suffix": ("",), "prompt_embeds": ()})

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise NotSupportedYet(f"best_of ({self.best_of}) other than n ({self.n or 1}) is not supported: leave it out", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidInput("max_tokens is 0, so there would be no output: request 1 or more, or set echo to true", "max_tokens")

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def output_limit(self) -> tuple[int | None, str]:
        return self.max_tokens, "max_tokens"

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        # With echo, logprobs covers the prompt too. An output of 0 tokens is possible only together with prompt log-probabilities.
        if self.echo and self.prompt_logprobs is None and (self.logprobs is not None or max_tokens == 0):
            defaults = {**defaults, "prompt_logprobs": self.logprobs or 0}
        return super().sampling(defaults, max_tokens)


# -- chats ------------------------------------------------------------------------------------------------------------

_ROLES = ("developer", "system", "user", "assistant", "tool", "function")


class ChatMessage(StrictModel):
    """One message of a chat."""

    role: str = Field(json_schema_extra={"enum": list(_ROLES)})
    content: ContentField = None
    name: str | None = None
    tool_calls: ToolCalls = None  # of an assistant
    tool_call_id: str | None = None  # of a tool: the call whose result this message is
    function_call: CalledFunction | None = None  # the old form of tool_calls
    reasoning: str | None = None
    reasoning_content: str | None = None  # another name of `reasoning`
    refusal: str | None = None  # of an assistant: the text with which it refused

    # What clients add to an answer before they send it back. `parsed` is the content once more, as an object.
    INERT = frozenset({"annotations", "parsed", "provider_specific_fields"})
    UNSUPPORTED = types.MappingProxyType({"audio": (), "images": ([],), "thinking_blocks": ([],), "reasoning_details": ([],)})
    ONLY_OF: ClassVar[Mapping[str, str]] = types.MappingProxyType({  # field -> the role that may have it
        "tool_calls": "assistant", "function_call": "assistant", "reasoning": "assistant", "reasoning_content": "assistant",
        "tool_call_id": "tool", "refusal": "assistant",
    })

    def check(self, path: str) -> None:
        if self.role not in _ROLES:
            hint = nearest(self.role, _ROLES)
            raise InvalidInput(f"{path}role must be one of {', '.join(_ROLES)}, got {self.role!r}{hint}", path + "role")
        for name, role in self.ONLY_OF.items():
            if getattr(self, name) and self.role != role:
                raise InvalidInput(f"{path}{name} is for messages of role {role}, and this message's role is {self.role!r}", path + name)
        if self.tool_calls and self.function_call is not None:
            if [call.function for call in self.tool_calls] != [self.function_call]:
                raise InvalidInput(f"{path}function_call is the old name of tool_calls: send one of them", path + "function_call")
            self.function_call = None
        if self.reasoning and self.reasoning_content and self.reasoning != self.reasoning_content:
            raise InvalidInput(f"{path}reasoning_content is another name of reasoning: send one of them", path + "reasoning_content")
        if self.role == "assistant":
            self.content = self._answer(path)
        if self.role == "function" and not self.name:
            raise InvalidInput(f"{path}name is required: the function whose result this is", path + "name")

    def _answer(self, path: str) -> Any:
        """The content of an assistant's message. A refusal is text like any other, and no content is null."""
        content, refusal = refusals_as_text(self.content) or None, self.refusal or None
        if content is not None and refusal is not None:
            raise InvalidInput(f"{path}refusal is an answer without content: leave one of them out", path + "refusal")
        return self.content if content is None and refusal is None and self.content != [] else content or refusal

    def calls(self, path: str) -> list[dict[str, Any]]:
        """An assistant's calls, in the newer form."""
        if self.function_call is not None:
            return [{"type": "function", "function": self.function_call.for_template(path + "function_call.")}]
        return [
            {**({} if call.id is None else {"id": call.id}), "type": "function",
             "function": call.function.for_template(f"{path}tool_calls.{i}.function.")}
            for i, call in enumerate(self.tool_calls or ())
        ]

    def for_template(self, path: str, ignored: list[str]) -> dict[str, Any]:
        """The message as `engine/conversation.py` takes it. An assistant's answer may have been empty."""
        content = None if self.content is None and self.role == "assistant" else message_content(self.content, path + "content", ignored)
        more = {"name": self.name, "tool_calls": self.calls(path) or None, "tool_call_id": self.tool_call_id,
                "reasoning_content": self.reasoning_content or self.reasoning or None}
        return {"role": "tool" if self.role == "function" else self.role, "content": content,
                **{name: value for name, value in more.items() if value is not None}}


_TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part with text, in chats and in responses
_INERT_IN_PARTS = ("annotations", "logprobs", "parsed", "prompt_cache_breakpoint", "cache_control")


def message_content(content: Any, where: str, ignored: list[str]) -> str | list[dict[str, str]]:
    """A message's content: a string, or text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidInput(f"{where} must be a string or a non-empty list of text parts, got {content!r}", where)
    texts = []
    for i, part in enumerate(content):
        here = f"{where}.{i}"
        if not isinstance(part, dict):
            raise InvalidInput(f"{here} must be an object such as {{\"type\": \"text\", \"text\": ...}}, got {part!r}", here)
        if part.get("type") not in _TEXT_PARTS:
            raise NotSupportedYet(f"{here}: this model takes text only, and the part's type is {part.get('type')!r}", here + ".type")
        if not isinstance(part.get("text"), str):
            raise InvalidInput(f"{here}.text must be a string, got {part.get('text')!r}", here + ".text")
        for name in part.keys() - {"type", "text"}:
            if name not in _INERT_IN_PARTS:
                raise UnknownField(unknown_field(f"{here}.{name}", name, ("type", "text")), f"{here}.{name}")
            if part[name] not in (None, []):
                ignored.append(f"{here}.{name}")
        texts.append({"type": "text", "text": part["text"]})
    return texts


def refusals_as_text(content: Any) -> Any:
    """A message's content in which parts with a refusal are parts with text."""
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": part.get("refusal")} if isinstance(part, dict) and part.get("type") == "refusal" else part
            for part in content]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(json_schema_extra={"minItems": 1})
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)  # the newer name; it overrides max_tokens
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=-1)
    add_generation_prompt: bool | None = None  # open the assistant's answer; on unless the final message is continued
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None  # accepted by servers that trust their clients with it
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None  # false: at most one call
    functions: Functions = None  # OpenAI's older name (2023) of tools
    function_call: ToolChoice = None  # and of tool_choice
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None  # false: the response leaves the reasoning out

    TEMPLATE_NAMES: ClassVar[frozenset[str]] = frozenset({  # variables that chat_template_kwargs must not set
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "self",
    })
    UNSUPPORTED = types.MappingProxyType({
        **_VLLM_UNSUPPORTED,
        "audio": (), "modalities": (["text"],), "moderation": (), "prediction": (), "web_search_options": (), "verbosity": ("medium",),
        "echo": (False,),
        "add_special_tokens": (False,), "documents": (), "mm_processor_kwargs": (), "best_of": (1,),
    })

    def ignored_fields(self, permissive: bool, path: str = "") -> list[str]:
        ignored = super().ignored_fields(permissive, path)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            ignored.append("max_tokens")
        return ignored

    def check(self) -> None:
        super().check()
        if not self.messages:
            raise InvalidInput("messages is empty: send at least one message", "messages")
        for i, message in enumerate(self.messages):
            message.check(f"messages.{i}.")
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("top_logprobs needs logprobs: set logprobs to true, or leave top_logprobs out", "top_logprobs")
        for name in self.chat_template_kwargs or ():
            if name in self.TEMPLATE_NAMES:
                raise InvalidInput(f"chat_template_kwargs must not set {name!r}: leave it out; the request has a separate field for it, "
                                   "or the server sets it", f"chat_template_kwargs.{name}")

    def conversation(self, ignored: list[str]) -> list[dict[str, Any]]:
        return [message.for_template(f"messages.{i}.", ignored) for i, message in enumerate(self.messages)]

    def tool_spec(self) -> ToolSpec | None:
        """The tools that the model sees; None if it sees none."""
        return tool_spec(self.tools, self.tool_choice, self.parallel_tool_calls, self.functions, self.function_call)

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def output_limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"


# -- other endpoints --------------------------------------------------------------------------------------------------


class TokenizeRequest(StrictModel):
    """`POST /tokenize`: a text, or messages through the chat template, tokenized exactly as for generation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FailFast()] = Field(default=[])
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    return_token_strs: bool | None = None

    UNSUPPORTED = types.MappingProxyType({"mm_processor_kwargs": ()})
    CHAT_FIELDS: ClassVar[tuple[str, ...]] = (
        "add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs", "chat_template",
    )

    def chat(self) -> ChatRequest | None:
        """The messages as a chat request; None for a text."""
        if (self.prompt is None) == (not self.messages):
            raise InvalidInput("send exactly one of prompt and messages", "prompt")
        fields = {name: value for name in self.CHAT_FIELDS if (value := getattr(self, name)) is not None}
        if not self.messages:
            for name in fields:
                raise InvalidInput(f"{name} is for messages, and this request has a prompt: leave it out", name)
            return None
        if self.add_special_tokens:
            raise InvalidInput("add_special_tokens is for prompts: a chat template writes special tokens itself; leave it out",
                               "add_special_tokens")
        return ChatRequest(messages=self.messages, **fields)


class DetokenizeRequest(StrictModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(json_schema_extra={"minimum": 0})]], FailFast()]


class AbortRequest(StrictModel):
    """`POST /abort_requests`: the requests with these response ids, or all."""

    request_ids: Strings = None
    all: bool | None = None

    def check(self) -> None:
        if bool(self.request_ids) == bool(self.all):
            raise InvalidInput("send request_ids (a non-empty list), or all: true", "request_ids")


# -- parsing ----------------------------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=StrictModel)


def parse(kind: type[Model], raw: bytes) -> Model:
    """The body of a request, with types checked. Raises `ApiError` naming the first wrong field."""
    _limit_containers(raw)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _describe(error.errors(include_url=False, include_context=False)[0]) from None


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
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param} {message.removeprefix('Input ')}, got {shorten(repr(got))}", param=param)
