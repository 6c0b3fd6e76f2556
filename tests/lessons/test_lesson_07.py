"""Lesson 7: it finds the same prefixes, evicts the same blocks and makes the same copies as minivllm's scheduler."""
from __future__ import annotations

from types import ModuleType

import pytest

from minivllm.core.plan import StepResult
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.simulate import SimulatedRequest, StepCost, simulate
from minivllm.core.trace_summary import block_tables
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams
from tests.lessons.loading import Mistake

HASH = "parent = sha256(parent + repr(tokens[start:start + block_size]).encode()).digest()"
MISTAKES = [
    Mistake(1, HASH, HASH.replace("parent + ", ""), "after DIFFERENT beginnings"),
    Mistake(1, "range(0, len(tokens) - block_size + 1, block_size)", "range(0, len(tokens), block_size)", "not full got a hash"),
    Mistake(1, HASH, HASH.replace("repr(tokens[start:start + block_size])", "''.join(map(str, tokens[start:start + block_size]))"),
            "separate the tokens"),
    Mistake(2, "in block_hashes(tokens[:-1], self.block_size):", "in block_hashes(tokens, self.block_size):",
            "no logits for the next token"),
    Mistake(2, "            if block_hash not in self.block_of:\n                break\n",
            "            if block_hash not in self.block_of:\n                continue\n", "stop at the first miss"),
    Mistake(3, "elif self.owners[sequence.table[index]] > 1:", "elif False:", "b will read a's token"),
    Mistake(3, "            self.release(shared)\n", "", "give up your share"),
    Mistake(3, "            self.keys[own] = list(self.keys[shared])\n", "", "needs the CONTENT"),
    Mistake(4, "self.free.insert(len(self.free) if block in self.hash_of else 0, block)",
            "self.free.extend([block] if block in self.hash_of else [])", "all blocks must be free"),
]


@pytest.mark.parametrize("num_blocks", [512, 160])
def test_lesson_and_scheduler_find_the_same_prefixes(lesson: ModuleType, num_blocks: int) -> None:
    """One request after another, with and without evictions."""
    turns = [([token + 3 for token in prompt], [token + 3 for token in answer]) for prompt, answer in lesson.chats(30, seed=1)]
    memory, ours = lesson.Memory(num_blocks, 16), 0
    ours = sum(map(len, (prompt for prompt, _ in turns))) - lesson.serve(memory, turns)
    config = SchedulerConfig(num_blocks=num_blocks + 1, max_num_seqs=1, max_num_batched_tokens=4096, max_model_len=4096)
    work = []
    for i, (prompt, answer) in enumerate(turns):
        params = SamplingParams(max_tokens=len(answer), ignore_eos=True)
        work.append(SimulatedRequest(EngineRequest(f"r{i}", tuple(prompt), params, arrival_time=float(i)), (tuple(answer),)))
    result = simulate(config, work, StepCost(1e-6, 0.0, 0.0))
    assert result.cached_tokens == ours > 1000


@pytest.mark.parametrize(("prompt", "n", "size"), [(13, 3, 8), (16, 3, 8), (5, 2, 4), (3, 4, 16), (9, 1, 4)])
def test_lesson_and_scheduler_make_the_same_copies_and_hold_as_many_blocks(lesson: ModuleType, prompt: int, n: int, size: int) -> None:
    outputs = 12
    memory = lesson.Memory(64, size)
    origin, _ = memory.start(list(range(prompt)))
    sequences = [origin, *(memory.fork(origin) for _ in range(n - 1))]
    ours = []
    for turn in range(outputs - 1):  # the last token is never computed
        for i, sequence in enumerate(sequences):
            memory.append(sequence, 1000 * i + turn)
            memory.check(sequence)
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
