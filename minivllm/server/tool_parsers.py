"""Parsers that find tool calls in a model's text.

    hermes        Let me look. <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>
    llama3_json   {"name": "weather", "parameters": {"city": "Paris"}}; {"name": ...}    <|python_tag|> in front is optional
    pythonic      [weather(city="Paris"), weather(city="Rome")]

    push(text) ─▶ ContentDelta("Let me look.")  ToolCallStart(0, "weather")  ToolCallArguments(0, '{"city": ')  ...  ToolCallEnd(0)

Text that is not a call of one of the request's tools is content. Nothing is dropped except white space next to a call, and nothing
raises. A call that breaks after its start keeps the arguments that were already reported, and the rest is content.
"""
from __future__ import annotations

import ast
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import ClassVar

from minivllm.server.json_calls import JsonCallParser
from minivllm.server.output_events import ContentDelta, IncrementalParser, ToolCallArguments, ToolCallEnd, ToolCallStart


class ToolParser(IncrementalParser, ABC):
    """The common part of all formats."""

    MARKERS: ClassVar[tuple[str, ...]] = ()  # must be in the text even if they are special tokens of the tokenizer

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(self._start)
        self._names = frozenset(names)
        self._num_calls = 0
        self._after_call = False  # white space here belongs to the call

    @abstractmethod
    def _start(self) -> bool:
        """The state at the start of a text."""

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


class _MarkedParser(ToolParser):
    """Calls after an opening marker, with content around them."""

    OPEN: ClassVar[str]

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
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
        self._emit_content(raw)
        self._state = self._text

    def _end_calls(self) -> None:
        self._raw = ""
        self._state = self._text

    def _start_unmarked(self, opening: str) -> bool:
        """A state: accept a call without its marker if the text starts with `opening`."""
        is_call = self._pending.lstrip().startswith(opening)
        return self._branch("" if is_call else self.OPEN, self._open, self._reject)


class _JsonParser(_MarkedParser):
    """Calls that are JSON objects."""

    def _open(self) -> None:
        self._call_parser = JsonCallParser(self._names)
        self._reported = False
        self._state = self._call

    def _call(self) -> bool:
        parser = self._call_parser
        self._pending = self._pending[parser.feed(self._pending):]
        if parser.started and not self._reported:
            self._reported = True
            self._start_call(parser.name or "")
        self._emit_arguments(parser.take())
        if not (parser.done or parser.broken or self._ended):
            return False
        if self._reported:
            self._raw = ""
            self._end_call()
            self._state = self._close if parser.done else self._text
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

    def _start(self) -> bool:
        return self._start_unmarked("{")

    def _close(self) -> bool:
        return self._branch(";", self._next, self._next)

    def _next(self) -> None:
        self._state = self._start


class RequiredCallsParser(_JsonParser):
    """What the grammar of `tool_choice: "required"` allows: a JSON array of calls."""

    OPEN = "["
    _text = ToolParser._emit_all

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


class PythonicParser(_MarkedParser):
    """Calls as a Python list, as Llama 3.2 and 4 write them. A call is reported once its closing bracket has arrived."""

    OPEN = "<|python_start|>"
    CLOSE = "<|python_end|>"
    MAX_DEPTH = 64  # brackets; far fewer than what makes Python's compiler recurse too deep

    def _start(self) -> bool:
        return self._start_unmarked("[")

    def _open(self) -> None:
        self._state = self._list

    def _list(self) -> bool:
        return self._branch("[", self._next_item, self._reject)

    def _next_item(self) -> None:
        self._item: list[str] = []  # its characters
        self._quote, self._escaped, self._depth = "", False, 0
        self._state = self._read_item

    def _read_item(self) -> bool:
        for i, char in enumerate(self._pending):
            at_end = self._depth == 0 and not self._quote and char in ",]"
            if at_end or not self._accept(char):
                used = i + 1 if at_end else i
                self._raw += self._pending[:used]
                self._pending = self._pending[used:]
                if at_end:
                    self._end_item(char)
                else:
                    self._reject()
                return True
            self._item.append(char)
        self._raw += self._pending
        self._pending = ""
        if self._ended:
            self._reject()
        return self._ended

    def _accept(self, char: str) -> bool:
        """Track strings and brackets. False as soon as the item cannot be a call of a known tool."""
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif self._depth == 0:
            if char == "(":
                self._depth = 1
                return "".join(self._item).strip() in self._names
            return char.isalnum() or char.isspace() or char in "_.-"
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._depth += 1
            return self._depth <= self.MAX_DEPTH
        elif char in ")]}":
            self._depth -= 1
        return True

    def _end_item(self, char: str) -> None:
        item = "".join(self._item).strip()
        call = parse_python_call(item)
        if call is None and not (self._num_calls and char == "]" and not item):  # a comma is allowed after the last call
            self._reject()
            return
        if call is not None:
            self._start_call(call[0])
            self._emit_arguments(call[1])
            self._end_call()
        if char == ",":
            self._raw = ","
            self._next_item()
        else:
            self._raw = ""
            self._state = self._close

    def _close(self) -> bool:
        return self._branch(self.CLOSE, self._end_calls, self._end_calls)


# Python text that can be a call with literal arguments. It excludes chains of operators and keywords, which Python's compiler would
# follow by recursion, and strings with a prefix.
_LITERALS_ONLY = re.compile(r"""
    (?: '(?:[^'\\]|\\.)*+' | "(?:[^"\\]|\\.)*+" | (?!lambda) [\w.]++ (?!\s*["'\w.]) | [,:=()\[\]{}\s] | [+-] (?!\s*[+-]) )*+
""", re.DOTALL | re.VERBOSE)
_CALL = re.compile(r"([^()\s]+)\s*(\(.*\))", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}


class _JsonNames(ast.NodeTransformer):
    """Replaces JSON's names, which models mix into Python. Rejects objects with keys that are not strings."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        if not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in node.keys):
            raise ValueError("a key is not a string")
        return self.generic_visit(node)


def parse_python_call(text: str) -> tuple[str, str] | None:
    """`f(a=1)` as ("f", '{"a": 1}'). Only literals are accepted; nothing is evaluated."""
    split = _CALL.fullmatch(text)
    if split is None or not _LITERALS_ONLY.fullmatch(split[2]):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about "\d" in a string
            call = ast.parse("f" + split[2], mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args or not all(k.arg for k in call.keywords):
            return None
        arguments = {keyword.arg: ast.literal_eval(_JsonNames().visit(keyword.value)) for keyword in call.keywords}
        return split[1], json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # TypeError: a literal that JSON does not have
        return None


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
