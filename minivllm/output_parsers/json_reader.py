"""JSON's grammar as a pushdown automaton that reads one character at a time.

What it writes is always JSON: valid JSON comes out unchanged, and the usual slips of models are corrected on the way, since fragments that
were sent to a client cannot be taken back:

    a raw line break, tab or quote in a string     escaped              'single quotes'                   "double quotes"
    True False None NaN undefined                  true false null      {key: bare words}                 {"key": "bare words"}
    a comma too many, or none                      one comma            an open bracket or string         closed

Comments, raw quotes and bare texts of several words need `json_text.py`: what follows them decides.
"""
from __future__ import annotations

import enum
import json
import re

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SHORT_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)\.(?:[eE][+-]?[0-9]+)?|-?\.[0-9]+(?:[eE][+-]?[0-9]+)?")  # 1. and .5
_WORDS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null", "undefined": "null",
          "NaN": "null", "Infinity": "null", "-Infinity": "null"}  # the last three as JavaScript's JSON.stringify writes them
_HEX_DIGITS = {"u": 4, "x": 2, "U": 8}  # of escapes; the last two are Python's
_CLOSING = {"{": "}", "[": "]"}


class JsonState(enum.Enum):
    """The reader's position in the grammar."""

    VALUE = enum.auto()  # after a colon, or at the start
    FIRST_ITEM = enum.auto()  # of an array
    ITEM = enum.auto()  # after a comma
    FIRST_KEY = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    NEXT = enum.auto()  # after a value in an object or array
    END = enum.auto()
    STRING = enum.auto()
    WORD = enum.auto()  # in a number, a literal, or a word without quotes


class JsonReader:
    """One JSON value, one character at a time. Subclasses override the three methods at the end."""

    def __init__(self) -> None:
        self.state = JsonState.VALUE
        self._stack: list[str] = []  # the open brackets
        self._in_key = False
        self._quote = ""
        self._escape = ""  # an unfinished escape, from its backslash on
        self._word = ""
        self._held = ""  # a comma, and white space after it: written if something follows

    @property
    def depth(self) -> int:
        return len(self._stack)

    def push(self, char: str) -> bool:
        """Whether the text can still become JSON. After False only `close` may be called."""
        state = self.state
        if state is JsonState.STRING:
            self._string(char)
            return True
        if state is JsonState.WORD:
            if char.isalnum() or char in "_.+-":
                self._word += char
                return True
            self._end_open()
            return self.push(char)
        if char.isspace():
            char = char if char in " \t\n\r" else " "
            if self._held:
                self._held += char
            else:
                self.write(char)
            return True
        if char in "]}":
            return self._close_to(char)
        if state is JsonState.COLON:
            if char == ":":
                self.state = JsonState.VALUE
                self.write(char)
            return char == ":"
        return state is not JsonState.END and self._next(char)

    def _next(self, char: str) -> bool:
        """A comma, or the start of a key or value."""
        state = self.state
        if char == ",":
            if state is JsonState.NEXT:
                self._held = ","
                self.state = JsonState.KEY if self._stack[-1] == "{" else JsonState.ITEM
            return state in (JsonState.NEXT, JsonState.KEY, JsonState.ITEM)
        if state is JsonState.NEXT:  # a comma is missing
            is_object = self._stack[-1] == "{"
            if char not in ("\"'" if is_object else "\"'{["):
                return False
            self._held = ","
            self.state = JsonState.KEY if is_object else JsonState.ITEM
        self._in_key = self.state in (JsonState.KEY, JsonState.FIRST_KEY)
        is_word = char.isalnum() or char == "_" if self._in_key else char not in "\"'{[:"
        if not (char in "\"'" or is_word or (char in "{[" and not self._in_key)):
            return False
        if self._held:
            self.write(self._held)
            self._held = ""
        self.token_starts(char, self._in_key)
        if char in "{[":
            self._stack.append(char)
            self.state = JsonState.FIRST_KEY if char == "{" else JsonState.FIRST_ITEM
            self.write(char)
        elif is_word:
            self.state, self._word = JsonState.WORD, char
        else:
            self.state, self._quote = JsonState.STRING, char
            self.write('"')
        return True

    def _close_to(self, bracket: str) -> bool:
        """Close the innermost bracket that fits, and those inside it."""
        if self.state in (JsonState.VALUE, JsonState.COLON) or not any(_CLOSING[opened] == bracket for opened in self._stack):
            return False
        closed = ""
        while closed != bracket:
            closed = self._close_one()
        return True

    def _close_one(self) -> str:
        held, self._held = self._held.replace(",", ""), ""
        closed = _CLOSING[self._stack.pop()]
        self.write(held + closed)
        self._end_token(in_key=False)
        return closed

    def close(self) -> None:
        """Complete the value where it broke."""
        self._end_open()
        if self.state in (JsonState.COLON, JsonState.VALUE):
            self.write(": null" if self.state is JsonState.COLON else "null")
        while self._stack:
            self._close_one()

    def _end_token(self, in_key: bool) -> None:
        self.state = JsonState.COLON if in_key else JsonState.NEXT if self._stack else JsonState.END
        self.token_ended(in_key)

    def _end_open(self) -> None:
        """End the open string or word, if there is one."""
        if self.state is JsonState.STRING:
            self._escape = ""
            self.write('"')
            self._end_token(self._in_key)
        elif self.state is JsonState.WORD:
            self._end_word()

    def _end_word(self) -> None:
        word, self._word = self._word.removeprefix("+").strip("`"), ""
        if _SHORT_NUMBER.fullmatch(word):
            word = re.sub(r"\.(?!\d)", ".0", re.sub(r"^(-?)\.", r"\g<1>0.", word))
        is_json = not self._in_key and (word in _WORDS or _NUMBER.fullmatch(word))
        self.write(_WORDS.get(word, word) if is_json else json.dumps(word, ensure_ascii=False))
        self._end_token(self._in_key)

    def _string(self, char: str) -> None:
        escape = self._escape
        if not escape:
            if char == "\\":
                self._escape = char
            elif char == self._quote:
                self.write('"')
                self._end_token(self._in_key)
            else:
                self.write(json.dumps(char, ensure_ascii=False)[1:-1] if char < " " or char == '"' else char)
            return
        self._escape = ""
        if escape == "\\":
            if char in _HEX_DIGITS:
                self._escape = escape + char
            elif char in '"\\/bfnrt':
                self.write(escape + char)
            elif char == "'":
                self.write(char)
            else:  # no escape of JSON: a backslash
                self.write("\\\\")
                self._string(char)
        elif char not in "0123456789abcdefABCDEF":
            self.write("\\" + escape)
            self._string(char)
        elif len(escape) - 1 == _HEX_DIGITS[escape[1]]:
            self.write(escape + char if escape[1] == "u" else json.dumps(chr(min(int(escape[2:] + char, 16), 0x10FFFF)))[1:-1])
        else:
            self._escape = escape + char

    def write(self, text: str) -> None:
        """Take JSON text."""

    def token_starts(self, char: str, in_key: bool) -> None:
        """A key or value starts with `char`. At depth 0 it is the whole value."""

    def token_ended(self, in_key: bool) -> None:
        """A key or value ended."""
