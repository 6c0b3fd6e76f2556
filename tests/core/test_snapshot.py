"""The snapshot of the scheduler: it is correct, contains no content of requests, and changes nothing."""
from __future__ import annotations

from typing import Any

import pytest

from minivllm.core import snapshot
from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.snapshot import CACHED, FREE, take_snapshot, view_step
from minivllm.sampling_params import SamplingParams
from tests.core.harness import Harness

PROMPT = tuple(range(100, 108))  # two blocks of four


def make(**settings: Any) -> Harness:
    defaults: dict[str, Any] = {"num_blocks": 33, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64}
    return Harness(SchedulerConfig(**{**defaults, **settings}))


def greedy(max_tokens: int = 20, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n, temperature=0.0 if n == 1 else 1.0)


def test_every_used_block_has_its_owner_and_the_others_are_free() -> None:
    harness = make()
    harness.add(PROMPT, greedy())
    harness.add((1, 2, 3), greedy())
    harness.step()
    harness.step()
    view = take_snapshot(harness.scheduler)
    assert view.per_cell == 1 and len(view.cells) == 32
    for sequence in harness.scheduler.running:
        assert {view.cells[block - 1] for block in sequence.table.blocks()} == {snapshot.owner(sequence)}
    assert sum(cell > 0 for cell in view.cells) == harness.scheduler.pool.num_used
    assert view.shared == ()
    assert [(s.owner, s.num_prompt_tokens, s.num_tokens - s.num_prompt_tokens) for s in view.running] == [(1, 8, 2), (2, 3, 2)]


def test_blocks_that_children_share_are_marked_as_shared() -> None:
    harness = make()
    harness.add(PROMPT, greedy(n=2))
    harness.step()
    harness.step()
    view = take_snapshot(harness.scheduler)
    first, second = (set(s.table.blocks()) for s in harness.scheduler.running)
    assert {cell + 1 for cell in view.shared} == first & second != set()
    assert [(s.owner, s.child) for s in view.running] == [(1, 0), (1, 1)]


def test_the_blocks_of_a_finished_request_are_cached() -> None:
    harness = make()
    harness.add(PROMPT, greedy(max_tokens=2))
    while harness.scheduler.has_unfinished():
        harness.step()
    cells = take_snapshot(harness.scheduler).cells
    assert cells.count(CACHED) == harness.scheduler.pool.num_cached > 0
    assert set(cells) == {CACHED, FREE}


def test_waiting_sequences_are_listed_in_priority_order() -> None:
    harness = make(max_num_seqs=1)
    for _ in range(4):
        harness.add(PROMPT, greedy())
    harness.step()
    view = take_snapshot(harness.scheduler)
    assert [s.owner for s in view.running] == [1]
    assert [s.owner for s in view.waiting] == [2, 3, 4]
    assert (view.num_running, view.num_waiting) == (1, 3)


def test_many_blocks_are_combined_into_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_CELLS", 10)
    harness = make()
    harness.add(PROMPT, greedy())
    harness.step()
    view = take_snapshot(harness.scheduler)
    assert (view.per_cell, len(view.cells)) == (4, 8)
    used = {(block - 1) // 4 for block in harness.scheduler.running[0].table.blocks()}
    assert {i for i, cell in enumerate(view.cells) if cell == 1} == used


def test_a_step_tells_prompt_tokens_from_decodes() -> None:
    harness = make(max_num_batched_tokens=6)
    harness.add((1, 2, 3), greedy())
    harness.step()
    harness.add(PROMPT, greedy())
    plan = harness.launch()
    assert plan is not None
    assert view_step(harness.scheduler, plan).work == ((1, 1, False), (2, 5, True))
    harness.finish()


def test_a_snapshot_changes_nothing() -> None:
    def run(observe: bool) -> list[Any]:
        harness = make(num_blocks=12)
        for i in range(5):
            harness.add((*PROMPT, i), greedy(max_tokens=12))
        while harness.scheduler.has_unfinished():
            harness.step()
            if observe:
                take_snapshot(harness.scheduler)
                harness.scheduler.check()
        return harness.plans

    assert run(observe=True) == run(observe=False)
