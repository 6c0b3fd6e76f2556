"""`check_state` finds damage: each test breaks one rule in the state of a scheduler at work."""
from __future__ import annotations

from collections.abc import Callable

import pytest

from minivllm.core.invariants import check_state
from minivllm.core.request import NO_ROW, SequenceStatus
from minivllm.core.scheduler_config import SchedulerConfig
from minivllm.core.scheduler_state import SchedulerState
from tests.core.harness import Harness
from tests.core.test_scheduler import greedy, prompt


def state_at_work() -> SchedulerState:
    """Two running sequences, a waiting one, and one plan in flight."""
    h = Harness(SchedulerConfig(num_blocks=40, block_size=4, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64))
    for first in range(3):
        h.add(prompt(9, first), greedy(8))
    h.step()
    h.launch()
    return h.scheduler._state


def lose_block(state: SchedulerState) -> None:
    state.running[0].table.groups[0].pop()


def free_too_much(state: SchedulerState) -> None:
    state.kv.pool.free(state.running[0].table.groups[0][0])


def free_row_twice(state: SchedulerState) -> None:
    state.free_rows.append(state.running[0].row)


def reverse_order(state: SchedulerState) -> None:
    state.running.reverse()


def queue_running_sequence(state: SchedulerState) -> None:
    state.waiting.push(state.running[0])


def lose_waiting_sequence(state: SchedulerState) -> None:
    state.waiting.pop()


def keep_finished_request(state: SchedulerState) -> None:
    waiting = state.waiting.pop()
    waiting.status = SequenceStatus.FINISHED


def change_token(state: SchedulerState) -> None:
    state.running[0].tokens[0] += 1


def forget_plan_in_flight(state: SchedulerState) -> None:
    state.running[0].num_planned -= 1
    state.running[0].leave_fast_path()


def take_row(state: SchedulerState) -> None:
    state.free_rows.append(state.running[0].row)
    state.running[0].row = NO_ROW


def count_waiting_as_computed(state: SchedulerState) -> None:
    waiting = state.waiting.first()
    assert waiting is not None
    waiting.num_computed = waiting.num_planned = 4


def cache_block_too_early(state: SchedulerState) -> None:
    state.running[0].num_cached_blocks += 2


def skip_the_checks_of_planning(state: SchedulerState) -> None:
    state.running[0].fast_plan_limit = 1000


def skip_the_checks_of_confirmation(state: SchedulerState) -> None:
    state.running[0].fast_confirm_limit = 1000


@pytest.mark.parametrize(("damage", "message"), [
    (lose_block, "has 1 references, and its owners are"),
    (free_too_much, "has 0 references, and its owners are"),
    (free_row_twice, "do not each occur once"),
    (reverse_order, "not in priority order"),
    (queue_running_sequence, "in two lists"),
    (lose_waiting_sequence, "in no list"),
    (keep_finished_request, "was not removed"),
    (change_token, "block hashes that do not belong"),
    (forget_plan_in_flight, "num_in_flight is not"),
    (take_row, "do not each occur once"),
    (count_waiting_as_computed, "counts tokens as computed"),
    (cache_block_too_early, "cached a block that is not computed"),
    (skip_the_checks_of_planning, "planned on the fast path"),
    (skip_the_checks_of_confirmation, "confirmed on the fast path"),
])
def test_damage_is_found(damage: Callable[[SchedulerState], None], message: str) -> None:
    state = state_at_work()
    check_state(state)
    damage(state)
    with pytest.raises(AssertionError, match=message):
        check_state(state)
