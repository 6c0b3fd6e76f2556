"""Tool calls written as JSON, read while they come.

    {"name": "weather", "arguments": {"city": "Par
                                     ╰─ from here on every character is handed out: the client sees arguments as they are written

`JsonScanner` is JSON's grammar as a pushdown automaton, one character at a time: it says at once when a text can no longer become
JSON. `CallReader` watches it and knows where the name and the arguments are. Until both are known the text may still be an answer
that only looks like a call, so it is kept and can be given back.
"""
from __future__ import annotations

import enum
import json
import re
from collections.abc import Container

_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = ("true", "false", "null")
_HEX = frozenset("0123456789abcdefABCDEF")


class At(enum.Enum):
    """Where in the grammar the next character stands."""

    VALUE = enum.auto()
    FIRST_VALUE = enum.auto()  # or the end of the array
    KEY = enum.auto()
    FIRST_KEY = enum.auto()  # or the end of the object
    COLON = enum.auto()
    NEXT = enum.auto()  # a comma, or the end of the object or array
    STRING = enum.auto()
    ESCAPE = enum.auto()
    HEX = enum.auto()
    NUMBER = enum.auto()
    LITERAL = enum.auto()
    END = enum.auto()


class JsonScanner:
    """One JSON value, strictly, one character at a time."""

    def __init__(self) -> None:
        self.at = At.VALUE
        self._stack: list[str] = []
        self._in_key = False
        self._word: list[str] = []

    @property
    def depth(self) -> int:
        return len(self._stack)

    def push(self, char: str) -> bool:
        """Whether the text can still become JSON; after False the scanner must not be used."""
        at = self.at
        if at is At.STRING:
            return self._string(char)
        if at in (At.ESCAPE, At.HEX):
            return self._escape(char)
        if at is At.NUMBER:
            if char in "0123456789+-.eE":
                self._word.append(char)
                return True
            if not _NUMBER.fullmatch("".join(self._word)):
                return False
            self._ended()
            return self.push(char)
        if at is At.LITERAL:
            self._word.append(char)
            word = "".join(self._word)
            if word in _LITERALS:
                self._ended()
            return any(literal.startswith(word) for literal in _LITERALS)
        if at is At.END:
            return False
        return char in _SPACE or self._structure(char)

    def _structure(self, char: str) -> bool:
        at = self.at
        if at is At.COLON:
            self.at = At.VALUE
            return char == ":"
        if at is At.NEXT and char == ",":
            self.at = At.KEY if self._stack[-1] == "{" else At.VALUE
            return True
        if at in (At.KEY, At.FIRST_KEY) and char == '"':
            self.at, self._in_key = At.STRING, True
            return True
        if char in "]}":
            return at in (At.NEXT, At.FIRST_KEY, At.FIRST_VALUE) and self._close(char)
        return at in (At.VALUE, At.FIRST_VALUE) and self._begin(char)

    def _begin(self, char: str) -> bool:
        if char == '"':
            self.at, self._in_key = At.STRING, False
        elif char in "{[":
            self._stack.append(char)
            self.at = At.FIRST_KEY if char == "{" else At.FIRST_VALUE
        elif char in "-0123456789":
            self.at, self._word = At.NUMBER, [char]
        elif char in "tfn":
            self.at, self._word = At.LITERAL, [char]
        else:
            return False
        return True

    def _close(self, char: str) -> bool:
        if self._stack.pop() + char not in ("{}", "[]"):
            return False
        self._ended()
        return True

    def _ended(self) -> None:
        self.at = At.NEXT if self._stack else At.END

    def _string(self, char: str) -> bool:
        if char == "\\":
            self.at = At.ESCAPE
        elif char != '"':
            return char >= " "
        elif self._in_key:
            self.at = At.COLON
        else:
            self._ended()
        return True

    def _escape(self, char: str) -> bool:
        if self.at is At.ESCAPE:
            self.at, self._word = (At.HEX if char == "u" else At.STRING), []
            return char in '"\\/bfnrtu'
        self._word.append(char)
        if len(self._word) == 4:
            self.at = At.STRING
        return char in _HEX


