"""Lesson 2: its memories and minivllm's allocators serve the same requests in the same way, and its tables equal minivllm's."""
from __future__ import annotations

from types import ModuleType

import pytest

from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.planning.allocator_replay import replay, sharegpt_like
from minivllm.planning.allocators import Allocator, ContiguousAllocator, PagedAllocator
from tests.lessons.loading import Mistake

SLOT = "return block * self.block_size + position % self.block_size"
FULL = "== len(table) * self.block_size"
NEEDED = "needed = math.ceil(prompt / self.block_size)"
GROW = """            if not self.free:
                return False
            table.append(self.allocate())
        self.lengths[name] += 1"""
GROW_FIRST = """            self.lengths[name] += 1
            if not self.free:
                return False
            table.append(self.allocate())
        else:
            self.lengths[name] += 1"""
ADMIT = """        if needed > len(self.free):
            return False
        self.tables[name] = [self.allocate() for _ in range(needed)]"""
ADMIT_PARTLY = """        self.tables[name] = []
        for _ in range(needed):
            if not self.free:
                return False
            self.tables[name].append(self.allocate())"""
MISTAKES = [
    Mistake(1, "block = self.tables[name][position // self.block_size]", "block = position // self.block_size", "the position itself"),
    Mistake(1, SLOT, "return block + position % self.block_size", "start at slot 7"),
    Mistake(2, FULL, FULL + " - 1", "one token too early"),
    Mistake(2, FULL, "> len(table) * self.block_size", "one token too late"),
    Mistake(2, GROW, GROW_FIRST, "check for room first"),
    Mistake(3, NEEDED, "needed = prompt // self.block_size + 1", "one too many"),
    Mistake(3, NEEDED, "needed = prompt // self.block_size", "round up"),
    Mistake(3, ADMIT, ADMIT_PARTLY, "count first, then allocate"),
    Mistake(4, "return self.free.pop(0)", "return self.free[0]", "allocated twice"),
]


def test_lesson_and_planning_make_the_same_requests(lesson: ModuleType) -> None:
    theirs = [(request.prompt, request.output) for request in sharegpt_like(50, limit=2048)]
    assert [(request.prompt, request.output) for request in lesson.chat_requests(50, 2048)] == theirs


@pytest.mark.parametrize("size", [None, 1, 4, 16, 64])
def test_lesson_and_allocators_serve_the_same_requests_alike(lesson: ModuleType, size: int | None) -> None:
    memory = lesson.ReservedMemory(2048, 512) if size is None else lesson.PagedMemory(2048, size)
    allocator: Allocator = ContiguousAllocator(2048, 512) if size is None else PagedAllocator(2048, size)
    usage, run = lesson.serve(memory, lesson.chat_requests(40, 512)), replay(allocator, sharegpt_like(40, limit=512))
    assert (usage.steps, usage.preempted) == (len(run.steps), run.preemptions)
    assert usage.running == pytest.approx(run.mean("running")) and usage.waste == pytest.approx(run.waste)


def test_lesson_and_block_pool_fill_the_same_tables(lesson: ModuleType) -> None:
    memory, pool = lesson.PagedMemory(80, 4), BlockPool(21)
    tables = {name: BlockTable(4, [[]]) for name in "ab"}
    for name, prompt in (("a", 6), ("b", 3)):
        memory.try_admit(name, prompt)
        tables[name].grow(pool, prompt)
    for turn in range(20):
        name = "aab"[turn % 3]
        memory.try_grow(name)
        tables[name].grow(pool, memory.lengths[name])
        ours = {name: [block - 1 for block in table.groups[0]] for name, table in tables.items()}  # block 0 is the null block there
        assert memory.tables == ours


def test_the_answers_of_the_questions_are_correct() -> None:
    assert 2**20 // 360 == 2912 and 2912 // -(-500 // 16) == 91 and 2912 // (2048 // 16) == 22
