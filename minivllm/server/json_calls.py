"""An incremental parser for tool calls that are written as JSON.

    {"name": "weather", "arguments": {"city": "Par
                                     ╰─ from here on each character is passed on at once, so clients see arguments as they are written

`JsonScanner` is JSON's grammar as a pushdown automaton that reads one character at a time. It rejects a text at the first character
that cannot belong to JSON. `JsonCallParser` uses it to find the name and the arguments. Until both are known the text may still be an
answer that only resembles a call, so it is kept and can be returned as content.

Why not `pydantic_core.from_json(text, allow_partial=True)`: it is several times faster, but it accepts texts that can no longer become
JSON (`{"a": 1 2`, `{"a": 1}}`), so the point where a call breaks would not be found. It also rejects lone surrogates and values nested
more than 200 deep. And it returns values without their positions in the text, while clients must get the arguments exactly as the model
wrote them. `test_tool_parsers.py` shows these cases.
"""
from __future__ import annotations

import enum
import json
import re
from collections.abc import Container

_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = ("true", "false", "null")
_HEX = "0123456789abcdefABCDEF"


_VALUE = '"{[-0123456789tfn'


class JsonState(enum.Enum):
    """The scanner's position in the grammar. Between tokens: the characters that may come next, besides white space."""

    VALUE = _VALUE
    FIRST_VALUE = _VALUE + "]"  # of an array
    KEY = '"'
    FIRST_KEY = '"}'
    COLON = ":"
    NEXT = ",]}"  # after a value in an object or array
    END = ""
    STRING = "in a string"
    NUMBER = "in a number"
    LITERAL = "in a literal"


class JsonScanner:
    """One JSON value, strictly, one character at a time."""

    def __init__(self) -> None:
        self.state = JsonState.VALUE
        self._stack: list[str] = []  # the open brackets
        self._in_key = False
        self._escape = ""  # of a string: the allowed characters after a backslash or in a \u escape
        self._hex_left = 0  # digits that a \u escape still needs
        self._word = ""  # a number or literal so far

    @property
    def depth(self) -> int:
        return len(self._stack)

    def push(self, char: str) -> bool:
        """Whether the text can still become JSON. After False the scanner must not be used."""
        state = self.state
        if state is JsonState.STRING:
            return self._string(char)
        if state is JsonState.NUMBER:
            if char in "0123456789+-.eE":
                self._word += char
                return True
            if not _NUMBER.fullmatch(self._word):
                return False
            self._end_value()
            return self.push(char)
        if state is JsonState.LITERAL:
            self._word += char
            if self._word in _LITERALS:
                self._end_value()
            return any(literal.startswith(self._word) for literal in _LITERALS)
        if state is not JsonState.END and char in _SPACE:
            return True
        return char in state.value and self._start_token(char)

    def _start_token(self, char: str) -> bool:
        if char in "]}":
            opened = self._stack.pop()
            self._end_value()
            return opened + char in ("[]", "{}")
        if char == ",":
            self.state = JsonState.KEY if self._stack[-1] == "{" else JsonState.VALUE
        elif char == ":":
            self.state = JsonState.VALUE
        elif char in "{[":
            self._stack.append(char)
            self.state = JsonState.FIRST_KEY if char == "{" else JsonState.FIRST_VALUE
        elif char == '"':
            self._in_key = self.state in (JsonState.KEY, JsonState.FIRST_KEY)
            self.state = JsonState.STRING
        else:
            self.state, self._word = JsonState.LITERAL if char in "tfn" else JsonState.NUMBER, char
        return True

    def _end_value(self) -> None:
        self.state = JsonState.NEXT if self._stack else JsonState.END

    def _string(self, char: str) -> bool:
        if self._escape:
            allowed = self._escape
            self._hex_left = 4 if char == "u" and not self._hex_left else max(0, self._hex_left - 1)
            self._escape = _HEX if self._hex_left else ""
            return char in allowed
        if char == "\\":
            self._escape = '"\\/bfnrtu'
        elif char != '"':
            return char >= " "
        elif self._in_key:
            self.state = JsonState.COLON
        else:
            self._end_value()
        return True


