"""/metrics: names, counts and times."""
from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from minivllm.engine.metrics import EngineMetrics, EngineStats, LatencyHistogram
from minivllm.outputs import OutputDelta, RequestMetrics


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _delta(tokens: int, reason: str | None = None, index: int = 0, metrics: RequestMetrics | None = None) -> OutputDelta:
    return OutputDelta(request_id="r", index=index, token_ids=(7,) * tokens, text="", finish_reason=reason, metrics=metrics)  # type: ignore[arg-type]


def _samples(metrics: EngineMetrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            found[sample.name + "".join(f"[{v}]" for v in labels.values())] = sample.value
    return found


def test_latencies_are_measured_from_arrival_and_between_tokens() -> None:
    clock = Clock()
    metrics = EngineMetrics("m", clock)
    metrics.added("r", 1.0, prompt_tokens=10, n=2)
    clock.now = 3.0
    metrics.observe([_delta(1), _delta(1, index=1)], EngineStats())
    clock.now = 5.0
    metrics.observe([_delta(4), _delta(0, "abort", index=1)], EngineStats())
    clock.now = 9.0
    times = RequestMetrics(arrival_time=1.0, first_scheduled_time=1.5, first_token_time=2.5, finished_time=8.5)
    metrics.observe([_delta(1, "length", metrics=times)], EngineStats())
    found = _samples(metrics)
    assert found["minivllm:time_to_first_token_seconds_sum"] == 2.0
    assert found["minivllm:time_to_first_token_seconds_count"] == 1.0  # of the request, not of each child
    assert found["minivllm:inter_token_latency_seconds_count"] == 5.0
    assert found["minivllm:inter_token_latency_seconds_sum"] == 2.0 + 4.0
    assert found["minivllm:e2e_request_latency_seconds_sum"] == 4.0 + 8.0
    assert found["minivllm:request_queue_time_seconds_sum"] == 0.5
    assert found["minivllm:request_prefill_time_seconds_sum"] == 1.0
    assert found["minivllm:request_decode_time_seconds_sum"] == 6.0
    assert found["minivllm:prompt_tokens_total"] == 10.0
    assert found["minivllm:generation_tokens_total"] == 7.0
    assert found["minivllm:request_success_total[length]"] == 1.0
    assert found["minivllm:request_success_total[abort]"] == 1.0
    assert metrics._tracked == {}


def test_gauges_and_counters_show_the_latest_stats() -> None:
    metrics = EngineMetrics("m")
    metrics.observe([], EngineStats(
        num_running=3, num_waiting=4, num_blocks=10, used_blocks=5, prefix_cache_queries=100, prefix_cache_hits=64, num_preemptions=2,
    ))
    found = _samples(metrics)
    assert found["minivllm:num_requests_running"] == 3.0
    assert found["minivllm:num_requests_waiting"] == 4.0
    assert found["minivllm:kv_cache_usage_perc"] == 0.5
    assert found["minivllm:prefix_cache_queries_total"] == 100.0
    assert found["minivllm:prefix_cache_hits_total"] == 64.0
    assert found["minivllm:num_preemptions_total"] == 2.0


def test_a_refused_request_is_not_counted() -> None:
    metrics = EngineMetrics("m")
    metrics.added("r", 0.0, 10, 1)
    metrics.refused("r")
    metrics.observe([_delta(1, "stop")], EngineStats())
    assert metrics.generation_tokens == 0


def test_a_bucket_counts_values_up_to_and_including_its_bound() -> None:
    histogram = LatencyHistogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]


def test_every_metric_name_of_the_interface_is_there() -> None:
    found = _samples(EngineMetrics("m"))
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total", "prefix_cache_hits_total",
        "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total", "request_success_total[stop]",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count", "request_prefill_time_seconds_count", "request_decode_time_seconds_count",
    ):
        assert f"minivllm:{name}" in found


def test_single_tokens_of_several_requests_in_one_step_are_all_counted_with_their_own_gaps() -> None:
    clock = Clock()
    metrics = EngineMetrics("m", clock)
    for name in "abc":
        metrics.added(name, 0.0, prompt_tokens=1, n=1)

    def step(at: float, names: str) -> None:
        clock.now = at
        metrics.observe([OutputDelta(name, 0, (7,), "") for name in names], EngineStats())

    step(1.0, "ab")
    step(2.0, "c")
    step(4.0, "abc")  # gaps of 3, 3 and 2 s
    step(4.5, "a")
    assert metrics.generation_tokens == 7
    assert metrics.inter_token_latency.total == 3.0 + 3.0 + 2.0 + 0.5
    assert sum(metrics.inter_token_latency.counts) == 4
