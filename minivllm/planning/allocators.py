"""Allocator laboratory: three ways to place growing texts in a fixed memory, behind one interface.

A request's keys and values grow by one slot (one token's place) a step, and nobody knows how far. What does one do?

    contiguous   [aaaaa..............|bb.................|     ]   reserve the longest possible text; never moves
    buddy        [aaaaa...|bb..|cccc|        |                 ]   a power of two; doubles when full, moving if it must
    paged        [aaaa|bb..|a...|cccc|        |    |    |      ]   fixed blocks anywhere, found through a table

Where slots go: *used* hold a token; *internal* waste is reserved for a request and empty; *external* waste is free and in
total enough for the request that waits, but cut into pieces that are each too small. `planning.laboratory` feeds all of them
the same lengths and reports all of it at each step. Nothing here touches a tensor: it is the bookkeeping of PagedAttention
(Kwon et al., 2023) and of what came before, bare, so that they can be compared in seconds.
"""
from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass

from minivllm.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Job:
    """One request as an allocator sees it: lengths. Jobs of one `group` begin with the same `shared` tokens."""

    prompt: int
    output: int
    group: str | None = None
    shared: int = 0

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1:
            raise InvalidInput(f"a job needs a prompt and an output of at least 1 token, got {self.prompt} and {self.output}", "prompt")
        if not 0 <= self.shared <= self.prompt or (self.shared > 0 and self.group is None):
            raise InvalidInput(f"shared ({self.shared}) must be at most the prompt ({self.prompt}), and needs a group", "shared")

    @property
    def total(self) -> int:
        return self.prompt + self.output


class Allocator(ABC):
    """A memory of `capacity` slots that places requests, known by integer keys, and lets them grow."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InvalidInput(f"capacity must be at least 1 slot, got {capacity}", "capacity")
        self.capacity = capacity
        self.lengths: dict[int, int] = {}  # key -> tokens held
        self.held = 0  # sum of the lengths
        self.reserved = 0  # slots that nobody else can have now
        self.moved = 0  # tokens copied to another place so far

    @property
    def longest(self) -> int:
        """The longest text that an empty memory can hold."""
        return self.capacity

    @abstractmethod
    def need(self, job: Job) -> int:
        """Free slots that admitting `job` takes, if they have the right shape. A query."""

    @abstractmethod
    def try_admit(self, key: int, job: Job) -> bool:
        """Place the prompt of `job`; False, and nothing changed, if there is no place."""

    @abstractmethod
    def try_grow(self, key: int) -> bool:
        """Make room for one more token; False, and nothing changed, if there is none."""

    @abstractmethod
    def release(self, key: int) -> None:
        """Take back everything `key` holds."""

    @property
    def used(self) -> int:
        """Slots with a token in them; a slot that several requests share counts once."""
        return self.held

    def check(self) -> None:
        """Assert that every slot is free or reserved, never both, and that each request's tokens have a place."""
        assert self.held == sum(self.lengths.values())
        assert self.used <= self.reserved <= self.capacity

    def _set_length(self, key: int, tokens: int) -> None:
        """The request's new length; 0 forgets it."""
        self.held += tokens - self.lengths.pop(key, 0)
        if tokens:
            self.lengths[key] = tokens


