"""The physical blocks of the KV cache: reference counts, the free list, and which content can be found again.

A block holds the keys and values of a fixed number of tokens. A block with references is *used*: block tables and moves to or
from host memory hold references, and sequences with the same prefix reference the same blocks. A block without references is
*free*. A free block that has a key (see `prefix_cache`) is also *cached*: its content stays until the block is allocated again
(lazy eviction), and until then a request with the same prefix can reuse it.

The free list is a doubly linked list, stored in two lists of integers. The null block, which is never allocated, marks both ends:

              allocated next                                          allocated last
    0  ->     7      ->     3      ->     9      ->     4      ->     1      ->   0
           no content    A's last     A's middle    B's last     a prefix shared by A and B

A block without a key goes to the front, because reusing it loses nothing. Blocks that were freed earlier are evicted earlier
(LRU). A finished sequence frees its last block first, so that shared prefixes are evicted last. A prefix hit unlinks a cached
block from the middle of the list. Every operation takes constant time.
"""
from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from minivllm.core.plan import NULL_BLOCK, BlockId

BlockKey: TypeAlias = Hashable  # identifies a block's content: equal keys mean equal content


class BlockPool:
    """Blocks 0 to num_blocks - 1. Block 0 is the null block: it is never allocated."""

    __slots__ = ("_block_of", "_keys", "_next", "_previous", "num_blocks", "num_cached", "num_free", "ref_counts")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, "a pool has at least the null block"
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.num_free = num_blocks - 1  # including cached blocks
        self.num_cached = 0  # free blocks with a key
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._block_of: dict[BlockKey, BlockId] = {}
        self._next: list[BlockId] = [*range(1, num_blocks), NULL_BLOCK]
        self._previous: list[BlockId] = [num_blocks - 1, *range(num_blocks - 1)]

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    # References.

    def allocate(self) -> BlockId:
        """Evict the first block of the free list and give it one reference. The list must not be empty."""
        return self.allocate_many(1)[0]

    def allocate_many(self, count: int) -> list[BlockId]:
        """Allocate `count` blocks. So many must be free."""
        assert count <= self.num_free, f"{count} blocks were requested and {self.num_free} are free: check num_free first"
        following, keys, ref_counts = self._next, self._keys, self.ref_counts
        blocks: list[BlockId] = []
        block = following[NULL_BLOCK]
        for _ in range(count):
            if keys[block] is not None:
                self.evict(block)
            ref_counts[block] = 1
            blocks.append(block)
            block = following[block]
        following[NULL_BLOCK] = block
        self._previous[block] = NULL_BLOCK
        self.num_free -= count
        return blocks

    def touch(self, block: BlockId) -> None:
        """Add a reference to a used block, or to a cached one, which then leaves the free list."""
        if self.ref_counts[block] == 0:
            assert self._keys[block] is not None, f"block {block} is free and not cached, so there is nothing to reuse"
            self._unlink(block)
            self.num_cached -= 1
        self.ref_counts[block] += 1

    def free(self, block: BlockId, *, evict_first: bool = False) -> None:
        """Remove a reference. Without references the block joins the free list: at the front if it may be evicted first."""
        self.free_many((block,), evict_first=evict_first)

    def free_many(self, blocks: Iterable[BlockId], *, evict_first: bool = False) -> None:
        """Remove a reference from each block, in order: a cached block that comes earlier will be evicted earlier."""
        following, previous, keys, ref_counts = self._next, self._previous, self._keys, self.ref_counts
        for block in blocks:
            count = ref_counts[block] - 1
            assert count >= 0, f"block {block} is freed and has no reference"
            ref_counts[block] = count
            if count:
                continue
            keyed = keys[block] is not None
            before = NULL_BLOCK if evict_first or not keyed else previous[NULL_BLOCK]
            after = following[before]
            following[before] = previous[after] = block
            previous[block], following[block] = before, after
            self.num_free += 1
            self.num_cached += keyed

    # Content.

    def cache(self, block: BlockId, key: BlockKey) -> None:
        """Let `lookup` find a used block, whose content is final, by `key`. If another block has this key, nothing changes."""
        assert self.ref_counts[block] > 0, f"block {block} is free, so its content is not known"
        if self._keys[block] is None and key not in self._block_of:
            self._keys[block] = key
            self._block_of[key] = block

    def lookup(self, key: BlockKey) -> BlockId | None:
        """The block with this content, used or free. `touch` it before the next allocation, which could evict it."""
        return self._block_of.get(key)

    def longest_prefix(self, group: int, block_hashes: Sequence[bytes]) -> list[BlockId]:
        """The blocks with the keys (group, hash), in order, up to the first hash that is not found."""
        find, blocks = self._block_of.get, []
        for block_hash in block_hashes:
            block = find((group, block_hash))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def key(self, block: BlockId) -> BlockKey | None:
        return self._keys[block]

    def evict(self, block: BlockId) -> None:
        """Remove the block's key, if it has one: its content is not found any more."""
        key = self._keys[block]
        if key is None:
            return
        self._keys[block] = None
        del self._block_of[key]
        if self.ref_counts[block] == 0:
            self.num_cached -= 1

    def evict_all(self) -> None:
        for block in list(self._block_of.values()):
            self.evict(block)

    # The free list.

    def free_list(self) -> Iterator[BlockId]:
        """Free blocks in the order in which they would be allocated."""
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            yield block
            block = self._next[block]

    def _unlink(self, block: BlockId) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self.num_free -= 1

    def check(self, owners: Mapping[BlockId, Sequence[str]]) -> None:
        """Assert that references and owners agree. `owners`: block -> one description per reference, such as "row 3"."""
        assert NULL_BLOCK not in owners, f"the null block has owners: {owners[NULL_BLOCK]}"
        assert self.ref_counts[NULL_BLOCK] == 0 and self._keys[NULL_BLOCK] is None, "the null block was allocated"
        free = list(self.free_list())
        assert len(free) == len(set(free)) == self.num_free, f"the free list is {free}, and num_free is {self.num_free}"
        free_set = set(free)
        for block in range(1, self.num_blocks):
            block_owners, count = owners.get(block, ()), self.ref_counts[block]
            assert len(block_owners) == count, f"block {block} has {count} references, and its owners are {list(block_owners)}"
            assert (block in free_set) == (count == 0), f"block {block} has {count} references; in the free list: {block in free_set}"
        keyed = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {key: block for block, key in keyed.items()} == self._block_of, "the keys and the index of keys disagree"
        assert self.num_cached == sum(block in keyed for block in free), "num_cached is not the number of free blocks with a key"
