"""Tool calls in a model's text: each parser is a small state machine, text in, events out.

    hermes        Let me look. <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>
    llama3_json   {"name": "weather", "parameters": {"city": "Paris"}}; {"name": ...}    <|python_tag|> in front is optional
    pythonic      [weather(city="Paris"), weather(city="Rome")]

    push(text) ─▶ Content("Let me look.")  CallStart(0, "weather")  CallArguments(0, '{"city": ')  CallArguments ...  CallEnd(0)

The same text gives the same content and calls however it is cut into pieces, because a state decides only on what no later text
can change. What is not a call of one of the request's tools is content: nothing is lost but white space beside a call, and nothing
raises. A call that breaks after it has begun keeps the arguments that were already told; the rest is content.
"""
from __future__ import annotations

import ast
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from minivllm.server.json_calls import CallReader


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    index: int


Event: TypeAlias = Content | Reasoning | CallStart | CallArguments | CallEnd


def settled(text: str, marker: str) -> int:
    """How much of a text is certain: the rest is white space and the beginning of a marker, as far as they are at its end."""
    end = len(text)
    for size in range(min(len(marker) - 1, end), 0, -1):
        if text.endswith(marker[:size]):
            end -= size
            break
    return len(text[:end].rstrip())


class ToolParser(ABC):
    """What all formats share: undecided text, and the calls so far."""

    MARKERS: ClassVar[tuple[str, ...]] = ()  # must reach the parser even where the tokenizer calls them special

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._rest = ""  # undecided
        self._ended = False
        self._events: list[Event] = []
        self._num_calls = 0
        self._after_call = False  # white space is not content then
        self._state: Callable[[], bool] = self._first  # does one thing; False: more text is needed

    def push(self, text: str) -> list[Event]:
        """What became certain with a piece of text."""
        self._rest += text
        return self._run()

    def finish(self) -> list[Event]:
        """The rest, at the end of the text."""
        self._ended = True
        return self._run()

    def _run(self) -> list[Event]:
        while self._state():
            pass
        events, self._events = self._events, []
        return events

    @abstractmethod
    def _first(self) -> bool:
        """The state at the beginning of a text."""

    def _say(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            self._events.append(Content(text))

    def _start(self, name: str) -> None:
        self._events.append(CallStart(self._num_calls, name))

    def _argue(self, fragment: str) -> None:
        if fragment:
            self._events.append(CallArguments(self._num_calls, fragment))

    def _end(self) -> None:
        self._events.append(CallEnd(self._num_calls))
        self._num_calls += 1
        self._after_call = True

    def _skip(self, what: str) -> bool | None:
        """Pass over white space and then `what`, if it is there: True or False; None if that cannot be known yet."""
        text = self._rest.lstrip()
        if text.startswith(what):
            self._rest = text[len(what):]
            return True
        return None if not self._ended and what.startswith(text) else False


class _Marked(ToolParser):
    """Calls behind an opening mark, and content around them."""

    OPEN: ClassVar[str]

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._raw = ""  # of a call that has not begun: content, should it be none

    def _text(self) -> bool:
        at = self._rest.find(self.OPEN)
        if at < 0:
            sure = len(self._rest) if self._ended else settled(self._rest, self.OPEN)
            self._say(self._rest[:sure])
            self._rest = self._rest[sure:]
            return False
        sure, end = len(self._rest[:at].rstrip()), at + len(self.OPEN)
        self._say(self._rest[:sure])
        self._raw, self._rest = self._rest[sure:end], self._rest[end:]
        self._open()
        return True

    @abstractmethod
    def _open(self) -> None:
        """Enter the state behind the opening mark."""

    def _bare(self, opening: str) -> bool:
        """A call may stand without its mark if it begins like `opening`."""
        text = self._rest.lstrip()
        if text.startswith(self.OPEN):
            text = text[len(self.OPEN):]
        elif not text.startswith(opening):
            if not self._ended and self.OPEN.startswith(text):
                return False
            self._give_up()
            return True
        self._raw += self._rest[:len(self._rest) - len(text)]
        self._rest = text
        self._open()
        return True

    def _give_up(self) -> None:
        """It was no call."""
        raw, self._raw = self._raw, ""
        self._say(raw)
        self._state = self._text


class _Json(_Marked):
    """Calls that are JSON objects."""

    def _open(self) -> None:
        self._reader = CallReader(self._names)
        self._told = False
        self._state = self._call

    def _call(self) -> bool:
        reader = self._reader
        self._rest = self._rest[reader.feed(self._rest):]
        if reader.begun and not self._told:
            self._told = True
            self._start(reader.name or "")
        self._argue(reader.take())
        if not (reader.done or reader.broken or self._ended):
            return False
        if self._told:
            self._raw = ""
            self._end()
            self._state = self._close if reader.done else self._text
        else:
            self._raw += reader.raw
            self._give_up()
        return True

    @abstractmethod
    def _close(self) -> bool:
        """The state after a call."""


class Hermes(_Json):
    """Nous Research's format, also Qwen's."""

    OPEN = "<tool_call>"
    CLOSE = "</tool_call>"
    MARKERS = (OPEN, CLOSE)

    def _first(self) -> bool:
        return self._text()

    def _close(self) -> bool:
        if self._skip(self.CLOSE) is None:
            return False
        self._state = self._text
        return True


class Llama3Json(_Json):
    """Llama 3's: an answer is either text or calls."""

    OPEN = "<|python_tag|>"

    def _first(self) -> bool:
        return self._bare("{")

    def _close(self) -> bool:
        separated = self._skip(";")
        if separated is None:
            return False
        self._raw = ";" if separated else ""
        self._state = self._first
        return True


class Pythonic(_Marked):
    """Calls as a Python list, as Llama 3.2 and 4 write them. A call is told when its closing bracket has come."""

    OPEN = "<|python_start|>"
    CLOSE = "<|python_end|>"
    MAX_DEPTH = 64  # brackets; far below what makes the compiler recurse too deeply
    _QUOTES: ClassVar[str] = "\"'"

    def _first(self) -> bool:
        return self._bare("[")

    def _open(self) -> None:
        self._state = self._list

    def _list(self) -> bool:
        before = self._rest
        opened = self._skip("[")
        if opened is None:
            return False
        if opened:
            self._raw += before[:len(before) - len(self._rest)]
            self._next_item()
        else:
            self._give_up()
        return True

    def _next_item(self) -> None:
        self._item: list[str] = []  # its characters
        self._quote, self._escaped, self._depth = "", False, 0
        self._state = self._read_item

    def _read_item(self) -> bool:
        for i, char in enumerate(self._rest):
            if self._depth == 0 and not self._quote and char in ",]":
                self._raw += self._rest[:i + 1]
                self._rest = self._rest[i + 1:]
                self._item_ends(char)
                return True
            if not self._fits(char):
                self._raw += self._rest[:i]
                self._rest = self._rest[i:]
                self._give_up()
                return True
            self._item.append(char)
        self._raw += self._rest
        self._rest = ""
        if self._ended:
            self._give_up()
        return self._ended

    def _fits(self, char: str) -> bool:
        """Follow strings and brackets; what cannot be a call of a known tool need not be read to its end."""
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
        elif char in self._QUOTES:
            self._quote = char
        elif char in "([{":
            self._depth += 1
            return self._depth <= self.MAX_DEPTH
        elif char in ")]}":
            self._depth -= 1
        return True

    def _item_ends(self, char: str) -> None:
        item = "".join(self._item).strip()
        call = read_python_call(item)
        if call is None and not (self._num_calls and char == "]" and not item):  # a comma may stand behind the last
            self._give_up()
            return
        if call is not None:
            self._raw = ""
            self._start(call[0])
            self._argue(call[1])
            self._end()
        if char == ",":
            self._raw = ","
            self._next_item()
        else:
            self._raw = ""
            self._state = self._close

    def _close(self) -> bool:
        if self._skip(self.CLOSE) is None:
            return False
        self._state = self._text
        return True


# Python that can be a call with literals and nothing else. In particular no chain of operators or keywords, which the compiler
# would follow by recursion, and no string with a prefix.
_PLAIN = re.compile(r"""
    (?: '(?:[^'\\]|\\.)*+' | "(?:[^"\\]|\\.)*+" | (?!lambda) [\w.]++ (?!\s*["'\w.]) | [,:=()\[\]{}\s] | [+-] (?!\s*[+-]) )*+
""", re.DOTALL | re.VERBOSE)
_CALL = re.compile(r"([^()\s]+)\s*(\(.*\))", re.DOTALL)
_NAMES = {"true": True, "false": False, "null": None}  # JSON's spelling: models mix the two languages


def read_python_call(text: str) -> tuple[str, str] | None:
    """`f(a=1)` as ("f", '{"a": 1}'). Only literals are read; nothing is ever evaluated."""
    split = _CALL.fullmatch(text)
    if split is None or not _PLAIN.fullmatch(split[2]):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about "\d" in a string
            call = ast.parse("f" + split[2], mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        arguments = {_key(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        return split[1], json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _key(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError("not a name")
    return name


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, int, float, str))):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key and _literal(key)): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _literal(node.operand)
        if type(value) in (int, float):
            return -value if isinstance(node.op, ast.USub) else value
    raise ValueError("not a literal")


class Required(_Json):
    """What the grammar of `tool_choice: "required"` allows: a JSON array of calls."""

    OPEN = "["

    def _first(self) -> bool:
        opened = self._skip(self.OPEN)
        if opened is None:
            return False
        if opened:
            self._raw = self.OPEN
            self._open()
        else:
            self._give_up()
        return True

    def _close(self) -> bool:
        more = self._skip(",")
        if more is None:
            return False
        if more:
            self._raw = ","
            self._open()
        else:
            self._skip("]")
            self._state = self._text
        return True

    def _text(self) -> bool:
        self._say(self._rest)
        self._rest = ""
        return False


class Named(ToolParser):
    """What the grammar of a named function allows: its arguments. No text, as when reasoning took all tokens, is no call."""

    def __init__(self, name: str) -> None:
        super().__init__((name,))
        self._name = name

    def _first(self) -> bool:
        if not self._rest:
            return False
        self._start(self._name)
        self._state = self._arguments
        return True

    def _arguments(self) -> bool:
        self._argue(self._rest)
        self._rest = ""
        if self._ended:
            self._end()
            self._state = self._over
        return False

    def _over(self) -> bool:
        return False


PARSERS: dict[str, type[Hermes | Llama3Json | Pythonic]] = {"hermes": Hermes, "llama3_json": Llama3Json, "pythonic": Pythonic}


def guess_parser(template: str) -> str | None:
    """The format that a chat template asks the model for, where it is clear."""
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"  # later models put XML inside
    if "[func_name1(" in template:
        return "pythonic"
    if '"parameters":' in template and ("<|python_tag|>" in template or "ipython" in template):
        return "llama3_json"
    return None