def is_object(text: str) -> bool:
    """Whether a text is one complete JSON object."""
    scanner = JsonScanner()
    text = text.strip(_SPACE)
    return text.startswith("{") and all(map(scanner.push, text)) and scanner.state is JsonState.END


class JsonCallParser:
    """Reads `{"name": ..., "arguments": {...}}`, or the same with "parameters". Other keys are skipped.

    `broken` is set for a name that no tool has and for a text that is not such an object. The character after `raw` is the wrong one.
    """

    ARGUMENTS = ("arguments", "parameters")

    def __init__(self, names: Container[str]) -> None:
        self.raw = ""  # the text read so far
        self.name: str | None = None
        self.done = self.broken = False
        self._names = names
        self._scanner = JsonScanner()
        self._key = ""
        self._seen: set[str] = set()  # of "name" and "arguments"
        self._start = 0  # index in `raw` of the current key or value of the call's object
        self._arguments: list[str] | None = None  # pieces that `take` has not returned. None: the arguments have not started
        self._streaming = False  # the current character belongs to an object of arguments

    @property
    def started(self) -> bool:
        """Whether the text is certainly a call, whatever follows."""
        return self.name is not None and self._arguments is not None

    def take(self) -> str:
        """The next fragment of the arguments."""
        if self.name is None or not self._arguments:
            return ""
        fragment, self._arguments = "".join(self._arguments), []
        return fragment

    def feed(self, text: str) -> int:
        """Read on. Returns the number of characters used: fewer than given if the call is done or broken."""
        for i in range(len(text)):
            if self.done or self.broken or not self._push(text, i):
                self.broken = not self.done
                self.raw += text[:i]
                return i
        self.raw += text
        return len(text)

    def _push(self, text: str, i: int) -> bool:
        """Read character i of a text that follows `raw`."""
        char, scanner = text[i], self._scanner
        state, depth = scanner.state, scanner.depth
        if not scanner.push(char):
            return False
        if depth == 0:
            return char == "{" or char in _SPACE
        if depth == 1 and state in (JsonState.KEY, JsonState.FIRST_KEY, JsonState.VALUE) and char not in _SPACE:
            self._start = len(self.raw) + i
            if state is JsonState.VALUE and not self._start_value(char):
                return False
        if self._streaming:
            assert self._arguments is not None
            self._arguments.append(char)
        if scanner.depth == 1 and state is JsonState.STRING and scanner.state is JsonState.COLON:
            return self._end_key((self.raw + text[:i + 1])[self._start:])
        if scanner.depth == 1 and scanner.state is JsonState.NEXT and (depth, state) != (1, JsonState.NEXT):
            return self._end_value((self.raw + text[:i + 1])[self._start:])
        return scanner.depth > 0 or self._end_object()

    def _end_key(self, text: str) -> bool:
        key = json.loads(text)
        self._key = "arguments" if key in self.ARGUMENTS else key
        is_new = self._key not in self._seen
        if self._key in ("name", "arguments"):
            self._seen.add(self._key)
        return is_new

    def _start_value(self, char: str) -> bool:
        if self._key == "name":
            return char == '"'
        if self._key != "arguments":
            return True
        if char == "{":
            self._arguments, self._streaming = [], True
        return char in '{"n'  # null: no arguments; a string: some models write the object as its text

    def _end_value(self, text: str) -> bool:
        if self._streaming:
            self._streaming = False
        elif self._key == "name":
            name = json.loads(text)
            if name not in self._names:
                return False
            self.name = name
        elif self._key == "arguments":
            arguments = json.loads(text) or "{}"
            if not is_object(arguments):
                return False
            self._arguments = [arguments]
        return True

    def _end_object(self) -> bool:
        if self._arguments is None:
            self._arguments = ["{}"]
        self.done = self.name is not None
        return self.done
