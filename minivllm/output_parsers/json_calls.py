"""An incremental parser for tool calls that are written as JSON, or almost as JSON.

    {"name": "weather", "arguments": {"city": "Par
                                     ╰─ from here on each character is passed on at once, so clients see arguments as they are written

`JsonReader` is JSON's grammar as a pushdown automaton that reads one character at a time. What it writes is always JSON: valid JSON comes
out unchanged, and the usual slips of models are corrected on the way, since the fragments that were sent cannot be taken back:

    a raw line break, tab or quote in a string     escaped              'single quotes'                   "double quotes"
    True False None NaN undefined                  true false null      {key: bare words}                 {"key": "bare words"}
    a comma too many, or none                      one comma            an open bracket or string         closed

Whether a quote ends its string depends on what follows: `",` and a key, `"}` and `"]` do, `"id" FROM` does not. So a quote is read once the
text after it decides.

`JsonCallParser` uses it to find the name and the arguments. Until both are known the text may still be an answer that only resembles a
call, so it is kept and can be returned as content. (`pydantic_core.from_json(text, allow_partial=True)` would neither correct nor find the
point where a call breaks: `test_tool_parsers.py` shows cases.)
"""
from __future__ import annotations

import enum
import json
import re
from collections.abc import Container

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SHORT_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)\.(?:[eE][+-]?[0-9]+)?|-?\.[0-9]+(?:[eE][+-]?[0-9]+)?")  # 1. and .5
_WORDS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null", "undefined": "null",
          "NaN": "null", "Infinity": "null", "-Infinity": "null"}  # the last three as JavaScript's JSON.stringify writes them
