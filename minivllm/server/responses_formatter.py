"""The response of `/v1/responses`: output items, complete or as named events.

    OutputParser ──▶ ReasoningDelta                    ContentDelta               ToolCallStart, ToolCallArguments, ToolCallEnd
                       ▼                                  ▼                        ▼
    item             reasoning                         message                  function_call
    events           output_item.added  content_part.added  reasoning_text.delta | output_text.delta ... .done  content_part.done
                     output_item.added  function_call_arguments.delta ... .done                    each ends with output_item.done

One item is open at a time, and output of another kind closes it. A complete response is made from the same items as a stream.
"""
from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from minivllm.output_parsers.events import ContentDelta, OutputEvent, ReasoningDelta, ToolCallArguments, ToolCallStart
from minivllm.output_parsers.json_text import is_object
from minivllm.outputs import OutputDelta
from minivllm.server.errors import ApiError, encode
from minivllm.server.formatters import ChoiceState, PreparedRequest, ResponseFormatter
from minivllm.server.logprobs import TokenNames, chat_entries
from minivllm.server.output_spec import OutputParser
from minivllm.server.responses_protocol import ResponsesRequest

ItemKind: TypeAlias = Literal["message", "reasoning", "function_call"]
_PREFIXES: dict[ItemKind, str] = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_EVENTS: dict[ItemKind, str] = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
NamedEvent: TypeAlias = tuple[str, dict[str, Any]]  # its type after "response.", and its fields


