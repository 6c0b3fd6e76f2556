"""Random sequences of calls: invariants hold, every request finishes, nothing leaks, and the tokens equal the plain computation's.

In the fake executor tokens depend on every cell that is read through block tables, copies and moves. So correct tokens test paging,
sharing, copy-on-write, windows, swapping, asynchronous scheduling and preemption at once.
"""
from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from minivllm.core.scheduler import SchedulerConfig
from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams
from minivllm.scheduling_policy import POLICIES
from tests.core.harness import GRAMMAR, Harness

WINDOWS = [(None,), (None,), (3,), (None, 4), (None, 7, 2), (1, None)]

CONFIGS = st.builds(
    SchedulerConfig,
    num_blocks=st.integers(6, 50), block_size=st.sampled_from([1, 2, 3, 4, 8]), max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.sampled_from([2, 3, 5, 9, 17, 64]), max_model_len=st.sampled_from([16, 24, 40]),
    kv_windows=st.sampled_from(WINDOWS), enable_prefix_caching=st.booleans(),
    long_prefill_token_threshold=st.sampled_from([0, 0, 2, 5]), policy=st.sampled_from(sorted(POLICIES)),
    planning_depth=st.integers(0, 1), num_host_blocks=st.sampled_from([0, 0, 5, 40]), swap_fixed_cost=st.sampled_from([0.0, 3.0]),
    swap_cost_per_token=st.sampled_from([0.0, 0.5]), eos_token_ids=st.sampled_from([(), (5,)]), max_loras=st.sampled_from([1, 2]),
    num_device_drafts=st.sampled_from([0, 3]),
)
PROMPTS = st.builds(  # few different prefixes, so that they are shared
    lambda start, length, tail: tuple((start + i) % 3 for i in range(length)) + tuple(tail),
    st.integers(0, 1), st.integers(1, 16), st.lists(st.integers(0, 22), max_size=5),
)
PARAMS = st.builds(
    SamplingParams, n=st.sampled_from([1, 1, 1, 2, 4]), max_tokens=st.sampled_from([None, 1, 2, 7, 15]),
    stop_token_ids=st.sampled_from([None, None, [3]]), min_tokens=st.integers(0, 1), prompt_logprobs=st.sampled_from([None, None, None, 0]),
    ignore_eos=st.booleans(), structured_outputs=st.sampled_from([None, GRAMMAR]),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Calls of users and engine, and failures, in any order. `Harness` checks every invariant after every call."""

    configs = CONFIGS

    @initialize(data=st.data(), seed=st.integers(0, 2**32), drafts=st.booleans(), stop_strings=st.booleans())
    def start(self, data: st.DataObject, seed: int, drafts: bool, stop_strings: bool) -> None:
        config = data.draw(self.configs)
        self.h = Harness(config, chaos=random.Random(seed), drafts=drafts, stop_strings=stop_strings)

    @rule(prompt=PROMPTS, params=PARAMS, seed=st.integers(0, 3), priority=st.integers(0, 2), salt=st.sampled_from([None, None, "salt"]),
          owner=st.sampled_from(["", "", "a", "b"]), adapter=st.sampled_from([0, 0, 1, 2, 3]))
    def add(self, prompt: tuple[int, ...], params: SamplingParams, seed: int, priority: int, salt: str | None, owner: str,
            adapter: int) -> None:
        try:
            self.h.add(prompt, params, seed=seed, priority=priority, cache_salt=salt, owner=owner, adapter_id=adapter)
        except InvalidInput as refusal:
            assert "can never fit" in refusal.message

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.h.step()

    @rule()
    def launch(self) -> None:
        self.h.launch()

    @precondition(lambda self: self.h.in_flight)
    @rule()
    def finish(self) -> None:
        self.h.finish()

    @rule()
    def launch_a_step_that_fails(self) -> None:
        self.h.launch(fails=True)

    @precondition(lambda self: self.h.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.h.abort(data.draw(st.sampled_from(sorted(self.h.requests))))

    @rule()
    def reset_the_prefix_cache(self) -> None:
        self.h.scheduler.reset_prefix_cache()
        self.h.scheduler.check()

    @rule()
    def lose_the_rows(self) -> None:
        self.h.scheduler.readmit_all()
        self.h.scheduler.check()

    def teardown(self) -> None:
        """Liveness: without new requests, every request finishes."""
        if hasattr(self, "h"):
            self.h.run()
            self.h.check_answers()


TestScheduler = SchedulerMachine.TestCase


class SwapMachine(SchedulerMachine):
    """The same with few device blocks and free swaps: moves are pending in nearly every step."""

    configs = st.builds(
        SchedulerConfig, num_blocks=st.integers(8, 18), block_size=st.sampled_from([2, 4]), max_num_seqs=st.integers(2, 6),
        max_num_batched_tokens=st.sampled_from([5, 17, 64]), max_model_len=st.just(24), kv_windows=st.sampled_from([(None,), (None, 4)]),
        enable_prefix_caching=st.booleans(), planning_depth=st.integers(0, 1), num_host_blocks=st.sampled_from([4, 12, 60]),
        swap_fixed_cost=st.just(0.0), swap_cost_per_token=st.just(0.0), eos_token_ids=st.sampled_from([(), (5,)]),
        max_loras=st.just(1), num_device_drafts=st.sampled_from([0, 3]),
    )


TestSwap = SwapMachine.TestCase


# Metamorphic: the same requests under other settings get the same tokens.

BASE: dict[str, Any] = {"num_blocks": 400, "block_size": 4, "max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": 48,
                        "eos_token_ids": (5,)}
CHANGES: list[dict[str, Any]] = [
    {"block_size": 1}, {"block_size": 7}, {"block_size": 64}, {"max_num_batched_tokens": 5}, {"max_num_seqs": 1}, {"max_num_seqs": 3},
    {"enable_prefix_caching": False}, {"num_blocks": 14}, {"num_blocks": 14, "enable_prefix_caching": False}, {"planning_depth": 1},
    {"num_blocks": 14, "planning_depth": 1}, {"num_blocks": 14, "num_host_blocks": 80, "swap_fixed_cost": 0.0},
    {"num_blocks": 14, "num_host_blocks": 80, "swap_fixed_cost": 0.0, "planning_depth": 1}, {"policy": "priority"},
    {"long_prefill_token_threshold": 3}, {"enable_chunked_prefill": False},
]


def workload(order: random.Random | None = None) -> list[tuple[str, tuple[int, ...], SamplingParams, int]]:
    chaos = random.Random(3)
    shared = tuple(chaos.randrange(23) for _ in range(18))
    requests = []
    for i in range(14):
        prompt = (*shared[:chaos.choice([0, 6, 18])], *(chaos.randrange(23) for _ in range(chaos.randint(1, 12))))
        requests.append((f"r{i}", prompt, SamplingParams(max_tokens=chaos.randint(1, 16), n=chaos.choice([1, 1, 1, 3])), i))
    if order is not None:
        order.shuffle(requests)
    return requests


def run(settings: dict[str, Any], order: random.Random | None = None, windows: tuple[int | None, ...] = (None,)) -> Harness:
    h = Harness(SchedulerConfig(**{**BASE, "kv_windows": windows, **settings}), chaos=random.Random(1))
    for i, (name, prompt, params, seed) in enumerate(workload(order)):
        h.add(prompt, params, name, seed=seed, priority=i % 3)
        if order is not None and order.random() < 0.5:
            h.step()
    h.run()
    return h


@pytest.mark.parametrize("windows", [(None,), (None, 5)])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_tokens_do_not_depend_on_settings(change: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    if windows != (None,) and change.get("num_blocks"):
        change = {**change, "num_blocks": 24}  # two groups need more blocks than one
    h = run(change, windows=windows)
    h.check_answers()
    if change.get("num_blocks"):
        assert h.scheduler.stats().num_preemptions > 0, "the pool is too large for this test"
    if change.get("num_host_blocks"):
        assert h.scheduler.stats().num_swaps > 0


@given(seed=st.integers(0, 2**32))
def test_tokens_do_not_depend_on_arrival_order_or_other_requests(seed: int) -> None:
    h = run({"num_blocks": 20, "max_num_batched_tokens": 17, "planning_depth": seed % 2}, random.Random(seed))
    h.check_answers()


@given(config=CONFIGS, seed=st.integers(0, 2**32))
def test_every_decode_is_in_every_step_unless_blocks_run_out(config: SchedulerConfig, seed: int) -> None:
    """The guarantee in the scheduler's docstring, under random settings."""
    chaos = random.Random(seed)
    h = Harness(config)
    for i in range(7):
        length = chaos.randint(1, config.max_model_len - 2)
        try:
            h.add(tuple(chaos.randrange(23) for _ in range(length)), SamplingParams(max_tokens=None, n=chaos.choice([1, 3])), seed=i)
        except InvalidInput:
            continue
    while h.scheduler.has_unfinished():
        decoding = {s.id for s in h.scheduler.running if s.num_outputs > 0 and s.num_left_to_plan == 1 and s.num_in_flight == 0}
        before = h.scheduler.stats().num_preemptions
        plan = h.launch()
        missed = decoding - set(plan.request_ids if plan else ())
        ran_out = h.scheduler.pool.num_free < len(config.kv_windows) * 2 or h.scheduler.stats().num_preemptions > before
        assert not missed or ran_out, f"{missed} missed a step"
        if h.in_flight:
            h.finish()
    h.check_answers()
