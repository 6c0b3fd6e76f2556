"""Lesson 6: the memory is full and a running request needs one more block. Which request pays, and what does it lose?

The simulated engine of lesson 5 with a limited number of blocks. Nothing is stored, so a block is only counted. First an engine without
preemption gets stuck, then one with it does not. Then three ways to choose a victim, and two ways to get its tokens back.
"""
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

STEP_MS = 1.5  # to read the weights once
TOKEN_MS = 0.004  # for each computed token
SWAP_TOKEN_MS = 0.001  # to copy the keys and values of one token to or from host memory: 22.5 KiB at 23 GB/s


@dataclass
class Request:
    name: str
    arrival: float  # ms
    prompt: int  # tokens
    output: int  # tokens
    computed: int = 0  # tokens whose keys and values are stored
    blocks: int = 0  # blocks that it holds
    times: list[float] = field(default_factory=list)  # when each output token was made, ms
    preempted: int = 0  # how often

    @property
    def known(self) -> int:
        """Tokens that exist: the prompt and the output so far."""
        return self.prompt + len(self.times)


def newest(running: list[Request]) -> Request:
    """The request that started last. Requests are in the order of their arrival."""
    return running[-1]


def oldest(running: list[Request]) -> Request:
    return running[0]


def largest(running: list[Request]) -> Request:
    """The request that holds the most blocks."""
    return max(running, key=lambda request: request.blocks)


def swap_is_cheaper(tokens: int, fixed_ms: float = 0.13) -> bool:
    """Whether to copy a request's `tokens` to host memory and back rather than to compute them again. A copy also costs `fixed_ms`."""
    # TASK 3: compare the two times
    return fixed_ms + 2 * tokens * SWAP_TOKEN_MS < tokens * TOKEN_MS
    # END


class Engine:
    def __init__(self, num_blocks: int, block_size: int, victim: Callable[[list[Request]], Request] | None, swap: bool = False) -> None:
        """`victim` chooses the request that loses its blocks; None: no preemption. With `swap`, tokens may go to host memory."""
        self.block_size, self.free, self.victim, self.swap = block_size, num_blocks, victim, swap
        self.running: list[Request] = []  # in the order of arrival
        self.waiting: list[Request] = []
        self.recomputed = self.swapped = 0  # tokens, in total
        self.moved = 0  # tokens copied from or to host memory in this step
        self.short = False  # whether a running request lacked a block in this step

    def make_room(self, request: Request, tokens: int) -> bool:
        """Give a running request the blocks for `tokens` tokens in total. False: it cannot have them now, and keeps what it has."""
        # TASK 1: take free blocks; while there are too few, preempt a victim. Set `short` if there were too few
        needed = math.ceil(tokens / self.block_size) - request.blocks
        while needed > self.free:
            self.short = True
            victim = request if self.victim is None else self.victim(self.running)
            if victim is request:  # it has the lowest priority itself, so it waits for others to finish
                return False
            self.preempt(victim)
        self.free -= needed
        request.blocks += needed
        return True
        # END

    def preempt(self, request: Request) -> None:
        """Take all blocks of a running request. It waits again, in front of requests that arrived later."""
        swapped = self.swap and swap_is_cheaper(request.computed)  # then its keys and values are kept in host memory
        # TASK 2: count its tokens in `moved` and `swapped`, or in `recomputed`. Free its blocks, and move it from running to waiting
        if swapped:
            self.moved += request.computed
            self.swapped += request.computed
        else:
            self.recomputed += request.computed
            request.computed = 0
        self.free += request.blocks
        request.blocks = 0
        self.running = [other for other in self.running if other is not request]
        self.waiting = sorted([request, *self.waiting], key=lambda other: other.arrival)
        # END
        request.preempted += 1

    def plan(self) -> list[tuple[Request, int]]:
        """The next step: requests, and how many tokens each computes."""
        self.short, self.moved = False, 0
        ready = [request for request in list(self.running) if request in self.running and self.make_room(request, request.known)]
        ready = [request for request in ready if request in self.running]  # a later request may have preempted an earlier one
        while not self.short and self.waiting and math.ceil(self.waiting[0].known / self.block_size) <= self.free:
            request = self.waiting.pop(0)
            self.moved += request.computed  # swapped out before, and swapped in now
            self.running = sorted([*self.running, request], key=lambda other: other.arrival)
            self.make_room(request, request.known)
            ready.append(request)
        return [(request, request.known - request.computed) for request in ready]

    def serve(self, requests: list[Request]) -> float:
        """Serve all requests -> the time of the last token in ms. Infinity if the engine is stuck."""
        coming, now = sorted(requests, key=lambda request: request.arrival), 0.0
        while coming or self.waiting or self.running:
            while coming and coming[0].arrival <= now:
                self.waiting.append(coming.pop(0))
            step = self.plan()
            if not step:
                if self.running or not coming:
                    return math.inf  # nothing can run, and nothing will finish
                now = coming[0].arrival
                continue
            now += STEP_MS + TOKEN_MS * sum(tokens for _, tokens in step) + SWAP_TOKEN_MS * self.moved
            for request, tokens in step:
                request.computed += tokens
                request.times.append(now)
                if len(request.times) == request.output:
                    self.free += request.blocks
                    self.running.remove(request)
        return now


