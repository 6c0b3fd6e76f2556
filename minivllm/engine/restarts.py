"""How often, and after which pauses, an engine whose process has ended is started again (`--restart-engine`)."""
from __future__ import annotations

import time
from collections.abc import Callable

FIRST_PAUSE = 1.0  # seconds; each further pause is twice as long ...
LONGEST_PAUSE = 30.0  # ... up to this
STEADY_SECONDS = 60.0  # an engine that has been ready for so long does not count as a failed attempt


class RestartCounter:
    """Counts the engines that ended in a row. Only one thread at a time calls its methods."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.failures = 0  # in a row
        self._clock = clock
        self._ready_since: float | None = None

    def ready(self) -> None:
        """The engine accepts requests."""
        self._ready_since = self._clock()

    def ended(self) -> bool:
        """The engine has ended. Returns whether it may be started again."""
        if self._ready_since is not None and self._clock() - self._ready_since >= STEADY_SECONDS:
            self.failures = 0
        self._ready_since = None
        self.failures += 1
        return self.failures <= self.most

    @property
    def pause(self) -> float:
        """Seconds before the next start."""
        return min(FIRST_PAUSE * 2.0 ** (self.failures - 1), LONGEST_PAUSE)
