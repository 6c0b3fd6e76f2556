"""How the text of one chat's output is to be read: reasoning first, then content and calls.

    text ─▶ ReasoningSplitter ─▶ Reasoning
                              ─▶ Content ─▶ ToolParser ─▶ Content, CallStart, CallArguments, CallEnd
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivllm.errors import NotSupportedYet
from minivllm.server.reasoning import Beginning, ReasoningSplitter
from minivllm.server.tool_parsers import PARSERS, Content, Event, Named, Required, ToolParser
from minivllm.server.tools import ToolUse


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One request's."""

    begin: Beginning = "answer"  # whether the output begins with reasoning
    splits: bool = False  # whether reasoning is split off at all
    include_reasoning: bool = True
    tools: ToolUse | None = None
    format: str | None = None  # of calls that the model writes by itself
    show_special: bool = False  # marks in front of reasoning or calls are special tokens

    def parser(self) -> ToolParser | None:
        use = self.tools
        if use is None:
            return None
        if use.mode == "named":
            return Named(use.named or "")
        return Required(use.names) if use.mode == "required" else PARSERS[self.format or ""](use.names)

    def sampling(self) -> dict[str, Any]:
        """What it needs of the sampling parameters."""
        schema = None if self.tools is None else self.tools.schema()
        needs: dict[str, Any] = {"skip_special_tokens": False} if self.show_special else {}
        if schema is not None:
            raise NotSupportedYet("tool_choice other than 'none' and 'auto' is not supported yet: leave it out", "tool_choice")
        return needs


class OutputReader:
    """Reads one output as it comes."""

    def __init__(self, reading: Reading) -> None:
        self._splitter = ReasoningSplitter(reading.begin)
        self._parser = reading.parser()

    def push(self, text: str) -> list[Event]:
        return self._pass_on(self._splitter.push(text))

    def finish(self) -> list[Event]:
        events = self._pass_on(self._splitter.finish())
        return events if self._parser is None else events + self._parser.finish()

    def _pass_on(self, events: list[Event]) -> list[Event]:
        if self._parser is None:
            return events
        return [found for event in events for found in (self._parser.push(event.text) if isinstance(event, Content) else (event,))]
