"""Reads JSON, or almost JSON, by looking at what follows a quote.

A quote ends its string if the text goes on as an object or array can: with a comma and a key, or with a bracket. So the quotes in
`{"q": "SELECT "id" FROM t"}` are part of the string. The same decides where a text without quotes ends. A string that is still open where
only closing brackets and the end of the call follow ends before these brackets.
"""
from __future__ import annotations

import json
import re

from minivllm.output_parsers.json_reader import JsonReader, JsonState

_OPENING = {"}": "{", "]": "["}
_LOOK_AHEAD = 200  # characters. What they leave undecided is read as JSON has it
_SPACE = re.compile(rf"\s{{0,{_LOOK_AHEAD}}}")
_GAP = re.compile(r"(?:\s|//[^\n]*\n|/\*.*?\*/)*+", re.DOTALL)  # between tokens: white space and comments
_BEFORE_END = re.compile(rf"[}}\]\s]{{0,{_LOOK_AHEAD}}}")
_KEY = re.compile(r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\w.-]++)\s*+(.)""", re.DOTALL)
_ITEM = re.compile(r"""["'{}\[\],\d+-]|(?:true|True|false|False|null|None|undefined|NaN|Infinity)\b""")


def _gap_end(text: str, at: int) -> int:
    """The end of white space and comments, which is the end of the text if a comment has no end."""
    end = _GAP.match(text, at).end()  # type: ignore[union-attr]
    return len(text) if text[end:end + 2] in ("/", "//", "/*") else end


class JsonTextReader(JsonReader):
    """Reads each character with the text behind it."""

    markers: tuple[str, ...] = ()  # the start and the end of a call, if both have one
    _comment = ""  # the first and the last characters of a comment, while it is read

    def read(self, text: str, at: int, ended: bool, cut: bool) -> bool | None:
        """Read the character at `at`. False: the text cannot become JSON. None: later text decides how the character is read."""
        char, state = text[at], self.state
        if self._comment or (char == "/" and state not in (JsonState.STRING, JsonState.WORD, JsonState.END)):
            is_comment = self._skip_comment(text, at, ended)
            if is_comment is not False or self._comment:
                return is_comment
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

    def _skip_comment(self, text: str, at: int, ended: bool) -> bool | None:
        """Skip a character of a comment. Only a marker of calls ends it early."""
        if not self._comment:
            if at + 1 == len(text):
                return False if ended else None
            self._comment = "/" if text[at + 1] in "/*" else ""
            return bool(self._comment)
        marked = self._at_marker(text, at, ended) if text[at] == "<" else False
        if marked is False:
            read = self._comment + text[at]
            ends = read.endswith("\n") if read.startswith("//") else len(read) > 3 and read.endswith("*/")
            self._comment = "" if ends else read[:2] + read[2:][-2:]
        return None if marked is None else not marked

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
        stack, at, closed = self._stack[-_LOOK_AHEAD:], 0, False
        while True:
            start, at = at, _gap_end(text, at)
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
            return self._item_follows(text[_gap_end(text, at + 1):], stack[-1], ended)
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
        if not (text[0] in "\"'_" or text[0].isalnum()):
            return False
        key = _KEY.match(text)
        return key[1] == ":" if key else None


class _JsonText(JsonTextReader):
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
