"""Metrics of an engine, under vLLM's names with the prefix `minivllm:`.

They have two sources: `EngineStats`, gauges and counters that the engine reports after each step, and the deltas of the requests, from
which `EngineMetrics` makes latency histograms in the client's process. The engine does not use prometheus.
Times are readings of `time.monotonic`, which is one clock for all processes of a machine.
"""
from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minivllm.outputs import DraftCounts, OutputDelta

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges, and counters since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0  # usable ones: without the null block
    used_blocks: int = 0  # held by requests
    cached_blocks: int = 0  # evictable: no request holds them, but their content can still be shared
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    num_preemptions: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    drafts: DraftCounts | None = None  # None: no speculative decoding

    @property
    def kv_cache_usage(self) -> float:
        return self.used_blocks / self.num_blocks if self.num_blocks else 0.0

    @classmethod
    def total(cls, engines: Collection[EngineStats]) -> EngineStats:
        """The sums over several engines."""
        if len(engines) == 1:
            return next(iter(engines))
        drafts = [stats.drafts for stats in engines if stats.drafts is not None]
        sums = {name: sum(getattr(stats, name) for stats in engines) for name in cls.__dataclass_fields__ if name != "drafts"}
        return cls(**sums, drafts=sum(drafts[1:], drafts[0]) if drafts else None)


_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0, 160.0, 640.0,
)


PER_POSITION = "spec_decode_num_accepted_tokens_per_pos"


class LatencyHistogram:
    """Counts per bucket. `observe` may run for every token of every stream, so it must be cheap: a bisection and two additions."""

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last one counts values above every bound
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' form: for each bound, the number of values up to it."""
        rows, so_far = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            so_far += count
            rows.append((bound, float(so_far)))
        return rows


