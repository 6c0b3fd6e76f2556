"""Sequences that wait for a row and blocks.

Each owner has a queue of its requests in the order (rank, arrival number), and each request its waiting sequences in the order of
their child index. The scheduling policy gives the rank. A preempted sequence keeps its order, so it returns to a position
before every later arrival. No other rule protects it. `FairShare` decides which owner is next.
"""
from __future__ import annotations

import heapq
from collections.abc import Iterator

from minivllm.core.fair_share import FairShare
from minivllm.core.request import Request, Sequence, SequenceStatus


class _OwnerQueue:
    """The requests of one owner that have waiting sequences. An order whose request has none any more is dropped at the front."""

    __slots__ = ("heap", "num_sequences", "orders", "requests")

    def __init__(self) -> None:
        self.requests: dict[tuple[float, int], Request] = {}  # by order
        self.heap: list[tuple[float, int]] = []  # their orders, and those of requests that have left
        self.orders: set[tuple[float, int]] = set()  # all in the heap
        self.num_sequences = 0

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def first(self, share: FairShare) -> Request | None:
        """The first request; a later one if the first ones have enough rows."""
        heap = self.heap
        while heap and heap[0] not in self.requests:
            self.orders.remove(heapq.heappop(heap))
        if not heap:
            return None
        first = self.requests[heap[0]]
        if len(self.requests) > 1 and share.has_enough(first):
            left = (order for order, request in self.requests.items() if not share.has_enough(request))
            return self.requests[min(left, default=heap[0])]
        return first

    def push(self, request: Request) -> None:
        self.requests[request.order] = request
        if request.order not in self.orders:
            self.orders.add(request.order)
            heapq.heappush(self.heap, request.order)

    def remove(self, request: Request) -> None:
        del self.requests[request.order]
        if len(self.heap) > 2 * len(self.requests) + 64:  # rebuild: most orders are of requests that have left
            self.heap = sorted(self.requests)
            self.orders = set(self.heap)


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

    def owners(self) -> list[str]:
        """Owners with waiting sequences, in the order of their first requests: a set of names has another order in each process."""
        return [name for name, queue in self._owners.items() if queue.num_sequences]

    def firsts(self, num_free_rows: int) -> Iterator[tuple[str, Sequence, int]]:
        """For each owner that may get rows: its first sequence, and how many sequences may start."""
        owners = self.owners() if num_free_rows else []
        for name in owners:
            queue = self._owners[name]
            num_rows = min(queue.num_sequences, num_free_rows)
            if len(owners) > 1:
                num_rows = min(num_rows, self._share.rows_left(name, len(owners)))
            if num_rows and (request := queue.first(self._share)) is not None:
                yield name, self._first_sequence(request), num_rows

    def num_owners_with(self, owner: str) -> int:
        """Owners with waiting requests, and this one."""
        return sum(queue.num_requests > 0 or name == owner for name, queue in self._owners.items()) + (owner not in self._owners)

    def push(self, sequence: Sequence) -> None:
        request = sequence.request
        queue = self._owners.get(request.new.owner)
        if queue is None:
            queue = self._owners[request.new.owner] = _OwnerQueue()
        heapq.heappush(request.waiting, (sequence.index, sequence))
        if not request.num_waiting:
            queue.push(request)
        queue.num_sequences += 1
        request.num_waiting += 1
        self._length += 1

    def first(self) -> Sequence | None:
        """The sequence that is admitted next."""
        request = self._first_request()
        return None if request is None else self._first_sequence(request)

    @staticmethod
    def _first_sequence(request: Request) -> Sequence:
        waiting = request.waiting
        while waiting[0][1].status is SequenceStatus.FINISHED:
            heapq.heappop(waiting)
        return waiting[0][1]

    def _first_request(self) -> Request | None:
        if len(self._owners) == 1:
            return next(iter(self._owners.values())).first(self._share)
        owner = min(self.owners(), key=self._share.turn, default=None)
        return None if owner is None else self._owners[owner].first(self._share)

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
        self._count_out(request)
        if not request.num_waiting:
            request.waiting.clear()

    def _count_out(self, request: Request) -> None:
        queue = self._owners[request.new.owner]
        request.num_waiting -= 1
        queue.num_sequences -= 1
        self._length -= 1
        if not request.num_waiting:
            queue.remove(request)

    def sequences(self) -> list[Sequence]:
        """All waiting sequences, in no particular order."""
        return [sequence for queue in self._owners.values() for request in queue.requests.values()
                for _, sequence in request.waiting if sequence.status is not SequenceStatus.FINISHED]
