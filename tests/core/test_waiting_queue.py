"""The waiting queue: its order, and that finished entries do not accumulate."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minivllm.core.block_table import BlockTable
from minivllm.core.fair_share import FairShare
from minivllm.core.request import Request, Sequence, SequenceStatus
from minivllm.core.stopping import StopRule
from minivllm.core.waiting_queue import WaitingQueue
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams


def waiting(arrival: int, priority: int = 0) -> Sequence:
    new = EngineRequest(f"r{arrival}", (1, 2), SamplingParams(), priority=priority)
    return Sequence(Request(new, 0, StopRule.of(new.params, (), 8), (priority, arrival), b""), 0, [1, 2], 10, BlockTable(4, [[]]))


def end(queue: WaitingQueue, sequence: Sequence) -> None:
    sequence.status = SequenceStatus.FINISHED
    queue.discount(sequence)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_the_lowest_priority_number_is_first_and_then_the_earliest_arrival(items: list[tuple[int, bool]]) -> None:
    queue, left = WaitingQueue(FairShare(4, 10)), []
    for arrival, (priority, ends) in enumerate(items):
        sequence = waiting(arrival, priority)
        queue.push(sequence)
        if ends:
            end(queue, sequence)
        else:
            left.append(sequence)
    assert len(queue) == len(left) == len(queue.sequences())
    assert [queue.pop() for _ in left] == sorted(left, key=lambda s: s.order)
    assert queue.first() is None


def test_finished_sequences_behind_a_waiting_front_are_removed() -> None:
    queue = WaitingQueue(FairShare(4, 10))
    queue.push(waiting(0))
    for arrival in range(1, 2000):
        sequence = waiting(arrival, priority=1)
        queue.push(sequence)
        end(queue, sequence)
    assert len(queue) == 1 and len(queue._owners[""].heap) < 100
