"""`POST /v1/responses`, stateless: OpenAI's newer shape of a chat, told as a chat to everything behind it.

    input, instructions ──▶ messages ──▶ ChatRequest ──▶ the chat endpoint's Job ──▶ deltas ──▶ output items, or named events

Nothing is stored, so what refers to an earlier response (`previous_response_id`, `conversation`, items by reference) is refused;
send the earlier items again: the prefix cache finds their tokens.
"""
from __future__ import annotations

import re
import time
import types
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema

from minivllm.errors import InvalidInput, NotSupportedYet, nearest
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import MAX_LOGPROBS
from minivllm.server.answers import Answer, Choice, Job
from minivllm.server.errors import ApiError, encode
from minivllm.server.logprobs import TokenNames, chat_entries
from minivllm.server.protocol import ChatRequest, Stop, StreamOptions, Strict, Strings, TokenIds, convert
from minivllm.server.reading import OutputReader
from minivllm.server.tool_parsers import Content

if TYPE_CHECKING:
    from starlette.responses import Response

    from minivllm.server.app import Frontend

LOGPROBS = "message.output_text.logprobs"  # what `include` must name for log-probabilities
# What clients send routinely and what this server has nothing of, so that leaving it out of the answer is right.
NOTHING_TO_INCLUDE = frozenset({
    "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "message.input_image.image_url", "computer_call_output.output.image_url", "code_interpreter_call.outputs",
})


class TextConfig(Strict):
    """The shape of the answer's text."""

    format: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]})] = None
    UNSUPPORTED = types.MappingProxyType({"verbosity": ("medium",)})


class ResponsesRequest(Strict):
    """`POST /v1/responses`."""

    input: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include: Strings = None
    metadata: dict[str, str] | None = None  # given back with the response
    text: TextConfig | None = None
    tools: Annotated[list[Any] | None, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]})] = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]})] = None
    parallel_tool_calls: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = None
    # vLLM's, as on the other endpoints
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
    truncate_prompt_tokens: int | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = None
    request_id: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    INERT = frozenset({"user", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
                       "safety_identifier"})
    UNSUPPORTED = types.MappingProxyType({
        "access_programs": (), "background": (False,), "background_options": (), "image": (), "conversation": (),
        "previous_response_id": (), "max_tool_calls": (), "moderation": (), "prompt": (),
        "reasoning": ({}, {"effort": None}, {"effort": "none"}), "truncation": ("disabled",), "context_management": ([],),
        "n": (1,), "prompt_logprobs": (), "return_token_ids": (False,),
    })
    # Names here -> names of the chat request.
    RENAMED: ClassVar[dict[str, str]] = {"max_output_tokens": "max_completion_tokens"}
    SAME: ClassVar[tuple[str, ...]] = (
        "model", "stream", "parallel_tool_calls", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "logit_bias", "skip_special_tokens",
        "structured_outputs", "truncate_prompt_tokens", "priority", "cache_salt", "request_id", "chat_template_kwargs",
    )

    def ignored(self, permissive: bool) -> list[str]:
        names = self.extras("", permissive)
        if self.text is not None:
            names += self.text.extras("text.", permissive)
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

    def as_chat(self, ignored: list[str]) -> ChatRequest:
        """The same request in the chat endpoint's words."""
        fields: dict[str, Any] = {name: value for name in self.SAME if (value := getattr(self, name)) is not None}
        fields |= {chat: value for own, chat in self.RENAMED.items() if (value := getattr(self, own)) is not None}
        opening = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields["messages"] = opening + read_input(self.input, ignored)
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
_CHAT_NAMES = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input", "logprobs": "include"}


@contextmanager
def own_names() -> Iterator[None]:
    """Errors of the chat request, about the fields that the client sent."""
    try:
        yield
    except (InvalidInput, ApiError) as error:
        first, dot, rest = (error.param or "").partition(".")
        if first in _CHAT_NAMES:
            error.param = _CHAT_NAMES[first] + (dot + rest if first != "messages" else "")  # messages are numbered otherwise than items
            error.message = re.sub(r"messages\.\d+\.", "input: ", error.message).replace(first, _CHAT_NAMES[first])
        raise


# -- input items as messages --------------------------------------------------------------------------------------------------


def read_input(value: Any, ignored: list[str]) -> list[dict[str, Any]]:
    """A text, or items of a conversation, as a chat's messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InvalidInput("input must be a string or a non-empty list of items", "input")
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        where = f"input.{i}"
        if not isinstance(item, dict):
            raise InvalidInput(f"{where} must be an object such as {{\"role\": \"user\", \"content\": ...}}", where)
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(_message(item, where, ignored))
        elif kind == "function_call":
            _add_call(messages, item, where)
        elif kind == "function_call_output":
            _fields(item, where, ("call_id", "output"))
            content = _content(item["output"], where + ".output", ignored)
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        elif kind == "reasoning":  # of an earlier turn: templates leave it out as well
            ignored.append(where)
        else:
            raise NotSupportedYet(f"{where}: items of type {kind!r} are not supported yet", where + ".type")
    return messages


def _fields(item: dict[str, Any], where: str, required: Sequence[str]) -> None:
    known = (*required, "type", "id", "status", "phase")  # the last three: of items that this API gave out
    for name in required:
        if name not in item:
            raise InvalidInput(f"{where}.{name} is required", f"{where}.{name}")
    for name in item:
        if name not in known:
            raise InvalidInput(f"unknown field '{where}.{name}'{nearest(name, known)}", f"{where}.{name}")


def _message(item: dict[str, Any], where: str, ignored: list[str]) -> dict[str, Any]:
    _fields(item, where, ("role", "content"))
    if not isinstance(item["role"], str):
        raise InvalidInput(f"{where}.role must be a string", where + ".role")
    return {"role": item["role"], "content": _content(item["content"], where + ".content", ignored)}


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


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """A call of a function; calls in a row are one message of the assistant."""
    _fields(item, where, ("call_id", "name", "arguments"))
    call = {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _chat_format(form: Any) -> Any:
    """`{"type": "json_schema", "name": ..., "schema": ...}` here is one level deeper in a chat."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}
    return form


