"""What the parsers of a model's output report: reasoning, content and tool calls, in the order in which the model wrote them."""
from __future__ import annotations

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


def settled(text: str, marker: str) -> int:
    """Number of leading characters that no later text can change. White space and a partial marker at the end are not settled."""
    end = len(text)
    for size in range(min(len(marker) - 1, end), 0, -1):
        if text.endswith(marker[:size]):
            end -= size
            break
    return len(text[:end].rstrip())
