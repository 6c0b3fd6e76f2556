"""Computes throughput, latencies with percentiles, and goodput from outcomes: as a table, and as JSON with vLLM's key names.

    TTFT   time to first token        start ──▶ first event
    TPOT   time per output token      (last event - first event) / (tokens - 1), one value per request
    ITL    inter-token latency        between consecutive events, one value per event
    E2EL   end to end latency         start ──▶ last event
"""
from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minivllm import __version__
from minivllm.benchmarks.outcome import RequestOutcome
from minivllm.benchmarks.statistics import percentile
from minivllm.errors import InvalidInput, nearest

METRICS = {"ttft": "Time to first token", "tpot": "Time per output token", "itl": "Inter-token latency", "e2el": "End-to-end latency"}


@dataclass(frozen=True, slots=True)
class Latencies:
    """The latencies of one successful request, in ms."""

    ttft: float | None
    tpot: float | None
    itl: tuple[float, ...]
    e2el: float

    @classmethod
    def of(cls, outcome: RequestOutcome) -> Latencies:
        times, tokens = outcome.times, outcome.tokens
        ttft = 1e3 * (times[0] - outcome.start) if times else None
        tpot = 1e3 * (times[-1] - times[0]) / (tokens - 1) if times and tokens > 1 else None
        gaps = tuple(1e3 * (after - before) for before, after in pairwise(times))
        return cls(ttft, tpot, gaps, 1e3 * (outcome.end - outcome.start))

    def value(self, metric: str) -> float | None:
        """The value that an objective limits. For ITL it is the longest gap, the worst stall of a stream."""
        if metric == "itl":
            return max(self.itl, default=None)
        value: float | None = getattr(self, metric)
        return value

    def meets(self, objectives: Mapping[str, float]) -> bool:
        """Whether all objectives are met. A metric that a request does not have (the ITL of a single token) is met."""
        return all((value := self.value(metric)) is None or value <= limit for metric, limit in objectives.items())


def read_objectives(pairs: Sequence[str]) -> dict[str, float]:
    """["ttft:500", "itl:50"] -> limits in ms."""
    limits = {}
    for pair in pairs:
        name, colon, value = pair.partition(":")
        name = {"e2e": "e2el"}.get(name, name)
        if name not in METRICS:
            raise InvalidInput(f"goodput must be among {', '.join(METRICS)}, got {name!r}{nearest(name, METRICS)}", "goodput")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if not colon or not limits[name] > 0:
            raise InvalidInput(f"goodput objectives are written NAME:MILLISECONDS, such as ttft:500; got {pair!r}", "goodput")
    return limits


def summarize(
    begin: float, outcomes: Sequence[RequestOutcome], *, metrics: Sequence[str], percentiles: Sequence[float],
    objectives: Mapping[str, float], prompt_tokens: Sequence[int],
) -> dict[str, Any]:
    """All figures of a run. `prompt_tokens`: those of each request, for servers that do not count them."""
    successful = [o for o in outcomes if o.error is None]
    if not successful:
        raise InvalidInput(f"no request succeeded: {outcomes[0].error}")
    latencies = [Latencies.of(o) for o in successful]
    duration = max(o.end for o in outcomes) - begin
    inputs = sum(p if o.prompt_tokens is None else o.prompt_tokens for o, p in zip(outcomes, prompt_tokens, strict=True) if o.error is None)
    tokens = sum(o.tokens for o in successful)
    result: dict[str, Any] = {
        "duration": duration, "completed": len(successful), "failed": len(outcomes) - len(successful),
        "total_input_tokens": inputs, "total_output_tokens": tokens,
        "request_throughput": len(successful) / duration, "output_throughput": tokens / duration,
        "total_token_throughput": (inputs + tokens) / duration, "events": sum(len(o.times) for o in successful),
    }
    if objectives:
        result["request_goodput"] = sum(latency.meets(objectives) for latency in latencies) / duration
        result["goodput_objectives_ms"] = dict(objectives)
    for metric in metrics:
        values = _values(latencies, metric)
        if values:
            result |= _figures(metric, values, percentiles)
    return result


def _values(latencies: Sequence[Latencies], metric: str) -> list[float]:
    if metric == "itl":
        return [gap for latency in latencies for gap in latency.itl]
    return [value for latency in latencies if (value := latency.value(metric)) is not None]


def _figures(metric: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    values = sorted(values)
    mean = sum(values) / len(values)
    figures = {f"mean_{metric}_ms": mean, f"median_{metric}_ms": percentile(values, 50.0),
               f"std_{metric}_ms": (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5}
    return figures | {f"p{q:g}_{metric}_ms": percentile(values, q) for q in percentiles}


def table(result: Mapping[str, Any], percentiles: Sequence[float]) -> str:
    """The figures as a table."""
    rows: list[tuple[str, str]] = [
        ("Successful requests", str(result["completed"])), ("Failed requests", str(result["failed"])),
        ("Benchmark duration (s)", f"{result['duration']:.2f}"),
        ("Total input tokens", str(result["total_input_tokens"])), ("Total generated tokens", str(result["total_output_tokens"])),
        ("Request throughput (req/s)", f"{result['request_throughput']:.2f}"),
    ]
    if "request_goodput" in result:
        rows.append(("Request goodput (req/s)", f"{result['request_goodput']:.2f}"))
    rows += [("Output token throughput (tok/s)", f"{result['output_throughput']:.2f}"),
             ("Total token throughput (tok/s)", f"{result['total_token_throughput']:.2f}")]
    lines = [" Serving benchmark ".center(56, "=")] + [f"{name + ':':<40}{value:>16}" for name, value in rows]
    for metric, title in METRICS.items():
        if f"mean_{metric}_ms" not in result:
            continue
        lines.append(f" {title} ({metric.upper()}) ".center(56, "-"))
        for name in ("mean", "median", *(f"p{q:g}" for q in percentiles)):
            label = f"{name[0].upper() + name[1:]} {metric.upper()} (ms):"
            lines.append(f"{label:<40}{result[f'{name}_{metric}_ms']:>16.2f}")
    return "\n".join([*lines, "=" * 56])


def details(begin: float, outcomes: Sequence[RequestOutcome]) -> dict[str, Any]:
    """Values of each request, in seconds, for later analysis."""
    return {
        "start_times": [o.start - begin for o in outcomes], "input_lens": [o.prompt_tokens for o in outcomes],
        "output_lens": [o.tokens for o in outcomes], "errors": [o.error or "" for o in outcomes],
        "ttfts": [o.times[0] - o.start if o.times else None for o in outcomes],
        "itls": [[after - before for before, after in pairwise(o.times)] for o in outcomes],
    }


def client_info() -> dict[str, Any]:
    """The date, and the client's version and machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "client": f"minivllm {__version__}",
        "client_machine": {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
    }
