"""Capstone: a scheduling policy for the real scheduler, judged on a recorded load.

    python lessons/capstone_policy/lesson.py              the load that is recorded in load.jsonl
    python lessons/capstone_policy/lesson.py run.jsonl    your own, which `minivllm serve --trace run.jsonl` has recorded

A policy is a function: request -> rank. The scheduler calls it once, when the request arrives, and serves lower ranks first. All other code
that runs here is the package's: its scheduler plans the steps, and its simulator says how long they take. Unlike the lessons, this file
imports minivllm.
"""
from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.simulate import SimulatedRequest, SimulationResult, StepCost, nearest_rank, recorded_requests, simulate
from minivllm.core.trace import read
from minivllm.course.lesson_files import lessons_folder
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams
from minivllm.scheduling_policy import POLICIES, Policy

LOAD = lessons_folder() / "capstone_policy" / "load.jsonl"
# How long a step took where the load was recorded: SmolLM2-135M on one CPU core. `StepCost.fit` found it in the trace.
COST = StepCost(base=17.3e-3, per_token=2.29e-3, per_context=0.0)


@dataclass(frozen=True)
class Load:
    """Requests whose outputs are known, and the machine that serves them."""

    name: str
    config: SchedulerConfig
    cost: StepCost
    requests: Sequence[SimulatedRequest]


def request(number: int, prompt: int, output: int, arrival: float, max_tokens: int | None = None) -> SimulatedRequest:
    """A request with these numbers of tokens. max_tokens: what the client allows; by default exactly the output."""
    tokens = tuple(range(1000 * number, 1000 * number + prompt))
    params = SamplingParams(max_tokens=max_tokens or output, ignore_eos=True)
    return SimulatedRequest(EngineRequest(f"r{number}", tokens, params, arrival), (tuple(range(output)),), seed=number)


