"""How long the masks of a step, and of one request, may take.

One mask is limited by a count of operations (`grammar_text.py`): 10 to 100 µs for usual grammars, at most about 20 ms for hostile ones.
A request with many children, or many requests, could still stop all streams for seconds. So the time is measured:

    first      the masks of all requests together, in parallel, in slices of 16, 32, 64 ... rows, while a slice is fast
    if slow    the requests of the slow slice and of the rest of the step are measured alone, in this and the next steps
    at last    a request that goes on spending more than its allowance ends with an error; all others continue

Many requests could each stay below their allowance, or end and be sent again. So the requests of one owner (API key) that are measured
alone also have an allowance together. What exceeds it is the owner's debt, which shrinks with time. An owner with a large debt gets no
new grammars (429), and its slow requests end at once.

The measure is the smaller one of wall-clock time and the process's CPU time, so a busy machine ends no request.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

FIRST_SLICE = 16  # rows
SLOW_SLICE = 0.02  # seconds
ALONE_SLICE = 8  # rows of a request that is measured alone
WATCHED_STEPS = 64  # steps after a slow slice in which its requests are measured alone
ALLOWANCE = 0.02  # seconds per step for a request ...
ALLOWANCE_PER_ROW = 0.0005  # ... with few rows; more rows make every step longer anyway
LARGEST_DEBT = 0.25  # seconds above all allowances so far
STEP_SECONDS = 0.5  # for all requests that are measured alone; beyond it, each that takes more than ...
FAIR_SECONDS = 0.005  # ... this in the step ends
OWNER_DEBT = 1.0  # seconds of one owner above its allowances, which are those of one request with all its rows
OWNER_RATE = 0.2  # by which the debt shrinks: seconds per second


@dataclass(slots=True)
class MaskAccount:
    """What one request has spent."""

    owner: str = ""
    watched: int = 0  # further steps in which it is measured alone
    debt: float = 0.0  # seconds
    spent: float = 0.0  # seconds in this step


@dataclass(slots=True)
class OwnerMasks:
    """What the requests of one owner that are measured alone have spent."""

    since: float  # when `debt` was computed, in seconds of the host's clock
    debt: float = 0.0  # seconds
    spent: float = 0.0  # seconds in this step
    num_rows: int = 0  # in this step

    def debt_at(self, now: float) -> float:
        """The debt with what this step has spent so far."""
        return max(0.0, self.debt - OWNER_RATE * (now - self.since)) + max(0.0, self.spent - _allowance(self.num_rows))


@dataclass(slots=True)
class MaskBudget:
    """Measures the masks of one step. `seconds` is a clock of the host: (wall-clock, CPU time of the process)."""

    seconds: Callable[[], tuple[float, float]] = lambda: (time.perf_counter(), time.process_time())
    _step: float = 0.0
    _owners: dict[str, OwnerMasks] = field(default_factory=dict)  # those with a debt, or measured in this step

    def begin_step(self) -> None:
        """Before the first mask of a step."""
        self._step, now = 0.0, self.seconds()[0]
        debts = {name: owner.debt_at(now) for name, owner in self._owners.items()}
        self._owners = {name: OwnerMasks(now, debt) for name, debt in debts.items() if debt}

    def exhausted(self, owner: str) -> bool:
        """Whether this owner's debt is too large for a new request."""
        return owner in self._owners and self._owners[owner].debt_at(self.seconds()[0]) > OWNER_DEBT

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
        owner = self._owners.setdefault(account.owner, OwnerMasks(self.seconds()[0]))
        owner.num_rows += num_rows
        for part in _slices(num_rows, ALONE_SLICE):
            seconds = self._measured(lambda part=part: fill(part))  # type: ignore[misc]
            account.spent += seconds
            owner.spent += seconds
            self._step += seconds
            if account.debt + account.spent - _allowance(num_rows) > LARGEST_DEBT:
                return False
            if account.spent > max(FAIR_SECONDS, ALLOWANCE_PER_ROW * num_rows) and (
                    self._step > STEP_SECONDS or owner.debt_at(self.seconds()[0]) > OWNER_DEBT):
                return False
        account.debt = max(account.debt + account.spent - _allowance(num_rows), 0.0)
        return True

    def _measured(self, work: Callable[[], None]) -> float:
        before = self.seconds()
        work()
        return min(now - then for now, then in zip(self.seconds(), before, strict=True))


def _allowance(num_rows: int) -> float:
    """Seconds per step."""
    return max(ALLOWANCE, ALLOWANCE_PER_ROW * num_rows)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
