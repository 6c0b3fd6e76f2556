"""Blocks in host memory: swapped sequences, prefix blocks that the device had no room for, and the moves between the two.

Moves ride on plans and finish when the worker says so, perhaps several steps later and in any order. Until then a move counts
as an owner of both its blocks: it holds one reference to each, so neither can be handed out, and the pools need no idea of
"moving". A block is free, used (by tables or moves, `check` says which), or cached.

    move out    device block -> host block    the sequence's (or the cache's) reference to the device block becomes the move's
    move in     host block -> device block    readable in the very step that carries the move: a step copies in before it computes
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

from minivllm.core.block_pool import BlockKey, BlockPool
from minivllm.core.plan import NULL_BLOCK, BlockId, BlockMove
from minivllm.core.prefix_cache import PrefixMatch
from minivllm.core.request import Sequence, State


@dataclass(frozen=True, slots=True)
class Move:
    """One block under way."""

    outward: bool
    device_block: BlockId
    host_block: int
    key: BlockKey | None  # what the host block may be found by once it has arrived; None: not a cached block, or inward
    sequence: Sequence | None  # the swapped-out sequence that waits for it


class HostTier:
    """The host pool and every move under way. With 0 host blocks nothing is ever moved."""

    __slots__ = ("_next_id", "_to_send_in", "_to_send_out", "device", "moves", "pool")

    def __init__(self, device: BlockPool, num_host_blocks: int) -> None:
        self.device = device
        self.pool = BlockPool(max(1, num_host_blocks))
        self.moves: dict[int, Move] = {}
        self._next_id = 0
        self._to_send_out: list[BlockMove] = []
        self._to_send_in: list[BlockMove] = []

    # Starting and finishing moves.

    def _start_out(self, device_block: BlockId, key: BlockKey | None, sequence: Sequence | None) -> int:
        """Move out; the caller's reference to the device block becomes the move's. The host block, referenced by the move."""
        host_block = self.pool.allocate()
        self._to_send_out.append(self._register(Move(True, device_block, host_block, key, sequence)))
        return host_block

    def start_in(self, host_block: int, device_block: BlockId) -> None:
        """Move in; the move takes its own reference to both blocks."""
        self.pool.touch(host_block)
        self.device.touch(device_block)
        self._to_send_in.append(self._register(Move(False, device_block, host_block, None, None)))

    def _register(self, move: Move) -> BlockMove:
        move_id = self._next_id
        self._next_id += 1
        self.moves[move_id] = move
        return BlockMove(move_id, move.device_block, move.host_block)

    def take_moves(self) -> tuple[list[BlockMove], list[BlockMove]]:
        """Moves (out, in) that no plan carries yet."""
        out, inward = self._to_send_out, self._to_send_in
        self._to_send_out, self._to_send_in = [], []
        return out, inward

    def finish(self, move_ids: Iterable[int]) -> None:
        """The worker has made these moves. Ids of abandoned moves are ignored."""
        for move_id in move_ids:
            move = self.moves.pop(move_id, None)
            if move is None:
                continue
            if move.key is not None:
                self.pool.commit(move.host_block, move.key)
            if move.sequence is not None:
                move.sequence.num_moves -= 1
            self._let_go(move)

    def abandon(self, move_ids: Iterable[int]) -> list[Sequence]:
        """The step that carried these moves failed, so nothing can be said about what arrived. Swapped sequences that lost blocks."""
        losers: list[Sequence] = []
        for move_id in move_ids:
            move = self.moves.pop(move_id, None)
            if move is None:
                continue
            if move.sequence is not None:
                move.sequence.num_moves -= 1
                if move.sequence.state is State.SWAPPED and move.sequence not in losers:
                    losers.append(move.sequence)
            self._let_go(move)
        return losers

    def _let_go(self, move: Move) -> None:
        self.pool.free(move.host_block)
        self.device.free(move.device_block, evict_first=move.outward)  # its content is safe in host memory

    # Whole sequences.

    def swap_out(self, sequence: Sequence) -> bool:
        """Move a sequence's blocks to host memory; False, and nothing done, if there is no room. Its table is empty afterwards."""
        table = sequence.table
        places = [(g, i, b) for g, group in enumerate(table.groups) for i, b in enumerate(group) if b != NULL_BLOCK]
        held = {(g, i): self.pool.lookup(key) for g, i, _ in places if (key := self._key(sequence, g, i)) is not None}
        revived = {h for h in held.values() if h is not None and self.pool.ref_counts[h] == 0}
        missing = sum(held.get((g, i)) is None for g, i, _ in places)
        if missing + len(revived) > self.pool.num_free:
            return False
        sequence.host_blocks = [[NULL_BLOCK] * len(group) for group in table.groups]
        for (g, i), host_block in held.items():  # before anything is allocated: that could evict them
            if host_block is not None:
                self.pool.touch(host_block)
                sequence.host_blocks[g][i] = host_block
                self.device.free(table.groups[g][i])
        for g, i, block in places:
            if held.get((g, i)) is None:
                host_block = self._start_out(block, self._key(sequence, g, i), sequence)
                self.pool.touch(host_block)  # the sequence's own reference
                sequence.host_blocks[g][i] = host_block
                sequence.num_moves += 1
        for group in table.groups:
            group.clear()
        return True

    def match_swapped(self, sequence: Sequence) -> PrefixMatch:
        """Where a swapped sequence's blocks are now: a full one may still be on the device."""
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
        """The sequence no longer needs its host blocks: moves in, if any, hold their own references."""
        for blocks in sequence.host_blocks:
            for host_block in reversed(blocks):
                if host_block != NULL_BLOCK:
                    self.pool.free(host_block)
        sequence.host_blocks = []

    @staticmethod
    def _key(sequence: Sequence, group: int, index: int) -> BlockKey | None:
        """What a full, confirmed block of this sequence is found by; None for the partly filled last one."""
        return (group, sequence.digests[index]) if sequence.commits and index < sequence.num_committed else None

    # The prefix cache's second level.

    def forget_all(self) -> None:
        """Nothing in host memory, or on its way there, is to be found by its content."""
        self.pool.forget_all()
        self.moves = {move_id: replace(move, key=None) for move_id, move in self.moves.items()}

    def spill(self, num_blocks: int) -> None:
        """Copy cached blocks that are soon to be handed out, of the next `num_blocks`, so that their content outlives that.

        At most half of the free blocks, since they cannot be handed out meanwhile, and of the host's, so that the copies do not
        evict one another, step after step.
        """
        most = min(num_blocks, self.device.num_free // 2, self.pool.num_free // 2)
        for block in list(islice(self.device.free_blocks(), most)):
            key = self.device.key(block)
            if key is None or self.pool.lookup(key) is not None:
                continue
            if self.pool.num_free == 0:
                return
            self.device.touch(block)
            self._start_out(block, key, None)
