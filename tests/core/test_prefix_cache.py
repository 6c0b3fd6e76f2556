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

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # two tokens: prefixes coincide often
OWNER = st.sampled_from([(None, None), ("sql", None), (None, "salt")])  # (adapter, cache_salt)

Name = tuple[tuple[str | None, str | None], tuple[int, ...]]  # everything a block's content depends on


class PrefixMachine(RuleBasedStateMachine):
    """Texts are computed and end; the model remembers, for each block of each group, the whole prefix it holds."""

    @initialize(block_size=st.integers(1, 4), ahead=st.integers(1, 3),
                windows=st.sampled_from([(None,), (None, None), (None, 3), (1,), (5,), (2, 6), (1, None)]))
    def start(self, block_size: int, ahead: int, windows: tuple[int | None, ...]) -> None:
        self.usual, prefix_cache.HASH_BATCH = prefix_cache.HASH_BATCH, ahead
        self.size = block_size
        self.windows = windows
        self.pool = BlockPool(24)
        self.cache = PrefixCache(self.pool, None, block_size, windows)
        self.held: list[BlockTable] = []
        self.before: tuple[tuple[str | None, str | None], list[int]] = (None, None), []  # the sequence that was named last
        self.prefix_of: dict[tuple[int, int], Name] = {}  # (group, block) -> what it holds

    def teardown(self) -> None:
        prefix_cache.HASH_BATCH = self.usual

    def _needed(self, group: int, num_blocks: int) -> range:
        """Blocks that a query right after `num_blocks` full blocks can see in this group: the definition, token by token."""
        window, end = self.windows[group], num_blocks * self.size
        seen = range(end) if window is None else range(max(0, end - window + 1), end)
        return range(seen.start // self.size, num_blocks) if seen else range(num_blocks, num_blocks)

    def _expected(self, owner: tuple[str | None, str | None], tokens: list[int]) -> int:
        """The longest match, by trying all."""
        present = {(group, name) for (group, _), name in self.prefix_of.items()}
        for num_blocks in range(len(tokens) // self.size, 0, -1):
            if all((group, (owner, tuple(tokens[:(i + 1) * self.size]))) in present
                   for group in range(len(self.windows)) for i in self._needed(group, num_blocks)):
                return num_blocks
        return 0

    def _as_before(self, owner: tuple[str | None, str | None], tokens: list[int]) -> int:
        """Blocks in which this sequence begins like the one before."""
        other_owner, other = self.before
        whole = min(len(tokens), len(other)) // self.size if owner == other_owner else 0
        return next((i for i in range(whole) if tokens[:(i + 1) * self.size] != other[:(i + 1) * self.size]), whole)

    @rule(owner=OWNER, tokens=TOKENS)
    def compute(self, owner: tuple[str | None, str | None], tokens: list[int]) -> None:
        """Match, take what is found, compute and commit the rest."""
        hashes: list[bytes] = []
        self.cache.extend_hashes(hashes, root_hash(*owner), tokens, len(tokens), stop_at_miss=True)
        match = self.cache.match(hashes)
        if None in self.windows:
            whole, names = self.windows.index(None), chain_hashes(root_hash(*owner), tokens, self.size)
            present = [self.pool.lookup((whole, name)) is not None for name in names]
            known = self._as_before(owner, tokens)  # names that are there without computing them
            reached = present.index(False) if False in present else len(present)
            if known:  # it goes on where the last of them is present
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
        revived = sum(self.pool.ref_counts[b] == 0 for b in match.device_blocks)
        if (len(hashes) - match.num_blocks) * len(self.windows) + revived > self.pool.num_free:
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
                name = (owner, tuple(tokens[:(index + 1) * self.size]))
                if block != NULL_BLOCK and (group, name) not in {(g, n) for (g, _), n in self.prefix_of.items()}:
                    self.prefix_of[group, block] = name
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
    def as_many_blocks_have_a_name_as_the_model_remembers(self) -> None:
        if hasattr(self, "pool"):
            assert {block for _, block in self.prefix_of} == self._keys().keys()


TestPrefixCache = PrefixMachine.TestCase


@given(a=TOKENS, b=TOKENS, block_size=st.integers(1, 4))
def test_digests_agree_exactly_as_far_as_full_blocks_of_tokens_do(a: list[int], b: list[int], block_size: int) -> None:
    cache = PrefixCache(BlockPool(2), None, block_size, (None,))
    hashes: list[list[bytes]] = [[], []]
    for tokens, into in zip((a, b), hashes, strict=True):
        cache.extend_hashes(into, root_hash(None, None), tokens, len(tokens))
    for index, (x, y) in enumerate(zip(*hashes, strict=False)):
        end = (index + 1) * block_size
        assert (x == y) == (a[:end] == b[:end])


def test_a_prompt_that_begins_like_the_one_before_is_named_from_there_on() -> None:
    cache = PrefixCache(BlockPool(2), None, 4, (None,))
    named: list[int] = []

    def counted(parent: bytes, tokens: list[int], block_size: int) -> list[bytes]:
        named.append(len(tokens) // block_size)
        return chain_hashes(parent, tokens, block_size)

    with patch.object(prefix_cache, "chain_hashes", counted):
        for tokens in ([*range(40)], [*range(32), 7, 7, 7, 7, 7], [1, 2], [*range(36), 9, 9, 9, 9], [5, *range(20)]):
            cache.extend_hashes([], root_hash(None, None), tokens, len(tokens))
    assert named == [10, 1, 2, 5]


@given(first=OWNER, second=OWNER)
def test_another_adapter_or_salt_is_another_root(first: tuple[str | None, str | None], second: tuple[str | None, str | None]) -> None:
    assert (root_hash(*first) == root_hash(*second)) == (first == second)


def test_a_salt_that_looks_like_an_adapter_is_another_root() -> None:
    roots = {root_hash("a", "b"), root_hash("b", "a"), root_hash("a, b", None), root_hash(None, "None"), root_hash(None, None)}
    assert len(roots) == 5


def test_equal_tokens_after_another_parent_are_another_block() -> None:
    root = root_hash(None, None)
    one, other = chain_hashes(root, [1, 2, 5, 6], 2), chain_hashes(root, [3, 4, 5, 6], 2)
    assert one[0] != other[0] and one[1] != other[1]
    assert one[1] == chain_hashes(one[0], [5, 6, 7], 2)[0]  # a block that is not full has no name


def test_token_boundaries_count() -> None:
    root = root_hash(None, None)
    assert chain_hashes(root, [1, 23], 2) != chain_hashes(root, [12, 3], 2)


def test_digests_are_cryptographic() -> None:
    assert [len(name) for name in chain_hashes(root_hash(None, None), [1, 2], 1)] == [32, 32]


def test_where_all_groups_have_windows_a_match_may_come_after_blocks_that_nobody_has() -> None:
    pool = BlockPool(10)
    cache = PrefixCache(pool, None, 1, (3,))
    tokens = list(range(80))
    names = chain_hashes(root_hash(None, None), tokens, 1)
    kept = pool.allocate_many(4)
    cache.insert(BlockTable(1, [[NULL_BLOCK] * 76 + kept]), names, 0, 80)
    hashes: list[bytes] = []
    cache.extend_hashes(hashes, root_hash(None, None), tokens, 80, stop_at_miss=True)
    assert cache.match(hashes).num_blocks == 80
