"""Views of a running engine for the server's page: the scheduler's snapshot and the latest steps, a few times a second.

A `Watch` exists only while a client watches. Making a view takes at most 1 / `TIME_SHARE` of the engine's time: the next one is made
after `INTERVAL` seconds, or later if the last one took long.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from minivllm.core.plan import StepPlan
from minivllm.core.scheduler import Scheduler
from minivllm.core.snapshot import Snapshot, StepView, take_snapshot, view_step

INTERVAL = 0.1  # seconds between two views, at least
TIME_SHARE = 20  # views take at most 1/20 of the engine's time
MAX_WORK = 600  # scheduled requests in the steps of one view; older steps are left out


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A finished step, and what it took."""

    step: StepView
    seconds: float  # since the last step ended, or since the idle engine began with this one
    used_blocks: int  # while it ran


@dataclass(frozen=True, slots=True)
class EngineView:
    """The engine at one moment, and what it did since the last view."""

    time: float  # time.monotonic
    snapshot: Snapshot
    steps: tuple[RecordedStep, ...]  # the latest ones since the last view, oldest first
    num_skipped: int  # other steps since the last view

    def after(self, earlier: EngineView) -> EngineView:
        """This view with the steps of an earlier one too. Steps beyond `MAX_WORK` are left out, the oldest first."""
        steps = deque(earlier.steps + self.steps)
        skipped = earlier.num_skipped + self.num_skipped + _drop_oldest(steps, sum(len(recorded.step.work) for recorded in steps))[1]
        return replace(self, steps=tuple(steps), num_skipped=skipped)


def _drop_oldest(steps: deque[RecordedStep], work: int) -> tuple[int, int]:
    """Drop steps until they fit into a view. Returns what is left of their work, and the number of dropped steps."""
    dropped = 0
    while work > MAX_WORK and len(steps) > 1:
        work -= len(steps.popleft().step.work)
        dropped += 1
    return work, dropped


class Watch:
    """Records steps and makes views of them."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._due = 0.0
        self._steps: deque[RecordedStep] = deque()
        self._skipped = self._work = 0
        self._last: float | None = None  # when the last step ended; None if the engine was idle since

    def record(self, plan: StepPlan, begin: float) -> None:
        """Record a step, before the scheduler is updated with its result. begin: when the engine began with it, if it was idle."""
        step, now = view_step(self._scheduler, plan), self._clock()
        self._steps.append(RecordedStep(step, now - (begin if self._last is None else self._last), self._scheduler.pool.num_used))
        self._last = now
        self._work, dropped = _drop_oldest(self._steps, self._work + len(step.work))
        self._skipped += dropped

    def view(self, *, at_rest: bool) -> EngineView | None:
        """A new view, or None if it is not due. It is always due when the engine is about to sleep (`at_rest`)."""
        begin = self._clock()
        if at_rest:
            self._last = None
        if begin < self._due and not at_rest:
            return None
        view = EngineView(begin, take_snapshot(self._scheduler), tuple(self._steps), self._skipped)
        self._steps.clear()
        self._skipped = self._work = 0
        end = self._clock()
        self._due = end + max(INTERVAL, TIME_SHARE * (end - begin))
        return view