class ContiguousAllocator(Allocator):
    """One interval per request, of the longest length it may reach, first fit. With `oracle`, of the length it will reach.

    No engine has the oracle; it shows that even a perfect forecast leaves reserved slots empty until the text has grown, and
    that intervals of many sizes leave holes.
    """

    def __init__(self, capacity: int, limit: int, oracle: bool = False) -> None:
        super().__init__(capacity)
        if not 1 <= limit <= capacity:
            raise InvalidInput(f"limit must be between 1 and the capacity ({capacity}), got {limit}", "limit")
        self.limit, self.oracle = limit, oracle
        self.holes: list[tuple[int, int]] = [(0, capacity)]  # (start, end), sorted, never adjacent
        self.places: dict[int, tuple[int, int]] = {}

    @property
    def longest(self) -> int:
        return self.limit

    def need(self, job: Job) -> int:
        return job.total if self.oracle else self.limit

    def try_admit(self, key: int, job: Job) -> bool:
        assert key not in self.places
        size = self.need(job)
        for i, (start, end) in enumerate(self.holes):
            if end - start >= size:
                self.holes[i:i + 1] = [(start + size, end)] if end - start > size else []
                self.places[key] = (start, start + size)
                self.reserved += size
                self._set_length(key, job.prompt)
                return True
        return False

    def try_grow(self, key: int) -> bool:
        start, end = self.places[key]
        if self.lengths[key] == end - start:
            return False
        self._set_length(key, self.lengths[key] + 1)
        return True

    def release(self, key: int) -> None:
        self._set_length(key, 0)
        place = self.places.pop(key)
        self.reserved -= place[1] - place[0]
        holes = sorted([*self.holes, place])
        self.holes = []
        for start, end in holes:  # neighbours become one hole
            if self.holes and self.holes[-1][1] == start:
                start = self.holes.pop()[0]
            self.holes.append((start, end))

    def check(self) -> None:
        super().check()
        assert self.reserved == sum(end - start for start, end in self.places.values())
        ends = 0
        for start, end in sorted([*self.holes, *self.places.values()]):
            assert start == ends and end > start, "intervals overlap or leave a gap"
            ends = end
        assert ends == self.capacity
        assert all(a[1] < b[0] for a, b in zip(self.holes, self.holes[1:], strict=False)), "adjacent holes were not joined"
        assert all(self.lengths[k] <= end - start for k, (start, end) in self.places.items())


class BuddyAllocator(Allocator):
    """Chunks whose sizes are powers of two (Knowlton, 1965). A chunk splits into two buddies, which join when both are free.

    A request starts in the smallest chunk that holds its prompt and one token more. When that is full it doubles: in place
    if its buddy lies above it and is free, else into a new chunk, to which everything moves.
    """

    def __init__(self, capacity: int, smallest: int = 16) -> None:
        super().__init__(capacity)
        if smallest < 1 or capacity < smallest or capacity & (capacity - 1) or smallest & (smallest - 1):
            raise InvalidInput(f"capacity and smallest must be powers of two, smallest first, got {capacity} and {smallest}", "capacity")
        self.smallest = smallest
        self.free: dict[int, set[int]] = {capacity: {0}}  # size -> starts
        self.places: dict[int, tuple[int, int]] = {}  # key -> (start, size)

    def _size(self, tokens: int) -> int:
        return max(self.smallest, 1 << (tokens - 1).bit_length())

    def need(self, job: Job) -> int:
        return self._size(job.prompt + 1)

    def _take(self, size: int) -> int | None:
        found = min((s for s, starts in self.free.items() if s >= size and starts), default=None)
        if found is None:
            return None
        start = min(self.free[found])
        self.free[found].remove(start)
        while found > size:  # give the upper halves back
            found //= 2
            self.free.setdefault(found, set()).add(start + found)
        return start

    def _give(self, start: int, size: int) -> None:
        while size < self.capacity and start ^ size in self.free.get(size, ()):  # the buddy differs in one bit
            self.free[size].remove(start ^ size)
            start, size = start & ~size, size * 2
        self.free.setdefault(size, set()).add(start)

    def try_admit(self, key: int, job: Job) -> bool:
        assert key not in self.places
        size = self.need(job)
        start = self._take(size)
        if start is None:
            return False
        self.places[key] = (start, size)
        self.reserved += size
        self._set_length(key, job.prompt)
        return True

    def try_grow(self, key: int) -> bool:
        start, size = self.places[key]
        if self.lengths[key] == size:
            buddy = start ^ size
            if buddy > start and buddy in self.free.get(size, ()):
                self.free[size].remove(buddy)
                self.places[key] = (start, 2 * size)
            else:
                larger = self._take(2 * size)
                if larger is None:
                    return False
                self.moved += self.lengths[key]
                self.places[key] = (larger, 2 * size)
                self._give(start, size)
            self.reserved += size
        self._set_length(key, self.lengths[key] + 1)
        return True

    def release(self, key: int) -> None:
        self._set_length(key, 0)
        start, size = self.places.pop(key)
        self.reserved -= size
        self._give(start, size)

    def check(self) -> None:
        super().check()
        assert self.reserved == sum(size for _, size in self.places.values())
        chunks = [(start, size) for size, starts in self.free.items() for start in starts]
        assert all(not (s < self.capacity and (start ^ s, s) in chunks) for start, s in chunks), "free buddies were not joined"
        ends = 0
        for start, size in sorted([*chunks, *self.places.values()]):
            assert start == ends and start % size == 0, "chunks overlap, leave a gap or are not aligned"
            ends += size
        assert ends == self.capacity
        assert all(self.lengths[k] <= size for k, (_, size) in self.places.items())


