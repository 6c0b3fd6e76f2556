"""One sequence's life in blocks: found, taken, grown, shared, committed, dropped, given back.

    match_prefix ──> fits? ──> take ──> room_needed / make_room ──> commit ──> drop_out_of_window ──> give_back
    what is already            shared      new blocks for the         full       what no position        to the pool, or
    computed, where            and moved   next tokens; a copy        blocks     sees any more           put_away to host
                               blocks      before a shared write      get keys                           memory

The scheduler decides who gets blocks and when; everything here is how. It owns the device pool, the prefix cache over it, and
the host tier behind it.
"""
from __future__ import annotations

from minivllm.core.admission import SchedulerConfig
from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.host_tier import HostTier
from minivllm.core.plan import BlockCopy, BlockId
from minivllm.core.prefix_cache import PrefixCache, PrefixMatch
from minivllm.core.request import Sequence, State


class KVManager:
    """The blocks of all sequences."""

    __slots__ = ("_config", "_groups", "_size", "_windows", "cache", "host", "pool")

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._size = config.block_size
        self._groups = len(config.kv_windows)
        self._windows = [(group, window) for group, window in enumerate(config.kv_windows) if window is not None]
        self.pool = BlockPool(config.num_blocks)
        self.host = HostTier(self.pool, config.num_host_blocks)
        host_pool = self.host.pool if config.num_host_blocks else None
        self.cache = PrefixCache(self.pool, host_pool, config.block_size, config.kv_windows)

    def empty_table(self) -> BlockTable:
        return BlockTable(self._size, [[] for _ in range(self._groups)])

    # Coming in.

    def match(self, sequence: Sequence) -> tuple[PrefixMatch, int]:
        """What of a waiting sequence exists already, and how many of its tokens that makes computed."""
        if sequence.state is State.SWAPPED:
            return self.host.match_swapped(sequence), sequence.num_computed
        found = self._match_prefix(sequence)
        return found, found.num_blocks * self._size

    def _match_prefix(self, sequence: Sequence) -> PrefixMatch:
        """The last token is computed always: something must be sampled from. And a token whose prompt log-probability is owed
        needs the position before it computed, so hits end before that one.
        """
        limit = len(sequence.tokens) - 1
        if sequence.logprobs_owed_from is not None:
            limit = min(limit, sequence.logprobs_owed_from - 1)
        if not self._config.enable_prefix_caching or limit < self._size:
            return PrefixMatch(0, ((),) * self._groups)
        self.cache.extend_digests(sequence.digests, sequence.request.root, sequence.tokens, limit, while_present=True)
        return self.cache.match(sequence.digests[:limit // self._size])

    def fits(self, match: PrefixMatch, num_tokens: int, reserve: int) -> bool:
        """Whether there are blocks for this many tokens, given what was found, and `reserve` more."""
        revived = sum(self.pool.ref_counts[block] == 0 for block in match.hits)  # free now, but not for long
        growth = max(0, -(-num_tokens // self._size) - match.num_blocks)  # a swapped table may reach past what is computed
        return revived + len(match.host) + growth * self._groups + reserve <= self.pool.num_free

    def take(self, sequence: Sequence, match: PrefixMatch, num_computed: int) -> None:
        """Give the sequence the matched blocks: those on the device are shared, those in host memory get a new one and a move."""
        for block in match.hits:  # before anything is allocated: that could evict them
            self.pool.touch(block)
        groups = [list(blocks) for blocks in match.device]
        for group, index, host_block in match.host:
            groups[group][index] = self.pool.allocate()
            self.host.start_in(host_block, groups[group][index])
        self.host.release(sequence)
        sequence.table = BlockTable(self._size, groups)
        sequence.num_computed = sequence.num_planned = num_computed
        # What comes from host memory is offered to the cache once the step that brings it has succeeded.
        sequence.num_committed = 0 if match.host else min(match.num_blocks, num_computed // self._size)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child starts where the parent is, on the same blocks; whoever writes into the partly filled one first copies it."""
        child.table = parent.table.fork(self.pool)
        child.num_computed, child.num_planned = parent.num_computed, parent.num_planned
        child.num_committed, child.commits = parent.num_committed, parent.commits
        parent.shares_tail = child.shares_tail = parent.num_planned < parent.table.capacity

    # Growing.

    def room_needed(self, sequence: Sequence, end: int) -> int:
        """Blocks that must be free so that the sequence can write up to position `end`."""
        shared = len(sequence.table.shared_at(self.pool, sequence.num_planned)) if sequence.shares_tail else 0
        return shared + sequence.table.num_blocks_to_hold(end)

    def make_room(self, sequence: Sequence, end: int, copies: list[BlockCopy]) -> tuple[tuple[BlockId, ...], ...]:
        """Slots up to position `end`, and sole ownership of the block that is written first. The new blocks, by group."""
        table, start = sequence.table, sequence.num_planned
        if sequence.shares_tail:
            for group in table.shared_at(self.pool, start):
                index, source, own = table.copy_on_write(self.pool, group, start)
                copies.append(BlockCopy(source, own, sequence.row, group, index))
            sequence.shares_tail = False
        return table.grow(self.pool, end)

    # Confirmed.

    def name_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """Names of the full blocks among the first `num_tokens` tokens, as far as they are known: `commit` will need them."""
        if sequence.commits and self._config.enable_prefix_caching:
            self.cache.extend_digests(sequence.digests, sequence.request.root, sequence.tokens, num_tokens)

    def commit(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full now: both their tokens and their content are confirmed."""
        full = sequence.num_computed // self._size
        if full > sequence.num_committed and sequence.commits and self._config.enable_prefix_caching:
            self.cache.extend_digests(sequence.digests, sequence.request.root, sequence.tokens, full * self._size)
            self.cache.commit(sequence.table, sequence.digests, sequence.num_committed, full)
            sequence.num_committed = full

    def drop_out_of_window(self, sequence: Sequence) -> list[BlockId]:
        """Take from window groups what no position from the first unconfirmed one on can see. The blocks are the caller's to free."""
        blocks: list[BlockId] = []
        for group, window in self._windows:
            for index, block in sequence.table.drop_before(group, max(0, sequence.num_computed - window + 1)):
                sequence.dropped.append((group, index))
                blocks.append(block)
        return blocks

    # Going.

    def num_freed_by(self, sequence: Sequence) -> int:
        """Blocks that nobody else holds."""
        return sum(self.pool.ref_counts[block] == 1 for block in sequence.table.blocks())

    def give_back(self, sequence: Sequence) -> None:
        sequence.table.release(self.pool)

    def put_away(self, sequence: Sequence) -> State:
        """Free a preempted sequence's blocks: SWAPPED if that costs less than computing them again and there is room, else WAITING."""
        computed, blocks = sequence.num_computed, sum(1 for _ in sequence.table.blocks())
        if self._config.swap_pays(computed, blocks) and self.host.swap_out(sequence):
            sequence.reset_computed(computed)
            return State.SWAPPED
        self.give_back(sequence)
        self.start_over(sequence)
        return State.WAITING

    def start_over(self, sequence: Sequence) -> None:
        """Nothing of the sequence is computed any more; what it committed may still be found."""
        self.host.release(sequence)
        sequence.num_committed, sequence.commits = 0, True
        sequence.reset_computed(0)
