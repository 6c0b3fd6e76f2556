"""One sequence's map from logical blocks to physical ones, for each KV group.

    position            0 .. 3    4 .. 7    8 .. 11   12 .. 15        block_size 4, 14 tokens
    logical block          0         1         2         3
    group 0  (full)       17         3        22         8            the last block is partly filled
    group 1  (window 4)    -         -         5        11            - is the null block: outside the window, freed

A table grows by appending; entries never change place. A fork shares all blocks with its parent, including the partly filled
last one. Before a sequence writes into a shared block it makes a private copy (*copy-on-write*). When only one owner is
left, it writes in place. Full blocks are never written again and stay shared.
"""
from __future__ import annotations

from collections.abc import Iterator

from minivllm.core.block_pool import BlockPool
from minivllm.core.plan import NULL_BLOCK, BlockId


class BlockTable:
    """Physical block ids by group and logical index. All groups have the same length. The table owns one reference per entry."""

    __slots__ = ("_num_dropped", "block_size", "groups")

    def __init__(self, block_size: int, groups: list[list[BlockId]]) -> None:
        self.block_size = block_size
        self.groups = groups  # [G][blocks]
        self._num_dropped = [0] * len(groups)  # leading entries known to be null

    @property
    def capacity(self) -> int:
        """Number of tokens for which the table has slots."""
        return len(self.groups[0]) * self.block_size

    @property
    def num_blocks(self) -> int:
        """Entries of all groups that are not outside a window."""
        return len(self.groups) * len(self.groups[0]) - sum(self._num_dropped)

    def blocks(self) -> Iterator[BlockId]:
        return (block for group in self.groups for block in group if block != NULL_BLOCK)

    def num_missing_blocks(self, num_tokens: int) -> int:
        """Blocks, over all groups, that must be allocated before there are slots for this many tokens."""
        missing = -(-num_tokens // self.block_size) - len(self.groups[0])
        return missing * len(self.groups) if missing > 0 else 0

    def grow(self, pool: BlockPool, num_tokens: int) -> tuple[tuple[BlockId, ...], ...]:
        """Append blocks until there are slots for `num_tokens`. Returns the appended blocks by group."""
        missing = -(-num_tokens // self.block_size) - len(self.groups[0])
        appended = []
        for group in self.groups:
            blocks = pool.allocate_many(missing) if missing > 0 else []
            group.extend(blocks)
            appended.append(tuple(blocks))
        return tuple(appended)

    def drop_before(self, group: int, position: int) -> list[tuple[int, BlockId]]:
        """Null the group's entries that end before `position`: [(logical index, block)]. The caller now owns their references."""
        blocks, dropped = self.groups[group], []
        end = min(position // self.block_size, len(blocks))
        for index in range(self._num_dropped[group], end):
            if blocks[index] != NULL_BLOCK:
                dropped.append((index, blocks[index]))
                blocks[index] = NULL_BLOCK
        self._num_dropped[group] = max(self._num_dropped[group], end)
        return dropped

    def fork(self, pool: BlockPool) -> BlockTable:
        """A table that shares every block."""
        for block in self.blocks():
            pool.touch(block)
        return BlockTable(self.block_size, [list(group) for group in self.groups])

    def shared_at(self, pool: BlockPool, position: int) -> list[int]:
        """Groups whose block at this position has another owner too: writing there needs a copy first."""
        index = position // self.block_size
        if index >= len(self.groups[0]):
            return []
        return [g for g, group in enumerate(self.groups) if pool.ref_counts[group[index]] > 1]

    def copy_on_write(self, pool: BlockPool, group: int, position: int) -> tuple[int, BlockId, BlockId]:
        """Replace the shared block at this position by a new one: (logical index, shared block, new block)."""
        index = position // self.block_size
        shared, own = self.groups[group][index], pool.allocate()
        self.groups[group][index] = own
        pool.free(shared)
        return index, shared, own

    def release(self, pool: BlockPool) -> None:
        """Free all blocks, the last one first, so that shared prefixes are evicted last."""
        pool.free_many(block for indexed in zip(*map(reversed, self.groups), strict=True) for block in indexed if block != NULL_BLOCK)
        for group in self.groups:
            group.clear()
        self._num_dropped = [0] * len(self.groups)

    def as_tuples(self) -> tuple[tuple[BlockId, ...], ...]:
        return tuple(tuple(group) for group in self.groups)
