"""CPU KV offload: blocks of swapped-out sequences and evicted prefixes in host memory, and the moves between host and device.

A plan carries moves, and the worker reports each one when it is finished: perhaps several steps later, and in any order. Until
then the move holds one reference to each of its two blocks, so neither can be allocated, and the pools need no extra state.

    move out    device block -> host block    takes over the reference that the sequence (or the cache) held to the device block
    move in     host block -> device block    readable in the step that carries the move: a step copies in before it computes
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

from minivllm.core.block_pool import BlockKey, BlockPool
from minivllm.core.plan import NULL_BLOCK, BlockId, BlockMove
from minivllm.core.prefix_cache import PrefixMatch
from minivllm.core.request import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class PendingMove:
    """A move that is not finished."""

    outward: bool
    device_block: BlockId
    host_block: int
    key: BlockKey | None  # a move out of a full block: the host block is cached under this key when the move is finished
    sequence: Sequence | None  # a move out of a preempted sequence: it cannot resume before the move is finished


class CPUOffload:
    """The host pool and all pending moves. With 0 host blocks nothing is ever moved."""

    __slots__ = ("_new_moves_in", "_new_moves_out", "_next_id", "device", "moves", "pool")

    def __init__(self, device: BlockPool, num_host_blocks: int) -> None:
        self.device = device
        self.pool = BlockPool(max(1, num_host_blocks))
        self.moves: dict[int, PendingMove] = {}
        self._next_id = 0
        self._new_moves_out: list[BlockMove] = []  # not on a plan yet
        self._new_moves_in: list[BlockMove] = []

    # Moves.

    def _start_move_out(self, device_block: BlockId, key: BlockKey | None, sequence: Sequence | None) -> int:
        """The move takes over the caller's reference to the device block. Returns the host block, which the move references."""
        host_block = self.pool.allocate()
        self._new_moves_out.append(self._register(PendingMove(True, device_block, host_block, key, sequence)))
        return host_block

    def start_move_in(self, host_block: int, device_block: BlockId) -> None:
        """The move adds its own reference to both blocks."""
        self.pool.touch(host_block)
        self.device.touch(device_block)
        self._new_moves_in.append(self._register(PendingMove(False, device_block, host_block, None, None)))

    def _register(self, move: PendingMove) -> BlockMove:
        move_id = self._next_id
        self._next_id += 1
        self.moves[move_id] = move
        return BlockMove(move_id, move.device_block, move.host_block)

    def pop_new_moves(self) -> tuple[list[BlockMove], list[BlockMove]]:
        """Moves (out, in) that no plan carries yet, for the next plan."""
        out, inward = self._new_moves_out, self._new_moves_in
        self._new_moves_out, self._new_moves_in = [], []
        return out, inward

    def finish_moves(self, move_ids: Iterable[int]) -> None:
        """The worker has made these moves. Ids of failed moves are ignored."""
        for move_id in move_ids:
            move = self.moves.pop(move_id, None)
            if move is None:
                continue
            if move.key is not None:
                self.pool.cache(move.host_block, move.key)
            if move.sequence is not None:
                move.sequence.num_moves_out -= 1
            self._free_blocks(move)

    def fail_moves(self, move_ids: Iterable[int]) -> list[Sequence]:
        """The step that carried these moves failed, so the copies cannot be trusted. Returns swapped sequences that lost blocks."""
        lost: list[Sequence] = []
        for move_id in move_ids:
            move = self.moves.pop(move_id, None)
            if move is None:
                continue
            if move.sequence is not None:
                move.sequence.num_moves_out -= 1
                if move.sequence.status is SequenceStatus.SWAPPED and move.sequence not in lost:
                    lost.append(move.sequence)
            self._free_blocks(move)
        return lost

    def _free_blocks(self, move: PendingMove) -> None:
        self.pool.free(move.host_block)
        self.device.free(move.device_block, evict_first=move.outward)  # after a move out the content is in host memory

    # Preempted sequences.

    def swap_out(self, sequence: Sequence) -> bool:
        """Move a sequence's blocks to host memory and empty its table. Without enough host blocks: False, and nothing changes."""
        table = sequence.table
        entries = [(g, i, b) for g, group in enumerate(table.groups) for i, b in enumerate(group) if b != NULL_BLOCK]
        in_host = {(g, i): self.pool.lookup(key) for g, i, _ in entries if (key := self._key(sequence, g, i)) is not None}
        leave_free_list = {h for h in in_host.values() if h is not None and self.pool.ref_counts[h] == 0}
        missing = sum(in_host.get((g, i)) is None for g, i, _ in entries)
        if missing + len(leave_free_list) > self.pool.num_free:
            return False
        sequence.host_blocks = [[NULL_BLOCK] * len(group) for group in table.groups]
        for (g, i), host_block in in_host.items():  # before anything is allocated, which could evict them
            if host_block is not None:
                self.pool.touch(host_block)
                sequence.host_blocks[g][i] = host_block
                self.device.free(table.groups[g][i])
        for g, i, block in entries:
            if in_host.get((g, i)) is None:
                host_block = self._start_move_out(block, self._key(sequence, g, i), sequence)
                self.pool.touch(host_block)  # the sequence's own reference
                sequence.host_blocks[g][i] = host_block
                sequence.num_moves_out += 1
        for group in table.groups:
            group.clear()
        return True

    def match_swapped(self, sequence: Sequence) -> PrefixMatch:
        """Where a swapped sequence's blocks are now. A full block may still be cached on the device."""
        device: list[tuple[BlockId, ...]] = []
        host: list[tuple[int, int, int]] = []
        for g, blocks in enumerate(sequence.host_blocks):
            found = []
            for i, host_block in enumerate(blocks):
                key = self._key(sequence, g, i)
                on_device = self.device.lookup(key) if key is not None and host_block != NULL_BLOCK else None
                found.append(on_device or NULL_BLOCK)
                if host_block != NULL_BLOCK and on_device is None:
                    host.append((g, i, host_block))
            device.append(tuple(found))
        return PrefixMatch(len(sequence.host_blocks[0]), tuple(device), tuple(host))

    def release(self, sequence: Sequence) -> None:
        """Remove the sequence's references to host blocks. Pending moves in hold their own."""
        for blocks in sequence.host_blocks:
            for host_block in reversed(blocks):
                if host_block != NULL_BLOCK:
                    self.pool.free(host_block)
        sequence.host_blocks = []

    @staticmethod
    def _key(sequence: Sequence, group: int, index: int) -> BlockKey | None:
        """The prefix-cache key of a full, confirmed block of this sequence. None for the partly filled last block."""
        return (group, sequence.block_hashes[index]) if sequence.cacheable and index < sequence.num_cached_blocks else None

    # The prefix cache in host memory.

    def reset_prefix_cache(self) -> None:
        """Remove the keys of all host blocks, those of pending moves included."""
        self.pool.evict_all()
        self.moves = {move_id: replace(move, key=None) for move_id, move in self.moves.items()}

    def save_before_eviction(self, num_blocks: int) -> None:
        """Copy the cached ones among the next `num_blocks` blocks of the free list to host memory, before they are evicted.

        A block cannot be allocated while it is copied, so at most half of the free device blocks are copied. At most half of
        the free host blocks are used, so that the copies of successive steps do not evict one another.
        """
        most = min(num_blocks, self.device.num_free // 2, self.pool.num_free // 2)
        for block in list(islice(self.device.free_list(), most)):
            key = self.device.key(block)
            if key is None or self.pool.lookup(key) is not None:
                continue
            if self.pool.num_free == 0:
                return
            self.device.touch(block)
            self._start_move_out(block, key, None)
