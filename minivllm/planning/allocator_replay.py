"""Replays a list of requests on any allocator, and reports how many fit and how the memory is used, step by step.

`replay` needs only the requests' lengths: made up by `sharegpt_like`, or read from a trace of the engine. It admits requests in
order while the allocator has room. Each running request grows by one token per step. After each step it records the reserved,
used and wasted slots. `bench/waste.py` prints the comparison, and notebook 1 draws it.
"""
from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from minivllm.errors import InvalidInput
from minivllm.planning.allocators import Allocator, RequestLengths


@dataclass(frozen=True, slots=True)
class StepUsage:
    """How the slots are used after one step."""

    step: int
    reserved: int
    used: int
    external: int  # free slots, enough in total for the next waiting request, but in pieces that are too small
    held: int  # tokens of all running requests; more than `used` if they share
    running: int
    waiting: int

    @property
    def internal(self) -> int:
        return self.reserved - self.used


@dataclass(frozen=True, slots=True)
class AllocatorRun:
    """One allocator's replay of one list of requests."""

    steps: tuple[StepUsage, ...]
    capacity: int
    preemptions: int  # times a request was preempted by an older one
    lost: int  # tokens that preempted requests held, to be recomputed (or found shared)
    moved: int  # tokens copied from one place in memory to another

    def mean(self, name: str) -> float:
        return float(sum(getattr(s, name) for s in self.steps)) / len(self.steps)

    @property
    def waste(self) -> float:
        """Fraction of the reserved slots that hold no token, averaged over steps."""
        return sum(s.internal / s.reserved for s in self.steps) / len(self.steps)

    @property
    def external(self) -> float:
        """Fraction of all slots that are external waste, averaged over steps."""
        return self.mean("external") / self.capacity


def replay(allocator: Allocator, requests: Iterable[RequestLengths], *, max_running: int = 1 << 30,
           watch: Callable[[Allocator], None] | None = None) -> AllocatorRun:
    """Serve the requests first come, first served, as many at a time as `allocator` can hold. Each grows by one token per step.

    When a request cannot grow, the youngest running one is preempted. It returns to the head of the queue with the tokens it has,
    which are recomputed. `watch` is called after each step, before finished requests are released.
    """
    waiting: deque[tuple[int, RequestLengths]] = deque(enumerate(requests))
    for _, request in waiting:
        if request.total > allocator.longest:
            raise InvalidInput(f"a request of {request.prompt} + {request.output} tokens can never fit {allocator.longest} slots: raise "
                               "the limit or the capacity", "requests")
    running: dict[int, RequestLengths] = {}  # oldest first
    steps: list[StepUsage] = []
    preemptions = lost = 0
    while waiting or running:
        while waiting and len(running) < max_running and allocator.try_admit(*waiting[0]):
            key, request = waiting.popleft()
            running[key] = request
        free = allocator.capacity - allocator.reserved
        blocked = bool(waiting) and len(running) < max_running and allocator.need(waiting[0][1]) <= free
        for key in list(running):
            while key in running and not allocator.try_grow(key):
                youngest, request = running.popitem()
                length = allocator.lengths[youngest]
                allocator.release(youngest)
                waiting.appendleft((youngest, RequestLengths(length, request.total - length, request.group, request.shared)))
                preemptions, lost = preemptions + 1, lost + length
        steps.append(StepUsage(len(steps), allocator.reserved, allocator.used, free if blocked else 0, allocator.held,
                               len(running), len(waiting)))
        if watch is not None:
            watch(allocator)
        for key in [k for k, request in running.items() if allocator.lengths[k] == request.total]:
            allocator.release(key)
            del running[key]
    return AllocatorRun(tuple(steps), allocator.capacity, preemptions, lost, allocator.moved)


def sharegpt_like(num_requests: int, *, limit: int = 2048, seed: int = 0, prompt_mean: float = 161.0, output_mean: float = 338.0,
                  sigma: float = 0.9) -> list[RequestLengths]:
    """Log-normal lengths with the means of ShareGPT as given in the PagedAttention paper (section 6.1), cut at `limit`.

    The mean of a log-normal distribution is exp(mu + sigma^2 / 2). Few requests reach its long tail, but a reservation of the
    longest possible length pays for it every time.
    """
    generator = random.Random(seed)

    def draw(mean: float, maximum: int) -> int:
        mu = math.log(mean) - sigma**2 / 2
        return max(1, min(maximum, round(generator.lognormvariate(mu, sigma))))

    requests = []
    for _ in range(num_requests):
        prompt = draw(prompt_mean, limit - 1)
        requests.append(RequestLengths(prompt, draw(output_mean, limit - prompt)))
    return requests


def with_system_prompt(requests: Sequence[RequestLengths], tokens: int, limit: int = 2048) -> list[RequestLengths]:
    """The same requests, each after a common system prompt of `tokens` tokens. Those longer than `limit` are cut, the output first."""
    longer = []
    for request in requests:
        prompt = min(tokens + request.prompt, limit - 1)
        longer.append(RequestLengths(prompt, min(request.output, limit - prompt), group="system", shared=min(tokens, prompt)))
    return longer
