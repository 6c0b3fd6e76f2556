"""All block operations of a sequence, from the prefix match to the release.

    get_computed_blocks    find the blocks that are computed already
    fits                   check that the pool has the other blocks
    assign                 share the blocks found on the device, and move those in host memory to the device
    num_blocks_needed      count the blocks that the next step needs
    allocate_slots         allocate them, and copy a shared block before a write
    cache_full_blocks      add full blocks to the prefix cache
    drop_out_of_window     remove blocks that no later position can see
    free                   release all blocks at the end
    swap_out_or_free       the same after a preemption, if possible with a copy in host memory

The scheduler decides when each of these happens, and for which sequence. The manager owns the device pool, the prefix cache over
it, and the CPU offload behind it.
"""
from __future__ import annotations

from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.offload import CPUOffload
from minivllm.core.plan import BlockCopy, BlockId
from minivllm.core.prefix_cache import PrefixCache, PrefixMatch
from minivllm.core.request import Sequence, SequenceStatus
from minivllm.core.scheduler_config import SchedulerConfig


class KVManager:
    """The blocks of all sequences."""

    __slots__ = ("_config", "_num_groups", "_size", "_windows", "cache", "has_windows", "offload", "pool")

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._size = config.block_size
        self._num_groups = len(config.kv_windows)
        self._windows = [(group, window) for group, window in enumerate(config.kv_windows) if window is not None]
        self.has_windows = bool(self._windows)
        self.pool = BlockPool(config.num_blocks)
        self.offload = CPUOffload(self.pool, config.num_host_blocks)
        host_pool = self.offload.pool if config.num_host_blocks else None
        self.cache = PrefixCache(self.pool, host_pool, config.block_size, config.kv_windows)

    def empty_table(self) -> BlockTable:
        return BlockTable(self._size, [[] for _ in range(self._num_groups)])

    # Admission of a waiting sequence.

    def get_computed_blocks(self, sequence: Sequence) -> tuple[PrefixMatch, int]:
        """The blocks that a waiting sequence can reuse, and the number of tokens they cover."""
        if sequence.status is SequenceStatus.SWAPPED:
            return self.offload.match_swapped(sequence), sequence.num_computed
        match = self._match_prefix(sequence)
        return match, match.num_blocks * self._size

    def _match_prefix(self, sequence: Sequence) -> PrefixMatch:
        """The longest cached prefix. It leaves out the last token, which must be computed to sample the next one.

        A prompt logprob is computed from the position before its token, so a match ends before the first one still to be returned.
        The mean of all hidden states needs every position, and the cache has keys and values only.
        """
        pooling = sequence.request.new.params.pooling
        limit = 0 if pooling is not None and pooling.needs_all else len(sequence.tokens) - 1
        if sequence.prompt_logprobs_from is not None:
            limit = min(limit, sequence.prompt_logprobs_from - 1)
        if not self._config.enable_prefix_caching or limit < self._size:
            return PrefixMatch(0, ((),) * self._num_groups)
        self.cache.extend_hashes(sequence.block_hashes, sequence.request.root_hash, sequence.tokens, limit, stop_at_miss=True)
        return self.cache.match(sequence.block_hashes[:limit // self._size])

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks of all groups that hold this many tokens."""
        return -(-num_tokens // self._size) * self._num_groups

    def fits(self, match: PrefixMatch, num_tokens: int, reserve: int) -> bool:
        """Whether the pool has blocks for this many tokens, given the match, and `reserve` blocks more."""
        leave_free_list = sum(self.pool.ref_counts[block] == 0 for block in match.device_blocks)
        growth = max(0, -(-num_tokens // self._size) - match.num_blocks)  # a swapped table may be longer than what is computed
        return leave_free_list + len(match.host) + growth * self._num_groups + reserve <= self.pool.num_free

    def assign(self, sequence: Sequence, match: PrefixMatch, num_computed: int) -> None:
        """Give the sequence the matched blocks. Device blocks are shared. A host block gets a new device block and a move in."""
        for block in match.device_blocks:  # before anything is allocated, which could evict them
            self.pool.touch(block)
        groups = [list(blocks) for blocks in match.device]
        for group, index, host_block in match.host:
            groups[group][index] = self.pool.allocate()
            self.offload.start_move_in(host_block, groups[group][index])
        self.offload.release(sequence)
        sequence.table = BlockTable(self._size, groups)
        sequence.num_computed = sequence.num_planned = num_computed
        # Blocks moved in are cached once the step that carries the moves has succeeded.
        sequence.num_cached_blocks = 0 if match.host else min(match.num_blocks, num_computed // self._size)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child continue from the parent's position on the same blocks. A write into the shared last block copies it first."""
        child.table = parent.table.fork(self.pool)
        child.num_computed, child.num_planned = parent.num_computed, parent.num_planned
        child.num_cached_blocks, child.cacheable = parent.num_cached_blocks, parent.cacheable
        parent.shares_last_block = child.shares_last_block = parent.num_planned < parent.table.capacity

    # Growth.

    def num_blocks_needed(self, sequence: Sequence, end: int) -> int:
        """Blocks that must be free before the sequence can write up to position `end`."""
        shared = len(sequence.table.shared_at(self.pool, sequence.num_planned)) if sequence.shares_last_block else 0
        return shared + sequence.table.num_missing_blocks(end)

    def allocate_slots(self, sequence: Sequence, end: int, copies: list[BlockCopy]) -> tuple[tuple[BlockId, ...], ...]:
        """Make slots up to position `end`, and copy the block that is written first if it is shared. Returns new blocks by group."""
        table, start = sequence.table, sequence.num_planned
        if sequence.shares_last_block:
            for group in table.shared_at(self.pool, start):
                index, source, own = table.copy_on_write(self.pool, group, start)
                copies.append(BlockCopy(source, own, sequence.row, group, index))
            sequence.shares_last_block = False
        return table.grow(self.pool, end)

    # Confirmed tokens.

    def hash_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """Hash the full blocks of the first `num_tokens` tokens, as far as the tokens are known. `cache_full_blocks` needs them."""
        if sequence.cacheable and self._config.enable_prefix_caching:
            self.cache.extend_hashes(sequence.block_hashes, sequence.request.root_hash, sequence.tokens, num_tokens)

    def cache_full_blocks(self, sequence: Sequence) -> None:
        """Add newly full blocks to the prefix cache. Their tokens and their content are confirmed."""
        full = sequence.num_computed // self._size
        if full > sequence.num_cached_blocks and sequence.cacheable and self._config.enable_prefix_caching:
            self.cache.extend_hashes(sequence.block_hashes, sequence.request.root_hash, sequence.tokens, full * self._size)
            self.cache.insert(sequence.table, sequence.block_hashes, sequence.num_cached_blocks, full)
            sequence.num_cached_blocks = full

    def drop_out_of_window(self, sequence: Sequence) -> list[BlockId]:
        """Remove blocks of window groups that no unconfirmed position can see. The caller must free the returned blocks."""
        blocks: list[BlockId] = []
        for group, window in self._windows:
            for index, block in sequence.table.drop_before(group, max(0, sequence.num_computed - window + 1)):
                sequence.dropped_entries.append((group, index))
                blocks.append(block)
        return blocks

    # Preemption and end.

    def num_unshared_blocks(self, sequence: Sequence) -> int:
        """Blocks that would become free if the sequence freed its table."""
        return sum(self.pool.ref_counts[block] == 1 for block in sequence.table.blocks())

    def free(self, sequence: Sequence) -> None:
        sequence.table.release(self.pool)

    def swap_out_or_free(self, sequence: Sequence) -> SequenceStatus:
        """Take a preempted sequence's blocks. SWAPPED if swapping is cheaper than recomputing and host memory has room, else WAITING."""
        computed, blocks = sequence.num_computed, sum(1 for _ in sequence.table.blocks())
        if self._config.swap_is_cheaper(computed, blocks) and self.offload.swap_out(sequence):
            sequence.reset_computed(computed)
            return SequenceStatus.SWAPPED
        self.free(sequence)
        self.restart(sequence)
        return SequenceStatus.WAITING

    def restart(self, sequence: Sequence) -> None:
        """Count nothing of the sequence as computed. The prefix cache may still have blocks that it cached."""
        self.offload.release(sequence)
        sequence.num_cached_blocks, sequence.cacheable = 0, True
        sequence.reset_computed(0)
