"""The common part of the parsers that find tool calls in a model's text."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import ClassVar

from minivllm.output_parsers.events import ContentDelta, IncrementalParser, ToolCallArguments, ToolCallEnd, ToolCallStart


class ToolParser(IncrementalParser, ABC):
    """The common part of all formats."""

    MARKERS: ClassVar[tuple[str, ...]] = ()  # must be in the text even if they are special tokens of the tokenizer

    def __init__(self, names: Collection[str], *, exclusive: bool = False) -> None:
        """`exclusive`: the output is either calls or content. So calls are at its start only, and content may contain the text of one."""
        super().__init__(self._start_exclusive if exclusive else self._start)
        self._names = frozenset(names)
        self._exclusive = exclusive
        self._num_calls = 0
        self._after_call = False  # white space here belongs to the call

    @abstractmethod
    def _start(self) -> bool:
        """The state at the start of a text."""

    def _start_exclusive(self) -> bool:
        return self._start()

    def _emit_content(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            self._events.append(ContentDelta(text))

    def _emit_all(self) -> bool:
        """A state in which all text is content."""
        self._emit_content(self._pending)
        self._pending = ""
        return False

    def _start_call(self, name: str) -> None:
        self._events.append(ToolCallStart(self._num_calls, name))

    def _emit_arguments(self, fragment: str) -> None:
        if fragment:
            self._events.append(ToolCallArguments(self._num_calls, fragment))

    def _end_call(self) -> None:
        self._events.append(ToolCallEnd(self._num_calls))
        self._num_calls += 1
        self._after_call = True


class MarkedParser(ToolParser):
    """Calls after an opening marker, with content around them."""

    OPEN: ClassVar[str]
    UNMARKED: ClassVar[str] = ""  # the start of a call that may lack its marker

    def __init__(self, names: Collection[str], *, exclusive: bool = False) -> None:
        super().__init__(names, exclusive=exclusive)
        self._raw = ""  # text of a call that has not started; it becomes content if there is no call

    def _text(self) -> bool:
        at = self._pending.find(self.OPEN)
        if at < 0:
            end = self._settled(self.OPEN)
            self._emit_content(self._pending[:end])
            self._pending = self._pending[end:]
            return False
        content_end = len(self._pending[:at].rstrip())
        self._emit_content(self._pending[:content_end])
        self._pending = self._pending[content_end:]
        return self._branch(self.OPEN, self._open, self._reject)

    @abstractmethod
    def _open(self) -> None:
        """Enter the state after the opening marker."""

    def _branch(self, token: str, found: Callable[[], None], missing: Callable[[], None]) -> bool:
        """A state: skip white space and `token` and continue with `found`, or continue with `missing`."""
        text = self._pending.lstrip()
        if text.startswith(token):
            size = len(self._pending) - len(text) + len(token)
            self._raw += self._pending[:size]
            self._pending = self._pending[size:]
            found()
        elif not self._ended and token.startswith(text):
            return False
        else:
            missing()
        return True

    def _reject(self) -> None:
        """The text was not a call."""
        raw, self._raw = self._raw, ""
        if not (self._exclusive and self._ended and self.OPEN in raw):  # certainly a call, but cut off before its start
            self._emit_content(raw)
        self._state = self._emit_all if self._exclusive else self._text

    def _end_calls(self) -> None:
        self._raw = ""
        self._state = self._start_exclusive if self._exclusive else self._text

    def _start_unmarked(self) -> bool:
        """A state: accept a call, without its marker too if it starts as such calls do."""
        is_call = bool(self.UNMARKED) and self._pending.lstrip().startswith(self.UNMARKED)
        return self._branch("" if is_call else self.OPEN, self._open, self._reject)

    _start_exclusive = _start_unmarked
