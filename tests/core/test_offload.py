"""CPU KV offload: which blocks move to host memory, when they may return, and that no moving block is used. See also SwapMachine."""
from __future__ import annotations

import random
from typing import Any

import pytest

from minivllm.core.scheduler import SchedulerConfig
from tests.core.harness import Harness
from tests.core.test_scheduler import greedy, launch, prompt


class NeverFinishes(random.Random):
    """Randomness that finishes as few moves as possible."""

    def randint(self, a: int, b: int) -> int:
        return a


def make(chaos: random.Random | None = None, **settings: Any) -> Harness:
    defaults: dict[str, Any] = {"num_blocks": 10, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 36,
                                "num_host_blocks": 40, "swap_fixed_cost": 0.0, "swap_cost_per_token": 0.0}
    return Harness(SchedulerConfig(**{**defaults, **settings}), chaos=chaos)


def add_four_requests(h: Harness) -> None:
    """More than the blocks have room for."""
    for i in range(4):
        h.add(prompt(4, i), greedy(20), f"r{i}")


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_swapped_request_resumes_without_recomputation(depth: int, caching: bool) -> None:
    h = make(planning_depth=depth, enable_prefix_caching=caching)
    add_four_requests(h)
    h.run()
    stats = h.scheduler.stats()
    assert stats.num_swaps == stats.num_preemptions > 0
    assert sum(plan.total_tokens for plan in h.plans) == 4 * (4 + 20 - 1)
    h.check_answers()


def test_a_full_block_that_is_still_on_the_device_is_not_moved_in() -> None:
    h = make()
    add_four_requests(h)
    h.run()
    assert sum(len(p.moves_in) for p in h.plans) < sum(len(p.moves_out) for p in h.plans)


def test_swapping_is_chosen_when_it_costs_less_than_recomputation() -> None:
    config = SchedulerConfig(num_blocks=10, block_size=16, swap_fixed_cost=20.0, swap_cost_per_token=0.25, kv_windows=(None, None))
    assert not config.swap_is_cheaper(num_tokens=26, num_blocks=4)  # 20 + 0.25 * 32 slots = 28
    assert config.swap_is_cheaper(num_tokens=29, num_blocks=4)
    h = make(swap_fixed_cost=1e9)
    add_four_requests(h)
    h.run()
    assert h.scheduler.stats().num_preemptions > 0 == h.scheduler.stats().num_swaps
    h.check_answers()


def test_without_room_in_host_memory_a_request_is_recomputed() -> None:
    h = make(num_host_blocks=2)
    add_four_requests(h)
    h.run()
    assert h.scheduler.stats().num_preemptions > h.scheduler.stats().num_swaps
    h.check_answers()


def test_without_host_blocks_nothing_is_moved() -> None:
    h = make(num_host_blocks=0)
    add_four_requests(h)
    h.run()
    assert h.executor.num_moves == 0


def test_a_request_whose_blocks_are_still_moving_out_does_not_resume() -> None:
    h = make(NeverFinishes(), num_blocks=9)
    add_four_requests(h)
    while h.scheduler.has_unfinished():
        h.step()
        moving_out = {m.sequence.id for m in h.scheduler.offload.moves.values() if m.sequence is not None}
        assert not moving_out & {s.id for s in h.scheduler.running}
    h.check_answers()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_waits_for_blocks_that_are_moving_out_and_preempts_no_further_one(depth: int) -> None:
    h = make(num_blocks=13, max_num_seqs=6, planning_depth=depth)
    for i in range(6):  # all six need their third block in the same step, and none is free
        h.add(prompt(4, i), greedy(8), f"r{i}")
    before = most = 0
    while h.scheduler.has_unfinished():
        h.step()
        after = h.scheduler.stats().num_preemptions
        before, most = after, max(most, after - before)
    assert most == 1, "the blocks of one preempted request are enough, as soon as they have moved"
    h.check_answers()


