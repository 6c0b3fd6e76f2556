"""Allocation for a running sequence: which sequence is preempted, and when none is."""
from __future__ import annotations

from minivllm.core.plan_builder import PlanBuilder
from minivllm.core.preemption import allocate_slots, preempt_paused_beam
from minivllm.core.request import Request, Sequence, SequenceStatus
from minivllm.core.scheduler_config import SchedulerConfig
from minivllm.core.scheduler_state import SchedulerState
from minivllm.core.stopping import StopRule
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams


def make(num_blocks: int, blocks_each: tuple[int, ...]) -> tuple[SchedulerState, list[Sequence], PlanBuilder]:
    """A state whose running sequences, in priority order, have these numbers of blocks of 4 tokens."""
    state = SchedulerState(SchedulerConfig(num_blocks=num_blocks, block_size=4))
    sequences = []
    for arrival, count in enumerate(blocks_each):
        new = EngineRequest(f"r{arrival}", (1, 2), SamplingParams())
        request = Request(new, 0, StopRule.of(SamplingParams(), (), 16), (0, arrival), b"")
        state.requests[request.new.request_id] = request
        sequence = state.new_sequence(request, 0, [1] * (4 * count), 1000)
        state.start_running(sequence)
        state.kv.allocate_slots(sequence, 4 * count, [])
        sequence.num_computed = sequence.num_planned = 4 * count
        sequences.append(sequence)
    return state, sequences, PlanBuilder(0, 100, 1)


def test_without_need_there_are_no_new_blocks() -> None:
    state, (only,), plan = make(4, (1,))
    assert allocate_slots(state, plan, only, 4) is plan.no_blocks
    assert state.kv.pool.num_free == 2


def test_the_running_sequence_with_the_lowest_priority_is_preempted() -> None:
    state, (first, second, third), plan = make(7, (2, 2, 2))
    assert allocate_slots(state, plan, first, 12) is not None
    assert [s.status for s in (first, second, third)] == [SequenceStatus.RUNNING, SequenceStatus.RUNNING, SequenceStatus.WAITING]
    assert state.waiting.first() is third and plan.short_of_blocks


def test_as_many_sequences_are_preempted_as_are_needed() -> None:
    state, (first, *others), plan = make(7, (2, 2, 2))
    assert allocate_slots(state, plan, first, 24) is not None
    assert all(s.status is SequenceStatus.WAITING for s in others) and state.num_preemptions == 2


def test_the_sequence_with_the_lowest_priority_waits_and_keeps_its_blocks() -> None:
    state, (first, second), plan = make(5, (2, 2))
    assert allocate_slots(state, plan, second, 12) is None
    assert first.status is second.status is SequenceStatus.RUNNING and second.table.capacity == 8


def test_no_sequence_is_preempted_if_enough_blocks_will_be_freed() -> None:
    state, (first, second, third), plan = make(7, (2, 2, 2))
    third.num_planned += 1  # a launched plan includes it
    state.finish(third)
    assert allocate_slots(state, plan, first, 16) is None
    assert second.status is SequenceStatus.RUNNING and plan.num_blocks_to_be_freed == 2
    assert allocate_slots(state, plan, first, 20) is None  # it needs three blocks: two are free then, and two will be freed
    assert second.status is SequenceStatus.WAITING and state.num_preemptions == 1


def test_a_victim_in_flight_is_counted_and_keeps_its_blocks_for_now() -> None:
    state, (first, second), plan = make(5, (2, 2))
    second.num_planned += 1
    assert allocate_slots(state, plan, first, 12) is None
    assert second.status is SequenceStatus.PREEMPTED and second.table.capacity == 8 and plan.num_blocks_to_be_freed == 2


def test_the_paused_beam_with_the_lowest_priority_is_preempted() -> None:
    state, (first, second, third), _ = make(7, (2, 2, 2))
    assert not preempt_paused_beam(state)
    first.paused = second.paused = True
    assert preempt_paused_beam(state)
    assert state.running == [first, third] and state.preempted_beams == [second] and len(state.waiting) == 0