def is_object(text: str) -> bool:
    """Whether a text is one JSON object."""
    scanner = JsonScanner()
    text = text.strip(_SPACE)
    return text.startswith("{") and all(map(scanner.push, text)) and scanner.at is At.END


class CallReader:
    """`{"name": ..., "arguments": {...}}`, or with "parameters". Other keys are read over.

    A name that no tool has, or a text that is not such an object, makes it `broken`: the character after `raw` does not fit.
    """

    ARGUMENTS = ("arguments", "parameters")

    def __init__(self, names: Container[str]) -> None:
        self.raw = ""  # what was read
        self.name: str | None = None
        self.done = self.broken = False
        self._names = names
        self._scanner = JsonScanner()
        self._key = ""
        self._seen: set[str] = set()
        self._token: list[str] = []  # the key or the value that is being read, where it matters
        self._arguments: list[str] | None = None  # not handed out yet; None: have not begun
        self._streams = False  # inside of an object of arguments

    @property
    def begun(self) -> bool:
        """Whether this is a call for certain, whatever follows."""
        return self.name is not None and self._arguments is not None

    def take(self) -> str:
        """The next fragment of the arguments."""
        if self.name is None or not self._arguments:
            return ""
        fragment, self._arguments = "".join(self._arguments), []
        return fragment

    def feed(self, text: str) -> int:
        """Read on; returns how many characters were taken. Fewer than given: it is done or broken."""
        for i, char in enumerate(text):
            if self.done or self.broken or not self._push(char):
                self.broken = not self.done
                self.raw += text[:i]
                return i
        self.raw += text
        return len(text)

    def _push(self, char: str) -> bool:
        scanner = self._scanner
        at, depth = scanner.at, scanner.depth
        if not scanner.push(char):
            return False
        if depth == 0:
            return char == "{" or char in _SPACE
        if depth == 1 and at is At.VALUE and char not in _SPACE and not self._value_begins(char):
            return False
        if self._streams:
            assert self._arguments is not None
            self._arguments.append(char)
        elif depth == 1 and scanner.at is not At.NEXT:
            if at in (At.KEY, At.FIRST_KEY, At.VALUE):
                self._token.clear()
            self._token.append(char)
        elif depth == 1 and at is not At.NEXT:
            self._token.append(char)
        if scanner.depth == 1 and at is At.STRING and scanner.at is At.COLON:
            return self._key_ends()
        if scanner.depth == 1 and scanner.at is At.NEXT and (depth, at) != (1, At.NEXT):
            return self._value_ends()
        return scanner.depth > 0 or self._object_ends()

    def _key_ends(self) -> bool:
        self._key = json.loads("".join(self._token))
        role = "arguments" if self._key in self.ARGUMENTS else self._key
        if role in ("name", "arguments"):
            if role in self._seen:
                return False
            self._seen.add(role)
            self._key = role
        return True

    def _value_begins(self, char: str) -> bool:
        if self._key == "name":
            return char == '"'
        if self._key != "arguments":
            return True
        if char == "{":
            self._arguments, self._streams = [], True
        return char in '{"n'  # null: none; a string: some models write the object as one

    def _value_ends(self) -> bool:
        if self._streams:
            self._streams = False
        elif self._key == "name":
            name = json.loads("".join(self._token))
            if name not in self._names:
                return False
            self.name = name
        elif self._key == "arguments":
            arguments = json.loads("".join(self._token)) or "{}"
            if not is_object(arguments):
                return False
            self._arguments = [arguments]
        return True

    def _object_ends(self) -> bool:
        if self._arguments is None:
            self._arguments = ["{}"]
        self.done = self.name is not None
        return self.done
