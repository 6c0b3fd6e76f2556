"""The result of one request of a serving benchmark."""
from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestOutcome:
    """Times are readings of `time.perf_counter`, which all processes of a machine share."""

    start: float = 0.0
    end: float = 0.0  # of the last text, or of the whole response if it was not streamed
    times: array[float] = field(default_factory=lambda: array("d"))  # arrival of each event with text
    prompt_tokens: int | None = None  # as the server counts them
    output_tokens: int | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Output tokens. If the server does not count them: one per event."""
        return len(self.times) if self.output_tokens is None else self.output_tokens
