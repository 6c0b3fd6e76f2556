"""Scheduling policies: every row of the table keeps the scheduler's promises, and a rank means what its module says."""
from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.cli import trace as command
from minivllm.config import EngineConfig
from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.simulate import StepCost, simulate, synthetic_requests
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams
from minivllm.scheduling_policy import POLICIES, Policy
from tests.core.harness import Harness
from tests.core.test_scheduler_machine import run

ONE_ROW = SchedulerConfig(num_blocks=40, block_size=4, max_num_seqs=1, max_num_batched_tokens=32, max_model_len=40)
REQUESTS = [EngineRequest(f"r{i}", tuple(range(length)), SamplingParams(max_tokens=most), arrival, priority)
            for i, (length, most, arrival, priority) in enumerate([(1, 1, 0.0, 0), (900, 1, 5.5, -3), (2, None, 1e6, 2)])]


def starts(h: Harness) -> list[str]:
    """Request ids in the order in which they got a row, with repetitions after preemptions."""
    return [admission.request_id for plan in h.plans for admission in plan.admitted]


# ---- every policy of the table

@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("planning_depth", [0, 1])
def test_a_policy_loses_no_request_and_changes_no_token(name: str, planning_depth: int) -> None:
    h = run({"policy": name, "num_blocks": 14, "planning_depth": planning_depth})
    h.check_answers()
    assert h.scheduler.stats().num_preemptions > 0, "the pool is too large for this test"


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_ranks_any_request_and_the_same_request_always_alike(name: str) -> None:
    ranks = [POLICIES[name](request) for request in REQUESTS]
    assert all(math.isfinite(rank) for rank in ranks)
    assert ranks == [POLICIES[name](dataclasses.replace(request)) for request in reversed(REQUESTS)][::-1]


def test_the_setting_has_the_names_of_the_table() -> None:
    field = next(f for f in dataclasses.fields(EngineConfig) if f.name == "scheduling_policy")
    assert field.metadata["choices"] == tuple(POLICIES)
    assert all(f"{name}: " in field.metadata["help"] for name in POLICIES), "the help of the setting explains each policy"


def test_a_new_row_can_be_compared_on_a_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The shortest output first: with one row, the median request waits less."""
    table: Mapping[str, Policy] = MappingProxyType({**POLICIES, "shortest": lambda request: request.params.max_tokens or 0})
    for module in ("scheduler", "scheduler_config"):
        monkeypatch.setattr(f"minivllm.core.{module}.POLICIES", table)
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    assert command.run(parser.parse_args(["trace", "--synthetic", "12", "--rate", "100", "--compare", "max_num_seqs=1",
                                          "--compare", "max_num_seqs=1", "policy=shortest"])) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("time to first token, median, ms"))
    _, fcfs, shortest = (float(figure) for figure in row.split()[-3:])
    assert shortest < fcfs


# ---- what a rank means

@given(ranks=st.lists(st.sampled_from([-1.5, 0.0, 1, 2.25, math.inf]), min_size=1, max_size=6))
def test_waiting_requests_start_in_the_order_of_rank_then_arrival(ranks: list[float]) -> None:
    h = Harness(ONE_ROW, policy=lambda request: ranks[int(request.request_id)])
    for i in range(len(ranks)):
        h.add((1, 2, i), SamplingParams(max_tokens=2), str(i))
    h.run()
    assert starts(h) == [str(i) for i in sorted(range(len(ranks)), key=lambda i: (ranks[i], i))]
    h.check_answers()


def test_a_rank_is_computed_once_and_the_highest_one_is_preempted_first() -> None:
    """The first request arrives first and has the highest rank: it loses its blocks to the others, and gets them back last."""
    ranked: list[str] = []

    def policy(request: EngineRequest) -> float:
        ranked.append(request.request_id)
        return -len(ranked)

    h = Harness(dataclasses.replace(ONE_ROW, num_blocks=12, max_num_seqs=3), policy=policy)
    for name in "abc":
        h.add(tuple(range(ord(name), ord(name) + 8)), SamplingParams(max_tokens=16, ignore_eos=True), name)
    h.run()
    assert ranked == ["a", "b", "c"]
    again = starts(h)[3:]
    assert again and "c" not in again and again[0] == "a", "the lowest rank, c, is never preempted"
    h.check_answers()


def test_a_rank_of_arrival_time_plus_a_bound_lets_no_request_wait_for_ever() -> None:
    """A long request, and short ones that come faster than they are served. By length alone, the long one starts last."""
    short = [(0.01 * i, 20) for i in range(100)]
    work = synthetic_requests([(400, 4), *((length, 4) for _, length in short)], [0.001, *(at for at, _ in short)])
    config = SchedulerConfig(num_blocks=100, max_num_seqs=1, max_model_len=512)

    def start_of_the_long_one(policy: Policy) -> int:
        times = simulate(config, work, StepCost(5e-3, 0.0, 0.0), policy).token_times
        return sorted(times, key=lambda name: times[name][0]).index(("r0", 0))

    assert start_of_the_long_one(lambda request: len(request.prompt_token_ids)) == 100
    assert start_of_the_long_one(lambda request: request.arrival_time + 1e-3 * len(request.prompt_token_ids)) < 50


def test_a_rank_that_is_no_number_is_a_bug_of_the_policy() -> None:
    with pytest.raises(AssertionError, match="NaN has no place in an order"):
        Harness(ONE_ROW, policy=lambda request: math.nan).add((1, 2, 3))