_HEX_DIGITS = {"u": 4, "x": 2, "U": 8}  # of escapes; the last two are Python's
_CLOSING = {"{": "}", "[": "]"}
_OPENING = {"}": "{", "]": "["}
_LOOK_AHEAD = 200  # characters. What they leave undecided is read as JSON has it
_SPACE = re.compile(rf"\s{{0,{_LOOK_AHEAD}}}")
_BEFORE_END = re.compile(rf"[}}\]\s]{{0,{_LOOK_AHEAD}}}")
_KEY = re.compile(r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\w.-]++)\s*+(.)""", re.DOTALL)
_ITEM = re.compile(r"""["'{}\[\],\d+-]|(?:true|True|false|False|null|None|undefined|NaN|Infinity)\b""")


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
        self.markers: tuple[str, ...] = ()  # the start and the end of a call, if both have one
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
        is_word = char.isalpha() or char == "_" if self._in_key else char not in "\"'{[:"
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

    # -- a text, with what follows each character ---------------------------------------------------------------------

    def read(self, text: str, at: int, ended: bool, cut: bool) -> bool | None:
        """Read the character at `at`. False: the text cannot become JSON. None: later text decides how the character is read."""
        char, state = text[at], self.state
        ends: bool | None = False
        if state is JsonState.STRING:
            if self._escape or (char not in self._quote + "}]<" and not char.isspace()):
                return self.push(char)
            ends = self._ends_before(text, at + 1, ended) if char == self._quote else self._lacks_quote(text, at, ended, cut)
        elif state is JsonState.WORD and not self._in_key:
            if char in ",}]<\"'" or char.isspace():
                ends = self._ends_before(text, at, ended)
        elif char == "<" and state in (JsonState.VALUE, JsonState.ITEM, JsonState.FIRST_ITEM):
            marked = self._at_marker(text, at, ended)
            return None if marked is None else not marked and self.push(char)
        else:
            return self.push(char)
        if ends is None:
            return None
        if ends:
            self._end_open()
            return (state is JsonState.STRING and char == self._quote) or self.push(char)
        if state is JsonState.WORD:
            self._word += char
        else:
            self.write(json.dumps(char, ensure_ascii=False)[1:-1])
        return True

    def _at_marker(self, text: str, at: int, ended: bool) -> bool | None:
        """Whether the start or end of a call is here."""
        if any(text.startswith(marker, at) for marker in self.markers):
            return True
        return None if not ended and any(marker.startswith(text[at:at + len(marker)]) for marker in self.markers) else False

    def _lacks_quote(self, text: str, at: int, ended: bool, cut: bool) -> bool | None:
        """Whether a string ends here without its quote: only brackets follow, and the end of the call or of the text."""
        end = _BEFORE_END.match(text, at).end()  # type: ignore[union-attr]
        brackets = sum(not char.isspace() for char in text[at:end])
        if end == at + _LOOK_AHEAD or brackets > self.depth:
            return False
        if end == len(text):
            return (not cut and brackets > 0) if ended else None
        if not self.markers or text[end] != "<":
            return False
        opening, closing = self.markers
        if not text.startswith(closing, end):
            return None if not ended and closing.startswith(text[end:end + len(closing)]) else False
        after = _SPACE.match(text, end + len(closing)).end()  # type: ignore[union-attr]
        if after == len(text) or text.startswith(opening, after):
            return True if ended or after < len(text) else None
        return None if not ended and opening.startswith(text[after:after + len(opening)]) else False

    def _ends_before(self, text: str, at: int, ended: bool) -> bool | None:
        """Whether a string or word ends before this text."""
        window = text[at:at + _LOOK_AHEAD]
        ends = self._fits_before(window, ended and len(text) - at <= _LOOK_AHEAD)
        return True if ends is None and (ended or len(window) == _LOOK_AHEAD) else ends

    def _fits_before(self, text: str, ended: bool) -> bool | None:
        """The same for a part of the text, None at its end. Brackets first, as if they closed those that are open."""
        stack, at, closed = list(self._stack), 0, False
        while True:
            start, at = at, _SPACE.match(text, at).end()  # type: ignore[union-attr]
            if at == len(text):
                return None
            char = text[at]
            if self._in_key:
                return char in ":,}]"
            if char not in _OPENING or not stack:
                break
            if _OPENING[char] not in stack:
                return False
            while stack.pop() != _OPENING[char]:
                pass
            at, closed = at + 1, True
        if char in "\"'" and closed and at == start:  # a value such as "{"a": "b"}"
            following = text[at + 1:].lstrip()
            return False if char != self._quote else following[0] not in "}]," if following else None
        if not stack or (closed and (at > start or char in ",<;")):
            return True
        if closed:
            return False
        if char == ",":
            return self._item_follows(text[at + 1:].lstrip(), stack[-1], ended)
        if char in "\"'" and stack[-1] == "{":
            return self._item_follows(text[at:], "{", ended)
        if char in "\"'" and at > start:
            return text[at + 1] not in "}], \n" if at + 1 < len(text) else None
        return self._at_marker(text, at, ended)

    def _item_follows(self, text: str, bracket: str, ended: bool) -> bool | None:
        """Whether an array or object can go on with this text."""
        if not text:
            return None
        if bracket == "[":
            if text[0].isalpha() and len(text) < 10 and not ended and self.state is JsonState.STRING:
                return None  # it may become a literal
            return self.state is JsonState.WORD or bool(_ITEM.match(text))
        if text[0] in "},":
            return True
        if not (text[0] in "\"'_" or text[0].isalpha()):
            return False
        key = _KEY.match(text)
        return key[1] == ":" if key else None

    def write(self, text: str) -> None:
        """Take JSON text."""

    def token_starts(self, char: str, in_key: bool) -> None:
        """A key or value starts with `char`. At depth 0 it is the whole value."""

    def token_ended(self, in_key: bool) -> None:
        """A key or value ended."""


class _JsonText(JsonReader):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.valid = all(self.read(text, at, ended=True, cut=False) for at in range(len(text))) and self.state is JsonState.END

    def write(self, text: str) -> None:
        self.pieces.append(text)


def object_text(text: str) -> str | None:
    """The text of a JSON object, corrected; None if it is no complete object."""
    read = _JsonText(text.strip())
    return "".join(read.pieces) if read.valid and read.pieces[0] == "{" else None


