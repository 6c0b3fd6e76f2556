"""Parsers that find tool calls in a model's text.

    hermes        Let me look. <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>
    llama3_json   {"name": "weather", "parameters": {"city": "Paris"}}; {"name": ...}    <|python_tag|> in front is optional
    pythonic      [weather(city="Paris"), weather(city="Rome")]

    push(text) ─▶ ContentDelta("Let me look.")  ToolCallStart(0, "weather")  ToolCallArguments(0, '{"city": ')  ...  ToolCallEnd(0)

Text that is not a call of one of the request's tools is content. Nothing is dropped except white space next to a call, and nothing
raises. A call whose JSON breaks after its start, beyond what `JsonReader` corrects, ends there: its open brackets are closed, and the rest
is content. So arguments are valid JSON unless the text ends inside them, as at the token limit.
"""
from __future__ import annotations

from abc import abstractmethod

from minivllm.output_parsers.json_calls import JsonCallParser
from minivllm.output_parsers.pythonic import PythonicParser
from minivllm.output_parsers.tool_parser import MarkedParser, ToolParser


class _JsonParser(MarkedParser):
    """Calls that are JSON objects."""

    def _open(self) -> None:
        self._call_parser = JsonCallParser(self._names, exact=self._exclusive)
        self._reported = False
        self._state = self._call

    def _call(self) -> bool:
        parser = self._call_parser
        self._pending = self._pending[parser.feed(self._pending):]
        cut_off = self._ended and not (parser.done or parser.broken)
        if not self._reported and (parser.started or (cut_off and parser.known)):
            self._reported = True
            self._start_call(parser.name or "")
        if self._reported:
            if parser.broken and not parser.complete:
                parser.close()
            self._emit_arguments(parser.take() + (parser.unfinished() if cut_off else ""))
        if not (parser.done or parser.broken or cut_off):
            return False
        if self._reported:
            self._raw = ""
            self._end_call()
            self._state = self._close
        else:
            self._raw += parser.raw
            self._reject()
        return True

    @abstractmethod
    def _close(self) -> bool:
        """The state after a call."""


class HermesParser(_JsonParser):
    """The format of Nous Research's Hermes models and of Qwen."""

    OPEN = "<tool_call>"
    CLOSE = "</tool_call>"
    MARKERS = (OPEN, CLOSE)

    def _start(self) -> bool:
        return self._text()

    def _close(self) -> bool:
        return self._branch(self.CLOSE, self._end_calls, self._end_calls)


class Llama3JsonParser(_JsonParser):
    """Llama 3's format: an output is either text or calls."""

    OPEN = "<|python_tag|>"
    UNMARKED = "{"

    def _start(self) -> bool:
        return self._start_unmarked()

    def _close(self) -> bool:
        return self._branch(";", self._next, self._next)

    def _next(self) -> None:
        self._end_calls()
        self._state = self._start_unmarked


class RequiredCallsParser(_JsonParser):
    """What the grammar of `tool_choice: "required"` allows: a JSON array of calls. The array is the server's and never content."""

    OPEN = "["
    _text = ToolParser._emit_all

    def _emit_content(self, text: str) -> None:
        pass

    def _start(self) -> bool:
        return self._branch(self.OPEN, self._open, self._reject)

    def _close(self) -> bool:
        return self._branch(",", self._open, self._end_array)

    def _end_array(self) -> None:
        self._branch("]", self._end_calls, self._end_calls)


class NamedCallParser(ToolParser):
    """What the grammar of a named function allows: its arguments. An empty text (reasoning used all tokens) is not a call."""

    def __init__(self, name: str) -> None:
        super().__init__((name,))
        self._name = name

    def _start(self) -> bool:
        if not self._pending:
            return False
        self._start_call(self._name)
        self._state = self._arguments
        return True

    def _arguments(self) -> bool:
        self._emit_arguments(self._pending)
        self._pending = ""
        if self._ended:
            self._end_call()
            self._state = self._emit_all
        return False


PARSERS: dict[str, type[HermesParser | Llama3JsonParser | PythonicParser]] = {
    "hermes": HermesParser, "llama3_json": Llama3JsonParser, "pythonic": PythonicParser,
}


def guess_parser(template: str) -> str | None:
    """The format that a chat template tells the model to use, if it is clear."""
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"  # newer models put XML inside
    if "[func_name1(" in template:
        return "pythonic"
    if '"parameters":' in template and ("<|python_tag|>" in template or "ipython" in template):
        return "llama3_json"
    return None
