"""Splits reasoning, the text between <think> and </think>, from the answer while the text arrives.

Some chat templates open or close the tag themselves, so the start of the output depends on the prompt:

    prompt ends with <think>     the output starts with reasoning
    prompt ends within <think>   the output goes on with the reasoning of a message that it continues
    prompt ends with </think>    thinking is turned off: the whole output is the answer
    neither, with qwen3          the output starts with reasoning if it opens the tag
    neither, with deepseek_r1    the output starts with reasoning: the model leaves the opening tag out

White space next to a tag belongs to the tag. An output that ends before </think> is reasoning only: its answer was cut off.
"""
from __future__ import annotations

from typing import Literal, TypeAlias

from minivllm.output_parsers.events import ContentDelta, IncrementalParser, ReasoningDelta

OPEN, CLOSE = "<think>", "</think>"

OutputStart: TypeAlias = Literal["reasoning", "within", "answer", "undecided"]


def output_start(parser: str, prompt: str, continued: str = "") -> OutputStart:
    """How the output of this prompt starts. `continued` is the content of the final message if the output continues it."""
    prompt = prompt.rstrip()
    if prompt.endswith(OPEN):
        return "reasoning"
    if continued.rfind(OPEN) > continued.rfind(CLOSE):
        return "within"
    if prompt.endswith(CLOSE) or continued:
        return "answer"
    return "reasoning" if parser == "deepseek_r1" else "undecided"


class ReasoningParser(IncrementalParser):
    """Reports `ReasoningDelta` and `ContentDelta`."""

    def __init__(self, start: OutputStart) -> None:
        super().__init__({"answer": self._answer, "within": self._reasoning}.get(start, self._before))
        self._start = start
        self._after_tag = False  # white space here belongs to the tag

    @property
    def in_reasoning(self) -> bool:
        return self._state == self._reasoning

    def _before(self) -> bool:
        text = self._pending.lstrip()
        if text.startswith(OPEN):
            self._pending = text[len(OPEN):]
        elif not self._ended and OPEN.startswith(text):
            return False
        elif self._start == "undecided":
            self._state = self._answer
            return True
        self._after_tag = True
        self._state = self._reasoning
        return True

    def _reasoning(self) -> bool:
        text, tag, rest = self._pending.partition(CLOSE)
        if not tag:
            end = self._settled(CLOSE)
            self._emit(ReasoningDelta, self._pending[:end])
            self._pending = self._pending[end:]
            return False
        self._emit(ReasoningDelta, text.rstrip())
        self._pending = rest
        self._after_tag = True
        self._state = self._answer
        return True

    def _answer(self) -> bool:
        self._emit(ContentDelta, self._pending)
        self._pending = ""
        return False

    def _emit(self, kind: type[ReasoningDelta] | type[ContentDelta], text: str) -> None:
        if self._after_tag:
            text = text.lstrip()
        if text:
            self._after_tag = False
            self._events.append(kind(text))
