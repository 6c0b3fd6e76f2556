"""CPU time of the control plane: `schedule` + `update` of one step in which every running request decodes one token.

    python bench/scheduler_cost.py [--planning-depth 1] [--profile]

Rows: running requests. Columns: tokens that each request has already. Prompts have slightly different lengths, so that in every
step some requests start a new block. Times are in microseconds: the median over the steps of a round, and the best of several rounds,
because other processes can only slow a round down. The last line is JSON.
"""
from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import time
from collections import deque

from minivllm.core.plan import StepPlan, StepResult
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams

BLOCK_SIZE = 16


class Bench:
    """A scheduler whose requests all decode. The results are made up, outside the timed sections."""

    def __init__(self, num_requests: int, history: int, depth: int, steps: int) -> None:
        room = steps + 4 * BLOCK_SIZE  # for the measured steps and the ones before
        blocks_each = (history + room) // BLOCK_SIZE + 1
        self.scheduler = Scheduler(SchedulerConfig(
            num_blocks=num_requests * blocks_each + 1, block_size=BLOCK_SIZE, max_num_seqs=num_requests,
            max_num_batched_tokens=num_requests * (history + BLOCK_SIZE), max_model_len=history + room, planning_depth=depth,
            eos_token_ids=(1,)))
        self.num_decoding = 0
        self.in_flight: deque[StepPlan] = deque()
        params = SamplingParams(max_tokens=None)
        for i in range(num_requests):  # no two prompts share a block
            prompt = (i, *range(history - 1 + i % BLOCK_SIZE))
            self.scheduler.add(EngineRequest(f"request-{i}", prompt, params), seed=i)
        while self.scheduler.stats().num_waiting:
            self.step()
        for _ in range(BLOCK_SIZE + 2):
            self.step()

    def step(self) -> tuple[float, float]:
        """(schedule, update) in seconds."""
        scheduler = self.scheduler
        start = time.perf_counter()
        plan = scheduler.schedule(0.0)
        planned = time.perf_counter() - start
        assert plan is not None
        self.in_flight.append(plan)
        if len(self.in_flight) <= scheduler.config.planning_depth:
            return self.step()  # depth 1: launch one more plan first
        plan = self.in_flight.popleft()
        self.num_decoding = len(plan.sample_rows)
        result = StepResult(plan.step_id, ((7,),) * len(plan.sample_rows))
        start = time.perf_counter()
        scheduler.update(plan, result, {}, 0.0)
        return planned, time.perf_counter() - start


def measure(num_requests: int, history: int, depth: int, steps: int, rounds: int) -> tuple[float, float]:
    """Median (schedule, update) in microseconds of the best round."""
    bench = Bench(num_requests, history, depth, steps * rounds)
    best: tuple[float, float] | None = None
    for _ in range(rounds):
        times = [bench.step() for _ in range(steps)]
        assert bench.num_decoding == num_requests, "not every request decoded"
        medians = statistics.median(t[0] for t in times) * 1e6, statistics.median(t[1] for t in times) * 1e6
        best = medians if best is None or sum(medians) < sum(best) else best
    assert best is not None
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--history", type=int, nargs="+", default=[100, 1000, 8000])
    parser.add_argument("--planning-depth", type=int, default=0, choices=(0, 1))
    parser.add_argument("--steps", type=int, default=64, help="steps in one round, a multiple of the block size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print a profile of 256 requests instead")
    args = parser.parse_args()
    if args.profile:
        bench = Bench(256, 1000, args.planning_depth, 320)
        profile = cProfile.Profile()
        profile.runcall(lambda: [bench.step() for _ in range(320)])
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)
        return
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"schedule + update, microseconds per step (planning depth {args.planning_depth}, {machine})\n")
    print("running  " + "".join(f"history {h:<24}" for h in args.history) + "per request")
    results = []
    for num_requests in args.requests:
        cells = []
        for history in args.history:
            schedule, update = measure(num_requests, history, args.planning_depth, args.steps, args.rounds)
            cells.append(schedule + update)
            results.append({"running": num_requests, "history": history, "schedule_us": round(schedule, 1), "update_us": round(update, 1)})
        last = results[-len(args.history):]
        text = "".join(f"{r['schedule_us']:7.1f} + {r['update_us']:7.1f} = {c:7.1f}   " for r, c in zip(last, cells, strict=True))
        print(f"{num_requests:7}  {text}{min(cells) / num_requests:6.2f}")
    print(json.dumps({"bench": "scheduler_cost", "machine": machine, "planning_depth": args.planning_depth, "results": results}))


if __name__ == "__main__":
    main()
