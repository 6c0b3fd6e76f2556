"""Tool calls as a Python list: `[weather(city="Paris"), weather(city="Rome")]`."""
from __future__ import annotations

import ast
import json
import re
import warnings

from minivllm.output_parsers.tool_parser import MarkedParser


class PythonicParser(MarkedParser):
    """Calls as a Python list, as Llama 3.2 and 4 write them. A call is reported once its closing bracket has arrived."""

    OPEN = "<|python_start|>"
    CLOSE = "<|python_end|>"
    UNMARKED = "["
    MAX_DEPTH = 64  # brackets; far fewer than what makes Python's compiler recurse too deep

    def _start(self) -> bool:
        return self._start_unmarked()

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
# follow by recursion, and strings with a prefix. Names of parameters are separate tokens: they may be Python's keywords, or have dashes.
_STRING = r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\""""
_PARAMETER = r"(?<=[(,\s])[^\W\d][\w-]*+(?=\s*=)"
_LITERALS_ONLY = re.compile(rf"""
    (?: {_STRING} | {_PARAMETER} | (?!lambda) [\w.]++ (?!\s*["'\w.]) | [,:=()\[\]{{}}\s] | [+-] (?!\s*[+-]) )*+
""", re.DOTALL | re.VERBOSE)
_TOKEN = re.compile(f"{_STRING}|{_PARAMETER}", re.DOTALL)
_RAW = re.compile(r"\\.|[\x00-\x1f]", re.DOTALL)  # in a string: an escape, or a character that Python's strings cannot hold
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
    names: list[str] = []

    def as_python(token: re.Match[str]) -> str:
        """A string with raw line breaks as Python has it, or a placeholder for the name of a parameter."""
        if token[0][0] in "\"'":
            return _RAW.sub(lambda raw: "".join(f"\\x{ord(char):02x}" for char in raw[0]) if raw[0][-1] < " " else raw[0], token[0])
        names.append(token[0])
        return f"_{len(names) - 1}"

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about "\d" in a string
            call = ast.parse("f" + _TOKEN.sub(as_python, split[2]), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args or len(set(names)) < len(names):
            return None
        arguments = {names[int((keyword.arg or "")[1:])]: ast.literal_eval(_JsonNames().visit(keyword.value)) for keyword in call.keywords}
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        if any("\ud800" <= char <= "\udfff" for char in written):  # "\ud83d\ude00" is one character in JSON, but two in Python
            written = json.dumps(arguments, allow_nan=False)
        return split[1], written
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # TypeError: a literal that JSON does not have
        return None
