"""The prefix cache against a model that stores whole prefixes instead of hashes."""
from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.core import prefix_cache
from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.plan import NULL_BLOCK
from minivllm.core.prefix_cache import PrefixCache, chain_hashes, root_hash

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # only two token ids, so that many prefixes are equal
OWNER = st.sampled_from([(0, None), (1, None), (2, None), (0, "salt")])  # (adapter, cache_salt)

Content = tuple[tuple[int, str | None], tuple[int, ...]]  # (adapter, salt) and all tokens that a block's content depends on


class PrefixMachine(RuleBasedStateMachine):
    """Sequences are computed and finish. The model stores, for each block of each group, the whole prefix up to its end."""

    @initialize(block_size=st.integers(1, 4), batch=st.integers(1, 3),
                windows=st.sampled_from([(None,), (None, None), (None, 3), (1,), (5,), (2, 6), (1, None)]))
    def start(self, block_size: int, batch: int, windows: tuple[int | None, ...]) -> None:
        self.usual, prefix_cache.HASH_BATCH = prefix_cache.HASH_BATCH, batch
        self.size = block_size
        self.windows = windows
        self.pool = BlockPool(24)
        self.cache = PrefixCache(self.pool, None, block_size, windows)
        self.held: list[BlockTable] = []
        self.before: tuple[tuple[int, str | None], list[int]] = (None, None), []  # the sequence that was hashed last
        self.prefix_of: dict[tuple[int, int], Content] = {}  # (group, block) -> its content

    def teardown(self) -> None:
        prefix_cache.HASH_BATCH = self.usual

    def _needed(self, group: int, num_blocks: int) -> range:
        """Blocks that a query right after `num_blocks` full blocks can see in this group, counted token by token."""
        window, end = self.windows[group], num_blocks * self.size
        seen = range(end) if window is None else range(max(0, end - window + 1), end)
        return range(seen.start // self.size, num_blocks) if seen else range(num_blocks, num_blocks)

    def _expected(self, owner: tuple[int, str | None], tokens: list[int]) -> int:
        """The longest match, found by trying all lengths."""
        present = {(group, content) for (group, _), content in self.prefix_of.items()}
        for num_blocks in range(len(tokens) // self.size, 0, -1):
            if all((group, (owner, tuple(tokens[:(i + 1) * self.size]))) in present
                   for group in range(len(self.windows)) for i in self._needed(group, num_blocks)):
                return num_blocks
        return 0

    def _shared_with_previous(self, owner: tuple[int, str | None], tokens: list[int]) -> int:
        """Number of blocks that this sequence shares with the one before."""
        other_owner, other = self.before
        whole = min(len(tokens), len(other)) // self.size if owner == other_owner else 0
        return next((i for i in range(whole) if tokens[:(i + 1) * self.size] != other[:(i + 1) * self.size]), whole)

    @rule(owner=OWNER, tokens=TOKENS)
    def compute(self, owner: tuple[int, str | None], tokens: list[int]) -> None:
        """Match a prefix, share its blocks, compute and cache the rest."""
        hashes: list[bytes] = []
        self.cache.extend_hashes(hashes, root_hash(*owner), tokens, len(tokens), stop_at_miss=True)
        match = self.cache.match(hashes)
        if None in self.windows:
            full, all_hashes = self.windows.index(None), chain_hashes(root_hash(*owner), tokens, self.size)
            present = [self.pool.lookup((full, block_hash)) is not None for block_hash in all_hashes]
            known = self._shared_with_previous(owner, tokens)  # hashes that are copied, not computed
            reached = present.index(False) if False in present else len(present)
            if known:  # the search continues if the last of them is cached
                reached = max((i + 1 for i, there in enumerate(present) if there), default=0)
            assert len(hashes) <= max(known, reached + prefix_cache.HASH_BATCH)
        if hashes:
            self.before = owner, tokens
        self.cache.extend_hashes(hashes, root_hash(*owner), tokens, len(tokens))
        assert hashes == chain_hashes(root_hash(*owner), tokens, self.size)
        assert match.num_blocks == self._expected(owner, tokens)
        for group, blocks in enumerate(match.device):
            assert len(blocks) == match.num_blocks
            for index, block in enumerate(blocks):
                assert (block != NULL_BLOCK) == (index in self._needed(group, match.num_blocks))
                if block != NULL_BLOCK:
                    assert self.prefix_of[group, block] == (owner, tuple(tokens[:(index + 1) * self.size]))
        leave_free_list = sum(self.pool.ref_counts[b] == 0 for b in match.device_blocks)
        if (len(hashes) - match.num_blocks) * len(self.windows) + leave_free_list > self.pool.num_free:
            return
        for block in match.device_blocks:
            self.pool.touch(block)
        table = BlockTable(self.size, [list(blocks) for blocks in match.device])
        before = self._keys()
        for group in table.grow(self.pool, len(hashes) * self.size):
            for block in group:
                self._evict(block)
        assert before.keys() - self._keys().keys() <= {b for blocks in table.groups for b in blocks}
        self.cache.insert(table, hashes, 0, len(hashes))
        for group, blocks in enumerate(table.groups):
            for index, block in enumerate(blocks):
                content = (owner, tuple(tokens[:(index + 1) * self.size]))
                if block != NULL_BLOCK and (group, content) not in {(g, c) for (g, _), c in self.prefix_of.items()}:
                    self.prefix_of[group, block] = content
        self.held.append(table)

    def _keys(self) -> dict[int, object]:
        return {b: self.pool.key(b) for b in range(self.pool.num_blocks) if self.pool.key(b) is not None}

    def _evict(self, block: int) -> None:
        for group in range(len(self.windows)):
            self.prefix_of.pop((group, block), None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.held.pop(data.draw(st.integers(0, len(self.held) - 1))).release(self.pool)

    @rule()
    def reset(self) -> None:
        self.pool.evict_all()
        self.prefix_of.clear()

    @invariant()
    def cached_blocks_are_those_of_the_model(self) -> None:
        if hasattr(self, "pool"):
            assert {block for _, block in self.prefix_of} == self._keys().keys()


TestPrefixCache = PrefixMachine.TestCase


@given(a=TOKENS, b=TOKENS, block_size=st.integers(1, 4))
def test_hashes_are_equal_exactly_as_far_as_full_blocks_of_tokens_are(a: list[int], b: list[int], block_size: int) -> None:
    cache = PrefixCache(BlockPool(2), None, block_size, (None,))
    hashes: list[list[bytes]] = [[], []]
    for tokens, into in zip((a, b), hashes, strict=True):
        cache.extend_hashes(into, root_hash(0, None), tokens, len(tokens))
    for index, (x, y) in enumerate(zip(*hashes, strict=False)):
        end = (index + 1) * block_size
        assert (x == y) == (a[:end] == b[:end])


def test_only_the_blocks_after_the_prefix_shared_with_the_previous_prompt_are_hashed() -> None:
    cache = PrefixCache(BlockPool(2), None, 4, (None,))
    hashed: list[int] = []

    def counted(parent: bytes, tokens: list[int], block_size: int) -> list[bytes]:
        hashed.append(len(tokens) // block_size)
        return chain_hashes(parent, tokens, block_size)

    with patch.object(prefix_cache, "chain_hashes", counted):
        for tokens in ([*range(40)], [*range(32), 7, 7, 7, 7, 7], [1, 2], [*range(36), 9, 9, 9, 9], [5, *range(20)]):
            cache.extend_hashes([], root_hash(0, None), tokens, len(tokens))
    assert hashed == [10, 1, 2, 5]


@given(first=OWNER, second=OWNER)
def test_another_adapter_or_salt_gives_another_root(first: tuple[int, str | None], second: tuple[int, str | None]) -> None:
    assert (root_hash(*first) == root_hash(*second)) == (first == second)


def test_a_salt_that_equals_an_adapter_gives_another_root() -> None:
    roots = {root_hash(1, "2"), root_hash(2, "1"), root_hash(12, None), root_hash(0, "12"), root_hash(0, "None"), root_hash(0, None)}
    assert len(roots) == 6


def test_equal_tokens_after_another_parent_give_another_hash() -> None:
    root = root_hash(0, None)
    one, other = chain_hashes(root, [1, 2, 5, 6], 2), chain_hashes(root, [3, 4, 5, 6], 2)
    assert one[0] != other[0] and one[1] != other[1]
    assert one[1] == chain_hashes(one[0], [5, 6, 7], 2)[0]  # a block that is not full has no hash


def test_token_boundaries_change_the_hash() -> None:
    root = root_hash(0, None)
    assert chain_hashes(root, [1, 23], 2) != chain_hashes(root, [12, 3], 2)


def test_hashes_have_256_bits() -> None:
    assert [len(block_hash) for block_hash in chain_hashes(root_hash(0, None), [1, 2], 1)] == [32, 32]


def test_if_all_groups_have_windows_a_match_may_follow_blocks_that_are_not_cached() -> None:
    pool = BlockPool(10)
    cache = PrefixCache(pool, None, 1, (3,))
    tokens = list(range(80))
    all_hashes = chain_hashes(root_hash(0, None), tokens, 1)
    kept = pool.allocate_many(4)
    cache.insert(BlockTable(1, [[NULL_BLOCK] * 76 + kept]), all_hashes, 0, 80)
    hashes: list[bytes] = []
    cache.extend_hashes(hashes, root_hash(0, None), tokens, 80, stop_at_miss=True)
    assert cache.match(hashes).num_blocks == 80
