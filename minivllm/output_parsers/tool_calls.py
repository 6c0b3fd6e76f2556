"""Parsers that find tool calls in a model's text.

    hermes        Let me look. <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>
    llama3_json   {"name": "weather", "parameters": {"city": "Paris"}}; {"name": ...}    <|python_tag|> in front is optional
    pythonic      [weather(city="Paris"), weather(city="Rome")]

    push(text) ─▶ ContentDelta("Let me look.")  ToolCallStart(0, "weather")  ToolCallArguments(0, '{"city": ')  ...  ToolCallEnd(0)

Text that is not a call of one of the request's tools is content. Nothing is dropped except white space and surplus brackets next to a
call, and nothing raises. A call whose JSON breaks after its start, beyond what `JsonReader` corrects, ends there: its open brackets are
closed, and the rest is content. A call that the model itself leaves open is closed. So arguments are valid JSON unless the token limit cuts
them off.
"""
from __future__ import annotations

import json
import re
from typing import ClassVar

from minivllm.output_parsers.json_calls import JsonCallParser
from minivllm.output_parsers.pythonic import PythonicParser
from minivllm.output_parsers.tool_parser import MarkedParser, ToolParser

_SURPLUS = re.compile(r"[\s}\],]*")  # between calls: white space, brackets too many, a comma


class _JsonParser(MarkedParser):
    """Calls that are JSON objects."""

    END: ClassVar[str] = ""  # behind a call

    def _open(self) -> None:
        self._call_parser = JsonCallParser(self._names, exact=self._exclusive, markers=self.MARKERS)
        self._reported = False
        self._state = self._call

    def _call(self) -> bool:
        parser = self._call_parser
        self._pending = self._pending[parser.feed(self._pending, self._ended, self._cut):]
        incomplete = self._ended and not (parser.done or parser.broken)
        cut_off = incomplete and self._cut
        if not self._reported and (parser.started or (cut_off and parser.known)):
            self._reported = True
            self._start_call(parser.name or "")
        if self._reported:
            if not parser.complete and (parser.broken or (incomplete and not cut_off)):
                parser.close()
            self._emit_arguments(parser.take() + (parser.unfinished() if cut_off else ""))
        if not (parser.done or parser.broken or incomplete):
            return False
        if self._reported:
            self._raw = ""
            self._end_call()
            self._state = self._close
        else:
            self._raw += parser.raw
            self._reject()
        return True

    def _close(self) -> bool:
        """The state after a call: its end, also after a bracket too many, or one more call."""
        rest = self._pending[_SURPLUS.match(self._pending).end():]  # type: ignore[union-attr]
        if not self._ended and rest != self.END and self.END.startswith(rest):
            return False
        if rest.startswith("{"):
            self._raw, self._pending = self._pending[:-len(rest)], rest
            self._open()
            return True
        if rest.startswith(self.END) or not rest:
            self._pending = rest.removeprefix(self.END)
        self._end_calls()
        return True


class HermesParser(_JsonParser):
    """The format of Nous Research's Hermes models and of Qwen."""

    OPEN = "<tool_call>"
    CLOSE = "</tool_call>"
    END = CLOSE
    MARKERS = (OPEN, CLOSE)

    def _start(self) -> bool:
        return self._text()


class Llama3JsonParser(_JsonParser):
    """Llama 3's format: an output is either text or calls."""

    OPEN = "<|python_tag|>"
    END = ";"
    UNMARKED = "{"

    def _start(self) -> bool:
        return self._start_unmarked()

    def _end_calls(self) -> None:
        super()._end_calls()
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
        self._call_parser = JsonCallParser(self._names)
        self._call_parser.feed(f'{{"name": {json.dumps(self._name)}, "arguments":', ended=False, cut=False)
        self._state = self._arguments
        return True

    def _arguments(self) -> bool:
        """Pass the arguments on. If a stop string cut them off, they are closed."""
        parser = self._call_parser
        self._pending = self._pending[parser.feed(self._pending, self._ended, self._cut):]
        if self._ended and not (self._cut or parser.complete or parser.broken):
            parser.close()
        self._emit_arguments(parser.take() + (parser.unfinished() if self._ended and self._cut else ""))
        if parser.broken:  # no output of the grammar
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
