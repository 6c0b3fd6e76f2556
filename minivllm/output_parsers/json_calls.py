"""An incremental parser for tool calls that are written as JSON, or almost as JSON.

    {"name": "weather", "arguments": {"city": "Par
                                     ╰─ from here on each character is passed on at once, so clients see arguments as they are written

Until the name and the arguments are known the text may still be an answer that only resembles a call, so it is kept and can be returned as
content. (`pydantic_core.from_json(text, allow_partial=True)` would neither correct slips nor find the point where a call breaks:
`test_tool_parsers.py` shows cases.)
"""
from __future__ import annotations

import json
from collections.abc import Container

from minivllm.output_parsers.json_text import JsonTextReader, object_text


class JsonCallParser(JsonTextReader):
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
