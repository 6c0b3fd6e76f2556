"""Three KV-cache allocators behind one interface: they store growing sequences in a memory of fixed size.

A request's keys and values grow by one slot (the memory of one token) per step, and their final length is not known beforehand.
The allocators differ in what they reserve:

    contiguous   [aaaaa..............|bb.................|     ]   the longest possible sequence; it never moves
    buddy        [aaaaa...|bb..|cccc|        |                 ]   a power of two, doubled when full; this may move the sequence
    paged        [aaaa|bb..|a...|cccc|        |    |    |      ]   blocks of fixed size anywhere, found through a table

A slot is *used* if it holds a token. *Internal* waste: reserved but empty slots. *External* waste: free slots, enough in total for the
waiting request, but in pieces that are too small. `planning.allocator_replay` gives all allocators the same requests and reports these
numbers at each step. There are no tensors here. This is only the bookkeeping of PagedAttention (Kwon et al., 2023) and of the
allocators before it, so they can be compared in seconds.
"""
from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass

from minivllm.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """The lengths of one request, in tokens. All requests of one `group` start with the same `shared` tokens."""

    prompt: int
    output: int
    group: str | None = None
    shared: int = 0

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1:
            raise InvalidInput(f"a request needs a prompt and an output of at least 1 token, got {self.prompt} and {self.output}", "prompt")
        if not 0 <= self.shared <= self.prompt or (self.shared > 0 and self.group is None):
            raise InvalidInput(f"shared ({self.shared}) must be at most the prompt ({self.prompt}), and needs a group: lower it, or name a "
                               "group", "shared")

    @property
    def total(self) -> int:
        return self.prompt + self.output


class Allocator(ABC):
    """A memory of `capacity` slots. Requests are identified by integer keys."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InvalidInput(f"capacity must be at least 1 slot, got {capacity}", "capacity")
        self.capacity = capacity
        self.lengths: dict[int, int] = {}  # key -> tokens held
        self.held = 0  # sum of `lengths`
        self.reserved = 0  # slots that no other request can get now
        self.moved = 0  # tokens copied from one place in memory to another so far

    @property
    def longest(self) -> int:
        """The longest sequence that an empty memory can hold."""
        return self.capacity

    @abstractmethod
    def need(self, request: RequestLengths) -> int:
        """Free slots that the request's prompt takes. It changes nothing."""

    @abstractmethod
    def try_admit(self, key: int, request: RequestLengths) -> bool:
        """Reserve slots for the prompt. Without room: False, and nothing changes."""

    @abstractmethod
    def try_grow(self, key: int) -> bool:
        """Add a slot for one more token. Without room: False, and nothing changes."""

    @abstractmethod
    def release(self, key: int) -> None:
        """Free everything that `key` holds."""

    @property
    def used(self) -> int:
        """Slots that hold a token. A slot that several requests share counts once."""
        return self.held

    def check(self) -> None:
        """Assert that every slot is either free or reserved, and that each request's tokens have slots."""
        assert self.held == sum(self.lengths.values())
        assert self.used <= self.reserved <= self.capacity

    def _set_length(self, key: int, tokens: int) -> None:
        """Set the request's length. 0 removes the request."""
        self.held += tokens - self.lengths.pop(key, 0)
        if tokens:
            self.lengths[key] = tokens


