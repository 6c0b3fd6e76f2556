"""How long the masks of a step, and of one request, may take.

One mask is limited by a count of operations (`grammar_text.py`): 10 to 100 µs for usual grammars, at most about 20 ms for hostile ones.
A request with many children, or many requests, could still stop all streams for seconds. So the time is measured:

    first      the masks of all requests together, in parallel, in slices of 16, 32, 64 ... rows, while a slice is fast
    if slow    the requests of the slow slice and of the rest of the step are measured alone, in this and the next steps
    at last    a request that goes on spending more than its allowance ends with an error; all others continue

The measure is the smaller one of wall-clock time and the process's CPU time, so a busy machine ends no request.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

FIRST_SLICE = 16  # rows
SLOW_SLICE = 0.02  # seconds
ALONE_SLICE = 8  # rows of a request that is measured alone
WATCHED_STEPS = 64  # steps after a slow slice in which its requests are measured alone
ALLOWANCE = 0.02  # seconds per step for a request ...
ALLOWANCE_PER_ROW = 0.0005  # ... with few rows; more rows make every step longer anyway
LARGEST_DEBT = 0.25  # seconds above all allowances so far
STEP_SECONDS = 0.5  # for all requests that are measured alone; beyond it, each that takes more than ...
FAIR_SECONDS = 0.005  # ... this in the step ends


@dataclass(slots=True)
class MaskAccount:
    """What one request has spent."""

    watched: int = 0  # further steps in which it is measured alone
    debt: float = 0.0  # seconds
    spent: float = 0.0  # seconds in this step


class MaskBudget:
    """Measures the masks of one step. `seconds` is a clock of the host."""

    def __init__(self, seconds: Callable[[], tuple[float, float]] = lambda: (time.perf_counter(), time.process_time())) -> None:
        self._seconds = seconds
        self._step = 0.0

    def begin_step(self) -> None:
        """Before the first mask of a step."""
        self._step = 0.0

    def together(self, accounts: Sequence[MaskAccount], fill: Callable[[slice], None]) -> int:
        """Fill the masks of rows [len(accounts)], which belong to these accounts, in slices. Returns how many rows are filled: the rest
        must be measured alone."""
        start, size = 0, FIRST_SLICE
        while start < len(accounts):
            part = slice(start, min(start + size, len(accounts)))
            if self._measured(lambda part=part: fill(part)) > SLOW_SLICE:  # type: ignore[misc]
                for account in accounts[start:]:
                    account.watched = WATCHED_STEPS
                return part.stop
            start, size = part.stop, 2 * size
        return len(accounts)

    def alone(self, account: MaskAccount, num_rows: int, fill: Callable[[slice], None]) -> bool:
        """Fill the masks of one request. False: it exceeded its budget, and has to end."""
        account.watched, account.spent = max(account.watched - 1, 0), 0.0
        allowance = max(ALLOWANCE, ALLOWANCE_PER_ROW * num_rows)
        for part in _slices(num_rows, ALONE_SLICE):
            seconds = self._measured(lambda part=part: fill(part))  # type: ignore[misc]
            account.spent += seconds
            self._step += seconds
            if account.debt + account.spent - allowance > LARGEST_DEBT or (
                    self._step > STEP_SECONDS and account.spent > max(FAIR_SECONDS, ALLOWANCE_PER_ROW * num_rows)):
                return False
        account.debt = max(account.debt + account.spent - allowance, 0.0)
        return True

    def _measured(self, work: Callable[[], None]) -> float:
        before = self._seconds()
        work()
        return min(now - then for now, then in zip(self._seconds(), before, strict=True))


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
