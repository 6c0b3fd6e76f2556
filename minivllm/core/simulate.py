"""Simulation of scheduler settings: the real scheduler, a simulated clock, and a formula for the duration of each step.

    arrivals ─▶ Scheduler.schedule ─▶ plan ─▶ StepCost: seconds ─▶ known tokens as the result ─▶ Scheduler.update ─▶ ...

Each request's output is known beforehand: recorded in a trace, or made up. So two settings can be compared on the same requests,
without a model or a GPU, and the numbers are the same on every machine. A real machine also has caches, noise, and kernels
that change at some size. So the sign of a difference is more reliable than its size.
"""
from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.core.plan import StepPlan, StepResult, Stop
from minivllm.core.request import sequence_id
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.trace import Arrival, BeamsChosen, Planned, Trace, Updated, replay
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams
from minivllm.scheduling_policy import Policy


@dataclass(frozen=True)
class StepCost:
    """seconds of a step = base + per_token x tokens computed + per_context x keys read + per_move x blocks moved.

    `base` is the time to read the weights, `per_token` the arithmetic for one token, and `per_context` the time to read one key
    and value from the KV cache (a sequence with s tokens of context reads s keys per step). The defaults are rough values for a
    model with 0.6B parameters on a data-center GPU.
    """

    base: float = 1.5e-3
    per_token: float = 4e-6
    per_context: float = 3e-8
    per_move: float = 5e-6
    host: float = 0.0  # CPU time of schedule and update; with planning_depth 1 it overlaps the device's time

    def seconds(self, plan: StepPlan) -> float:
        moves = len(plan.moves_in) + len(plan.moves_out)
        return self.base + self.per_token * plan.total_tokens + self.per_context * context_read(plan) + self.per_move * moves

    @staticmethod
    def fit(trace: Trace) -> StepCost:
        """The non-negative coefficients that fit the step times of a trace best, by least squares.

        Fitted twice: the second time without the tenth of the steps that the first fit misses most. Such a step compiled a kernel, or
        waited for another program. (This is one step of least trimmed squares, Rousseeuw 1984.)
        """
        samples, started, last_end = [], {}, -math.inf
        for event in trace.events:
            if isinstance(event, Planned) and event.plan is not None:
                started[event.plan.step_id] = event.now
            elif isinstance(event, Updated) and event.result.error is None:
                begin = max(started[event.plan.step_id], last_end)
                last_end = event.now
                samples.append(((1.0, float(event.plan.total_tokens), float(context_read(event.plan))), event.now - begin))
        if len(samples) < 3:
            raise InvalidInput(f"step costs can be fitted to at least 3 steps, and this trace has {len(samples)}: record a longer one, "
                               "or give the costs", "step_cost")
        first = _non_negative_least_squares(samples)
        samples.sort(key=lambda sample: abs(sum(a * b for a, b in zip(sample[0], first, strict=True)) - sample[1]))
        return StepCost(*_non_negative_least_squares(samples[:len(samples) - len(samples) // 10]))


def context_read(plan: StepPlan) -> int:
    """Keys that attention reads: the context of each sequence, once."""
    return sum(start + n for start, n in zip(plan.starts, plan.num_tokens, strict=True))


def _non_negative_least_squares(samples: Sequence[tuple[tuple[float, ...], float]]) -> list[float]:
    """Minimize |Ax - b| over x >= 0, for a few columns: the best ordinary solution over all subsets of the columns."""
    width = len(samples[0][0])
    scale = [max(abs(row[i]) for row, _ in samples) or 1.0 for i in range(width)]
    best, best_error = [0.0] * width, math.inf
    for subset in range(1, 1 << width):
        columns = [i for i in range(width) if subset >> i & 1]
        x = _least_squares([([row[i] / scale[i] for i in columns], y) for row, y in samples])
        if x is None or min(x) < 0.0:
            continue
        full = [0.0] * width
        for i, value in zip(columns, x, strict=True):
            full[i] = value / scale[i]
        error = sum((sum(a * b for a, b in zip(row, full, strict=True)) - y) ** 2 for row, y in samples)
        if error < best_error:
            best, best_error = full, error
    return best


def _least_squares(samples: Sequence[tuple[list[float], float]]) -> list[float] | None:
    """Normal equations by Gaussian elimination with pivoting; None if the columns depend on each other."""
    n = len(samples[0][0])
    m = [[sum(row[i] * row[j] for row, _ in samples) for j in range(n)] + [sum(row[i] * y for row, y in samples)] for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(m[r][i]))
        if abs(m[pivot][i]) < 1e-9 * len(samples):
            return None
        m[i], m[pivot] = m[pivot], m[i]
        for r in range(n):
            if r != i:
                factor = m[r][i] / m[i][i]
                m[r] = [a - factor * b for a, b in zip(m[r], m[i], strict=True)]
    return [m[i][n] / m[i][i] for i in range(n)]


class SimulatedRequest(NamedTuple):
    """A request whose output is known."""

    new: EngineRequest
    outputs: tuple[tuple[int, ...], ...]  # [n] output tokens of each child
    seed: int = 0


def recorded_requests(trace: Trace) -> list[SimulatedRequest]:
    """The requests of a trace, with their output tokens.

    Two kinds are left out: requests aborted before their first token, and beam searches, because their steps depend on the model's
    probabilities. If an id was used several times, the later requests get a suffix, because under other settings they may run
    at the same time.
    """
    outputs: list[dict[int, list[int]]] = []  # by arrival: child -> tokens
    arrivals: list[tuple[EngineRequest, int]] = []
    latest: dict[str, int] = {}  # request id -> index of its latest arrival
    beam_searches: set[int] = set()
    for step in replay(trace):
        if step.mismatch is not None:
            raise InvalidInput(f"the trace does not replay: {step.mismatch}", "trace")
        if isinstance(step.event, Arrival):
            new = step.event.new
            if new.request_id in latest:
                new = dataclasses.replace(new, request_id=f"{new.request_id}/{len(arrivals)}")
            latest[step.event.new.request_id] = len(arrivals)
            arrivals.append((new, step.event.seed))
            outputs.append({})
        elif isinstance(step.event, BeamsChosen):
            beam_searches.add(latest[step.event.request_id])
        for update in step.updates:
            outputs[latest[update.request_id]].setdefault(update.index, []).extend(update.token_ids)
    requests = []
    for number, ((new, seed), got) in enumerate(zip(arrivals, outputs, strict=True)):
        children = tuple(tuple(got.get(i, ())) for i in range(new.params.n))
        if all(children) and number not in beam_searches:
            requests.append(SimulatedRequest(new, children, seed))
    return requests


def synthetic_requests(lengths: Iterable[tuple[int, int]], arrival_times: Iterable[float]) -> list[SimulatedRequest]:
    """Requests with these (prompt, output) lengths. No token occurs twice, so no two requests share a prefix."""
    requests, token = [], 0
    for i, ((prompt, output), arrival) in enumerate(zip(lengths, arrival_times, strict=True)):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        new = EngineRequest(f"r{i}", tuple(range(token, token + prompt)), params, arrival_time=arrival)
        token += prompt
        requests.append(SimulatedRequest(new, (tuple(range(token, token + output)),), seed=i))
        token += output
    return requests


class SimulatedStep(NamedTuple):
    """When the device computed a plan, and the scheduler's state after its update."""

    start: float
    end: float
    plan: StepPlan
    running: int
    waiting: int
    used_blocks: int


@dataclass(frozen=True)
class SimulationResult:
    """All steps of a simulation, and the times at which each sequence got its tokens."""

    config: SchedulerConfig
    steps: tuple[SimulatedStep, ...]
    arrivals: dict[str, float]  # arrival time of each request, by id
    token_times: dict[tuple[str, int], list[float]]  # (request id, child) -> time of each token
    refused: tuple[str, ...]  # ids of requests that can never fit under these settings
    num_preemptions: int
    cached_tokens: int  # prompt tokens found in the prefix cache

    @property
    def duration(self) -> float:
        """From the first arrival to the last token."""
        return max((step.end for step in self.steps), default=0.0) - min(self.arrivals.values(), default=0.0)

    def times_to_first_token(self) -> list[float]:
        return [times[0] - self.arrivals[request] for (request, _), times in self.token_times.items() if times]

    def inter_token_latencies(self) -> list[float]:
        """Times between two successive tokens of a sequence."""
        return [b - a for times in self.token_times.values() for a, b in itertools.pairwise(times)]

    def latencies(self) -> list[float]:
        return [times[-1] - self.arrivals[request] for (request, _), times in self.token_times.items() if times]

    @property
    def output_tokens(self) -> int:
        return sum(map(len, self.token_times.values()))

    @property
    def computed_tokens(self) -> int:
        return sum(step.plan.total_tokens for step in self.steps)


def nearest_rank(values: Sequence[float], p: float) -> float:
    """The p-th percentile by the nearest-rank method: the smallest value that is at least as large as p percent of all. NaN if none.

    The result is always one of the values. `benchmarks.statistics.percentile` interpolates between two of them.
    """
    return sorted(values)[max(0, math.ceil(len(values) * p / 100) - 1)] if values else math.nan


def simulate(config: SchedulerConfig, requests: Iterable[SimulatedRequest], cost: StepCost,
             policy: Policy | None = None) -> SimulationResult:
    """Serve the requests under these settings, with step times given by `cost`. `policy`: instead of the one that `config` names."""
    scheduler = Scheduler(config, policy)
    coming = deque(sorted(requests, key=lambda request: request.new.arrival_time))
    known: dict[str, tuple[tuple[int, ...], int]] = {}  # sequence id -> its output tokens, length of its prompt
    arrivals: dict[str, float] = {}
    times: dict[tuple[str, int], list[float]] = {}
    refused: list[str] = []
    steps: list[SimulatedStep] = []
    inflight: deque[tuple[StepPlan, float, float]] = deque()
    now = device_free = coming[0].new.arrival_time if coming else 0.0
    cached: dict[tuple[str, int], int] = {}
    while True:
        while coming and coming[0].new.arrival_time <= now:
            new, outputs, seed = coming.popleft()
            try:
                scheduler.add(new, seed)
            except InvalidInput:
                refused.append(new.request_id)
                continue
            arrivals[new.request_id] = new.arrival_time
            for i, tokens in enumerate(outputs):
                known[sequence_id(new.request_id, i, new.params.n)] = (tokens, len(new.prompt_token_ids))
                times[new.request_id, i] = []
        while len(inflight) <= config.planning_depth and (plan := scheduler.schedule(now)) is not None:
            now += cost.host
            start = max(now, device_free)
            device_free = start + cost.seconds(plan)
            inflight.append((plan, start, device_free))
        if inflight:
            plan, start, end = inflight.popleft()
            now = max(now, end)
            for update in scheduler.update(plan, *_result(plan, known), now):
                times[update.request_id, update.index].extend([now] * len(update.token_ids))
                cached[update.request_id, update.index] = update.num_cached_tokens
            stats = scheduler.stats()
            steps.append(SimulatedStep(start, end, plan, stats.num_running, stats.num_waiting, stats.num_used_blocks))
        elif coming:
            now = max(now, coming[0].new.arrival_time)
        else:
            break
    assert not scheduler.has_unfinished(), "nothing can be planned, but requests are unfinished"
    return SimulationResult(config, tuple(steps), arrivals, times, tuple(refused), scheduler.stats().num_preemptions, sum(cached.values()))


def _result(plan: StepPlan, known: dict[str, tuple[tuple[int, ...], int]]) -> tuple[StepResult, dict[int, Stop]]:
    """The known token of each sample, and a stop at each sequence's last token. A sample after the last token gets token 0."""
    tokens, stops = [], {}
    for i, (column, name) in enumerate(zip(plan.sample_from, plan.sample_ids, strict=True)):
        outputs, prompt = known[name]
        index = plan.starts[column] + plan.num_tokens[column] - prompt  # of the sampled token among the outputs
        tokens.append((outputs[index] if index < len(outputs) else 0,))
        if index == len(outputs) - 1:
            stops[i] = Stop(keep=1, matched="end of record")
    moves = tuple(move.move_id for move in (*plan.moves_in, *plan.moves_out))
    return StepResult(plan.step_id, tuple(tokens), finished_moves=moves), stops
