"""Sequences that wait for a row and blocks, in the order in which they will get them.

The order is (priority, arrival number, child index); under FCFS everybody's priority counts as 0. A preempted sequence comes
back with its old place, which is before everybody who arrived later: that is all there is to fairness after preemption.
"""
from __future__ import annotations

import heapq

from minivllm.core.request import Sequence, State


class WaitingQueue:
    """A heap. A sequence that ends while it waits is only counted out, and skipped when it comes to the front."""

    __slots__ = ("_heap", "_length")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.order, sequence))
        self._length += 1

    def first(self) -> Sequence | None:
        while self._heap and self._heap[0][1].state is State.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        first = self.first()
        assert first is not None
        heapq.heappop(self._heap)
        self._length -= 1
        return first

    def count_out(self, sequence: Sequence) -> None:
        """`sequence` was waiting and is now FINISHED."""
        assert sequence.state is State.FINISHED
        self._length -= 1
        if len(self._heap) > 2 * self._length + 64:  # mostly ended ones, behind a front that stays
            self._heap = [entry for entry in self._heap if entry[1].state is not State.FINISHED]
            heapq.heapify(self._heap)

    def sequences(self) -> list[Sequence]:
        """Everybody who waits, in no particular order."""
        return [sequence for _, sequence in self._heap if sequence.state is not State.FINISHED]
