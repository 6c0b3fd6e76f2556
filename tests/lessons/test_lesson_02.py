"""Lesson 2 runs, its claims are correct, and its pages work as minivllm's: the same attention, copies and waste."""
from __future__ import annotations

import contextlib
import io
import sys
from types import ModuleType

import pytest
import torch

from minivllm.core.plan import StepResult
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.trace_summary import block_tables
from minivllm.engine_request import EngineRequest
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference import attention as kernel
from minivllm.planning.allocators import PagedAllocator, RequestLengths
from minivllm.sampling_params import SamplingParams
from tests.lessons.loading import LESSONS, load_lesson, run_lesson_alone

FOLDER = LESSONS / "02_paged_blocks"


@pytest.fixture(scope="module")
def lesson() -> ModuleType:
    return load_lesson(FOLDER)


def test_the_lesson_runs_on_its_own_and_prints_what_its_readme_states() -> None:
    printed = run_lesson_alone(FOLDER)
    assert "a: 11 tokens, table [0, 3, 5]" in printed
    assert "a writes token 11: table [0, 3, 6], copies so far: 1" in printed
    assert "d writes token 12: table [0, 3, 5, 8], copies so far: 1" in printed
    assert "2048)   79.9%" in printed and "blocks of  16                      1.8%" in printed


@pytest.mark.parametrize("size", [1, 4, 7])
def test_lesson_and_kernel_give_the_same_attention_over_the_same_blocks(lesson: ModuleType, size: int) -> None:
    heads, dim, lengths = 2, 8, (13, 1, 8)
    dice = torch.Generator().manual_seed(size)
    memory, sequences = lesson.Memory(40, size, heads, dim), [lesson.Sequence() for _ in lengths]
    memory.free = torch.randperm(39, generator=dice).add(1).tolist()  # scattered; without block 0, which is the null block
    for position in range(max(lengths)):
        for sequence, length in zip(sequences, lengths, strict=True):
            if position < length:
                memory.append(sequence, *torch.randn(2, heads, dim, generator=dice))
    q = torch.randn(len(sequences), heads, dim, generator=dice)
    most = max(len(sequence.table) for sequence in sequences)
    batch = InputBatch(
        tokens=torch.zeros(3, dtype=torch.int32), positions=torch.tensor(lengths) - 1, query_start=torch.arange(4, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32), slots=(torch.zeros(3, dtype=torch.int64),),
        block_tables=(torch.tensor([sequence.table + [0] * (most - len(sequence.table)) for sequence in sequences], dtype=torch.int32),),
        logit_rows=torch.arange(3), num_decodes=3, query_lens_host=(1, 1, 1), seq_lens_host=lengths,
    )
    shape = {"block_size": size, "num_heads": heads, "num_kv_heads": heads, "head_dim": dim}
    meta = kernel.prepare_attention(batch, 0, **shape, window=None, dtype=q.dtype)
    theirs = kernel.attention(q, KVLayer(memory.k.nan_to_num(), memory.v.nan_to_num()), meta, scale=dim**-0.5)
    for i, sequence in enumerate(sequences):
        torch.testing.assert_close(lesson.attend_gathered(q[i], memory, sequence), theirs[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(lesson.attend_by_block(q[i], memory, sequence), theirs[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("prompt", "n", "size"), [(13, 3, 8), (16, 3, 8), (5, 2, 4), (3, 4, 16), (9, 1, 4)])
def test_lesson_and_scheduler_make_the_same_copies_and_hold_as_many_blocks(lesson: ModuleType, prompt: int, n: int, size: int) -> None:
    outputs = 12
    memory, origin = lesson.Memory(64, size, 1, 1), lesson.Sequence()
    nothing = torch.zeros(1, 1)
    for _ in range(prompt):
        memory.append(origin, nothing, nothing)
    sequences = [origin, *(memory.fork(origin) for _ in range(n - 1))]
    ours = []
    for _ in range(outputs - 1):  # the last token is never computed
        for sequence in sequences:
            memory.append(sequence, nothing, nothing)
        ours.append((memory.copies, 64 - len(memory.free), sorted(len(sequence.table) for sequence in sequences)))

    scheduler = Scheduler(SchedulerConfig(num_blocks=64, block_size=size, max_model_len=64))
    scheduler.add(EngineRequest("r", tuple(range(prompt)), SamplingParams(n=n, max_tokens=outputs, ignore_eos=True)))
    theirs, copies = [], 0
    while (plan := scheduler.schedule(0.0)) is not None:
        copies += len(plan.copies)
        tables = [groups[0] for groups in block_tables(scheduler).values()]
        theirs.append((copies, len({block for table in tables for block in table}), sorted(map(len, tables))))
        scheduler.update(plan, StepResult(plan.step_id, tuple((500 + row,) for row in plan.sample_rows)), {}, 0.0)
    assert theirs[1:] == ours


@pytest.mark.parametrize("size", [1, 4, 16, 256])
def test_lesson_and_allocator_count_the_same_waste(lesson: ModuleType, size: int) -> None:
    lengths = lesson.some_lengths(12, limit=300)
    empty = held = 0
    for length in lengths:
        allocator = PagedAllocator(512, size)
        assert allocator.try_admit(0, RequestLengths(1, length))
        for _ in range(length):
            empty, held = empty + allocator.reserved - allocator.used, held + allocator.reserved
            allocator.try_grow(0)
    assert lesson.waste(lengths, size) == pytest.approx(empty / held)


def test_the_answers_of_the_exercises_are_correct(lesson: ModuleType) -> None:
    memory, sequence = lesson.Memory(12, 4, 1, 1), lesson.Sequence([0, 3, 5], 11)
    assert sequence.table[9 // memory.size] * memory.size + 9 % memory.size == 21  # exercise 1
    assert 2**20 // 360 == 2912 and 2912 // -(-500 // 16) == 91 and 2912 // (2048 // 16) == 22  # exercise 4


@pytest.mark.parametrize(("old", "new"), [
    ("elif self.owners[sequence.table[index]] > 1:", "elif False:"),  # exercise 2
    ("total = total * shrink", "total = total"),  # exercise 3
    ("weighted = weighted * shrink", "weighted = weighted"),
])
def test_the_changes_of_exercises_2_and_3_break_the_lesson(old: str, new: str) -> None:
    source = (FOLDER / "lesson.py").read_text(encoding="utf-8")
    assert source.count(old) == 1
    broken = ModuleType("broken_lesson")
    sys.modules[broken.__name__] = broken
    try:
        exec(compile(source.replace(old, new), "lesson.py", "exec"), broken.__dict__)
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(AssertionError):
            broken.part_one()
    finally:
        del sys.modules[broken.__name__]