class PagedAllocator(Allocator):
    """Blocks of `block_size` slots, anywhere, counted references. With `sharing`, full blocks of a common prefix exist once.

    Only the blocks of requests that run now are shared, and only full ones: they are never written again, so they need no
    copy. (The engine does more: it keeps a finished request's blocks for as long as nobody needs the room.)
    """

    def __init__(self, capacity: int, block_size: int = 16, sharing: bool = False) -> None:
        super().__init__(capacity)
        if not 1 <= block_size <= capacity:
            raise InvalidInput(f"block_size must be between 1 and the capacity ({capacity}), got {block_size}", "block_size")
        self.block_size, self.sharing = block_size, sharing
        self.free = list(range(capacity // block_size))  # a heap: lowest block first, so that pictures are stable
        self.tables: dict[int, list[int]] = {}  # key -> block ids, in the order of the text
        self.refs: dict[int, int] = {}  # block -> requests that have it in their table
        self.prefixes: dict[tuple[str, int], int] = {}  # (group, i) -> block that holds block i of the group's prefix
        self.prefix_of: dict[int, tuple[str, int]] = {}
        self.saved = 0  # slots that would be needed more without sharing

    @property
    def longest(self) -> int:
        return self.capacity // self.block_size * self.block_size

    def _shared_blocks(self, job: Job) -> list[int]:
        found: list[int] = []
        if self.sharing and job.group is not None:
            while len(found) < job.shared // self.block_size and (job.group, len(found)) in self.prefixes:
                found.append(self.prefixes[job.group, len(found)])
        return found

    def need(self, job: Job) -> int:
        return (-(-job.prompt // self.block_size) - len(self._shared_blocks(job))) * self.block_size

    def _take(self) -> int:
        block = heapq.heappop(self.free)
        self.refs[block] = 1
        self.reserved += self.block_size
        return block

    def try_admit(self, key: int, job: Job) -> bool:
        assert key not in self.tables
        if self.need(job) > len(self.free) * self.block_size:
            return False
        table = self._shared_blocks(job)
        for block in table:
            self.refs[block] += 1
            self.saved += self.block_size
        for i in range(len(table), -(-job.prompt // self.block_size)):
            table.append(self._take())
            if self.sharing and job.group is not None and i < job.shared // self.block_size:
                self.prefixes[job.group, i] = table[i]
                self.prefix_of[table[i]] = (job.group, i)
        self.tables[key] = table
        self._set_length(key, job.prompt)
        return True

    def try_grow(self, key: int) -> bool:
        if self.lengths[key] == len(self.tables[key]) * self.block_size:
            if not self.free:
                return False
            self.tables[key].append(self._take())
        self._set_length(key, self.lengths[key] + 1)
        return True

    def release(self, key: int) -> None:
        self._set_length(key, 0)
        for block in self.tables.pop(key):
            self.refs[block] -= 1
            if self.refs[block]:
                self.saved -= self.block_size
                continue
            del self.refs[block]
            self.reserved -= self.block_size
            heapq.heappush(self.free, block)
            if block in self.prefix_of:
                del self.prefixes[self.prefix_of.pop(block)]

    @property
    def used(self) -> int:
        return self.held - self.saved  # a shared block is full, by construction

    def check(self) -> None:
        super().check()
        assert self.reserved == len(self.refs) * self.block_size
        assert self.saved == sum(refs - 1 for refs in self.refs.values()) * self.block_size
        assert sorted([*self.free, *self.refs]) == list(range(self.capacity // self.block_size)), "a block is lost or doubly owned"
        held: dict[int, int] = {}
        for key, table in self.tables.items():
            assert 0 <= len(table) * self.block_size - self.lengths[key] < self.block_size, "a table does not fit its length"
            for block in table:
                held[block] = held.get(block, 0) + 1
        assert held == self.refs, "a reference count is not the number of tables that name the block"
        assert {block: prefix for prefix, block in self.prefixes.items()} == self.prefix_of
