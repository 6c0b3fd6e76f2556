"""Work with texts, off the event loop: chat templates, tokenization, large JSON.

    run(owner, size, work) ──▶ queue of the owner ──▶ one of WORKERS threads ──▶ result, or `WorkTooSlow` after WORK_SECONDS

The owners' queues take turns, so a key with long texts does not delay another key's short ones by more than one text for each thread.
A job is dropped if its client leaves before it begins. A chat template that runs too long is interrupted: it is Python code. The
tokenizer is not, and cannot be interrupted; its work is bounded by the limits of `cost.py`.
"""
from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

from minivllm.server.errors import RETRY_AFTER, ApiError

WORKERS = 3  # threads; they share Python's global lock, so more would not be faster
MOST_OF_ONE = 2  # threads of one owner: its long texts leave one to the others
WORK_SECONDS = 10.0  # time limit of one job
MAX_QUEUED = 32 * 2**20  # characters of one owner's jobs that wait
Value = TypeVar("Value")


class WorkTooSlow(BaseException):
    """Raised inside a job at its time limit. No `Exception`, so that no handler in a template or library takes it for its own."""


class _Job:
    """One piece of work and the future of its result. `lock` guards `thread`, which is set while it runs.

    Texts may be large, so nothing keeps a job that is done: no timer, and no cycle of an error, its traceback and the frames in it.
    """

    def __init__(self, size: int, work: Callable[[], Any]) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.size = size
        self.work: Callable[[], Any] | None = work  # until it begins
        self.timer: asyncio.TimerHandle | None = None  # ends it at the time limit
        self.lock = threading.Lock()
        self.thread: int | None = None

    def run(self) -> None:
        """On a worker's thread."""
        work, self.work = self.work, None
        assert work is not None
        with self.lock:
            self.thread = threading.get_ident()
        try:
            try:
                self.loop.call_soon_threadsafe(self._limit)
                result = work()
            finally:
                with self.lock:
                    self.thread = None
        except WorkTooSlow:
            return  # `_interrupt` has reported it
        except Exception as error:
            self._report(self._fail, error)
        except BaseException as error:  # a panic of a library in Rust
            self._report(self._fail, RuntimeError(f"{type(error).__name__}: {error}"))
        else:
            self._report(self._finish, result)
        finally:
            del self, work

    def _report(self, how: Callable[[Any], None], value: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(how, value)
        except RuntimeError:  # the loop is closed: the server has ended
            return

    # On the event loop.

    def _limit(self) -> None:
        if not self.future.done():
            self.timer = self.loop.call_later(WORK_SECONDS, self._interrupt)

    def _interrupt(self) -> None:
        with self.lock:
            if self.thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(WorkTooSlow))
        self._fail(ApiError(400, f"preparing the prompt took longer than {WORK_SECONDS:g} s: shorten it, or use a simpler chat template",
                            code="prompt_too_slow"))

    def _finish(self, result: Any) -> None:
        self._stop_timer()
        if not self.future.done():
            self.future.set_result(result)

    def _fail(self, error: Exception) -> None:
        self._stop_timer()
        if not self.future.done():
            self.future.set_exception(error)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class TextWorkers:
    """Threads that are started on first use, and end with the process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()  # by owner, the one whose turn it is first
        self._queued: dict[str, int] = {}  # characters by owner
        self._running: Counter[str] = Counter()  # jobs by owner
        self._threads: list[threading.Thread] = []

    async def run(self, owner: str, size: int, work: Callable[[], Value]) -> Value:
        """The result of `work`, which handles about `size` characters. Raises `ApiError` if too much waits, and at the time limit."""
        job = _Job(size, work)
        with self._changed:
            if self._queued.get(owner, 0) + size > max(MAX_QUEUED, size):
                raise ApiError(429, f"{MAX_QUEUED} characters of this key's requests wait to be tokenized already: try again later",
                               code="rate_limit_exceeded", headers={"retry-after": RETRY_AFTER})
            self._queues.setdefault(owner, deque()).append(job)
            self._queued[owner] = self._queued.get(owner, 0) + size
            if len(self._threads) < WORKERS:
                self._threads.append(threading.Thread(target=self._serve, name="minivllm-text", daemon=True))
                self._threads[-1].start()
            self._changed.notify()
        try:
            return cast(Value, await job.future)
        except asyncio.CancelledError:
            self._drop(owner, job)
            raise
        finally:
            del job

    def _drop(self, owner: str, job: _Job) -> None:
        """The client has left: forget the job if it has not begun, and interrupt it otherwise."""
        with self._changed:
            if owner in self._queues and job in self._queues[owner]:
                self._queues[owner].remove(job)
                self._queued[owner] -= job.size
                if not self._queues[owner]:
                    del self._queues[owner]
                return
        job._interrupt()

    def _serve(self) -> None:
        while True:
            owner, job = self._next()
            with contextlib.suppress(WorkTooSlow):  # it arrived just after its job had ended
                job.run()
            del job  # while the thread waits for the next one
            with self._changed:
                self._running[owner] -= 1

    def _next(self) -> tuple[str, _Job]:
        with self._changed:
            while (owner := next((name for name in self._queues if self._running[name] < MOST_OF_ONE), None)) is None:
                self._changed.wait()
            jobs = self._queues.pop(owner)
            job = jobs.popleft()
            self._queued[owner] -= job.size
            self._running[owner] += 1
            if jobs:
                self._queues[owner] = jobs  # at the end: the other owners are next
            return owner, job
