"""The request models of `POST /v1/chat/completions` and `POST /tokenize`, and how an earlier message is read."""
from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import FailFast, Field, WithJsonSchema

from minivllm.errors import InvalidInput, NotSupportedYet, UnknownField, nearest, unknown_field
from minivllm.server.protocol import VLLM_UNSUPPORTED, GenerationRequest
from minivllm.server.strict import StrictModel
from minivllm.server.tools import CalledFunction, Functions, ToolCalls, ToolChoice, Tools, ToolSpec, tool_spec

_ROLES = ("developer", "system", "user", "assistant", "tool", "function")
MAX_MESSAGES = 2048  # of one conversation
_MAY_BE_EMPTY = ("assistant", "tool", "function")  # roles of messages without content: null, an empty list, or left out
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part with text, in chats and in responses
_INERT_IN_PARTS = ("annotations", "logprobs", "parsed", "prompt_cache_breakpoint", "cache_control")
_TEXT_PART = {"type": "object", "required": ["type", "text"],
              "properties": {"type": {"enum": list(_TEXT_PARTS)}, "text": {"type": "string"}}}
ContentField: TypeAlias = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}),
]


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
        """The message as `engine/conversation.py` takes it. An assistant's answer may have been empty, and so may a result."""
        if self.content in (None, []) and self.role in _MAY_BE_EMPTY:
            content: Any = None if self.role == "assistant" else ""
        else:
            content = message_content(self.content, path + "content", ignored)
        more = {"name": self.name, "tool_calls": self.calls(path) or None, "tool_call_id": self.tool_call_id,
                "reasoning_content": self.reasoning_content or self.reasoning or None}
        return {"role": "tool" if self.role == "function" else self.role, "content": content,
                **{name: value for name, value in more.items() if value is not None}}


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
            if name not in _INERT_IN_PARTS and part[name] is not None:
                raise UnknownField(unknown_field(f"{here}.{name}", name, ("type", "text")), f"{here}.{name}")
            if name not in _INERT_IN_PARTS or part[name] not in (None, []):
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

    # the conversation
    messages: Annotated[list[ChatMessage], FailFast()] = Field(max_length=MAX_MESSAGES, json_schema_extra={"minItems": 1})
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)  # the newer name; it overrides max_tokens
    logprobs: bool | None = None  # respond with the log-probabilities of the output's tokens
    top_logprobs: int | None = Field(default=None, ge=-1)  # number of alternatives per token; needs logprobs
    add_generation_prompt: bool | None = None  # open the assistant's answer; on unless the final message is continued
    continue_final_message: bool | None = None  # continue the last message instead of answering it
    chat_template_kwargs: dict[str, Any] | None = None  # variables for the chat template
    chat_template: str | None = None  # accepted by servers that trust their clients with it
    tools: Tools = None  # functions that the model may call
    tool_choice: ToolChoice = None  # none, auto, required, or one function
    parallel_tool_calls: bool | None = None  # false: at most one call
    functions: Functions = None  # OpenAI's older name (2023) of tools
    function_call: ToolChoice = None  # and of tool_choice
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None  # a variable for the chat template
    include_reasoning: bool | None = None  # false: the response leaves the reasoning out

    TEMPLATE_NAMES: ClassVar[frozenset[str]] = frozenset({  # variables that chat_template_kwargs must not set
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "self",
    })
    UNSUPPORTED = types.MappingProxyType({
        **VLLM_UNSUPPORTED,
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


class TokenizeRequest(StrictModel):
    """`POST /tokenize`: a text, or messages through the chat template, tokenized exactly as for generation."""

    model: str | None = None  # a served name
    prompt: str | None = None  # a text; or send messages
    messages: Annotated[list[ChatMessage], FailFast()] = Field(default=[], max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None  # add a BOS token, if the model uses one
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    return_token_strs: bool | None = None  # respond with each token's text too

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
        chat = ChatRequest(messages=self.messages, **fields)
        chat._size = self._size
        return chat
