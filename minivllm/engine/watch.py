"""Views of a running engine for the server's page: the scheduler's snapshot and the latest steps, a few times a second.

A `Watch` exists only while a client watches. Making a view takes at most 1 / `TIME_SHARE` of the engine's time: the next one is made
after `INTERVAL` seconds, or later if the last one took long.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from minivllm.core.plan import StepPlan
from minivllm.core.scheduler import Scheduler
from minivllm.core.snapshot import Snapshot, StepView, take_snapshot, view_step

INTERVAL = 0.1  # seconds between two views, at least
TIME_SHARE = 20  # views take at most 1/20 of the engine's time
MAX_WORK = 600  # scheduled requests in the steps of one view; older steps are left out


@dataclass(frozen=True, slots=True)
class EngineView:
    """The engine at one moment, and what it did since the last view."""

    time: float  # time.monotonic
    snapshot: Snapshot
    steps: tuple[StepView, ...]  # the latest ones since the last view, oldest first
    num_skipped: int  # other steps since the last view


class Watch:
    """Records steps and makes views of them."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._due = 0.0
        self._steps: deque[StepView] = deque()
        self._skipped = self._work = 0

    def record(self, plan: StepPlan) -> None:
        """Record a step, before the scheduler is updated with its result."""
        step = view_step(self._scheduler, plan)
        self._steps.append(step)
        self._work += len(step.work)
        while self._work > MAX_WORK and len(self._steps) > 1:
            self._work -= len(self._steps.popleft().work)
            self._skipped += 1

    def view(self, *, at_rest: bool) -> EngineView | None:
        """A new view, or None if it is not due. It is always due when the engine is about to sleep (`at_rest`)."""
        begin = self._clock()
        if begin < self._due and not at_rest:
            return None
        view = EngineView(begin, take_snapshot(self._scheduler), tuple(self._steps), self._skipped)
        self._steps.clear()
        self._skipped = self._work = 0
        end = self._clock()
        self._due = end + max(INTERVAL, TIME_SHARE * (end - begin))
        return view
