"""Block tables: growing, dropping, and copy-on-write against deep copies."""
from __future__ import annotations

import copy
from collections import defaultdict

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.plan import NULL_BLOCK


class CopyOnWriteMachine(RuleBasedStateMachine):
    """Texts grow and fork. With blocks: memory and shared tables. As the model: each text is a list of its own, deeply copied."""

    @initialize(block_size=st.integers(1, 5), num_groups=st.integers(1, 2))
    def start(self, block_size: int, num_groups: int) -> None:
        self.size = block_size
        self.pool = BlockPool(120)
        self.memory = [[-1] * block_size for _ in range(120)]
        self.tables = {0: BlockTable(block_size, [[] for _ in range(num_groups)])}
        self.texts: dict[int, list[int]] = {0: []}
        self.next_name = 1
        self.clock = 0

    def _pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)))

    @precondition(lambda self: self.pool.num_free > 10)
    @rule(data=st.data(), count=st.integers(1, 4))
    def write(self, data: st.DataObject, count: int) -> None:
        name = self._pick(data)
        table, text = self.tables[name], self.texts[name]
        for group in table.shared_at(self.pool, len(text)):
            _, source, own = table.copy_on_write(self.pool, group, len(text))
            self.memory[own] = list(self.memory[source])
        needed = table.num_missing_blocks(len(text) + count)
        free = self.pool.num_free
        table.grow(self.pool, len(text) + count)
        assert free - self.pool.num_free == needed
        for _ in range(count):
            self.clock += 1
            for group in table.groups:
                self.memory[group[len(text) // self.size]][len(text) % self.size] = self.clock
            text.append(self.clock)

    @precondition(lambda self: len(self.texts) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name = self._pick(data)
        free = self.pool.num_free
        self.tables[self.next_name] = self.tables[name].fork(self.pool)
        assert self.pool.num_free == free, "a fork costs no block"
        self.texts[self.next_name] = copy.deepcopy(self.texts[name])
        self.next_name += 1

    @precondition(lambda self: len(self.texts) > 1)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = self._pick(data)
        self.tables.pop(name).release(self.pool)
        del self.texts[name]

    @invariant()
    def every_text_reads_back_as_its_own_copy(self) -> None:
        if not hasattr(self, "pool"):
            return
        owners: dict[int, list[str]] = defaultdict(list)
        for name, table in self.tables.items():
            for group in table.groups:
                assert [self.memory[group[i // self.size]][i % self.size] for i in range(len(self.texts[name]))] == self.texts[name]
                for block in group:
                    owners[block].append(f"text {name}")
        self.pool.check(owners)


TestCopyOnWrite = CopyOnWriteMachine.TestCase


def test_the_last_owner_of_a_shared_block_writes_in_place() -> None:
    pool = BlockPool(10)
    first = BlockTable(4, [[]])
    first.grow(pool, 6)
    second = first.fork(pool)
    assert first.shared_at(pool, 6) == [0]
    index, source, own = first.copy_on_write(pool, 0, 6)
    assert (index, source) == (1, second.groups[0][1])
    assert first.groups[0][1] == own != source
    assert second.shared_at(pool, 6) == []


def test_a_fork_at_a_block_edge_shares_nothing_that_is_written_next() -> None:
    pool = BlockPool(10)
    table = BlockTable(4, [[]])
    table.grow(pool, 8)
    fork = table.fork(pool)
    assert table.shared_at(pool, 8) == fork.shared_at(pool, 8) == []


def test_blocks_before_a_window_are_dropped_once_and_leave_null_entries() -> None:
    pool = BlockPool(10)
    table = BlockTable(4, [[], []])
    table.grow(pool, 12)
    blocks = list(table.groups[1])
    assert table.drop_before(1, 9) == [(0, blocks[0]), (1, blocks[1])]
    assert table.drop_before(1, 9) == []
    assert table.groups[1] == [NULL_BLOCK, NULL_BLOCK, blocks[2]]
    assert NULL_BLOCK not in table.groups[0]


def test_a_table_gives_its_last_block_back_first() -> None:
    pool = BlockPool(4)
    table = BlockTable(1, [[]])
    table.grow(pool, 3)
    blocks = list(table.groups[0])
    for block in blocks:
        pool.cache(block, block)
    table.release(pool)
    assert list(pool.free_list()) == blocks[::-1]
