"""Which replica should get a request? A simulation of policies.  Run: python -m bench.routing [--replicas 8] [--trace FILE]

The same requests go to the same replicas under each policy. Requests come from chats: each has one of a few system prompts, some of which
are far more popular than others, and several turns, whose prompts contain all turns before. `--trace FILE` reads requests from JSON lines
in place of them: {"at": seconds, "parts": [["a name", tokens], ...], "output": tokens}. Parts with one name have the same tokens.

A replica is simulated step by step, with chunked prefill: a step computes one token of each request that decodes, and prompt tokens up
to the budget. Its prefix cache is a list of block hashes with a limit. Times of a step are those of one model on one GPU, below.

    round robin     the next replica, whatever it has
    least loaded    the replica with the fewest unfinished requests
    prefix only     the replica that holds the most of the prompt, whatever its queue
    router          minivllm.engine.routing: the least work before the output begins
"""
from __future__ import annotations

import argparse
import json
import random
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from minivllm.core.prefix_cache import chain_hashes
from minivllm.engine.routing import Router

BLOCK = 16  # tokens
NUM_BLOCKS = 6000  # per replica: 96,000 tokens
BUDGET = 2048  # prompt tokens of one step
# Seconds of a step, about those of a 7B model in bfloat16 on an H200: reading the weights, then per prompt token and per decode.
STEP, PER_PROMPT_TOKEN, PER_DECODE = 3.0e-3, 16.5e-6, 20e-6


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace."""

    at: float  # seconds
    tokens: array[int]  # of the prompt
    output: int  # tokens
    hashes: list[bytes]  # of the prompt's blocks

    @classmethod
    def of(cls, at: float, parts: Sequence[tuple[str, int]], output: int) -> TracedRequest:
        """parts: name and number of tokens. Parts with one name have one content."""
        tokens = array("q")
        for name, length in parts:
            start = int.from_bytes(sha256(name.encode()).digest()[:6], "big")
            tokens.extend(range(start, start + length))
        return cls(at, tokens, output, chain_hashes(b"", tokens, BLOCK))


@dataclass
class RunningRequest:
    """A request that a replica has."""

    request: TracedRequest
    number: int
    to_compute: int  # prompt tokens
    produced: int = 0


@dataclass
class SimulatedReplica:
    """One engine: its queue, its batch and its prefix cache."""

    waiting: deque[RunningRequest] = field(default_factory=deque)
    running: list[RunningRequest] = field(default_factory=list)
    held: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    time: float = 0.0  # until which it is simulated
    hits: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def num_held(self, hashes: Sequence[bytes]) -> int:
        return next((count for count, name in enumerate(hashes) if name not in self.held), len(hashes))

    def add(self, request: TracedRequest, number: int) -> None:
        self.time = max(self.time, request.at)
        self.waiting.append(RunningRequest(request, number, len(request.tokens)))

    def keep(self, hashes: Sequence[bytes]) -> None:
        for name in reversed(hashes):
            self.held[name] = None
            self.held.move_to_end(name)
        while len(self.held) > NUM_BLOCKS:
            self.held.popitem(last=False)

    def step(self) -> tuple[list[RunningRequest], list[RunningRequest]]:
        """One step. Returns the requests whose output has begun with it, and those that have ended with it."""
        decodes = [r for r in self.running if r.produced]
        budget = BUDGET
        while self.waiting and budget > sum(r.to_compute for r in self.running):
            admitted = self.waiting.popleft()
            cached = min(BLOCK * self.num_held(admitted.request.hashes), len(admitted.request.tokens) - 1)
            admitted.to_compute -= cached
            self.hits += cached
            self.running.append(admitted)
        begun, computed = [], 0
        for r in self.running:
            if not r.produced:
                part = min(budget - computed, r.to_compute)
                r.to_compute -= part
                computed += part
                if not r.to_compute:
                    begun.append(r)
        self.time += STEP + PER_PROMPT_TOKEN * computed + PER_DECODE * len(decodes)
        for r in begun:
            self.keep(r.request.hashes)
        for r in (*decodes, *begun):
            r.produced += 1
        ended = [r for r in self.running if r.produced >= r.request.output]
        self.running = [r for r in self.running if r.produced < r.request.output]
        return begun, ended


# -- policies: (replicas, request, its number, the router) -> index ----------------------------------------------------


def round_robin(replicas: Sequence[SimulatedReplica], request: TracedRequest, number: int, router: Router) -> int:
    return number % len(replicas)


def least_loaded(replicas: Sequence[SimulatedReplica], request: TracedRequest, number: int, router: Router) -> int:
    return min(range(len(replicas)), key=lambda i: (replicas[i].num_requests, (i - number) % len(replicas)))


def prefix_only(replicas: Sequence[SimulatedReplica], request: TracedRequest, number: int, router: Router) -> int:
    return max(range(len(replicas)), key=lambda i: (replicas[i].num_held(request.hashes), -((i - number) % len(replicas))))


def routed(replicas: Sequence[SimulatedReplica], request: TracedRequest, number: int, router: Router) -> int:
    return router.choose(str(number), request.tokens, range(len(replicas)))


POLICIES: dict[str, Callable[[Sequence[SimulatedReplica], TracedRequest, int, Router], int]] = {
    "round robin": round_robin, "least loaded": least_loaded, "prefix only": prefix_only, "router": routed,
}


@dataclass(frozen=True)
class SimulationResult:
    """What one policy gives."""

    hit_rate: float  # share of the prompt tokens found in a prefix cache
    ttft: list[float]  # seconds from arrival to the first token, sorted
    busiest: float  # most prompt tokens computed by one replica, relative to the mean

    def percentile(self, share: float) -> float:
        return self.ttft[min(int(share * len(self.ttft)), len(self.ttft) - 1)]


def simulate(trace: Sequence[TracedRequest], num_replicas: int, policy: str) -> SimulationResult:
    """Run a trace. The router is told when outputs begin and end, as by a running server."""
    replicas = [SimulatedReplica() for _ in range(num_replicas)]
    router, is_routed = Router(num_replicas, BLOCK, NUM_BLOCKS), policy == "router"
    ttft: list[float] = []
    computed = [0] * num_replicas

    def advance(until: float) -> None:
        """Steps that begin before this time, of all replicas in the order of time."""
        while True:
            busy = [i for i in range(num_replicas) if replicas[i].num_requests and replicas[i].time < until]
            if not busy:
                return
            replica = replicas[min(busy, key=lambda i: replicas[i].time)]
            begun, ended = replica.step()
            ttft.extend(replica.time - r.request.at for r in begun)
            if is_routed:
                for r in begun:
                    router.begun(str(r.number))
                for r in ended:
                    router.ended(str(r.number))

    for number, request in enumerate(trace):
        advance(request.at)
        chosen = POLICIES[policy](replicas, request, number, router)
        replicas[chosen].add(request, number)
        computed[chosen] += len(request.tokens)
    advance(float("inf"))
    tokens, hits = sum(len(request.tokens) for request in trace), [replica.hits for replica in replicas]
    work = [total - hit for total, hit in zip(computed, hits, strict=True)]
    return SimulationResult(sum(hits) / tokens, sorted(ttft), max(work) * num_replicas / sum(work))


# -- the trace ---------------------------------------------------------------------------------------------------------


def chats(seconds: float, per_second: float, seed: int) -> list[TracedRequest]:
    """Turns of chats that begin at a constant mean rate."""
    dice, requests, at, chat = random.Random(seed), list[TracedRequest](), 0.0, 0
    systems = [(f"system {i}", dice.randint(300, 3000)) for i in range(24)]
    popularity = [1 / (1 + i) for i in range(len(systems))]
    while (at := at + dice.expovariate(per_second)) < seconds:
        chat += 1
        parts, now = [dice.choices(systems, popularity)[0]], at
        for turn in range(dice.randint(1, 8)):
            parts.append((f"chat {chat} turn {turn}", dice.randint(20, 300)))
            output = dice.randint(30, 300)
            requests.append(TracedRequest.of(now, parts, output))
            parts.append((f"chat {chat} answer {turn}", output))
            now += dice.expovariate(1 / 8.0) + 0.01 * output
    return sorted(requests, key=lambda request: request.at)


def read_trace(path: Path) -> list[TracedRequest]:
    """A trace in JSON lines; see the top of this file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return sorted((TracedRequest.of(row["at"], [(str(name), int(length)) for name, length in row["parts"]], row["output"])
                   for row in rows), key=lambda request: request.at)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the trace")
    parser.add_argument("--chats", type=float, default=8.0, help="new chats per second and replica")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="requests as JSON lines, in place of generated ones")
    args = parser.parse_args(argv)
    trace = read_trace(args.trace) if args.trace else chats(args.seconds, args.chats * args.replicas, args.seed)
    tokens = sum(len(request.tokens) for request in trace)
    print(f"{len(trace)} requests, {tokens:,} prompt tokens, {args.replicas} replicas, {trace[-1].at:.0f} s")
    print(f"{'policy':14}{'prefix hits':>12}{'TTFT p50':>11}{'p99':>10}{'busiest replica':>17}")
    rows = {}
    for policy in POLICIES:
        result = simulate(trace, args.replicas, policy)
        p50, p99 = (1000 * result.percentile(share) for share in (0.5, 0.99))
        rows[policy] = {"hit_rate": round(result.hit_rate, 4), "ttft_p50_ms": round(p50, 2), "ttft_p99_ms": round(p99, 2),
                        "busiest": round(result.busiest, 3)}
        print(f"{policy:14}{100 * result.hit_rate:>11.1f}%{p50:>8.1f} ms{p99:>7.1f} ms{result.busiest:>16.2f}x")
    print(json.dumps({"bench": "routing", "replicas": args.replicas, "requests": len(trace), "seed": args.seed, **rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
