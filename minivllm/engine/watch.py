"""What the engine tells those who watch it, some times a second: the scheduler's snapshot and the latest steps.

Nothing here runs while nobody watches. While somebody does, a view is made at most every `INTERVAL` seconds, and more seldom if it
is dear, so that it never takes more than a twentieth of the engine's time.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from minivllm.core.plan import StepPlan
from minivllm.core.scheduler import Scheduler
from minivllm.core.snapshot import Snapshot, StepView, take_snapshot, view_step

INTERVAL = 0.1
SHARE = 20  # of the engine's time, one part at most
MOST_WORK = 600  # entries of steps in one view: the newest steps that fit


@dataclass(frozen=True, slots=True)
class EngineView:
    """One look at the engine."""

    time: float  # time.monotonic
    snapshot: Snapshot
    steps: tuple[StepView, ...]  # the latest, oldest first; none that an earlier view held
    num_skipped: int  # steps since the last view that are not among them


class Watch:
    """Made when somebody begins to watch, dropped when the last one leaves."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._due = 0.0
        self._steps: deque[StepView] = deque()
        self._skipped = self._work = 0

    def record(self, plan: StepPlan) -> None:
        """A step is about to be taken in."""
        step = view_step(self._scheduler, plan)
        self._steps.append(step)
        self._work += len(step.work)
        while self._work > MOST_WORK and len(self._steps) > 1:
            self._work -= len(self._steps.popleft().work)
            self._skipped += 1

    def view(self, *, at_rest: bool) -> EngineView | None:
        """A new view if one is due; the last one before the engine sleeps always is."""
        begin = self._clock()
        if begin < self._due and not at_rest:
            return None
        view = EngineView(begin, take_snapshot(self._scheduler), tuple(self._steps), self._skipped)
        self._steps.clear()
        self._skipped = self._work = 0
        end = self._clock()
        self._due = end + max(INTERVAL, SHARE * (end - begin))
        return view
