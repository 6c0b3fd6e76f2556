"""The queue of commands that need preparation: fair between owners, on a few threads, while steps continue."""
from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from minivllm.engine.messages import LoadAdapterCommand
from minivllm.engine_request import EngineRequest

THREADS = 2
PreparedKind: TypeAlias = EngineRequest | LoadAdapterCommand


class PreparationWork(Protocol):
    """What must be done before a command can be obeyed."""

    def run(self) -> None: ...

    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class QueuedWork:
    """A command, and its work."""

    command: PreparedKind
    work: PreparationWork


class PreparationQueue:
    """Runs the work of commands. Owners take turns, so many grammars of one owner do not delay another owner's.

    done: called on a thread of the queue, once for each command, with the error of its work.
    """

    def __init__(self, done: Callable[[PreparedKind, Exception | None], None]) -> None:
        self._done = done
        self._threads = ThreadPoolExecutor(THREADS, "minivllm-prepare")  # started on first use
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[QueuedWork]] = {}  # by owner; the first owner is next. Guarded by the lock

    def add(self, command: PreparedKind, owner: str, work: PreparationWork) -> QueuedWork:
        """Queue a command. Its work may be canceled at any time."""
        job = QueuedWork(command, work)
        with self._lock:
            self._waiting.setdefault(owner, deque()).append(job)
        self._threads.submit(self._run_next)
        return job

    def close(self) -> None:
        """Start no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> QueuedWork:
        """The oldest job of the owner whose turn it is. There is one job for each call."""
        with self._lock:
            owner, jobs = next(iter(self._waiting.items()))
            job = jobs.popleft()
            del self._waiting[owner]
            if jobs:
                self._waiting[owner] = jobs  # after all others
            return job

    def _run_next(self) -> None:
        job = self._next()
        error: Exception | None = None
        try:
            job.work.run()
        except Exception as failure:
            error = failure
        except BaseException as panic:  # of a library in Rust: the command must not wait for ever
            error = RuntimeError(f"{type(panic).__name__}: {panic}")
        self._done(job.command, error)