def test_an_empty_step_waits_for_a_move_if_nothing_else_can_be_planned() -> None:
    h = make(NeverFinishes(), num_blocks=9)
    add_four_requests(h)
    while h.scheduler.has_unfinished():
        h.step()
    empty = [p for p in h.plans if not p.rows and not p.moves_out]
    assert empty and all(p.total_tokens == 0 and p.sample_rows == () for p in empty)


def test_evicted_prefix_blocks_are_found_in_host_memory() -> None:
    h = make(num_blocks=40)
    h.add(prompt(17), greedy(4), "old")
    h.run()
    for i in range(7):  # enough to evict every block of the device
        h.add(prompt(25, 7 + i), greedy(4), f"other {i}")
        h.run()
    h.add(prompt(17), greedy(4), "again")
    h.run()
    assert h.answers["again", 0].num_cached_tokens == 16
    assert len(next(p for p in h.plans if p.request_ids == ("again",)).moves_in) == 4
    h.check_answers()


def test_a_step_saves_at_most_half_of_the_free_blocks() -> None:
    h = make(NeverFinishes(), num_blocks=24, num_host_blocks=100)
    for i in range(4):
        h.add(prompt(20, 3 * i), greedy(4), f"r{i}")
        while h.scheduler.has_unfinished():
            plan = launch(h)
            assert len(plan.moves_out) <= h.scheduler.stats().num_free_blocks
            h.finish()
    assert h.executor.num_moves > 0
    h.check_answers()


def test_aborting_a_request_while_its_blocks_move_leaks_nothing() -> None:
    h = make(NeverFinishes())
    add_four_requests(h)
    while not h.scheduler.stats().num_swaps:
        h.step()
    for name in list(h.requests):
        h.abort(name)
    h.executor.chaos = None  # from here on moves finish at once
    h.add(prompt(3), greedy(2), "last")
    h.run()
    h.step()
    assert h.scheduler.stats().num_used_host_blocks == h.scheduler.stats().num_moves == 0
    h.check_answers()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_swapped_request_whose_moves_fail_is_recomputed(depth: int) -> None:
    h = make(enable_prefix_caching=False, planning_depth=depth)
    add_four_requests(h)
    while not (h.plans and h.plans[-1].moves_out):
        while h.launch(fails=lambda plan: bool(plan.moves_out)) is not None:
            pass
        if not h.plans[-1].moves_out:
            h.finish()
    victims = {s.id for s in h.scheduler.waiting if s.host_blocks}
    h.run()
    ended = {name for (name, _), answer in h.answers.items() if answer.finish_reason == "error"}
    assert ended and victims and not ended & victims
    assert h.scheduler.stats().num_used_host_blocks == 0
    h.check_answers()


def test_a_block_whose_move_failed_is_not_found_in_host_memory() -> None:
    h = make(num_blocks=40)
    h.add(prompt(17), greedy(4), "old")
    h.run()
    for i in range(7):
        h.add(prompt(25, 7 + i), greedy(4), f"other {i}")
        while h.scheduler.has_unfinished():
            h.launch(fails=lambda plan: bool(plan.moves_out))
            h.finish()
    h.add(prompt(17), greedy(4), "again")
    h.run()
    assert h.answers["again", 0].num_cached_tokens == 0
    h.check_answers()


def test_a_reset_of_the_prefix_cache_covers_host_memory_and_moves_to_it() -> None:
    h = make(NeverFinishes())
    h.add(prompt(17), greedy(4), "old")
    h.run()
    h.add(prompt(25, 7), greedy(2), "other")
    launch(h)
    assert h.scheduler.stats().num_moves > 0
    h.scheduler.reset_prefix_cache()
    h.executor.chaos = None
    h.finish()
    assert h.scheduler.stats().num_moves == h.scheduler.stats().num_cached_host_blocks == 0
    h.run()
    h.add(prompt(17), greedy(1), "again")
    h.run()
    assert h.answers["again", 0].num_cached_tokens == 0