class ContiguousAllocator(Allocator):
    """One interval per request, first fit. It has the length `limit`, or with `oracle` the request's final length.

    No engine knows the final length. The oracle shows that even a perfect forecast leaves slots empty until the sequence has grown,
    and that intervals of many sizes leave holes.
    """

    def __init__(self, capacity: int, limit: int, oracle: bool = False) -> None:
        super().__init__(capacity)
        if not 1 <= limit <= capacity:
            raise InvalidInput(f"limit must be between 1 and the capacity ({capacity}), got {limit}", "limit")
        self.limit, self.oracle = limit, oracle
        self.holes: list[tuple[int, int]] = [(0, capacity)]  # (start, end), sorted, never adjacent
        self.intervals: dict[int, tuple[int, int]] = {}  # key -> (start, end)

    @property
    def longest(self) -> int:
        return self.limit

    def need(self, request: RequestLengths) -> int:
        return request.total if self.oracle else self.limit

    def try_admit(self, key: int, request: RequestLengths) -> bool:
        assert key not in self.intervals
        size = self.need(request)
        for i, (start, end) in enumerate(self.holes):
            if end - start >= size:
                self.holes[i:i + 1] = [(start + size, end)] if end - start > size else []
                self.intervals[key] = (start, start + size)
                self.reserved += size
                self._set_length(key, request.prompt)
                return True
        return False

    def try_grow(self, key: int) -> bool:
        start, end = self.intervals[key]
        if self.lengths[key] == end - start:
            return False
        self._set_length(key, self.lengths[key] + 1)
        return True

    def release(self, key: int) -> None:
        self._set_length(key, 0)
        interval = self.intervals.pop(key)
        self.reserved -= interval[1] - interval[0]
        holes = sorted([*self.holes, interval])
        self.holes = []
        for start, end in holes:  # adjacent holes become one
            if self.holes and self.holes[-1][1] == start:
                start = self.holes.pop()[0]
            self.holes.append((start, end))

    def check(self) -> None:
        super().check()
        assert self.reserved == sum(end - start for start, end in self.intervals.values())
        ends = 0
        for start, end in sorted([*self.holes, *self.intervals.values()]):
            assert start == ends and end > start, "intervals overlap or leave a gap"
            ends = end
        assert ends == self.capacity
        assert all(a[1] < b[0] for a, b in zip(self.holes, self.holes[1:], strict=False)), "adjacent holes were not joined"
        assert all(self.lengths[k] <= end - start for k, (start, end) in self.intervals.items())


class BuddyAllocator(Allocator):
    """Chunks whose sizes are powers of two (Knowlton, 1965). A chunk splits into two buddies, which join again when both are free.

    A request starts in the smallest chunk that holds its prompt and one more token. A full chunk is doubled. If its buddy lies above
    it and is free, the two join and nothing moves. Otherwise all tokens move to a new chunk of twice the size.
    """

    def __init__(self, capacity: int, smallest: int = 16) -> None:
        super().__init__(capacity)
        if smallest < 1 or capacity < smallest or capacity & (capacity - 1) or smallest & (smallest - 1):
            raise InvalidInput(f"capacity and smallest must be powers of two, and smallest at most capacity, got {capacity} and {smallest}",
                               "capacity")
        self.smallest = smallest
        self.free: dict[int, set[int]] = {capacity: {0}}  # size -> starts
        self.chunks: dict[int, tuple[int, int]] = {}  # key -> (start, size)

    def _size(self, tokens: int) -> int:
        return max(self.smallest, 1 << (tokens - 1).bit_length())

    def need(self, request: RequestLengths) -> int:
        return self._size(request.prompt + 1)

    def _allocate(self, size: int) -> int | None:
        found = min((s for s, starts in self.free.items() if s >= size and starts), default=None)
        if found is None:
            return None
        start = min(self.free[found])
        self.free[found].remove(start)
        while found > size:  # split, and free the upper half
            found //= 2
            self.free.setdefault(found, set()).add(start + found)
        return start

    def _free(self, start: int, size: int) -> None:
        while size < self.capacity and start ^ size in self.free.get(size, ()):  # the buddy differs in one bit
            self.free[size].remove(start ^ size)
            start, size = start & ~size, size * 2
        self.free.setdefault(size, set()).add(start)

    def try_admit(self, key: int, request: RequestLengths) -> bool:
        assert key not in self.chunks
        size = self.need(request)
        start = self._allocate(size)
        if start is None:
            return False
        self.chunks[key] = (start, size)
        self.reserved += size
        self._set_length(key, request.prompt)
        return True

    def try_grow(self, key: int) -> bool:
        start, size = self.chunks[key]
        if self.lengths[key] == size:
            buddy = start ^ size
            if buddy > start and buddy in self.free.get(size, ()):
                self.free[size].remove(buddy)
                self.chunks[key] = (start, 2 * size)
            else:
                larger = self._allocate(2 * size)
                if larger is None:
                    return False
                self.moved += self.lengths[key]
                self.chunks[key] = (larger, 2 * size)
                self._free(start, size)
            self.reserved += size
        self._set_length(key, self.lengths[key] + 1)
        return True

    def release(self, key: int) -> None:
        self._set_length(key, 0)
        start, size = self.chunks.pop(key)
        self.reserved -= size
        self._free(start, size)

    def check(self) -> None:
        super().check()
        assert self.reserved == sum(size for _, size in self.chunks.values())
        free = [(start, size) for size, starts in self.free.items() for start in starts]
        assert all(not (s < self.capacity and (start ^ s, s) in free) for start, s in free), "free buddies were not joined"
        ends = 0
        for start, size in sorted([*free, *self.chunks.values()]):
            assert start == ends and start % size == 0, "chunks overlap, leave a gap or are not aligned"
            ends += size
        assert ends == self.capacity
        assert all(self.lengths[k] <= size for k, (_, size) in self.chunks.items())


