"""What the parsers of a model's output report, in the order in which the model wrote it, and the base class of these parsers."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    index: int


OutputEvent: TypeAlias = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


class IncrementalParser:
    """A state machine: text in, events out. The same text gives the same events however it is cut into pieces.

    A state is a method that does one thing and returns True, or returns False if it needs more text. It decides only what later text
    cannot change.
    """

    def __init__(self, start: Callable[[], bool]) -> None:
        self._state = start
        self._pending = ""  # text that no state has used yet
        self._ended = False
        self._cut = False
        self._events: list[OutputEvent] = []

    def push(self, text: str) -> list[OutputEvent]:
        """The events that a further piece of text makes certain."""
        self._pending += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def finish(self, cut: bool = False) -> list[OutputEvent]:
        """The remaining events, at the end of the text. `cut`: the text ends at the token limit, not where the model ended it."""
        self._ended, self._cut = True, cut
        return self.push("")

    def _settled(self, marker: str) -> int:
        """Number of pending characters before white space and a partial marker at the end, which later text may still change."""
        text = self._pending
        if self._ended:
            return len(text)
        partial = next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
        return len(text[:len(text) - partial].rstrip())
