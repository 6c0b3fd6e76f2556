"""Reasoning split from the answer: what stands between <think> and </think>, while it comes.

Where a text begins depends on the prompt, because some chat templates open or close the tag themselves:

    prompt ends with <think>     the text begins inside
    prompt ends with </think>    the template was told not to think: all of it is the answer
    neither                      qwen3: inside if the text opens the tag; deepseek_r1: inside, the model leaves the tag out

White space beside the tags belongs to them. A text that ends inside is all reasoning: its answer was cut off.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from minivllm.server.tool_parsers import Content, Event, Reasoning, settled

OPEN, CLOSE = "<think>", "</think>"

Beginning = Literal["inside", "answer", "undecided"]


def beginning(parser: str, prompt: str, continued: str = "") -> Beginning:
    """Where the output of this prompt begins. `continued` is the message it continues, if it does."""
    prompt = prompt.rstrip()
    if prompt.endswith(OPEN) or continued.rfind(OPEN) > continued.rfind(CLOSE):
        return "inside"
    if prompt.endswith(CLOSE) or continued:
        return "answer"
    return "inside" if parser == "deepseek_r1" else "undecided"


class ReasoningSplitter:
    """Text in, `Reasoning` and `Content` out; the same however the text is cut into pieces."""

    def __init__(self, begin: Beginning) -> None:
        self._rest = ""
        self._ended = False
        self._events: list[Event] = []
        self._begin = begin
        self._fresh = False  # right behind a tag: white space is part of it
        self._state: Callable[[], bool] = self._answer if begin == "answer" else self._first

    @property
    def thinking(self) -> bool:
        return self._state == self._inside

    def push(self, text: str) -> list[Event]:
        self._rest += text
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        self._ended = True
        return self.push("")

    def _first(self) -> bool:
        text = self._rest.lstrip()
        if text.startswith(OPEN):
            self._rest = text[len(OPEN):]
        elif not self._ended and OPEN.startswith(text):
            return False
        elif self._begin == "undecided":
            self._state = self._answer
            return True
        self._fresh = True
        self._state = self._inside
        return True

    def _inside(self) -> bool:
        at = self._rest.find(CLOSE)
        sure = len(self._rest[:at].rstrip()) if at >= 0 else len(self._rest) if self._ended else settled(self._rest, CLOSE)
        self._tell(Reasoning, self._rest[:sure])
        if at < 0:
            self._rest = self._rest[sure:]
            return False
        self._rest = self._rest[at + len(CLOSE):]
        self._fresh = True
        self._state = self._answer
        return True

    def _answer(self) -> bool:
        self._tell(Content, self._rest)
        self._rest = ""
        return False

    def _tell(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        if self._fresh:
            text = text.lstrip()
        if text:
            self._fresh = False
            self._events.append(kind(text))
