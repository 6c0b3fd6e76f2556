"""One future for a command to several replicas."""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from minivllm.errors import EngineDead


def unless_dead(errors: list[BaseException | None]) -> BaseException | None:
    """The error of a command that a replica need not obey if it has stopped: the next one has an empty cache and its own adapters."""
    serious = [error for error in errors if error is not None and not isinstance(error, EngineDead)]
    return serious[0] if serious else errors[0] if all(errors) else None


def all_done(futures: Sequence[Future[None]], finish: Callable[[list[BaseException | None]], BaseException | None]) -> Future[None]:
    """A future that is done when all are. finish: its error, from theirs."""
    combined: Future[None] = Future()
    lock, remaining = threading.Lock(), len(futures)

    def done(_: Future[None]) -> None:
        nonlocal remaining
        with lock:
            remaining -= 1
            if remaining:
                return
        error = finish([future.exception() for future in futures])
        if not combined.set_running_or_notify_cancel():
            return
        if error is None:
            combined.set_result(None)
        else:
            combined.set_exception(error)

    for future in futures:
        future.add_done_callback(done)
    return combined
