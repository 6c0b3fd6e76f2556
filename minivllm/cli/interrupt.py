"""Ctrl-C while an answer is generated ends the answer and not the command."""
from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


class Interrupt:
    """Records Ctrl-C instead of raising, so that no step of an engine is interrupted."""

    def __init__(self) -> None:
        self.pressed = False

    @contextlib.contextmanager
    def recording(self, on_press: Callable[[], None] = lambda: None) -> Iterator[None]:
        self.pressed = False

        def press(signum: int, frame: object) -> None:
            self.pressed = True
            with contextlib.suppress(OSError):  # the connection is closed already
                on_press()

        previous = signal.signal(signal.SIGINT, press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
