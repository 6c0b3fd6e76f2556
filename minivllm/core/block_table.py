"""One sequence's map from logical blocks to physical ones, for each KV group.

    position            0 .. 3    4 .. 7    8 .. 11   12 .. 15        block_size 4, 14 tokens
    logical block          0         1         2         3
    group 0  (full)       17         3        22         8            the last block is partly filled
    group 1  (window 4)    -         -         5        11            - is the null block: out of the window, given back

Growing appends; nothing is ever moved. A fork shares all blocks with its origin, the partly filled last one too: each of the
two must own that block before it writes there, so whoever writes first copies it, and the last one left writes in place
(*copy-on-write*). Full blocks are never written again and stay shared.
"""
from __future__ import annotations

from collections.abc import Iterator

from minivllm.core.block_pool import BlockPool
from minivllm.core.plan import NULL_BLOCK, BlockId


class BlockTable:
    """Physical block ids by group and logical index. All groups have the same length; the table owns one reference per entry."""

    __slots__ = ("_num_dropped", "block_size", "groups")

    def __init__(self, block_size: int, groups: list[list[BlockId]]) -> None:
        self.block_size = block_size
        self.groups = groups  # [G][blocks]
        self._num_dropped = [0] * len(groups)  # leading entries known to be null

    @property
    def capacity(self) -> int:
        """Tokens there are slots for."""
        return len(self.groups[0]) * self.block_size

    def blocks(self) -> Iterator[BlockId]:
        return (block for group in self.groups for block in group if block != NULL_BLOCK)

    def num_blocks_to_hold(self, num_tokens: int) -> int:
        """Blocks that must be allocated, over all groups, before there are slots for this many tokens."""
        missing = -(-num_tokens // self.block_size) - len(self.groups[0])
        return missing * len(self.groups) if missing > 0 else 0

    def grow(self, pool: BlockPool, num_tokens: int) -> tuple[tuple[BlockId, ...], ...]:
        """Append blocks until there are slots for `num_tokens`; what was appended, by group."""
        missing = -(-num_tokens // self.block_size) - len(self.groups[0])
        appended = []
        for group in self.groups:
            blocks = pool.allocate_many(missing) if missing > 0 else []
            group.extend(blocks)
            appended.append(tuple(blocks))
        return tuple(appended)

    def drop_before(self, group: int, position: int) -> list[tuple[int, BlockId]]:
        """Null the group's entries that lie wholly before `position`: [(logical index, block)]. Their references pass to the caller."""
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
        """Groups whose block at this position has another owner too, so that writing there needs a copy first."""
        index = position // self.block_size
        if index >= len(self.groups[0]):
            return []
        return [g for g, group in enumerate(self.groups) if pool.ref_counts[group[index]] > 1]

    def copy_on_write(self, pool: BlockPool, group: int, position: int) -> tuple[int, BlockId, BlockId]:
        """Own the block at this position: (logical index, shared block, own block). The shared one stays with its other owners."""
        index = position // self.block_size
        shared, own = self.groups[group][index], pool.allocate()
        self.groups[group][index] = own
        pool.free(shared)
        return index, shared, own

    def release(self, pool: BlockPool) -> None:
        """Give everything back, last block first, so that beginnings stay cached longest."""
        pool.free_all(block for indexed in zip(*map(reversed, self.groups), strict=True) for block in indexed if block != NULL_BLOCK)
        for group in self.groups:
            group.clear()
        self._num_dropped = [0] * len(self.groups)

    def as_tuples(self) -> tuple[tuple[BlockId, ...], ...]:
        return tuple(tuple(group) for group in self.groups)
