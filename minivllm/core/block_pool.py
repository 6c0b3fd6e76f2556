"""The physical blocks of the KV cache: who uses each, which are free, and what the free ones still remember.

A block is a fixed number of tokens' keys and values. It is *used* while somebody references it (a sequence's block table, or
a move to or from host memory); sequences that start alike reference the same blocks. A block nobody references is *free*, and
if it has a key (see `prefix_cache`) it is also *cached*: its content stays until the block is handed out again ("lazy
eviction"), so a request that comes back finds it.

Free blocks form a ring, linked through two lists of integers and closed by the null block, which is never handed out:

              handed out next                                        handed out last
    0  ->     7      ->     3      ->     9      ->     4      ->     1      ->   0
           no content     A's tail   A's middle     B's tail    a prefix that A and B shared

What has no key goes to the front: nothing is lost by reusing it. A sequence gives its blocks back last one first, so tails go
before the beginnings that others are more likely to share, and what was given back earlier goes before what came later (LRU).
Being linked, a cached block leaves the middle of the ring at no cost when a prefix hit revives it: every operation is O(1).
"""
from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from minivllm.core.plan import NULL_BLOCK, BlockId

BlockKey: TypeAlias = Hashable  # names a block's content; equal keys, equal content


class BlockPool:
    """`num_blocks` blocks with ids 0 to num_blocks - 1, of which block 0 is the null block and belongs to nobody."""

    __slots__ = ("_block_of", "_keys", "_next", "_previous", "num_blocks", "num_cached", "num_free", "ref_counts")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, "the null block at least"
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.num_free = num_blocks - 1  # cached ones included
        self.num_cached = 0  # free blocks with a key
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._block_of: dict[BlockKey, BlockId] = {}
        self._next: list[BlockId] = [*range(1, num_blocks), NULL_BLOCK]
        self._previous: list[BlockId] = [num_blocks - 1, *range(num_blocks - 1)]

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    # Taking and giving back.

    def allocate(self) -> BlockId:
        """The free block at the front of the ring, forgotten by the cache and referenced once. There must be one."""
        return self.allocate_many(1)[0]

    def allocate_many(self, count: int) -> list[BlockId]:
        """`count` blocks from the front of the ring, each as `allocate` gives it. There must be so many."""
        assert count <= self.num_free, f"{count} blocks, but {self.num_free} are free: ask `num_free` first"
        following, keys, ref_counts = self._next, self._keys, self.ref_counts
        blocks: list[BlockId] = []
        block = following[NULL_BLOCK]
        for _ in range(count):
            if keys[block] is not None:
                self.forget(block)
            ref_counts[block] = 1
            blocks.append(block)
            block = following[block]
        following[NULL_BLOCK] = block
        self._previous[block] = NULL_BLOCK
        self.num_free -= count
        return blocks

    def touch(self, block: BlockId) -> None:
        """One more reference to a block that is used, or that is free and cached."""
        if self.ref_counts[block] == 0:
            assert self._keys[block] is not None, f"block {block} is free and holds nothing worth a reference"
            self._unlink(block)
            self.num_cached -= 1
        self.ref_counts[block] += 1

    def free(self, block: BlockId, *, evict_first: bool = False) -> None:
        """One reference less; the last one puts the block into the ring, at the front if it may be reused first."""
        self.free_all((block,), evict_first=evict_first)

    def free_all(self, blocks: Iterable[BlockId], *, evict_first: bool = False) -> None:
        """`free` for one block after the other: of those with a key, whoever comes first will be evicted first."""
        following, previous, keys, ref_counts = self._next, self._previous, self._keys, self.ref_counts
        for block in blocks:
            count = ref_counts[block] - 1
            assert count >= 0, f"block {block} is freed more often than it was taken"
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

    def commit(self, block: BlockId, key: BlockKey) -> None:
        """The used block's content is final and is what `key` names. The first block with a key keeps it."""
        assert self.ref_counts[block] > 0, f"block {block} is free: its content is nobody's"
        if self._keys[block] is None and key not in self._block_of:
            self._keys[block] = key
            self._block_of[key] = block

    def lookup(self, key: BlockKey) -> BlockId | None:
        """The block with this content, used or free; `touch` it before anything is allocated."""
        return self._block_of.get(key)

    def beginning(self, group: int, digests: Sequence[bytes]) -> list[BlockId]:
        """The blocks with the keys (group, digest), in order, up to the first that nobody has."""
        find, blocks = self._block_of.get, []
        for digest in digests:
            block = find((group, digest))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def key(self, block: BlockId) -> BlockKey | None:
        return self._keys[block]

    def forget(self, block: BlockId) -> None:
        """The block's content is no longer to be found."""
        key = self._keys[block]
        if key is None:
            return
        self._keys[block] = None
        del self._block_of[key]
        if self.ref_counts[block] == 0:
            self.num_cached -= 1

    def forget_all(self) -> None:
        for block in list(self._block_of.values()):
            self.forget(block)

    def free_blocks(self) -> Iterator[BlockId]:
        """Free blocks in the order in which they would be handed out."""
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            yield block
            block = self._next[block]

    # The ring.

    def _unlink(self, block: BlockId) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self.num_free -= 1

    def check(self, owners: Mapping[BlockId, Sequence[str]]) -> None:
        """Assert that every reference has an owner and the other way round. `owners`: block -> who holds it, once per reference."""
        assert NULL_BLOCK not in owners, f"{owners[NULL_BLOCK]} claim the null block"
        assert self.ref_counts[NULL_BLOCK] == 0 and self._keys[NULL_BLOCK] is None, "the null block was handed out"
        free = list(self.free_blocks())
        assert len(free) == len(set(free)) == self.num_free, f"the ring holds {free}, counted {self.num_free}"
        free_set = set(free)
        for block in range(1, self.num_blocks):
            holders, count = owners.get(block, ()), self.ref_counts[block]
            assert len(holders) == count, f"block {block} counts {count} references, held by {list(holders)}"
            assert (block in free_set) == (count == 0), f"block {block}: {count} references, free: {block in free_set}"
        keyed = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {key: block for block, key in keyed.items()} == self._block_of, "keys and the index of keys disagree"
        assert self.num_cached == sum(block in keyed for block in free), "cached free blocks are miscounted"
