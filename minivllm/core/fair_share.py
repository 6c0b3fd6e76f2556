"""Fair sharing of rows and queue positions between owners (API keys).

An owner's share is the larger one of its fraction of the rows and its fraction of the blocks. The owner with the smallest share is
served first; among owners with equal shares, the one that was served the longest time ago. So a key that sends a thousand requests gets
no more than a key that always has a few waiting, and what one key does not need goes to the others. If all rows or blocks are taken when
an owner with a smaller share waits, newest sequences of the owner with the most are preempted, as long as that brings the shares closer.
This is dominant resource fairness (Ghodsi et al., 2011). Sheng et al. (2024, "Fairness in Serving Large Language Models") share tokens
instead, which needs no preemption but lets long outputs hold all rows.

Within one owner the order is that of the queue, with one exception: a request with many children gets at most half of the rows while
another request waits.

With one owner, which is the case without API keys, this changes nothing but that exception.
"""
from __future__ import annotations

from collections.abc import Mapping

from minivllm.core.request import Request, Sequence


class FairShare:
    """The rows of each owner and of each request, and the order in which owners were served. Counts RUNNING sequences only."""

    __slots__ = ("_max_rows", "_num_blocks", "_num_served", "_served", "blocks", "large", "most_of_one", "rows")

    def __init__(self, max_rows: int, num_blocks: int) -> None:
        self._max_rows, self._num_blocks = max_rows, num_blocks
        self.most_of_one = (max_rows + 1) // 2  # rows of one request while another request waits
        self.rows: dict[str, int] = {}  # by owner
        self.blocks: Mapping[str, int] = {}  # by owner, as of the current step; only kept if there are several owners
        self.large: set[Request] = set()  # requests with more rows than `most_of_one`
        self._served: dict[str, int] = {}  # by owner: number of its latest admission
        self._num_served = 0

    def start(self, sequence: Sequence) -> None:
        """The sequence runs now."""
        request = sequence.request
        owner = request.new.owner
        request.num_rows += 1
        if request.num_rows == self.most_of_one + 1:
            self.large.add(request)
        self.rows[owner] = self.rows.get(owner, 0) + 1
        self._num_served += 1
        self._served[owner] = self._num_served

    def stop(self, sequence: Sequence) -> None:
        """The sequence runs no more; it may keep its row for the plans that are launched."""
        request = sequence.request
        if request.num_rows == self.most_of_one + 1:
            self.large.remove(request)
        request.num_rows -= 1
        self.rows[request.new.owner] -= 1

    def turn(self, owner: str) -> tuple[float, int]:
        """The owner with the lowest value is served next."""
        share = max(self.rows.get(owner, 0) / self._max_rows, self.blocks.get(owner, 0) / self._num_blocks)
        return share, self._served.get(owner, 0)

    def has_enough(self, request: Request) -> bool:
        """Whether the request leaves further rows to other requests that wait."""
        return request.num_rows >= self.most_of_one
