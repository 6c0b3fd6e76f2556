"""A view of the scheduler for a person who watches it: running and waiting sequences, and the owners of blocks. Read-only.

Requests appear as small numbers, in order of arrival. Their content does not appear. A screen shows at most a few thousand
rectangles, so neighboring blocks are combined into *cells*:

    blocks   1 2 3 4   5 6 7 8   9 ...        per_cell = 4
    cell        7         0       -1          7: request 7 owns a block of the cell; 0: FREE; -1: CACHED (cached and evictable)
"""
from __future__ import annotations

from dataclasses import dataclass

from minivllm.core.plan import StepPlan
from minivllm.core.request import Sequence, SequenceStatus
from minivllm.core.scheduler import Scheduler

FREE, CACHED = 0, -1  # owners start at 1
MAX_CELLS = 2048
MAX_LISTED = 256  # running sequences, and as many waiting ones, that are listed


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence. Children of one request have the same owner."""

    owner: int
    child: int
    num_prompt_tokens: int
    num_tokens: int  # prompt and output
    num_computed: int
    num_cached: int  # prompt tokens found in the prefix cache
    num_blocks: int
    preempted: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    running: tuple[SequenceView, ...]
    waiting: tuple[SequenceView, ...]
    num_running: int
    num_waiting: int
    per_cell: int  # blocks in one cell
    cells: tuple[int, ...]  # owner, FREE or CACHED
    shared: tuple[int, ...]  # indices of cells with a block that several sequences use


@dataclass(frozen=True, slots=True)
class StepView:
    """What one step computes: (owner, number of tokens, whether it is a prompt chunk), in the order of the plan."""

    step_id: int
    work: tuple[tuple[int, int, bool], ...]


def owner(sequence: Sequence) -> int:
    return sequence.request.order[1] + 1


def take_snapshot(scheduler: Scheduler) -> Snapshot:
    """Takes time in proportion to used blocks and waiting sequences."""
    waiting = sorted(scheduler.waiting, key=lambda sequence: sequence.order)
    per_cell, cells, shared = _cells(scheduler)
    return Snapshot(
        tuple(map(_view, scheduler.running[:MAX_LISTED])), tuple(map(_view, waiting[:MAX_LISTED])),
        len(scheduler.running), len(waiting), per_cell, cells, shared,
    )


def _view(sequence: Sequence) -> SequenceView:
    return SequenceView(
        owner(sequence), sequence.index, sequence.num_prompt_tokens, len(sequence.tokens), sequence.num_computed,
        sequence.num_cached_tokens, sum(1 for _ in sequence.table.blocks()),
        sequence.num_preemptions > 0 or sequence.status is SequenceStatus.SWAPPED,
    )


def _cells(scheduler: Scheduler) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """(blocks per cell, cells, shared cells). Cells start at block 1, since block 0 is the null block."""
    pool = scheduler.pool
    count = pool.num_blocks - 1
    per_cell = max(1, -(-count // MAX_CELLS))
    cells = [FREE] * -(-count // per_cell)
    shared = set()
    for sequence in reversed(scheduler.running):  # the owner with the highest priority comes last and stays
        number = owner(sequence)
        for block in sequence.table.blocks():
            cell = (block - 1) // per_cell
            cells[cell] = number
            if pool.ref_counts[block] > 1:
                shared.add(cell)
    for cell, state in enumerate(cells):
        if state == FREE and pool.key(1 + cell * per_cell) is not None:
            cells[cell] = CACHED
    return per_cell, tuple(cells), tuple(sorted(shared))


def view_step(scheduler: Scheduler, plan: StepPlan) -> StepView:
    """Describe a launched plan. Call it before the plan's update, because it reads the sequences' current state."""
    known = {sequence.id: sequence for sequence in scheduler.running}
    work = []
    for name, start, tokens in zip(plan.request_ids, plan.starts, plan.num_tokens, strict=True):
        sequence = known.get(name)
        if sequence is not None:  # otherwise it finished after the plan was made
            work.append((owner(sequence), tokens, start < sequence.num_prompt_tokens))
    return StepView(plan.step_id, tuple(work))
