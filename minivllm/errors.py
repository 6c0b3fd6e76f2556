"""Errors a user can cause, kept apart from bugs.

A user error names the field, the value and the fix, and is raised at the door (principle 6): by a constructor, by
`add_request`, by the loader. The server turns `InvalidInput` into HTTP 400 with `param` set; the command line prints the
message alone. An `assert` anywhere in this package means a bug of ours, never a user's mistake.
"""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class InvalidInput(ValueError):
    """Bad input from a user. `param` is the dotted name of the offending field (``None`` if there is no single one)."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str | None]]:
        return type(self), (self.message, self.param)


class ModelError(InvalidInput):
    """A model that cannot be found, read or built: missing folder, truncated file, missing or mis-shaped tensor."""


class NotSupportedYet(InvalidInput):
    """A name that vLLM or OpenAI users know and that this engine does not have yet. Never silently ignored."""


class EngineDead(RuntimeError):
    """The engine loop ended; nothing more will be answered. Carries the reason."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'temperature'?`` for an unknown `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