@dataclass(slots=True)
class OutputItem:
    """One element of `output`. The methods that change it return the events of the change."""

    kind: ItemKind
    index: int
    name: str = ""  # of the called function
    status: str = "in_progress"
    pieces: list[str] = field(default_factory=list)  # of the text or of the call's arguments
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""
    call_id: str = ""

    def __post_init__(self) -> None:
        self.id = _PREFIXES[self.kind] + uuid.uuid4().hex
        self.call_id = f"call_{uuid.uuid4().hex[:24]}" if self.kind == "function_call" else ""

    def body(self) -> dict[str, Any]:
        common = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return {**common, "call_id": self.call_id, "name": self.name, "arguments": "".join(self.pieces)}
        content = [] if self.status == "in_progress" and not self.pieces else [self.part()]
        if self.kind == "reasoning":
            return {**common, "summary": [], "content": content}
        return {**common, "role": "assistant", "content": content}

    def part(self) -> dict[str, Any]:
        """The only element of its content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": "".join(self.pieces)}
        return {"type": "output_text", "text": "".join(self.pieces), "annotations": [], "logprobs": self.logprobs}

    def open(self) -> Iterator[NamedEvent]:
        yield "output_item.added", {"output_index": self.index, "item": self.body()}
        if self.kind != "function_call":
            yield "content_part.added", {**self._position(), "part": self.part()}

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[NamedEvent]:
        self.pieces.append(text)
        self.logprobs += logprobs
        yield f"{_EVENTS[self.kind]}.delta", {**self._position(), "delta": text, **self._event_logprobs(logprobs)}

    def close(self, status: str) -> Iterator[NamedEvent]:
        self.status = status
        text = "".join(self.pieces)
        if self.kind == "function_call":
            yield "function_call_arguments.done", {**self._position(), "name": self.name, "arguments": text}
        else:
            yield f"{_EVENTS[self.kind]}.done", {**self._position(), "text": text, **self._event_logprobs(self.logprobs)}
            yield "content_part.done", {**self._position(), "part": self.part()}
        yield "output_item.done", {"output_index": self.index, "item": self.body()}

    def _position(self) -> dict[str, Any]:
        position = {"item_id": self.id, "output_index": self.index}
        return position if self.kind == "function_call" else {**position, "content_index": 0}

    def _event_logprobs(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """In events, tokens have no bytes. Only messages have log-probabilities."""
        if self.kind != "message":
            return {}
        return {"logprobs": [
            {"token": e["token"], "logprob": e["logprob"], "top_logprobs": [{"token": t["token"], "logprob": t["logprob"]}
             for t in e["top_logprobs"]]} for e in entries
        ]}


class ResponsesFormatter(ResponseFormatter):
    """Reasoning, text and tool calls, each as an item."""

    def __init__(
        self, request: PreparedRequest, names: TokenNames, body: ResponsesRequest, keep: Callable[[dict[str, Any]], bool] | None,
    ) -> None:
        """`keep` stores the complete response, or returns False; None: it is not stored."""
        super().__init__(request, names)
        self._body = body
        self._keep = keep
        self._sequence_number = 0  # of the next event
        self._parser = None if request.output is None else OutputParser(request.output)
        self._items: list[OutputItem] = []
        self._open: OutputItem | None = None
        self._held_logprobs: list[dict[str, Any]] = []  # of tokens whose text the parser has not reported yet
        self._reasoning_tokens = 0

    # -- complete -----------------------------------------------------------------------------------------------------

    def collect(self, prompt: int, deltas: Sequence[OutputDelta]) -> None:
        for _ in self._update(prompt, deltas):
            pass

    def body(self) -> dict[str, Any]:
        response = self._response(self._status())
        if self._keep is not None:
            response["store"] = self._keep(response)
        return response

    # -- streamed -----------------------------------------------------------------------------------------------------

    def first_events(self) -> bytes:
        response = self._response("in_progress")
        return self._encode("created", {"response": response}) + self._encode("in_progress", {"response": response})

    def events(self, prompt: int, deltas: Sequence[OutputDelta]) -> bytes:
        return b"".join(self._encode(kind, fields) for kind, fields in self._update(prompt, deltas))

    def last_events(self) -> bytes:
        return self._encode(self._status(), {"response": self.body()})

    def error_events(self, error: ApiError) -> bytes:
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        return self._encode("failed", {"response": response})

    def _encode(self, kind: str, fields: dict[str, Any]) -> bytes:
        kind = "response." + kind
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, "sequence_number": number, **fields}) + b"\n\n"

    # -- from deltas to items -----------------------------------------------------------------------------------------

    def _update(self, prompt: int, deltas: Sequence[OutputDelta]) -> Iterator[NamedEvent]:
        """Update the items. Yields each event right after its change."""
        for choice, delta in self.state.update(prompt, deltas):
            logprobs = chat_entries(self.names, delta.logprobs or (), self.num_logprobs or 0)
            self._held_logprobs += logprobs
            for event in self._parse(choice, delta, logprobs):
                yield from self._apply(event)
            if delta.finish_reason is not None:
                yield from self._end()

    def _parse(self, choice: ChoiceState, delta: OutputDelta, logprobs: list[dict[str, Any]]) -> list[OutputEvent]:
        parser = self._parser
        if parser is None:
            return [ContentDelta(delta.text)] if delta.text else []
        was_in_reasoning = parser.in_reasoning
        events = parser.push(delta.text, delta.finish_reason)
        if was_in_reasoning or parser.in_reasoning:
            self._reasoning_tokens = choice.num_tokens
            self._held_logprobs = logprobs if any(isinstance(event, ContentDelta) for event in events) else []
        return events

    def _apply(self, event: OutputEvent) -> Iterator[NamedEvent]:
        logprobs, self._held_logprobs = self._held_logprobs, []
        if isinstance(event, ContentDelta):
            yield from self._add("message", event.text, logprobs)
        elif isinstance(event, ReasoningDelta):
            yield from self._add("reasoning", event.text, [])
        elif isinstance(event, ToolCallStart):
            yield from self._start(OutputItem("function_call", len(self._items), event.name))
        elif isinstance(event, ToolCallArguments):
            assert self._open is not None
            yield from self._open.add(event.fragment, [])
        else:
            yield from self._close()

    def _add(self, kind: ItemKind, text: str, logprobs: list[dict[str, Any]]) -> Iterator[NamedEvent]:
        if self._open is None or self._open.kind != kind:
            yield from self._start(OutputItem(kind, len(self._items)))
        assert self._open is not None
        yield from self._open.add(text, logprobs)

    def _start(self, item: OutputItem) -> Iterator[NamedEvent]:
        yield from self._close()
        self._open = item
        self._items.append(item)
        yield from item.open()

    def _close(self, status: str = "completed") -> Iterator[NamedEvent]:
        if self._open is not None:
            if self._open.kind == "function_call":
                status = "completed" if is_object("".join(self._open.pieces)) else "incomplete"
            yield from self._open.close(status)
            self._open = None

    def _end(self) -> Iterator[NamedEvent]:
        """The end of the output. An empty output is an empty message, unless calls were required."""
        output = self.request.output
        if not self._items and not (output is not None and output.tools is not None and output.tools.forced):
            yield from self._start(OutputItem("message", 0))
        if self._open is not None and self._open.kind == "message" and self._held_logprobs:
            yield from self._open.add("", self._held_logprobs)
        yield from self._close(self._status())

    # -- the response object ------------------------------------------------------------------------------------------

    def _status(self) -> str:
        return "completed" if self.state.choices[0].finish_reason == "stop" else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        body, params, finish_reason = self._body, self.request.prompts[0].params, self.state.choices[0].finish_reason
        ended = status in ("completed", "incomplete")
        reason = "max_output_tokens" if finish_reason == "length" else finish_reason
        text_format = body.text.format if body.text is not None and body.text.format is not None else {"type": "text"}
        tools = [{**tool, "parameters": tool.get("parameters"), "strict": bool(tool.get("strict"))} for tool in body.tools or ()
                 if tool["type"] == "function"]
        return {
            "id": self.request.id, "object": "response", "created_at": self.request.created,
            "completed_at": int(time.time()) if ended else None,
            "status": status, "error": None, "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self.request.model,
            "output": [item.body() for item in self._items] if ended else [], "previous_response_id": body.previous_response_id,
            "parallel_tool_calls": body.parallel_tool_calls is not False, "store": self._keep is not None,
            "reasoning": {"effort": body.effort, "summary": None},
            "temperature": params.temperature, "top_p": params.top_p, "top_logprobs": body.top_logprobs or 0,
            "text": {"format": text_format}, "tool_choice": body.tool_choice or "auto", "tools": tools,
            "truncation": body.truncation or "disabled", "background": False, "metadata": body.metadata or {}, "user": None,
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.state.usage()
        has_reasoning = any(item.kind == "reasoning" for item in self._items)
        return {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens if has_reasoning else 0},
            "total_tokens": usage["total_tokens"],
        }
