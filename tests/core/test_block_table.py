"""Block tables: growth, dropped entries, and copy-on-write against deep copies."""
from __future__ import annotations

import copy
from collections import defaultdict

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.plan import NULL_BLOCK


class CopyOnWriteMachine(RuleBasedStateMachine):
    """Sequences grow and fork, in blocks with shared tables. In the model each sequence is a separate list, deeply copied."""

    @initialize(block_size=st.integers(1, 5), num_groups=st.integers(1, 2))
    def start(self, block_size: int, num_groups: int) -> None:
        self.size = block_size
        self.pool = BlockPool(120)
        self.memory = [[-1] * block_size for _ in range(120)]
        self.tables = {0: BlockTable(block_size, [[] for _ in range(num_groups)])}
        self.sequences: dict[int, list[int]] = {0: []}
        self.next_name = 1
        self.clock = 0

    def _pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.sequences)))

    @precondition(lambda self: self.pool.num_free > 10)
    @rule(data=st.data(), count=st.integers(1, 4))
    def write(self, data: st.DataObject, count: int) -> None:
        name = self._pick(data)
        table, tokens = self.tables[name], self.sequences[name]
        for group in table.shared_at(self.pool, len(tokens)):
            _, source, own = table.copy_on_write(self.pool, group, len(tokens))
            self.memory[own] = list(self.memory[source])
        needed = table.num_missing_blocks(len(tokens) + count)
        free = self.pool.num_free
        table.grow(self.pool, len(tokens) + count)
        assert free - self.pool.num_free == needed
        for _ in range(count):
            self.clock += 1
            for group in table.groups:
                self.memory[group[len(tokens) // self.size]][len(tokens) % self.size] = self.clock
            tokens.append(self.clock)

    @precondition(lambda self: len(self.sequences) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name = self._pick(data)
        free = self.pool.num_free
        self.tables[self.next_name] = self.tables[name].fork(self.pool)
        assert self.pool.num_free == free, "a fork costs no block"
        self.sequences[self.next_name] = copy.deepcopy(self.sequences[name])
        self.next_name += 1

    @precondition(lambda self: len(self.sequences) > 1)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = self._pick(data)
        self.tables.pop(name).release(self.pool)
        del self.sequences[name]

    @invariant()
    def every_sequence_reads_back_as_its_own_copy(self) -> None:
        if not hasattr(self, "pool"):
            return
        owners: dict[int, list[str]] = defaultdict(list)
        for name, table in self.tables.items():
            for group in table.groups:
                assert [self.memory[group[i // self.size]][i % self.size] for i in range(len(self.sequences[name]))] == self.sequences[name]
                for block in group:
                    owners[block].append(f"sequence {name}")
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


def test_a_fork_at_the_end_of_a_block_needs_no_copy() -> None:
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


def test_a_released_table_frees_its_last_block_first() -> None:
    pool = BlockPool(4)
    table = BlockTable(1, [[]])
    table.grow(pool, 3)
    blocks = list(table.groups[0])
    for block in blocks:
        pool.cache(block, block)
    table.release(pool)
    assert list(pool.free_list()) == blocks[::-1]