def chat_requests(count: int, per_second: float, seed: int = 0) -> list[Request]:
    dice, now, requests = random.Random(seed), 0.0, []
    for i in range(count):
        prompt, output = (max(1, min(1000, round(dice.lognormvariate(math.log(mean) - 0.9**2 / 2, 0.9)))) for mean in (161, 338))
        requests.append(Request(f"r{i}", now, prompt, output))
        now += 1000 * dice.expovariate(per_second)
    return requests


def film(victim: Callable[[list[Request]], Request] | None) -> None:
    """Three requests in a memory of 12 blocks of 4 slots: the blocks that each holds, every third step."""
    engine = Engine(12, 4, victim)
    requests = [Request(name, i, 8, 24) for i, name in enumerate("abc")]
    engine.waiting, steps = list(requests), []
    while step := engine.plan():
        for request, tokens in step:
            request.computed += tokens
            request.times.append(float(len(steps)))
            if len(request.times) == request.output:
                engine.free, request.blocks = engine.free + request.blocks, 0
                engine.running.remove(request)
        steps.append([f"{request.blocks:2d}" if request.blocks else "  " if request.known == 32 else " w" for request in requests])
    for i, request in enumerate(requests):
        print(f"  {request.name}  " + " ".join(row[i] for row in steps[::3]) + f"  {len(request.times)} of {request.output} tokens")
    if engine.running:
        print(f"  stuck after step {len(steps)}: {engine.free} blocks are free, and every running request needs one more")


def main() -> None:
    for victim in (None, newest):
        print(f"blocks held, {'no preemption' if victim is None else 'preempt the newest'} (w: waits again)")
        film(victim)
    print("\n200 requests, 40 per second, 600 blocks of 16   preempted   recomputed    swapped   latency: mean    longest   all done")
    for name, victim, swap in (("preempt the newest", newest, False), ("preempt the oldest", oldest, False),
                               ("preempt the largest", largest, False), ("the newest, swapping", newest, True)):
        requests = chat_requests(200, per_second=40)
        engine = Engine(600, 16, victim, swap)
        end = engine.serve(requests)
        latencies = [request.times[-1] - request.arrival for request in requests]
        print(f"  {name:42s}  {sum(request.preempted for request in requests):12d}  {engine.recomputed:11,d}  {engine.swapped:9,d}"
              f"  {sum(latencies) / len(latencies):11.0f} ms  {max(latencies):6.0f} ms  {end / 1000:6.2f} s")
    print(f"\nswapping is cheaper from {next(n for n in range(10**6) if swap_is_cheaper(n))} tokens on")
    system = 400
    print(f"if every prompt starts with the same {system} tokens, {system / (system + 161):.0%} of all prompt tokens are the same ones")


if __name__ == "__main__":
    main()
