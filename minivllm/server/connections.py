"""How many connections may be open, and which of them is closed for a new one."""
from __future__ import annotations

import contextlib
import logging
import time
from typing import Protocol

OTHER_FILES = 128  # files that the process needs beside its connections: the model's, the engine's pipe, logs
WARNING_SECONDS = 10.0  # between two warnings about too many connections

log = logging.getLogger(__name__)


class IdleConnection(Protocol):
    """A connection without a request in progress."""

    def give_up(self) -> None:
        """Close it, because a new one needs its place."""


class ConnectionLimit:
    """All connections of a server. Beyond the limit, a new one takes the place of the one that has been idle for the longest time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.idle: dict[IdleConnection, None] = {}  # connections without a request in progress, the longest idle first
        self.open = 0
        self._next_warning = 0.0

    def admit(self) -> bool:
        """Count a new connection. False: all others have a request in progress, so it must be refused."""
        self.open += 1
        if self.open <= self.most:
            return True
        if (now := time.monotonic()) >= self._next_warning:
            self._next_warning = now + WARNING_SECONDS
            log.warning("%d connections are open, as many as --max-connections allows: idle ones are closed for new ones", self.most)
        if not self.idle:
            return False
        next(iter(self.idle)).give_up()
        return True


def connections_possible(wanted: int) -> int:
    """`wanted`, or as many connections as the process may have open files beside its other ones. Raises its soft limit first."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = wanted + OTHER_FILES
    if soft < needed:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = max(soft // 2, soft - OTHER_FILES)
    if possible < wanted:
        log.warning("max_connections is %d here instead of %d, because this process may open %d files: raise that limit (ulimit -n)",
                    possible, wanted, soft)
    return min(wanted, possible)
