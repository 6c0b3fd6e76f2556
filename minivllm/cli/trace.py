"""`minivllm trace FILE`: summarize a recorded run, replay it, compare settings. Needs no model and no GPU.

    minivllm trace run.jsonl                                            batch over time, tokens by kind, block use, waste
    minivllm trace run.jsonl --replay                                   check that all plans are exactly the same
    minivllm trace run.jsonl --compare max_num_batched_tokens=256       the same requests under another setting
    minivllm trace --synthetic 200 --rate 60 --compare num_blocks=300   generated requests, which a smaller cache preempts
"""
from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minivllm.cli.numbers import whole_number
from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.simulate import (
    SimulatedRequest,
    SimulationResult,
    StepCost,
    nearest_rank,
    recorded_requests,
    simulate,
    synthetic_requests,
)
from minivllm.core.trace import Arrival, Planned, Trace, read, replay
from minivllm.core.trace_summary import StepRecord, Summary, summarize
from minivllm.errors import InvalidInput, nearest

BUCKETS = 12  # rows of the table over time
SYNTHETIC = SchedulerConfig(num_blocks=1024, max_model_len=2048)
SETTINGS = [f for f in dataclasses.fields(SchedulerConfig) if f.name not in ("kv_windows", "eos_token_ids")]  # tuples cannot be set


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("trace", help="summarize a recorded run, replay it, compare settings",
                                 description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", metavar="FILE", help="file that --trace FILE has recorded")
    parser.add_argument("--replay", action="store_true", help="only check that a replay gives the same plans")
    parser.add_argument("--compare", nargs="+", action="append", metavar="KEY=VALUE",
                        help="also simulate with these settings; may be given several times")
    parser.add_argument("--step-cost", metavar="BASE,TOKEN,CONTEXT[,HOST]",
                        help="cost of a step in seconds. BASE: per step; TOKEN: per computed token; CONTEXT: per key that attention reads; "
                             "HOST: CPU time of scheduling, which overlaps the device's time with planning_depth=1 (default: fitted to "
                             "the step times in FILE)")
    parser.add_argument("--synthetic", type=int, metavar="N", help="instead of FILE: generate N requests with ShareGPT-like lengths")
    parser.add_argument("--rate", type=float, default=10.0, metavar="R", help="synthetic requests per second (default: 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the synthetic requests (default: 0)")


def run(args: argparse.Namespace) -> int:
    if (args.file is None) == (args.synthetic is None):
        raise InvalidInput("give either a trace file or --synthetic N", "file")
    if args.synthetic is not None:
        if args.replay:
            raise InvalidInput("--replay needs a trace file", "replay")
        work = _synthetic(args.synthetic, args.rate, args.seed)
        return _compare(SYNTHETIC, work, _cost(args.step_cost, StepCost), args.compare or [], base="as it is")
    trace = read(args.file)
    if trace.cut_off:
        print("the last line is incomplete and ignored: the process was killed while writing it\n")
    if args.replay:
        return _replay(trace)
    if args.compare:
        work = recorded_requests(trace)
        left_out = sum(isinstance(event, Arrival) for event in trace.events) - len(work)
        if left_out:
            print(f"{left_out} requests are ignored: they are beam searches or were aborted before their first token")
        return _compare(trace.config, work, _cost(args.step_cost, lambda: StepCost.fit(trace)), args.compare)
    return _summary(summarize(trace))


# -- replay ----------------------------------------------------------------------------------------------------------------


def _replay(trace: Trace) -> int:
    plans = 0
    for step in replay(trace):
        if step.mismatch is not None:
            print(f"after {plans} equal plans the replay differs: {step.mismatch}")
            return 1
        plans += isinstance(step.event, Planned) and step.event.plan is not None
    print(f"{len(trace.events)} events replayed, {plans} plans, all equal")
    return 0


# -- summary ---------------------------------------------------------------------------------------------------------------


def _summary(summary: Summary) -> int:
    config, kinds = summary.trace.config, summary.kinds
    last = summary.steps[-1].stats if summary.steps else None
    if summary.trace.about:
        print("engine      " + ", ".join(f"{key} {value}" for key, value in summary.trace.about.items()))
    print("settings    " + ", ".join(f"{f.name}={getattr(config, f.name)}" for f in SETTINGS if getattr(config, f.name) != f.default))
    endings = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.finish_reasons.items())) or "none"
    print(f"requests    {summary.num_requests}; finished sequences: {endings}")
    if last is not None:
        total = sum(kinds)
        print(f"steps       {len(summary.steps)} in {summary.duration:.3f} s, {total / len(summary.steps):.1f} tokens each")
        print(f"tokens      {total} computed: {kinds.prompt} prompt, {kinds.output} output, {kinds.recomputed} recomputed; "
              f"{summary.num_tokens_kept} returned")
        print(f"prefix      {last.prefix_hits} of {last.prefix_queries} tokens found in the cache")
        print(f"preemptions {last.num_preemptions}, of which {last.num_swaps} swapped out to host memory")
        maximum = max(step.stats.num_used_blocks for step in summary.steps)
        print(f"blocks      at most {maximum} of {last.num_blocks} used; "
              f"on average {summary.waste:.1%} of the slots in used blocks were empty")
        print()
        _print_over_time(summary.steps)
    if summary.mismatch is not None:
        print(f"\nthe rest cannot be replayed with this version: {summary.mismatch}")
        return 1
    return 0