# Kind, name, help and value of what an engine reports.
_OF_ENGINES: tuple[tuple[str, str, str, Callable[[EngineStats], float]], ...] = (
    ("gauge", "num_requests_running", "Requests in the running batch.", lambda stats: stats.num_running),
    ("gauge", "num_requests_waiting", "Requests in the queue, preempted ones included.", lambda stats: stats.num_waiting),
    ("gauge", "kv_cache_usage_perc", "Fraction of KV blocks held by requests; 1 is full.", lambda stats: stats.kv_cache_usage),
    ("counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda stats: stats.prefix_cache_queries),
    ("counter", "prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda stats: stats.prefix_cache_hits),
    ("counter", "num_preemptions", "Preemptions of running requests.", lambda stats: stats.num_preemptions),
    ("counter", "engine_steps", "Steps of the engine.", lambda stats: stats.num_steps),
    ("counter", "engine_failed_steps", "Steps that failed. Their requests ended with an error.", lambda stats: stats.num_failed_steps),
)
_OF_REPLICAS = ("Replicas that there should be.", "Replicas that take requests.")
_OF_DRAFTS: tuple[tuple[str, str, Callable[[DraftCounts], float]], ...] = (
    ("spec_decode_num_drafts", "Steps of a sequence that verified drafts.", lambda counts: counts.num_steps),
    ("spec_decode_num_draft_tokens", "Drafts verified.", lambda counts: counts.num_drafts),
    ("spec_decode_num_accepted_tokens", "Drafts accepted.", lambda counts: counts.num_accepted),
)


@dataclass(slots=True)
class _Tracked:
    """An unfinished request, as the client sees it."""

    arrival: float
    prompt_tokens: int
    open_children: int
    last: dict[int, float]  # child -> time of its last token


class EngineMetrics:
    """The metrics of one engine, or of several replicas. One thread at a time calls its methods.

    What the engines report has the label `engine` if there are several: the number of the replica. What is measured here has no such label.
    """

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic, num_engines: int = 1) -> None:
        self.model = model
        self._clock = clock
        self._stats = [EngineStats()] * num_engines
        self._tracked: dict[str, _Tracked] = {}
        self.replicas: tuple[int, int] | None = None  # how many there should be, and how many live; None: an engine without replicas
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.time_to_first_token = LatencyHistogram()
        self.inter_token_latency = LatencyHistogram()
        self.e2e_latency = LatencyHistogram()
        self.queue_time = LatencyHistogram()
        self.prefill_time = LatencyHistogram()
        self.decode_time = LatencyHistogram()

    def added(self, request_id: str, arrival: float, prompt_tokens: int, n: int) -> None:
        self._tracked[request_id] = _Tracked(arrival, prompt_tokens, n, {})

    def refused(self, request_id: str) -> None:
        self._tracked.pop(request_id, None)

    def failed(self, request_id: str) -> None:
        """A request ends with an error, if it has not ended."""
        if (tracked := self._tracked.pop(request_id, None)) is not None:
            self.finished["error"] += tracked.open_children

    def engine_ended(self) -> None:
        """Counters of the next engine's stats start at 0, which Prometheus understands."""
        self._stats = [EngineStats()] * len(self._stats)

    def observe(self, deltas: Sequence[OutputDelta], stats: EngineStats, engine: int = 0) -> None:
        """Count the deltas of one step of an engine, which have just arrived."""
        self._stats[engine] = stats
        now = self._clock()
        gaps: dict[float, int] = {}  # time of the last token -> number of streams: few different times, so few observations
        for delta in deltas:
            tracked = self._tracked.get(delta.request_id)
            if tracked is None:
                continue
            last = tracked.last.get(delta.index)
            if last is not None and delta.finish_reason is None and len(delta.token_ids) == 1:
                gaps[last] = gaps.get(last, 0) + 1
                tracked.last[delta.index] = now
                continue
            try:
                self._delta(tracked, delta, now)
            except Exception:  # the figures of one request are wrong then, and its deltas still arrive
                log.exception("request %s is no longer measured because of a bug", delta.request_id)
                self._tracked.pop(delta.request_id, None)
        for last, count in gaps.items():
            self.inter_token_latency.observe(now - last, count)
            self.generation_tokens += count

    def _delta(self, tracked: _Tracked, delta: OutputDelta, now: float) -> None:
        if delta.token_ids:
            count = len(delta.token_ids)
            last = tracked.last.get(delta.index)
            if not tracked.last:
                self.time_to_first_token.observe(now - tracked.arrival)
                self.prompt_tokens += tracked.prompt_tokens
            if last is not None:
                self.inter_token_latency.observe((now - last) / count, count)
            tracked.last[delta.index] = now
            self.generation_tokens += count
        if delta.finish_reason is None:
            return
        self.finished[delta.finish_reason] += 1
        self.e2e_latency.observe(now - tracked.arrival)
        times = delta.metrics
        if times is not None and times.first_scheduled_time is not None:
            self.queue_time.observe(times.first_scheduled_time - times.arrival_time)
            if times.first_token_time is not None:
                self.prefill_time.observe(times.first_token_time - times.first_scheduled_time)
                if times.finished_time is not None:
                    self.decode_time.observe(times.finished_time - times.first_token_time)
        tracked.open_children -= 1
        if tracked.open_children == 0:
            del self._tracked[delta.request_id]

    # -- output ------------------------------------------------------------------------------------------------------

    def families(self) -> Iterator[tuple[str, str, str, list[tuple[dict[str, str], float | LatencyHistogram]]]]:
        """(kind, name, help, samples) of every metric."""
        labels = [{"engine": str(number)} if len(self._stats) > 1 else {} for number in range(len(self._stats))]
        for kind, name, text, value_of in _OF_ENGINES:
            yield kind, name, text, [(label, value_of(stats)) for label, stats in zip(labels, self._stats, strict=True)]
        for name, text, number in zip(("num_replicas_wanted", "num_replicas_live"), _OF_REPLICAS, self.replicas or (), strict=False):
            yield "gauge", name, text, [({}, number)]
        for name, text, value in (("prompt_tokens", "Prompt tokens processed.", self.prompt_tokens),
                                  ("generation_tokens", "Tokens generated.", self.generation_tokens)):
            yield "counter", name, text, [({}, value)]
        with_drafts = [(label, stats.drafts) for label, stats in zip(labels, self._stats, strict=True) if stats.drafts is not None]
        if with_drafts:
            yield from _of_drafts(with_drafts)
        ends: list[tuple[dict[str, str], float | LatencyHistogram]] = [
            ({"finished_reason": reason}, count) for reason, count in self.finished.items()
        ]
        yield "counter", "request_success", "Finished completions, by reason.", ends
        histograms: list[tuple[str, str, LatencyHistogram]] = [
            ("time_to_first_token_seconds", "Time from arrival to the first token.", self.time_to_first_token),
            ("inter_token_latency_seconds", "Time between two tokens of a stream.", self.inter_token_latency),
            ("e2e_request_latency_seconds", "Time from arrival to the end.", self.e2e_latency),
            ("request_queue_time_seconds", "Time from arrival to the first step.", self.queue_time),
            ("request_prefill_time_seconds", "Time from the first step to the first token.", self.prefill_time),
            ("request_decode_time_seconds", "Time from the first token to the last one.", self.decode_time),
        ]
        for name, text, histogram in histograms:
            yield "histogram", name, text, [({}, histogram)]

    def render(self) -> bytes:
        """The text of `/metrics`, in the format that Prometheus reads."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(_collector(self))
        return generate_latest(registry)


def _of_drafts(engines: list[tuple[dict[str, str], DraftCounts]]) -> Iterator[
        tuple[str, str, str, list[tuple[dict[str, str], float | LatencyHistogram]]]]:
    """vLLM's metrics of speculative decoding; see `EngineMetrics.families`. engines: labels and counts of each."""
    for name, text, value_of in _OF_DRAFTS:
        yield "counter", name, text, [(label, value_of(counts)) for label, counts in engines]
    yield "counter", PER_POSITION, "Drafts accepted, by position.", [
        ({**label, "position": str(i)}, count) for label, counts in engines for i, count in enumerate(counts.accepted_per_position or [0])]


def _collector(metrics: EngineMetrics) -> Collector:
    """An adapter to prometheus_client. It is imported here, so that only `/metrics` needs that package."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector

    makers = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}

    class EngineCollector(Collector):
        def collect(self) -> Iterator[Metric]:
            for kind, name, text, samples in metrics.families():
                labels = ["model_name", *samples[0][0]]
                family = makers[kind](f"minivllm:{name}", text, labels=labels)
                for extra, value in samples:
                    names = [metrics.model, *extra.values()]
                    if isinstance(value, LatencyHistogram):
                        family.add_metric(names, buckets=value.cumulative(), sum_value=value.total)
                    else:
                        family.add_metric(names, value)
                yield family

    return EngineCollector()
