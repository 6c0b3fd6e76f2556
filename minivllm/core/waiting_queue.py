"""Sequences that wait for a row and blocks.

Each owner has a queue of its requests in the order (priority, arrival number), and each request its waiting sequences in the order of
their child index. Under the FCFS policy all priorities count as 0. A preempted sequence keeps its order, so it returns to a position
before every later arrival. No other rule protects it. `FairShare` decides which owner is next.
"""
from __future__ import annotations

import heapq

from minivllm.core.fair_share import FairShare
from minivllm.core.request import Request, Sequence, SequenceStatus


class _OwnerQueue:
    """The requests of one owner that have waiting sequences. An entry without waiting sequences is dropped when it reaches the front."""

    __slots__ = ("heap", "num_requests", "num_sequences")

    def __init__(self) -> None:
        self.heap: list[tuple[tuple[int, int], Request]] = []
        self.num_requests = self.num_sequences = 0

    def first(self, share: FairShare) -> Request | None:
        """The first request; a later one if the first ones have enough rows."""
        heap = self.heap
        while heap and not heap[0][1].num_waiting:
            heapq.heappop(heap)[1].is_queued = False
        if not heap:
            return None
        first = heap[0][1]
        if self.num_requests > 1 and share.has_enough(first):  # at most two requests have that many
            left = (request for _, request in heapq.nsmallest(len(heap), heap) if request.num_waiting and not share.has_enough(request))
            return next(left, first)
        return first


class WaitingQueue:
    """The queues of all owners. A sequence that finished while it waited is not counted, and is skipped when it reaches the front."""

    __slots__ = ("_length", "_owners", "_share")

    def __init__(self, share: FairShare) -> None:
        self._share = share
        self._owners: dict[str, _OwnerQueue] = {}
        self._length = 0

    def __len__(self) -> int:
        """Waiting sequences."""
        return self._length

    @property
    def has_several_owners(self) -> bool:
        """Whether more than one owner has ever sent a request."""
        return len(self._owners) > 1

    @property
    def num_requests(self) -> int:
        """Requests with waiting sequences."""
        return sum(queue.num_requests for queue in self._owners.values())

    def num_requests_of(self, owner: str) -> int:
        return self._owners[owner].num_requests if owner in self._owners else 0

    def num_sequences_of(self, owner: str) -> int:
        return self._owners[owner].num_sequences if owner in self._owners else 0

    def num_owners_with(self, owner: str) -> int:
        """Owners with waiting requests, and this one."""
        return sum(queue.num_requests > 0 or name == owner for name, queue in self._owners.items()) + (owner not in self._owners)

    def push(self, sequence: Sequence) -> None:
        request = sequence.request
        queue = self._owners.get(request.new.owner)
        if queue is None:
            queue = self._owners[request.new.owner] = _OwnerQueue()
        heapq.heappush(request.waiting, (sequence.index, sequence))
        if not request.is_queued:
            request.is_queued = True
            heapq.heappush(queue.heap, (request.order, request))
        queue.num_requests += not request.num_waiting
        queue.num_sequences += 1
        request.num_waiting += 1
        self._length += 1

    def first(self) -> Sequence | None:
        """The sequence that is admitted next."""
        request = self._first_request()
        if request is None:
            return None
        waiting = request.waiting
        while waiting[0][1].status is SequenceStatus.FINISHED:
            heapq.heappop(waiting)
        return waiting[0][1]

    def _first_request(self) -> Request | None:
        if len(self._owners) == 1:
            return next(iter(self._owners.values())).first(self._share)
        owners = sorted((owner for owner, queue in self._owners.items() if queue.num_sequences), key=self._share.turn)
        return self._owners[owners[0]].first(self._share) if owners else None

    def pop(self) -> Sequence:
        first = self.first()
        assert first is not None
        heapq.heappop(first.request.waiting)
        self._count_out(first.request)
        return first

    def discount(self, sequence: Sequence) -> None:
        """`sequence` finished while it waited: do not count it any more."""
        assert sequence.status is SequenceStatus.FINISHED
        request = sequence.request
        queue = self._count_out(request)
        if not request.num_waiting:
            request.waiting.clear()
        if len(queue.heap) > 2 * queue.num_requests + 64:  # rebuild: most entries have no waiting sequence and are not at the front
            for _, other in queue.heap:
                other.is_queued = other.num_waiting > 0
            queue.heap = [entry for entry in queue.heap if entry[1].is_queued]
            heapq.heapify(queue.heap)

    def _count_out(self, request: Request) -> _OwnerQueue:
        queue = self._owners[request.new.owner]
        request.num_waiting -= 1
        queue.num_requests -= not request.num_waiting
        queue.num_sequences -= 1
        self._length -= 1
        return queue

    def sequences(self) -> list[Sequence]:
        """All waiting sequences, in no particular order."""
        return [sequence for queue in self._owners.values() for _, request in queue.heap if request.num_waiting
                for _, sequence in request.waiting if sequence.status is not SequenceStatus.FINISHED]
