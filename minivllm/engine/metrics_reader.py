"""The metrics of an engine as plain objects: what `LLM.get_metrics` returns (vLLM's shapes)."""
from __future__ import annotations

from dataclasses import dataclass

from minivllm.engine.metrics import PER_POSITION, EngineMetrics, LatencyHistogram


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric with one set of labels. `name` has the prefix `minivllm:`."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass(frozen=True, slots=True)
class Gauge(Metric):
    """A number that goes up and down."""

    value: float


@dataclass(frozen=True, slots=True)
class Vector(Metric):
    """One counter per position, for the acceptance of drafts."""

    values: list[int]


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """buckets: upper limit -> number of values up to it. The bucket "+Inf" has all `count` values."""

    count: int
    sum: float
    buckets: dict[str, int]


def read_metrics(metrics: EngineMetrics) -> list[Metric]:
    """The current values of all metrics."""
    found: list[Metric] = []
    for kind, name, _, samples in metrics.families():
        if name == PER_POSITION:
            counts = [int(value) for _, value in samples if not isinstance(value, LatencyHistogram)]
            found.append(Vector(f"minivllm:{name}", {"model_name": metrics.model}, counts))
            continue
        for labels, value in samples:
            key, labels = f"minivllm:{name}", {"model_name": metrics.model, **labels}
            if isinstance(value, LatencyHistogram):
                buckets = {bound: int(count) for bound, count in value.cumulative()}
                found.append(Histogram(key, labels, buckets["+Inf"], value.total, buckets))
            else:
                found.append(Counter(key, labels, int(value)) if kind == "counter" else Gauge(key, labels, value))
    return found
