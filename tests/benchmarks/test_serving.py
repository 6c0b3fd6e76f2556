"""A serving benchmark's requests, their arrival times, and the figures from their outcomes."""
from __future__ import annotations

import json
import math
import random
from array import array
from itertools import pairwise
from pathlib import Path

import pytest

from minivllm.benchmarks import workloads
from minivllm.benchmarks.outcome import RequestOutcome
from minivllm.benchmarks.report import Latencies, read_objectives, summarize
from minivllm.benchmarks.serving import LengthDistribution, ServingRequest, arrivals, nano_requests, random_requests, trace_requests
from minivllm.errors import InvalidInput


def test_lengths_are_fixed_uniform_in_their_range_or_log_normal() -> None:
    rng = random.Random(0)
    assert {LengthDistribution(middle=64).draw(rng) for _ in range(50)} == {64}
    ranged = [LengthDistribution(middle=100, ratio=0.2).draw(rng) for _ in range(2000)]
    assert (min(ranged), max(ranged)) == (80, 120)
    logs = sorted(LengthDistribution(middle=100, sigma=0.5).draw(rng) for _ in range(4000))
    assert 95 < logs[2000] < 105
    assert 0.45 < math.log(logs[int(4000 * 0.8413)] / logs[2000]) < 0.55  # one sigma above


def test_random_prompts_share_only_their_prefix_and_depend_only_on_the_seed() -> None:
    requests = random_requests(5, LengthDistribution(middle=20), LengthDistribution(middle=3), seed=7, prefix_len=10, last_id=300)
    assert len({request.prompt[:10] for request in requests}) == 1
    assert len({request.prompt[10:] for request in requests}) == 5
    assert all(len(request.prompt) == 30 and request.output_len == 3 for request in requests)
    assert all(isinstance(t, int) and t <= 300 for request in requests for t in request.prompt)
    assert requests == random_requests(5, LengthDistribution(middle=20), LengthDistribution(middle=3), seed=7, prefix_len=10, last_id=300)
    assert requests != random_requests(5, LengthDistribution(middle=20), LengthDistribution(middle=3), seed=8, prefix_len=10, last_id=300)


def test_text_prompts_have_the_given_number_of_words() -> None:
    [request] = random_requests(1, LengthDistribution(middle=20), LengthDistribution(middle=3), seed=0, prefix_len=5, text=True)
    assert isinstance(request.prompt, str)
    assert len(request.prompt.split()) == 25


def test_the_nano_dataset_is_the_nano_workload() -> None:
    requests = nano_requests(None, 0)
    assert sum(request.output_len for request in requests) == 133_966
    assert [request.prompt for request in requests] == [request.prompt_token_ids for request in workloads.nano()]


def test_arrivals_have_the_given_rate_and_burstiness_changes_only_their_spread() -> None:
    requests = [ServingRequest((1,), 1)] * 4000
    spreads = []
    for burstiness in (0.25, 1.0, 16.0):
        due = arrivals(requests, 10.0, burstiness, seed=3)
        gaps = [after - before for before, after in pairwise(due)]
        mean = sum(gaps) / len(gaps)
        assert due[0] == 0.0 and 0.09 < mean < 0.11
        spreads.append((sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean)
    assert spreads == [pytest.approx(2.0, rel=0.1), pytest.approx(1.0, rel=0.1), pytest.approx(0.25, rel=0.1)]


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_trace_keeps_its_times_in_order(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"timestamp": 9500, "prompt": "later", "output_length": 5}, "",
                 {"timestamp": 8000, "prompt": [1, 2, 3], "output_length": 2})
    requests = trace_requests(file, None, seed=0)
    assert requests == [ServingRequest((1, 2, 3), 2, 0.0), ServingRequest("later", 5, 1.5)]
    assert arrivals(requests, math.inf, 1.0, 0) == [0.0, 1.5]


def test_equal_hash_ids_of_a_trace_are_equal_tokens(tmp_path: Path) -> None:
    lines = [{"input_length": 700, "output_length": 1, "hash_ids": [5, 6]}, {"input_length": 1500, "output_length": 1, "hash_ids": [5, 7]}]
    first, second = (request.prompt for request in trace_requests(write(tmp_path / "t.jsonl", *lines), None, seed=0))
    assert (len(first), len(second)) == (700, 1500)
    assert first[:512] == second[:512] and first[512:700] != second[512:700]


@pytest.mark.parametrize(("line", "message"), [
    ("{", "not JSON"), ("[]", "not an object"), ({"input_length": 3}, "output_length is missing"),
    ({"input_length": 0, "output_length": 1}, "input_length"), ({"prompt": [], "output_length": 1}, "prompt"),
    ({"input_length": 3, "output_length": 1, "timestamp": "now"}, "timestamp"),
])
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=rf"line 2.*{message}"):
        trace_requests(write(tmp_path / "t.jsonl", {"input_length": 3, "output_length": 1}, line), None, seed=0)


def outcome(start: float, *times: float, tokens: int | None = None, error: str | None = None) -> RequestOutcome:
    return RequestOutcome(start, times[-1] if times else start + 1, array("d", times), 10, tokens, error)


def test_latencies_follow_their_definitions() -> None:
    latency = Latencies.of(outcome(1.0, 1.5, 1.6, 2.0, tokens=6))
    assert (latency.ttft, latency.tpot, latency.e2el) == (500.0, pytest.approx(100.0), 1000.0)
    assert latency.itl == (pytest.approx(100.0), pytest.approx(400.0))


def test_a_request_must_meet_all_objectives_and_itl_is_its_longest_gap() -> None:
    latency = Latencies.of(outcome(1.0, 1.5, 1.6, 2.0, tokens=6))
    assert latency.meets(read_objectives(["ttft:500", "tpot:101", "itl:401", "e2e:1000"]))
    assert not latency.meets(read_objectives(["ttft:499"]))
    assert not latency.meets(read_objectives(["ttft:500", "itl:399"]))


@pytest.mark.parametrize("pair", ["ttft", "ttft:", "ttft:fast", "ttft:-1", "tftt:5", ":5", "ttft:nan"])
def test_a_wrong_objective_is_refused(pair: str) -> None:
    with pytest.raises(InvalidInput, match="goodput"):
        read_objectives([pair])


def test_the_summary_counts_failures_separately() -> None:
    outcomes = [outcome(0.0, 1.0, 2.0, tokens=2), outcome(1.0, 2.0, 4.0, tokens=2), outcome(0.0, error="HTTP 500")]
    result = summarize(
        0.0, outcomes, metrics=["ttft", "itl"], percentiles=[50.0, 99.0], objectives={"itl": 1500.0}, prompt_tokens=[5, 5, 5])
    assert (result["completed"], result["failed"], result["total_input_tokens"], result["total_output_tokens"]) == (2, 1, 20, 4)
    assert (result["duration"], result["output_throughput"], result["request_goodput"]) == (4.0, 1.0, 0.25)
    assert (result["mean_ttft_ms"], result["p50_itl_ms"], result["p99_itl_ms"]) == (1000.0, 1500.0, pytest.approx(1990.0))
    assert "mean_tpot_ms" not in result


def test_a_run_without_a_successful_request_has_the_reason() -> None:
    with pytest.raises(InvalidInput, match="HTTP 500"):
        summarize(0.0, [outcome(0.0, error="HTTP 500")], metrics=[], percentiles=[], objectives={}, prompt_tokens=[1])