class PagedAllocator(Allocator):
    """Blocks of `block_size` slots anywhere in memory, with reference counts. With `sharing`, a common prefix is stored once.

    Only full blocks of running requests are shared. They are never written again, so they need no copy. (The engine's prefix cache
    also keeps the blocks of finished requests until the memory is needed.)
    """

    def __init__(self, capacity: int, block_size: int = 16, sharing: bool = False) -> None:
        super().__init__(capacity)
        if not 1 <= block_size <= capacity:
            raise InvalidInput(f"block_size must be between 1 and the capacity ({capacity}), got {block_size}", "block_size")
        self.block_size, self.sharing = block_size, sharing
        self.free = list(range(capacity // block_size))  # a heap: the lowest block is allocated first, so results are reproducible
        self.tables: dict[int, list[int]] = {}  # key -> block ids, in the order of the tokens
        self.refs: dict[int, int] = {}  # block -> number of tables that contain it
        self.prefixes: dict[tuple[str, int], int] = {}  # (group, i) -> block with part i of the group's prefix
        self.prefix_of: dict[int, tuple[str, int]] = {}
        self.saved = 0  # additional slots that would be used without sharing

    @property
    def longest(self) -> int:
        return self.capacity // self.block_size * self.block_size

    def _shared_blocks(self, request: RequestLengths) -> list[int]:
        found: list[int] = []
        if self.sharing and request.group is not None:
            while len(found) < request.shared // self.block_size and (request.group, len(found)) in self.prefixes:
                found.append(self.prefixes[request.group, len(found)])
        return found

    def need(self, request: RequestLengths) -> int:
        return (-(-request.prompt // self.block_size) - len(self._shared_blocks(request))) * self.block_size

    def _allocate(self) -> int:
        block = heapq.heappop(self.free)
        self.refs[block] = 1
        self.reserved += self.block_size
        return block

    def try_admit(self, key: int, request: RequestLengths) -> bool:
        assert key not in self.tables
        if self.need(request) > len(self.free) * self.block_size:
            return False
        table = self._shared_blocks(request)
        for block in table:
            self.refs[block] += 1
            self.saved += self.block_size
        for i in range(len(table), -(-request.prompt // self.block_size)):
            table.append(self._allocate())
            if self.sharing and request.group is not None and i < request.shared // self.block_size:
                self.prefixes[request.group, i] = table[i]
                self.prefix_of[table[i]] = (request.group, i)
        self.tables[key] = table
        self._set_length(key, request.prompt)
        return True

    def try_grow(self, key: int) -> bool:
        if self.lengths[key] == len(self.tables[key]) * self.block_size:
            if not self.free:
                return False
            self.tables[key].append(self._allocate())
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
        return self.held - self.saved  # exact, because only full blocks are shared

    def check(self) -> None:
        super().check()
        assert self.reserved == len(self.refs) * self.block_size
        assert self.saved == sum(refs - 1 for refs in self.refs.values()) * self.block_size
        assert sorted([*self.free, *self.refs]) == list(range(self.capacity // self.block_size)), "a block is lost, or both free and used"
        held: dict[int, int] = {}
        for key, table in self.tables.items():
            assert 0 <= len(table) * self.block_size - self.lengths[key] < self.block_size, "a table does not fit its length"
            for block in table:
                held[block] = held.get(block, 0) + 1
        assert held == self.refs, "a reference count is not the number of tables with the block"
        assert {block: prefix for prefix, block in self.prefixes.items()} == self.prefix_of
