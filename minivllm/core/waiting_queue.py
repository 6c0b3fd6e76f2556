"""Sequences that wait for a row and blocks, in priority order.

The order is (priority, arrival number, child index). Under the FCFS policy all priorities count as 0. A preempted sequence keeps
its order, so it returns to a position before every later arrival. No other rule protects it.
"""
from __future__ import annotations

import heapq

from minivllm.core.request import Sequence, SequenceStatus


class WaitingQueue:
    """A heap. An entry whose sequence has finished is not counted, and is skipped when it reaches the front."""

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
        while self._heap and self._heap[0][1].status is SequenceStatus.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        first = self.first()
        assert first is not None
        heapq.heappop(self._heap)
        self._length -= 1
        return first

    def discount(self, sequence: Sequence) -> None:
        """`sequence` finished while it waited: do not count it any more."""
        assert sequence.status is SequenceStatus.FINISHED
        self._length -= 1
        if len(self._heap) > 2 * self._length + 64:  # rebuild: most entries are finished but not at the front
            self._heap = [entry for entry in self._heap if entry[1].status is not SequenceStatus.FINISHED]
            heapq.heapify(self._heap)

    def sequences(self) -> list[Sequence]:
        """All waiting sequences, in no particular order."""
        return [sequence for _, sequence in self._heap if sequence.status is not SequenceStatus.FINISHED]
