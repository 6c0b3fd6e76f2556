"""`/v1/chat/completions` where the output is more than text: reasoning and tool calls told apart, whole or streamed.

    stream   delta: {"reasoning": ...}  {"content": ...}  {"tool_calls": [{"index": 0, "id", "function": {"name", "arguments": ""}}]}
             and then, for each fragment, {"tool_calls": [{"index": 0, "function": {"arguments": ...}}]}
    whole    message: {"content": text or null, "reasoning": ..., "tool_calls": [...]}
"""
from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minivllm.outputs import OutputDelta
from minivllm.server.answers import ChatAnswer, Choice, Job
from minivllm.server.logprobs import TokenNames
from minivllm.server.reading import OutputReader, Reading
from minivllm.server.tool_parsers import CallArguments, CallStart, Content, Event, Reasoning


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Read:
    """What has been read of one choice."""

    reader: OutputReader
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


class ReadAnswer(ChatAnswer):
    """A chat's answer, read."""

    def __init__(self, job: Job, names: TokenNames) -> None:
        super().__init__(job, names)
        reading = job.reading or Reading()
        self._reading = reading
        self._read = [Read(OutputReader(reading)) for _ in self.choices]
        self._max_calls = None if reading.tools is None or reading.tools.parallel else 1
        self._legacy = reading.tools is not None and reading.tools.legacy

    # -- streamed -----------------------------------------------------------------------------------------------------

    def chunk(self, prompt: int, deltas: Sequence[OutputDelta]) -> bytes:
        out = []
        for choice, delta in self._take(prompt, deltas):
            text, logprobs = self._news(choice, delta)
            change = self._note(choice, text)
            if change or logprobs or delta.finish_reason is not None or (self.job.return_token_ids and delta.token_ids):
                body = {"index": choice.index, "delta": change, "logprobs": logprobs,
                        "finish_reason": self._finish_reason(choice), "stop_reason": choice.stop_reason}
                if self.job.return_token_ids:
                    body["token_ids"] = list(delta.token_ids)
                out.append(self._event([body], self.usage() if self.job.continuous_usage else None))
        return b"".join(out)

    def _note(self, choice: Choice, text: str) -> dict[str, Any]:
        """Read on in one choice's text; what is new, as a delta."""
        read = self._read[choice.index]
        events = read.reader.push(text)
        if choice.finish_reason is not None:
            events += read.reader.finish()
        change: dict[str, Any] = {}
        for event in events:
            self._add(read, event, change)
        return change

    def _add(self, read: Read, event: Event, change: dict[str, Any]) -> None:
        if isinstance(event, Content):
            read.content += event.text
            change["content"] = change.get("content", "") + event.text
        elif isinstance(event, Reasoning):
            if self._reading.include_reasoning:
                read.reasoning += event.text
                change["reasoning"] = change["reasoning_content"] = change.get("reasoning", "") + event.text
        elif self._max_calls is not None and event.index >= self._max_calls:
            pass  # more calls than were asked for
        elif isinstance(event, CallStart):
            read.calls.append(Call(f"call_{uuid.uuid4().hex[:24]}", event.name))
            self._call_change(change, event.index, read.calls[-1])
        elif isinstance(event, CallArguments):
            read.calls[event.index].arguments += event.fragment
            self._call_change(change, event.index, None)["arguments"] += event.fragment

    def _call_change(self, change: dict[str, Any], index: int, new: Call | None) -> dict[str, Any]:
        """The delta's entry for a call: its function, with arguments to add to."""
        if self._legacy:
            if new is not None:
                change["function_call"] = {"name": new.name, "arguments": ""}
            function: dict[str, Any] = change.setdefault("function_call", {"arguments": ""})
            return function
        entries: list[dict[str, Any]] = change.setdefault("tool_calls", [])
        if new is not None:
            entries.append({"index": index, "id": new.id, "type": "function", "function": {"name": new.name, "arguments": ""}})
        elif not entries or entries[-1]["index"] != index:
            entries.append({"index": index, "function": {"arguments": ""}})
        called: dict[str, Any] = entries[-1]["function"]
        return called

    # -- whole --------------------------------------------------------------------------------------------------------

    def keep(self, prompt: int, deltas: Sequence[OutputDelta]) -> None:
        super().keep(prompt, deltas)
        for choice in self.choices[prompt * self.job.n:(prompt + 1) * self.job.n]:
            if choice.pieces:
                self._note(choice, "".join(choice.pieces))
                choice.pieces.clear()

    def whole_choice(self, choice: Choice) -> dict[str, Any]:
        read = self._read[choice.index]
        self._note(choice, "")
        message: dict[str, Any] = {"role": "assistant", "content": read.content or (None if read.calls or read.reasoning else "")}
        if self._reading.splits:
            message["reasoning"] = message["reasoning_content"] = read.reasoning or None
        if read.calls and self._legacy:
            message["function_call"] = {"name": read.calls[0].name, "arguments": read.calls[0].arguments}
        elif read.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in read.calls
            ]
        return {"index": choice.index, "message": message, "logprobs": choice.logprobs,
                "finish_reason": self._finish_reason(choice), "stop_reason": choice.stop_reason}

    def _finish_reason(self, choice: Choice) -> str | None:
        """Calls that the model chose to make are a reason of their own; a named function is simply finished."""
        use = self._reading.tools
        if choice.finish_reason == "stop" and use is not None and use.mode != "named" and self._read[choice.index].calls:
            return "function_call" if self._legacy else "tool_calls"
        return choice.finish_reason


def chat_answer(job: Job, names: TokenNames) -> ChatAnswer:
    """The kind of answer that a chat needs."""
    return ChatAnswer(job, names) if job.reading is None else ReadAnswer(job, names)
