"""`/v1/chat/completions` with an output that is parsed into reasoning, content and tool calls, streamed or complete.

    stream     delta: {"reasoning": ...}  {"content": ...}  {"tool_calls": [{"index": 0, "id", "function": {"name", "arguments": ""}}]}
               and then, for each fragment, {"tool_calls": [{"index": 0, "function": {"arguments": ...}}]}
    complete   message: {"content": text or null, "reasoning": ..., "tool_calls": [...]}
"""
from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from minivllm.output_parsers.events import ContentDelta, OutputEvent, ReasoningDelta, ToolCallArguments, ToolCallStart
from minivllm.server.formatters import ChatFormatter, ChoiceState, PreparedRequest
from minivllm.server.logprobs import TokenNames
from minivllm.server.output_spec import OutputParser, OutputSpec


@dataclass(slots=True)
class ParsedToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedChoice:
    """The parsed output of one choice so far."""

    parser: OutputParser
    content: str = ""
    reasoning: str = ""
    calls: list[ParsedToolCall] = field(default_factory=list)


class ParsedChatFormatter(ChatFormatter):
    """A chat's response with parsed outputs."""

    TEXT_CHUNK = None

    def __init__(self, request: PreparedRequest, names: TokenNames) -> None:
        super().__init__(request, names)
        self._spec = request.output or OutputSpec()
        self._parsed = [ParsedChoice(OutputParser(self._spec)) for _ in self.state.choices]
        self._legacy = self._spec.tools is not None and self._spec.tools.legacy
        self.no_content = None if self._spec.tools is not None and self._spec.tools.forced else ""

    def chunk_content(self, choice: ChoiceState, text: str) -> dict[str, Any]:
        """Parse new text and return the delta of the message."""
        parsed = self._parsed[choice.index]
        delta: dict[str, Any] = {}
        for event in parsed.parser.push(text, choice.finish_reason):
            self._add(parsed, event, delta)
        return delta

    def keep_text(self, choice: ChoiceState, text: str) -> None:
        self.chunk_content(choice, text)

    def _add(self, parsed: ParsedChoice, event: OutputEvent, delta: dict[str, Any]) -> None:
        if isinstance(event, ContentDelta):
            parsed.content += event.text
            delta["content"] = delta.get("content", "") + event.text
        elif isinstance(event, ReasoningDelta):
            parsed.reasoning += event.text
            delta["reasoning"] = delta["reasoning_content"] = delta.get("reasoning", "") + event.text
        elif isinstance(event, ToolCallStart):
            parsed.calls.append(ParsedToolCall(f"call_{uuid.uuid4().hex[:24]}", event.name))
            self._function_delta(delta, event.index, parsed.calls[-1])
        elif isinstance(event, ToolCallArguments):
            parsed.calls[event.index].arguments += event.fragment
            self._function_delta(delta, event.index, None)["arguments"] += event.fragment

    def _function_delta(self, delta: dict[str, Any], index: int, new: ParsedToolCall | None) -> dict[str, Any]:
        """The function of a call in a delta. The caller appends arguments to it. `new`: the call, if it starts here."""
        if self._legacy:
            if new is not None:
                delta["function_call"] = {"name": new.name, "arguments": ""}
            function: dict[str, Any] = delta.setdefault("function_call", {"arguments": ""})
            return function
        entries: list[dict[str, Any]] = delta.setdefault("tool_calls", [])
        if new is not None:
            entries.append({"index": index, "id": new.id, "type": "function", "function": {"name": new.name, "arguments": ""}})
        elif not entries or entries[-1]["index"] != index:
            entries.append({"index": index, "function": {"arguments": ""}})
        called: dict[str, Any] = entries[-1]["function"]
        return called

    def complete_content(self, choice: ChoiceState) -> dict[str, Any]:
        parsed = self._parsed[choice.index]
        no_content = None if parsed.calls or parsed.reasoning else self.no_content
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content or no_content, "reasoning": None}
        if self._spec.splits_reasoning:
            message["reasoning"] = message["reasoning_content"] = parsed.reasoning or None
        functions = [{"name": call.name, "arguments": call.arguments} for call in parsed.calls]
        if functions and self._legacy:
            message["function_call"] = functions[0]
        elif functions:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": function} for call, function in zip(parsed.calls, functions, strict=True)
            ]
        return message

    def finish_reason(self, choice: ChoiceState) -> str | None:
        """Calls that the model chose end with "tool_calls" (old form: "function_call"), the call of a named function with "stop"."""
        tools = self._spec.tools
        if choice.finish_reason == "stop" and tools is not None and tools.mode != "named" and self._parsed[choice.index].calls:
            return "function_call" if self._legacy else "tool_calls"
        return choice.finish_reason