def _chat_tool(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise NotSupportedYet(f"{where}: only tools of type 'function' are supported, got {kind!r}", where + ".type")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _chat_tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


# -- the answer ---------------------------------------------------------------------------------------------------------------


class ResponsesAnswer(Answer):
    """One message of output text."""

    OBJECT = CHUNK_OBJECT = "response"
    TAIL = ""

    def __init__(self, job: Job, names: TokenNames, request: ResponsesRequest) -> None:
        super().__init__(job, names)
        self._request = request
        self._item_id = "msg_" + uuid.uuid4().hex
        self._number = 0  # of the next event
        self._logprobs: list[dict[str, Any]] = []
        self._reader = None if job.reading is None else OutputReader(job.reading)

    @staticmethod
    def text_opening() -> str:
        return ""

    def new_logprobs(self, choice: Choice, token_ids: Sequence[int], entries: Sequence[Any]) -> Any:
        return chat_entries(self.names, (entry for entry in entries if entry is not None), self.top_logprobs or 0)

    def chunk_choice(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        raise NotImplementedError("events have a shape of their own")

    whole_choice = chunk_choice  # type: ignore[assignment]

    # -- whole

    def keep(self, prompt: int, deltas: Sequence[OutputDelta]) -> None:
        for _ in self._texts(prompt, deltas):
            pass

    def whole(self) -> dict[str, Any]:
        return self._response(self._status())

    # -- streamed

    def first(self) -> bytes:
        response = self._response("in_progress")
        item = {**self._item("in_progress"), "content": []}
        return b"".join((
            self._say("response.created", response=response), self._say("response.in_progress", response=response),
            self._say("response.output_item.added", output_index=0, item=item),
            self._say("response.content_part.added", **self._place(), part={**self._part(), "text": "", "logprobs": []}),
        ))

    def chunk(self, prompt: int, deltas: Sequence[OutputDelta]) -> bytes:
        return b"".join(
            self._say("response.output_text.delta", **self._place(), delta=text, logprobs=_without_bytes(logprobs))
            for text, logprobs in self._texts(prompt, deltas) if text or logprobs
        )

    def last(self) -> bytes:
        status = self._status()
        text = "".join(self.choices[0].pieces)
        return b"".join((
            self._say("response.output_text.done", **self._place(), text=text, logprobs=_without_bytes(self._logprobs)),
            self._say("response.content_part.done", **self._place(), part=self._part()),
            self._say("response.output_item.done", output_index=0, item=self._item(status)),
            self._say(f"response.{status}", response=self._response(status)),
        ))

    def failed(self, error: ApiError) -> bytes:
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        return self._say("response.failed", response=response)

    # -- pieces

    def _texts(self, prompt: int, deltas: Sequence[OutputDelta]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        for choice, delta in self._take(prompt, deltas):
            text, logprobs = self._news(choice, delta)
            if self._reader is not None:  # reasoning is not part of the output text
                events = self._reader.push(text) + (self._reader.finish() if delta.finish_reason is not None else [])
                text = "".join(event.text for event in events if isinstance(event, Content))
            choice.pieces.append(text)
            self._logprobs += logprobs or []
            yield text, logprobs or []

    def _say(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, "sequence_number": number, **fields}) + b"\n\n"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": "".join(self.choices[0].pieces), "annotations": [], "logprobs": self._logprobs}

    def _item(self, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": [self._part()]}

    def _status(self) -> str:
        return "completed" if self.choices[0].finish_reason == "stop" else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        """The response object as far as it has come."""
        request, params = self._request, self.job.requests[0].params
        ended = status in ("completed", "incomplete")
        reason = "max_output_tokens" if self.choices[0].finish_reason == "length" else self.choices[0].finish_reason
        form = request.text.format if request.text is not None and request.text.format is not None else {"type": "text"}
        return {
            "id": self.job.id, "object": "response", "created_at": self.job.created, "completed_at": int(time.time()) if ended else None,
            "status": status, "error": None, "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens, "model": self.job.model,
            "output": [self._item(status)] if ended else [], "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": False,
            "temperature": params.temperature, "top_p": params.top_p, "top_logprobs": request.top_logprobs or 0,
            "text": {"format": form}, "tool_choice": request.tool_choice or "auto", "tools": request.tools or [], "truncation": "disabled",
            "background": False, "metadata": request.metadata or {}, "user": None, "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def _without_bytes(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events name tokens without their bytes."""
    return [{"token": e["token"], "logprob": e["logprob"], "top_logprobs": [{"token": t["token"], "logprob": t["logprob"]}
             for t in e["top_logprobs"]]} for e in entries]


async def respond(frontend: Frontend, body: ResponsesRequest) -> Response:
    """Answer one request."""
    from minivllm.server.generation import GenerationResponse
    from minivllm.server.logprobs import NoNames

    ignored = body.ignored(frontend.config.permissive)
    body.check()
    with own_names():
        chat = body.as_chat(ignored)
        chat.ignored(False)  # raises over what the chat endpoint does not support
        if chat.tool_use() is not None:
            raise NotSupportedYet("tools are not supported yet at this endpoint: use /v1/chat/completions", "tools")
        job = await frontend.chat_job(chat, ignored, "resp_")
    return GenerationResponse(frontend.client, frontend.running, ResponsesAnswer(job, frontend.tokenizer or NoNames(), body))
