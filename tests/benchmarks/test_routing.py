"""The simulation of routing policies, on a trace whose outcome is known and on a short generated one."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.routing import BLOCK, PER_PROMPT_TOKEN, STEP, TracedRequest, chats, main, read_trace, simulate


def request(at: float, *parts: tuple[str, int], output: int = 2) -> TracedRequest:
    return TracedRequest.of(at, parts, output)


def test_hits_and_times_to_first_token_are_those_of_the_model_of_a_replica() -> None:
    trace = [request(0.0, ("a", 10 * BLOCK)), request(1.0, ("a", 10 * BLOCK), ("b", BLOCK)), request(2.0, ("c", BLOCK))]
    apart, together = simulate(trace, 2, "round robin"), simulate(trace, 2, "router")
    assert apart.hit_rate == 0
    assert together.hit_rate == 10 / 22
    assert together.ttft == pytest.approx([STEP + PER_PROMPT_TOKEN * tokens for tokens in (BLOCK, BLOCK, 10 * BLOCK)])


def test_the_router_finds_more_than_round_robin_and_has_no_queue_at_a_popular_prefix() -> None:
    trace = chats(seconds=4.0, per_second=36.0, seed=1)
    results = {policy: simulate(trace, 4, policy) for policy in ("round robin", "prefix only", "router")}
    assert all(len(result.ttft) == len(trace) for result in results.values())
    assert results["router"].hit_rate > results["round robin"].hit_rate + 0.1
    assert results["router"].percentile(0.99) < min(results[policy].percentile(0.99) for policy in ("round robin", "prefix only"))


def test_a_recorded_trace_is_read_and_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [{"at": 1.5, "parts": [["system", 40], ["b", 5]], "output": 3}, {"at": 0.5, "parts": [["system", 40]], "output": 1}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = read_trace(file)
    assert (first.at, first.output, len(second.tokens)) == (0.5, 1, 45)
    assert second.tokens[:40] == first.tokens
    assert main(["--trace", str(file), "--replicas", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["router"]["hit_rate"] == round(2 * BLOCK / 85, 4)
