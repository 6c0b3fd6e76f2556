"""The same requests through any allocator: how many fit, and where the memory goes, step by step.

`replay` needs only lengths: made up (`sharegpt_like`) or read from a trace of the engine. It admits requests in order for as
long as the allocator finds a place, lets each running one grow by a token a step, and notes reserved, used and wasted slots.
`bench/waste.py` prints the comparison, notebook 2 draws it.
"""
from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minivllm.errors import InvalidInput
from minivllm.planning.allocators import Allocator, Job


@dataclass(frozen=True, slots=True)
class Moment:
    """Where the slots are after one step."""

    step: int
    reserved: int
    used: int
    external: int  # free when requests were admitted, enough in total for the next in line, and yet it could not be placed
    held: int  # tokens the running requests have between them; above `used` when they share
    running: int
    waiting: int

    @property
    def internal(self) -> int:
        return self.reserved - self.used


@dataclass(frozen=True, slots=True)
class Replay:
    """One allocator's run over one list of jobs."""

    moments: tuple[Moment, ...]
    capacity: int
    preemptions: int  # times a request lost its place to an older one
    lost: int  # tokens that they held then, and had to compute again (or find shared)
    moved: int  # tokens copied to another place

    def mean(self, name: str) -> float:
        return float(sum(getattr(m, name) for m in self.moments)) / len(self.moments)

    @property
    def waste(self) -> float:
        """Share of the reserved slots that hold nothing, averaged over steps."""
        return sum(m.internal / m.reserved for m in self.moments) / len(self.moments)

    @property
    def external(self) -> float:
        """Share of all slots that are free, wanted, and in pieces too small, averaged over steps."""
        return self.mean("external") / self.capacity


def replay(allocator: Allocator, jobs: Iterable[Job], *, max_running: int = 1 << 30) -> Replay:
    """Run `jobs` first come, first served, one token each a step, as many at a time as `allocator` can hold.

    When a request cannot grow, the youngest one gives up its place, returns to the head of the queue and comes back with the
    tokens it has, to be computed again.
    """
    waiting: deque[tuple[int, Job]] = deque(enumerate(jobs))
    for _, job in waiting:
        if job.total > allocator.longest:
            raise InvalidInput(f"a job of {job.prompt} + {job.output} tokens can never fit {allocator.longest} slots: raise the limit "
                               "or the capacity", "jobs")
    running: dict[int, Job] = {}  # oldest first
    moments: list[Moment] = []
    preemptions = lost = 0
    while waiting or running:
        while waiting and len(running) < max_running and allocator.try_admit(*waiting[0]):
            key, job = waiting.popleft()
            running[key] = job
        free = allocator.capacity - allocator.reserved
        stuck = bool(waiting) and len(running) < max_running and allocator.need(waiting[0][1]) <= free
        for key in list(running):
            while key in running and not allocator.try_grow(key):
                youngest, job = running.popitem()
                length = allocator.lengths[youngest]
                allocator.release(youngest)
                waiting.appendleft((youngest, Job(length, job.total - length, job.group, job.shared)))
                preemptions, lost = preemptions + 1, lost + length
        moments.append(Moment(len(moments), allocator.reserved, allocator.used, free if stuck else 0, allocator.held,
                              len(running), len(waiting)))
        for key in [k for k, job in running.items() if allocator.lengths[k] == job.total]:
            allocator.release(key)
            del running[key]
    return Replay(tuple(moments), allocator.capacity, preemptions, lost, allocator.moved)


def sharegpt_like(num_jobs: int, *, limit: int = 2048, seed: int = 0, prompt_mean: float = 161.0, output_mean: float = 338.0,
                  sigma: float = 0.9) -> list[Job]:
    """Log-normal lengths whose means are those of ShareGPT in the PagedAttention paper (section 6.1), cut at `limit`.

    The mean of a log-normal is exp(mu + sigma^2 / 2). The tail is what a reservation has to be prepared for and rarely meets.
    """
    dice = random.Random(seed)

    def draw(mean: float, most: int) -> int:
        mu = math.log(mean) - sigma**2 / 2
        return max(1, min(most, round(dice.lognormvariate(mu, sigma))))

    jobs = []
    for _ in range(num_jobs):
        prompt = draw(prompt_mean, limit - 1)
        jobs.append(Job(prompt, draw(output_mean, limit - prompt)))
    return jobs


def with_system_prompt(jobs: Sequence[Job], tokens: int, limit: int = 2048) -> list[Job]:
    """The same jobs, each behind one common system prompt of `tokens` tokens; jobs that then pass `limit` lose output first."""
    out = []
    for job in jobs:
        prompt = min(tokens + job.prompt, limit - 1)
        out.append(Job(prompt, min(job.output, limit - prompt), group="system", shared=min(tokens, prompt)))
    return out
