"""Changes of a sequence's status: where its row and its blocks go."""
from __future__ import annotations

from minivllm.core.request import NO_ROW, Request, Sequence, SequenceStatus
from minivllm.core.scheduler_config import SchedulerConfig
from minivllm.core.scheduler_state import SchedulerState
from minivllm.core.stopping import StopRule
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams


def make() -> SchedulerState:
    return SchedulerState(SchedulerConfig(num_blocks=10, block_size=4, max_num_seqs=3))


def waiting(state: SchedulerState, arrival: int) -> Sequence:
    new = EngineRequest(f"r{arrival}", (1, 2, 3, 4), SamplingParams())
    request = Request(new, 0, StopRule.of(SamplingParams(), (), 16), (0, arrival), b"")
    state.requests[request.new.request_id] = request
    sequence = state.new_sequence(request, 0, [1, 2, 3, 4], 10)
    state.waiting.push(sequence)
    return sequence


def running(state: SchedulerState, arrival: int, in_flight: int = 0) -> Sequence:
    """A sequence with one block, of whose tokens `in_flight` are in flight."""
    sequence = waiting(state, arrival)
    assert state.waiting.pop() is sequence
    state.start_running(sequence)
    state.kv.allocate_slots(sequence, 4, [])
    sequence.num_planned, sequence.num_computed = 4, 4 - in_flight
    return sequence


def test_running_sequences_stay_in_priority_order() -> None:
    state = make()
    second, first = running(state, 1), running(state, 0)
    assert state.running == [first, second] and {first.row, second.row} == {0, 1} and state.free_rows == [2]


def test_a_preempted_sequence_returns_to_the_queue_without_row_and_blocks() -> None:
    state = make()
    sequence = running(state, 0)
    state.preempt(sequence)
    state.remove_rowless()
    assert (sequence.status, sequence.row, sequence.num_computed) == (SequenceStatus.WAITING, NO_ROW, 0)
    assert state.waiting.first() is sequence and state.running == [] and len(state.free_rows) == 3
    assert state.kv.pool.num_used == 0 and sequence.num_preemptions == state.num_preemptions == 1


def test_a_sequence_in_flight_keeps_row_and_blocks_until_it_is_idle() -> None:
    for leave, status in ((SchedulerState.preempt, SequenceStatus.WAITING), (SchedulerState.finish, SequenceStatus.FINISHED)):
        state = make()
        sequence = running(state, 0, in_flight=2)
        leave(state, sequence)
        assert sequence.row != NO_ROW and state.kv.pool.num_used == 1 and len(state.waiting) == 0
        sequence.num_computed = sequence.num_planned
        state.leave_row_if_idle(sequence)
        assert sequence.row == NO_ROW and state.kv.pool.num_used == 0 and sequence.status is status
        assert len(state.waiting) == (status is SequenceStatus.WAITING)


def test_a_sequence_that_finishes_while_it_waits_leaves_the_queue() -> None:
    state = make()
    first, second = waiting(state, 0), waiting(state, 1)
    state.finish(first)
    state.finish(first)  # a second call changes nothing
    assert len(state.waiting) == 1 and state.waiting.first() is second
    state.remove_if_finished(first.request)
    assert list(state.requests) == ["r1"]


def test_a_finished_request_with_unforked_children_is_not_removed() -> None:
    state = make()
    sequence = waiting(state, 0)
    sequence.request.num_unforked = 1
    state.finish(sequence)
    state.remove_if_finished(sequence.request)
    assert "r0" in state.requests


def test_a_finished_beam_leaves_the_preempted_ones() -> None:
    state = make()
    beam = running(state, 0)
    beam.paused = True
    state.preempt(beam)
    assert state.preempted_beams == [beam]
    state.finish(beam)
    assert state.preempted_beams == [] and len(state.waiting) == 0
