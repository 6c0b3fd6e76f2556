"""Errors that a user can cause. Bugs of this package are reported by `assert` instead.

A user error names the field, the value and the fix. It is raised as early as possible: by a constructor, by `add_request`, or by
the loader. The server answers `InvalidInput` with HTTP 400 and sets `param`. The command line prints only the message.
"""
from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_NAME = 128  # characters of a name that is compared with known ones


class InvalidInput(ValueError):
    """Wrong input from a user. `param` is the dotted name of the wrong field; None if it is not one single field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str | None]]:
        return type(self), (self.message, self.param)


class ModelError(InvalidInput):
    """A model that cannot be found, read or built: a missing folder, a truncated file, a tensor that is missing or has a wrong shape."""


class NotEnoughMemory(ModelError):
    """Weights, a step or a KV cache that the device has no memory for. A start adds the plan of its memory."""


class NotSupportedYet(InvalidInput):
    """A parameter of vLLM or OpenAI that this engine does not support yet. It is refused and never ignored."""


class UnknownField(InvalidInput):
    """A field that a request must not have, because no version of the API has it."""


class RequestFailed(RuntimeError):
    """A request ended without its result, because of a failed step or a bug. The message is the reason."""


class EngineDead(RuntimeError):
    """The engine loop ended, so no request is answered any more. The message is the reason."""


class EngineRestarting(EngineDead):
    """The same, but the engine is being started again: a request may be sent again in a while."""


class ReplicaLost(EngineDead):
    """The replica that computed a request has stopped after its output had begun. Others continue: the request may be sent again."""


def is_failure(error: BaseException) -> bool:
    """Whether it is an error rather than an interruption. A panic of a library in Rust is not an `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def shown(value: object, limit: int = 60) -> str:
    """A wrong value for an error message: its beginning, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out very long integers
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[:limit]} .. ({len(text)} characters)"


def refuse_unbuilt(**values: object) -> None:
    """Raise `NotSupportedYet` for the first argument that requests something: these features are not built."""
    for name, value in values.items():
        if value:
            raise NotSupportedYet(f"{name} is not supported yet: leave it out", name)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name, such as ``; did you mean 'temperature'?``. Empty if no known name is similar."""
    if len(name) > MAX_NAME:  # comparing takes time in proportion to the square of the length, and no known name is that long
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_field(field: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown field of a request. `field` is its full path, `name` the last part, which is compared with `known`."""
    return f"unknown field {field!r}" + (nearest(name, known) or ": leave it out")
