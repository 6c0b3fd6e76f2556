"""The block pool against a model of plain lists."""
from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.core.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Blocks are allocated, shared and freed. The model has the free list as a list, and the owners of each block by name."""

    @initialize(num_blocks=st.integers(1, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.free = list(range(1, num_blocks))  # in allocation order
        self.owners: dict[int, list[str]] = {}
        self.content: dict[int, int] = {}  # block -> key
        self.names = 0

    def _name(self) -> str:
        self.names += 1
        return f"owner {self.names}"

    @precondition(lambda self: self.free)
    @rule()
    def allocate(self) -> None:
        expected = self.free.pop(0)
        self.content.pop(expected, None)
        assert self.pool.allocate() == expected
        self.owners[expected] = [self._name()]

    @rule(key=st.integers(0, 5))
    def look_up_and_touch(self, key: int) -> None:
        block = next((b for b, k in self.content.items() if k == key), None)
        assert self.pool.lookup(key) == block
        if block is not None:
            self.pool.touch(block)
            if block in self.free:
                self.free.remove(block)
            self.owners.setdefault(block, []).append(self._name())

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), evict_first=st.booleans())
    def free_one(self, data: st.DataObject, evict_first: bool) -> None:
        block = data.draw(st.sampled_from(sorted(self.owners)))
        self.pool.free(block, evict_first=evict_first)
        self.owners[block].pop()
        if not self.owners[block]:
            del self.owners[block]
            self.free.insert(0 if evict_first or block not in self.content else len(self.free), block)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), key=st.integers(0, 5))
    def cache(self, data: st.DataObject, key: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.owners)))
        self.pool.cache(block, key)
        if block not in self.content and key not in self.content.values():
            self.content[block] = key

    @rule(key=st.integers(0, 5))
    def evict(self, key: int) -> None:
        block = self.pool.lookup(key)
        if block is not None:
            self.pool.evict(block)
            del self.content[block]

    @rule()
    def evict_all(self) -> None:
        self.pool.evict_all()
        self.content.clear()

    @invariant()
    def agrees_with_the_model(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.owners)
            assert list(self.pool.free_list()) == self.free
            assert self.pool.num_free == len(self.free)
            assert self.pool.num_used == len(self.owners)
            assert self.pool.num_cached == sum(b in self.content for b in self.free)


TestPool = PoolMachine.TestCase


def test_blocks_without_content_are_allocated_before_cached_ones() -> None:
    pool = BlockPool(4)
    cached, plain = pool.allocate(), pool.allocate()
    pool.cache(cached, "key")
    pool.free(cached)
    pool.free(plain)
    assert list(pool.free_list()) == [plain, 3, cached]


def test_a_freed_block_keeps_its_content_until_it_is_allocated_again() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.cache(block, "key")
    pool.free(block)
    assert pool.lookup("key") == block
    assert pool.allocate() == block
    assert pool.lookup("key") is None


def test_a_hit_removes_a_cached_block_from_the_middle_of_the_free_list() -> None:
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.cache(block, f"key {block}")
        pool.free(block)
    pool.touch(blocks[1])
    assert list(pool.free_list()) == [blocks[0], blocks[2]]


def test_the_first_block_with_a_key_keeps_it() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.cache(first, "key")
    pool.cache(second, "key")
    assert pool.lookup("key") == first
    assert pool.key(second) is None


@pytest.mark.parametrize("misuse", [
    lambda pool: pool.free(1),
    lambda pool: pool.touch(1),
    lambda pool: pool.cache(1, "key"),
    lambda pool: [pool.allocate() for _ in range(3)],
])
def test_misuse_fails_an_assertion(misuse: object) -> None:
    with pytest.raises(AssertionError):
        misuse(BlockPool(3))  # type: ignore[operator]


def test_check_names_the_block_and_its_owners() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    with pytest.raises(AssertionError, match=rf"block {block} has 1 references, and its owners are \['row 0', 'row 1'\]"):
        pool.check({block: ["row 0", "row 1"]})


def test_operations_take_constant_time() -> None:
    """List accesses are counted, not timed. No operation walks the free list."""
    visited = 0

    class CountingList(list):  # type: ignore[type-arg]
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            nonlocal visited
            visited += 1
            return super().__getitem__(index)

    def visits(num_blocks: int) -> int:
        nonlocal visited
        pool = BlockPool(num_blocks)
        blocks = [pool.allocate() for _ in range(num_blocks - 1)]
        for block in blocks:
            pool.cache(block, block)
            pool.free(block)
        pool._next, pool._previous = CountingList(pool._next), CountingList(pool._previous)
        visited = 0
        pool.touch(blocks[num_blocks // 2])
        pool.free(blocks[num_blocks // 2])
        pool.allocate()
        return visited

    assert visits(10_000) == visits(10)
