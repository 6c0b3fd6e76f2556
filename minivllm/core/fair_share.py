"""Fair sharing of rows, of a step's tokens and of queue positions between owners (API keys).

An owner's share is the larger one of its fraction of the rows and its fraction of the blocks. The owner with the smallest share is
served first; among owners with equal shares, the one that was served the longest time ago. So a key that sends a thousand requests gets
no more than a key that always has a few waiting, and what one key does not need goes to the others. If all rows or blocks are taken when
an owner with a smaller share waits, newest sequences of the owner with the most are preempted, as long as that brings the shares closer.
This is dominant resource fairness (Ghodsi et al., 2011). Sheng et al. (2024, "Fairness in Serving Large Language Models") share tokens
instead, which needs no preemption but lets long outputs hold all rows.

Rows alone are not enough: a row that computes a prompt takes many tokens of a step, and a step of many tokens takes longer for all.
So the tokens beside the decodes, which are prompts and drafts, are shared too (`token_parts`).

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

    def rows_left(self, owner: str, num_waiting: int) -> int:
        """Rows that an owner lacks for an equal share among the owners with rows, or among `num_waiting` ones if those are more."""
        num_owners = max(num_waiting, sum(count > 0 for count in self.rows.values()))
        return max(0, -(-self._max_rows // num_owners) - self.rows.get(owner, 0))

    def has_enough(self, request: Request) -> bool:
        """Whether the request leaves further rows to other requests that wait."""
        return request.num_rows >= self.most_of_one


class TokenParts:
    """How many further tokens, beside its decodes, each owner may have in one step."""

    __slots__ = ("_left",)

    def __init__(self, left: dict[str, int] | None = None) -> None:
        self._left = left  # by owner; None: no limit, because only one owner has work

    def limit(self, owner: str, count: int) -> int:
        """`count`, or fewer tokens if the owner's part is smaller."""
        return count if self._left is None else min(count, self._left.get(owner, 1))

    def spend(self, owner: str, count: int) -> None:
        if self._left is not None:
            self._left[owner] = self._left.get(owner, 1) - count


def token_parts(
    decodes: Mapping[str, int], wanted: Mapping[str, int], waiting: Mapping[str, int], budget: int, free_tokens: int, step_id: int,
) -> TokenParts:
    """Share the tokens of a step between owners. All counts are tokens, by owner.

    decodes: planned already. wanted: further ones, of prompts and drafts. waiting: rows of the owners that have sequences in the queue.
    Some of those rows may have no tokens in this step, because they are about to end. budget: tokens that are left.

    A step of T tokens takes about as long as 1 + T / free_tokens empty ones. Each owner must keep 40% or more of the speed that it
    would have alone. So beside d tokens of the owner with the fewest, each other owner has at most

        1.5 d             if that owner waits for more rows: alone it would have about 2 d tokens. Each of its rows counts as one at least
        d + free_tokens   if all its work is in this step

    Within these limits and the budget, small demands are met first and the rest is divided equally (max-min fairness). Every owner may
    have one token, so that its prompts always advance.
    """
    totals = {owner: decodes.get(owner, 0) + wanted.get(owner, 0) for owner in {*decodes, *wanted}}
    needs = {owner: need for owner in {*totals, *waiting} if (need := max(totals.get(owner, 0), waiting.get(owner, 0)))}
    if len(needs) < 2 or not totals:
        return TokenParts()
    least = min(needs.values())  # of several owners; the lower limit counts, whatever their names are
    most = min(least * 3 // 2 if owner in waiting else least + free_tokens for owner, need in needs.items() if need == least)
    goals = {owner: min(total, most) for owner, total in totals.items()}

    def parts(level: int) -> dict[str, int]:
        return {owner: max(0, min(level, goal) - decodes.get(owner, 0)) for owner, goal in goals.items()}

    low, high = 0, max(goals.values(), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(parts(middle).values()) <= budget else (low, middle - 1)
    shared, above = parts(low), parts(low + 1)
    rest = budget - sum(shared.values())
    owners = sorted(goals)
    first = step_id % len(owners)
    for owner in owners[first:] + owners[:first]:  # single tokens that cannot be divided go to another owner in each step
        if rest and above[owner] > shared[owner]:
            shared[owner] += 1
            rest -= 1
    return TokenParts({owner: max(1, part) for owner, part in shared.items()})
