"""The answer of `/v1/responses`: output items, whole or as named events.

    OutputReader ──▶ Reasoning                         Content                  CallStart, CallArguments, CallEnd
                       ▼                                  ▼                        ▼
    item             reasoning                         message                  function_call
    events           output_item.added  content_part.added  reasoning_text.delta | output_text.delta ... .done  content_part.done
                     output_item.added  function_call_arguments.delta ... .done                    each ends with output_item.done

One item is open at a time; another kind of event closes it. Token by token the text goes to the open item, so that the items of a
stream and those of a whole answer are the same.
"""
from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from minivllm.outputs import OutputDelta
from minivllm.server.answers import Answer, Choice, Job
from minivllm.server.errors import ApiError, encode
from minivllm.server.logprobs import TokenNames, chat_entries
from minivllm.server.reading import OutputReader
from minivllm.server.tool_parsers import CallArguments, CallStart, Content, Event, Reasoning

if TYPE_CHECKING:
    from minivllm.server.responses import ResponsesRequest

Kind = Literal["message", "reasoning", "function_call"]
_PREFIXES: dict[Kind, str] = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_EVENTS: dict[Kind, str] = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
Said = tuple[str, dict[str, Any]]  # an event: what follows "response." in its type, and its fields


@dataclass(slots=True)
class Item:
    """One element of `output`."""

    kind: Kind
    index: int
    name: str = ""  # of the function that is called
    status: str = "in_progress"
    pieces: list[str] = field(default_factory=list)  # of its text, or of the call's arguments
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
        """The one element of its content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": "".join(self.pieces)}
        return {"type": "output_text", "text": "".join(self.pieces), "annotations": [], "logprobs": self.logprobs}

    # -- its events

    def place(self) -> dict[str, Any]:
        place = {"item_id": self.id, "output_index": self.index}
        return place if self.kind == "function_call" else {**place, "content_index": 0}

    def opened(self) -> Iterator[Said]:
        yield "output_item.added", {"output_index": self.index, "item": self.body()}
        if self.kind != "function_call":
            yield "content_part.added", {**self.place(), "part": self.part()}

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Said]:
        self.pieces.append(text)
        self.logprobs += logprobs
        more = {"logprobs": _without_bytes(logprobs)} if self.kind == "message" else {}
        yield f"{_EVENTS[self.kind]}.delta", {**self.place(), "delta": text, **more}

    def closed(self, status: str) -> Iterator[Said]:
        self.status = status
        text = "".join(self.pieces)
        if self.kind == "function_call":
            yield "function_call_arguments.done", {**self.place(), "name": self.name, "arguments": text}
        else:
            more = {"logprobs": _without_bytes(self.logprobs)} if self.kind == "message" else {}
            yield f"{_EVENTS[self.kind]}.done", {**self.place(), "text": text, **more}
            yield "content_part.done", {**self.place(), "part": self.part()}
        yield "output_item.done", {"output_index": self.index, "item": self.body()}


class ResponsesAnswer(Answer):
    """Reasoning, text and calls, each an item."""

    OBJECT = CHUNK_OBJECT = "response"
    TAIL = ""

    def __init__(self, job: Job, names: TokenNames, request: ResponsesRequest) -> None:
        super().__init__(job, names)
        self._request = request
        self._number = 0  # of the next event
        self._reader = None if job.reading is None else OutputReader(job.reading)
        use = None if job.reading is None else job.reading.tools
        self._max_calls = None if use is None or use.parallel else 1
        self._items: list[Item] = []
        self._open: Item | None = None
        self._waiting: list[dict[str, Any]] = []  # log-probabilities of tokens whose text the reader still holds back
        self._thought = 0  # tokens before the answer

    @staticmethod
    def text_opening() -> str:
        return ""

    def new_logprobs(self, choice: Choice, token_ids: Sequence[int], entries: Sequence[Any]) -> Any:
        return chat_entries(self.names, (entry for entry in entries if entry is not None), self.top_logprobs or 0)

    def chunk_choice(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        raise NotImplementedError("events have a shape of their own")

    whole_choice = chunk_choice  # type: ignore[assignment]

    # -- whole --------------------------------------------------------------------------------------------------------

    def keep(self, prompt: int, deltas: Sequence[OutputDelta]) -> None:
        for _ in self._read(prompt, deltas):
            pass

    def whole(self) -> dict[str, Any]:
        return self._response(self._status())

    # -- streamed -----------------------------------------------------------------------------------------------------

    def first(self) -> bytes:
        response = self._response("in_progress")
        return self._say("created", {"response": response}) + self._say("in_progress", {"response": response})

    def chunk(self, prompt: int, deltas: Sequence[OutputDelta]) -> bytes:
        return b"".join(self._say(kind, fields) for kind, fields in self._read(prompt, deltas))

    def last(self) -> bytes:
        status = self._status()
        return self._say(status, {"response": self._response(status)})

    def failed(self, error: ApiError) -> bytes:
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        return self._say("failed", {"response": response})

    def _say(self, kind: str, fields: dict[str, Any]) -> bytes:
        kind = "response." + kind
        number, self._number = self._number, self._number + 1
        return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, "sequence_number": number, **fields}) + b"\n\n"

    # -- from the engine's deltas to items ----------------------------------------------------------------------------

    def _read(self, prompt: int, deltas: Sequence[OutputDelta]) -> Iterator[Said]:
        """Bring the items up to date; the events that tell of it, each when it has just happened."""
        for choice, delta in self._take(prompt, deltas):
            text, logprobs = self._news(choice, delta)
            self._waiting += logprobs or []
            for event in self._events(choice, text, logprobs or [], delta.finish_reason is not None):
                yield from self._note(event)
            if delta.finish_reason is not None:
                yield from self._end()

    def _events(self, choice: Choice, text: str, logprobs: list[dict[str, Any]], ended: bool) -> list[Event]:
        reader = self._reader
        if reader is None:
            return [Content(text)] if text else []
        thought = reader.thinking
        events = reader.push(text) + (reader.finish() if ended else [])
        if thought or reader.thinking:
            self._thought = choice.num_tokens
            self._waiting = logprobs if any(isinstance(event, Content) for event in events) else []
        return events

    def _note(self, event: Event) -> Iterator[Said]:
        logprobs, self._waiting = self._waiting, []
        if isinstance(event, Content):
            yield from self._switch("message")
            assert self._open is not None
            yield from self._open.add(event.text, logprobs)
        elif isinstance(event, Reasoning):
            yield from self._switch("reasoning")
            assert self._open is not None
            yield from self._open.add(event.text, [])
        elif self._max_calls is not None and event.index >= self._max_calls:
            pass  # more calls than were asked for
        elif isinstance(event, CallStart):
            yield from self._close()
            yield from self._begin(Item("function_call", len(self._items), event.name))
        elif isinstance(event, CallArguments):
            assert self._open is not None
            yield from self._open.add(event.fragment, [])
        else:
            yield from self._close()

    def _switch(self, kind: Kind) -> Iterator[Said]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            yield from self._begin(Item(kind, len(self._items)))

    def _begin(self, item: Item) -> Iterator[Said]:
        self._open = item
        self._items.append(item)
        yield from item.opened()

    def _close(self, status: str = "completed") -> Iterator[Said]:
        if self._open is not None:
            if self._open.kind == "function_call":
                status = "completed" if _is_json("".join(self._open.pieces)) else "incomplete"
            yield from self._open.closed(status)
            self._open = None

    def _end(self) -> Iterator[Said]:
        """The output is over; an empty one is an empty message."""
        if not self._items:
            yield from self._switch("message")
        if self._open is not None and self._open.kind == "message" and self._waiting:
            yield from self._open.add("", self._waiting)
        yield from self._close(self._status())

    # -- the response -------------------------------------------------------------------------------------------------

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
            "output": [item.body() for item in self._items] if ended else [], "previous_response_id": None,
            "parallel_tool_calls": request.parallel_tool_calls is not False, "store": False,
            "reasoning": {"effort": request.effort, "summary": None},
            "temperature": params.temperature, "top_p": params.top_p, "top_logprobs": request.top_logprobs or 0,
            "text": {"format": form}, "tool_choice": request.tool_choice or "auto", "tools": [_tool(tool) for tool in request.tools or ()],
            "truncation": "disabled", "background": False, "metadata": request.metadata or {}, "user": None,
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage()
        thought = any(item.kind == "reasoning" for item in self._items)
        return {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": self._thought if thought else 0},
            "total_tokens": usage["total_tokens"],
        }


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as it was understood."""
    return {**tool, "parameters": tool.get("parameters"), "strict": bool(tool.get("strict"))}


def _without_bytes(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events name tokens without their bytes."""
    return [{"token": e["token"], "logprob": e["logprob"], "top_logprobs": [{"token": t["token"], "logprob": t["logprob"]}
             for t in e["top_logprobs"]]} for e in entries]