def is_object(text: str) -> bool:
    """Whether a text is one complete JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return object_text(text) == text.strip()  # nested too deep for Python's parser


class JsonCallParser(JsonReader):
    """Reads `{"name": ..., "arguments": {...}}`, or the same with "parameters". Other keys are skipped.

    `broken` is set for a name that no tool has and for a text that is not such an object. The character after `raw` is the wrong one.
    """

    ARGUMENTS = ("arguments", "parameters")

    def __init__(self, names: Container[str], *, exact: bool = False, markers: tuple[str, ...] = ()) -> None:
        """`exact`: a call has a name and arguments and nothing else. Other objects are content."""
        super().__init__()
        self.markers = markers
        self._exact = exact
        self.raw = ""  # the text read so far
        self.name: str | None = None
        self.done = self.broken = False
        self.complete = False  # the arguments have ended
        self._names = names
        self._key = ""
        self._seen: set[str] = set()  # of "name" and "arguments"
        self._pieces: list[str] = []  # JSON text of the current key or value of the call's object
        self._arguments: list[str] | None = None  # pieces that `take` has not returned. None: the arguments have not started
        self._streaming = False  # the arguments have a member, so they are an object
        self._fits = True

    @property
    def known(self) -> bool:
        """Whether the name is known and the arguments have started."""
        return self.name is not None and self._arguments is not None

    @property
    def started(self) -> bool:
        """Whether the text is certainly a call, whatever follows."""
        return self.known and (self._streaming or self.complete)

    def take(self) -> str:
        """The next fragment of the arguments."""
        if self.name is None or not self._arguments:
            return ""
        fragment = "".join(self._arguments)
        self._arguments.clear()
        return fragment

    def unfinished(self) -> str:
        """The number, word or escape of the arguments that the end of the text cut off."""
        return "" if self.complete else self._word or self._escape

    def feed(self, text: str, ended: bool, cut: bool) -> int:
        """Read on. Returns the number of characters used: fewer than given if the call is done or broken, or if later text decides."""
        for i in range(len(text)):
            read = None if self.done or self.broken else self.read(text, i, ended, cut)
            if not read or not self._fits:
                self.broken = self.broken or (not self.done and read is not None)
                self.raw += text[:i]
                return i
        self.raw += text
        return len(text)

    def write(self, text: str) -> None:
        self._pieces.append(text)

    def token_starts(self, char: str, in_key: bool) -> None:
        if self.depth == 0:
            self._fits = char == "{"
        elif self.depth == 1:
            self._pieces = []
            if not in_key and self._key == "name":
                self._fits = char in "\"'"
            elif not in_key and self._key == "arguments":
                if char == "{":
                    self._arguments = self._pieces
                self._fits = char in "{\"'nN"  # null: no arguments; a string: some models write the object as its text

    def token_ended(self, in_key: bool) -> None:
        if self.depth == 0:
            self._end_object()
        elif self.depth == 1:
            self._end_part(in_key, "".join(self._pieces))
            self._pieces = []
        elif in_key and self._pieces is self._arguments:
            self._streaming = True

    def _end_part(self, in_key: bool, text: str) -> None:
        """A key or value of the call's object."""
        if in_key:
            key = json.loads(text)
            self._key = "arguments" if key in self.ARGUMENTS else key
            if self.known and self.complete and self._key in self._seen:
                self._key = ""  # repeated behind a complete call: skipped
            self._fits = self._key not in self._seen and (not self._exact or self._key in ("", "name", "arguments"))
            if self._key in ("name", "arguments"):
                self._seen.add(self._key)
        elif self._key == "name":
            self.name = json.loads(text)
            self._fits = self.name in self._names
        elif self._key == "arguments":
            if self._pieces is not self._arguments:
                arguments = object_text(json.loads(text) or "{}")
                self._fits = arguments is not None
                self._arguments = None if arguments is None else [arguments]
            self.complete = self._fits

    def _end_object(self) -> None:
        if self._arguments is None and not self._exact:
            self._arguments = ["{}"]
        self.complete = self.done = self.known
        self._fits = self.done