def _print_over_time(steps: Sequence[StepRecord]) -> None:
    heads = ("from, s", "steps", "running", "waiting", "prompt/step", "output/step", "recomp./step", "blocks used")
    print("{:>9} {:>6} {:>8} {:>8} {:>12} {:>12} {:>13} {:>12}".format(*heads))
    for start, bucket in _buckets(steps):
        n = len(bucket)

        def mean(of: Callable[[StepRecord], float], bucket: Sequence[StepRecord] = bucket) -> float:
            return sum(map(of, bucket)) / len(bucket)

        print(f"{start:9.3f} {n:6d} {mean(lambda s: s.stats.num_running):8.1f} {mean(lambda s: s.stats.num_waiting):8.1f} "
              f"{mean(lambda s: s.kinds.prompt):12.1f} {mean(lambda s: s.kinds.output):12.1f} {mean(lambda s: s.kinds.recomputed):13.1f} "
              f"{mean(lambda s: s.stats.kv_usage):12.1%}")


def _buckets(steps: Sequence[StepRecord]) -> Iterator[tuple[float, list[StepRecord]]]:
    """Steps in equal intervals of time. Intervals without a step are left out."""
    first = steps[0].planned_at
    span = (steps[-1].planned_at - first) / BUCKETS or 1.0
    for i in range(BUCKETS):
        inside = [s for s in steps if min(int((s.planned_at - first) / span), BUCKETS - 1) == i]
        if inside:
            yield i * span, inside


# -- comparison ------------------------------------------------------------------------------------------------------------


def _compare(config: SchedulerConfig, work: Sequence[SimulatedRequest], cost: StepCost, changes: Sequence[Sequence[str]],
             base: str = "recorded") -> int:
    if not work:
        raise InvalidInput("no request in this trace has a token, so there is nothing to compare", "file")
    columns = [(base, config)]
    columns += [(" ".join(change), dataclasses.replace(config, **dict(map(_setting, change)))) for change in changes]
    print(f"simulated: {len(work)} requests; a step takes {cost.base * 1e3:.4g} ms + {cost.per_token * 1e6:.4g} us per token "
          f"+ {cost.per_context * 1e9:.4g} ns per key read, and {cost.host * 1e3:.4g} ms of the CPU\n")
    outcomes = [simulate(c, work, cost) for _, c in columns]
    width = max(12, *(len(name) for name, _ in columns)) + 2
    print(f"{'':34}" + "".join(f"{name:>{width}}" for name, _ in columns))
    for label, figure in _FIGURES:
        print(f"{label:34}" + "".join(f"{figure(outcome):>{width}}" for outcome in outcomes))
    return 0


