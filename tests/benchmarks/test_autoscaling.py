"""The simulation of autoscaling: the number follows a ramp, and every request is served."""
from __future__ import annotations

import json

import pytest

from bench import autoscaling
from bench.autoscaling import MAX_RUNNING, CappedReplica, main
from bench.routing import TracedRequest


def test_the_number_rises_and_falls_with_the_load_and_all_requests_are_served(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autoscaling, "MAX_RUNNING", 2)
    assert main(["--most", "2", "--minutes", "1", "--chats", "0.8", "--start", "5", "--upscale-delay", "2", "--downscale-delay", "5"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    numbers = [number for _, number in result["changes"]]
    assert numbers[0] == 1 and 2 in numbers and numbers[-1] == 1
    one, two, scaled = (result["rows"][name] for name in ("1", "2", "1 to 2"))
    assert one["minutes"] < scaled["minutes"] < two["minutes"]
    assert two["p99_ms"] < scaled["p99_ms"] < one["p99_ms"]


def test_a_full_batch_makes_requests_wait_in_their_order() -> None:
    replica = CappedReplica()
    for number in range(MAX_RUNNING + 2):
        replica.add(TracedRequest.of(0.0, [(f"p{number}", 16)], 3), number)
    replica.step()
    assert len(replica.running) == MAX_RUNNING and [waiting.number for waiting in replica.waiting] == [MAX_RUNNING, MAX_RUNNING + 1]