def recorded_load(path: Path = LOAD) -> Load:
    """100 requests as they arrived at a small server with 4 rows, which was too slow for them."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    config = SchedulerConfig(num_blocks=200, max_num_seqs=4, max_num_batched_tokens=256, max_model_len=2048)
    return Load(path.name, config, COST, [
        request(i, line["input_length"], line["output_length"], line["timestamp"] / 1e3) for i, line in enumerate(lines)])


def made_up_load(seed: int, rate: float = 5.0, count: int = 150) -> Load:
    """Bursts of requests on a server with 8 rows. Clients round max_tokens up, so outputs end before it."""
    dice, now, requests = random.Random(seed), 0.0, []
    for i in range(count):
        prompt = min(900, 2 + int(dice.lognormvariate(3.2, 1.0)))
        output = min(300, 1 + int(dice.lognormvariate(2.6, 1.0)))
        allowed = next(limit for limit in (16, 32, 64, 128, 512) if limit >= output)
        requests.append(request(i, prompt, output, now, allowed))
        now += dice.gammavariate(0.3, 1 / (0.3 * rate))
    config = SchedulerConfig(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=256, max_model_len=2048)
    return Load(f"made up with seed {seed}", config, COST, requests)


def load_from_trace(path: str) -> Load:
    trace = read(path)
    return Load(path, trace.config, StepCost.fit(trace), recorded_requests(trace))


# ---- policies


def seconds_of_work(request: EngineRequest, cost: StepCost, rows: int, longest: int = 512) -> float:
    """How long the request occupies a row at most: its prompt is computed, then each output token takes a step with `rows` tokens.

    longest: outputs of requests whose max_tokens is None, which means no limit
    """
    # TASK 1: cost.per_token for each prompt token; for each token that the client allows, the time of a decode step of all rows
    tokens = longest if request.params.max_tokens is None else request.params.max_tokens
    return len(request.prompt_token_ids) * cost.per_token + tokens * (cost.base + rows * cost.per_token)
    # END


@dataclass(frozen=True)
class ShortestFirst:
    """The request with the least work first."""

    cost: StepCost
    rows: int

    def __call__(self, request: EngineRequest) -> float:
        return seconds_of_work(request, self.cost, self.rows)


@dataclass(frozen=True)
class Aging:
    """Less work first, but no request is overtaken by one that arrives more than `patience` seconds later."""

    cost: StepCost
    rows: int
    patience: float  # seconds
    weight: float = 5.0  # seconds of arrival that one second of work counts as

    def __call__(self, request: EngineRequest) -> float:
        # TASK 3: seconds on the clock of arrivals, and never more than `patience` later than the request's own arrival
        work = seconds_of_work(request, self.cost, self.rows)
        return request.arrival_time + min(self.weight * work, self.patience)
        # END


def my_policy(cost: StepCost, rows: int) -> Policy:
    """The policy that task 4 judges."""
    return Aging(cost, rows, patience=5.0)


# ---- the judge


def longest_overtaking(result: SimulationResult) -> float:
    """The largest number of seconds by which a request arrived after one that it overtook; 0 if none was overtaken.

    A request overtakes another if it arrives later and gets its first token earlier. `result.arrivals` has the arrival of each request
    id, and `result.token_times` the times of all tokens of each (request id, 0).
    """
    # TASK 2: over all pairs of requests, the largest difference of arrivals of a pair in which the later one is served first
    served = [(arrival, result.token_times[name, 0][0]) for name, arrival in result.arrivals.items()]
    pairs = ((later - earlier) for earlier, first in served for later, second in served if later > earlier and second < first)
    return max(pairs, default=0.0)
    # END


def run(load: Load, policy: Policy | None = None) -> SimulationResult:
    """The load under a policy; None: the package's default, first come first served."""
    return simulate(load.config, load.requests, load.cost, policy)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def quarters(load: Load, result: SimulationResult) -> list[float]:
    """Mean time to the first token of each quarter of the requests, from the least work to the most."""
    order = sorted(load.requests, key=lambda request: seconds_of_work(request.new, load.cost, load.config.max_running))
    waits = [result.token_times[request.new.request_id, 0][0] - request.new.arrival_time for request in order]
    size = -(-len(waits) // 4)
    return [mean(waits[i:i + size]) for i in range(0, len(waits), size)]


def show(load: Load, policies: dict[str, Policy | None]) -> None:
    arrivals = [request.new.arrival_time for request in load.requests]
    prompts = sum(len(request.new.prompt_token_ids) for request in load.requests)
    outputs = sum(len(output) for request in load.requests for output in request.outputs)
    print(f"{load.name}: {len(arrivals)} requests in {max(arrivals) - min(arrivals):.0f} s, {prompts} + {outputs} tokens; "
          f"{load.config.max_running} rows")
    print("                          time to first token, s      overtaken by      mean of each quarter, s:")
    print("                           mean    median     99%     at most, s        least work ... most work")
    for name, policy in policies.items():
        result = run(load, policy)
        times = result.times_to_first_token()
        print(f"  {name:22s}{mean(times):7.2f}{nearest_rank(times, 50):9.2f}{nearest_rank(times, 99):9.2f}"
              f"{longest_overtaking(result):13.1f}     " + "".join(f"{seconds:8.2f}" for seconds in quarters(load, result)))


def main() -> None:
    loads = [load_from_trace(path) for path in sys.argv[1:]] or [recorded_load(), made_up_load(1)]
    for load in loads:
        rows = load.config.max_running
        policies: dict[str, Policy | None] = {"first come": None, "shortest first": ShortestFirst(load.cost, rows)}
        policies |= {f"aging, at most {patience:2d} s": Aging(load.cost, rows, patience) for patience in (2, 5, 10, 20)}
        policies |= {f"package: {name}": policy for name, policy in POLICIES.items() if name not in ("fcfs", "priority")}
        show(load, policies)
        print()


if __name__ == "__main__":
    main()