def _ms(values: Sequence[float], p: float) -> str:
    return f"{nearest_rank(values, p) * 1e3:.1f}"


_FIGURES: tuple[tuple[str, Callable[[SimulationResult], str]], ...] = (
    ("duration, s", lambda o: f"{o.duration:.3f}"),
    ("output tokens per second", lambda o: f"{o.output_tokens / o.duration:.1f}" if o.duration else "-"),
    ("steps", lambda o: str(len(o.steps))),
    ("tokens computed", lambda o: str(o.computed_tokens)),
    ("tokens per step", lambda o: f"{o.computed_tokens / max(1, len(o.steps)):.1f}"),
    ("prompt tokens found in the cache", lambda o: str(o.cached_tokens)),
    ("preemptions", lambda o: str(o.num_preemptions)),
    ("maximum number of blocks used", lambda o: str(max((s.used_blocks for s in o.steps), default=0))),
    ("time to first token, median, ms", lambda o: _ms(o.times_to_first_token(), 50)),
    ("time to first token, 99%, ms", lambda o: _ms(o.times_to_first_token(), 99)),
    ("between tokens, median, ms", lambda o: _ms(o.inter_token_latencies(), 50)),
    ("between tokens, 99%, ms", lambda o: _ms(o.inter_token_latencies(), 99)),
    ("between tokens, longest, ms", lambda o: _ms(o.inter_token_latencies(), 100)),
    ("whole request, median, ms", lambda o: _ms(o.latencies(), 50)),
    ("requests refused", lambda o: str(len(o.refused))),
)


def _setting(text: str) -> tuple[str, Any]:
    """A scheduler setting from `key=value`."""
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    field = next((f for f in SETTINGS if f.name == name), None)
    if not equals or field is None:
        hint = nearest(name, [f.name for f in SETTINGS])
        raise InvalidInput(f"{text!r} is not KEY=VALUE with a setting of the scheduler{hint}", "compare")
    kind = str(field.type)
    try:
        if kind == "bool":
            return name, {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[value.lower()]
        if kind == "int | None" and value.lower() == "none":
            return name, None
        parse: Callable[[str], Any] = whole_number if kind.startswith("int") else {"float": float, "str": str}[kind]
        return name, parse(value)
    except (KeyError, ValueError, argparse.ArgumentTypeError):
        raise InvalidInput(f"{name} is of type {kind}, got {value!r}", "compare") from None


def _cost(text: str | None, default: Callable[[], StepCost]) -> StepCost:
    if text is None:
        return default()
    try:
        base, per_token, per_context, *host = (float(part) for part in text.split(","))
        if len(host) > 1 or min(base, per_token, per_context, *host) < 0.0:
            raise ValueError
    except ValueError:
        raise InvalidInput(f"--step-cost must be 3 or 4 non-negative numbers of seconds such as 0.0015,4e-6,3e-8, got {text!r}",
                           "step_cost") from None
    return StepCost(base, per_token, per_context, host=host[0] if host else 0.0)


def _synthetic(count: int, rate: float, seed: int) -> list[SimulatedRequest]:
    """ShareGPT-like lengths, and exponential gaps between arrivals (a Poisson process)."""
    from minivllm.planning.allocator_replay import sharegpt_like

    if count < 1 or not rate > 0.0:
        raise InvalidInput(f"--synthetic and --rate must be above 0, got {count} and {rate:g}", "synthetic")
    dice, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += dice.expovariate(rate)
    return synthetic_requests([(job.prompt, job.output) for job in sharegpt_like(count, seed=seed)], times)
