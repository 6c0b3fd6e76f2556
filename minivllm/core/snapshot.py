"""A picture of the scheduler for people who watch: who runs, who waits, whose the blocks are. Only looks, changes nothing.

Requests appear as small numbers, in the order in which they came; nothing of their content is here. Many blocks are summed up in
fewer *cells* of neighbouring ones, since a screen has room for some thousand:

    blocks   1 2 3 4   5 6 7 8   9 ...        per_cell = 4
    cell        7         0       -1           the first used block's owner; FREE; CACHED: free, but its content can still be found
"""
from __future__ import annotations

from dataclasses import dataclass

from minivllm.core.plan import StepPlan
from minivllm.core.request import Sequence, State
from minivllm.core.scheduler import Scheduler

FREE, CACHED = 0, -1  # owners count from 1
MOST_CELLS = 2048
MOST_LISTED = 256  # sequences that are listed one by one


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence. Children of one request have the same owner."""

    owner: int
    child: int
    num_prompt_tokens: int
    num_tokens: int  # prompt and output
    num_computed: int
    num_cached: int  # of the prompt, found in the prefix cache
    num_blocks: int
    preempted: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    running: tuple[SequenceView, ...]
    waiting: tuple[SequenceView, ...]
    num_running: int
    num_waiting: int
    per_cell: int  # blocks
    cells: tuple[int, ...]  # owner, FREE or CACHED
    shared: tuple[int, ...]  # cells with a block that several sequences use


@dataclass(frozen=True, slots=True)
class StepView:
    """What one step computes: (owner, tokens, whether they are of its prompt), in the order of the plan."""

    step_id: int
    work: tuple[tuple[int, int, bool], ...]


def owner(sequence: Sequence) -> int:
    return sequence.request.order[1] + 1


def take_snapshot(scheduler: Scheduler) -> Snapshot:
    """Takes time in proportion to the blocks in use and the sequences that wait."""
    waiting = sorted(scheduler.waiting, key=lambda sequence: sequence.order)
    per_cell, cells, shared = _cells(scheduler)
    return Snapshot(
        tuple(map(_view, scheduler.running[:MOST_LISTED])), tuple(map(_view, waiting[:MOST_LISTED])),
        len(scheduler.running), len(waiting), per_cell, cells, shared,
    )


def _view(sequence: Sequence) -> SequenceView:
    return SequenceView(
        owner(sequence), sequence.index, sequence.num_prompt_tokens, len(sequence.tokens), sequence.num_computed,
        sequence.num_cached_tokens, sum(1 for _ in sequence.table.blocks()),
        sequence.num_preemptions > 0 or sequence.state is State.SWAPPED,
    )


def _cells(scheduler: Scheduler) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The blocks from 1 on (0 is the null block) in cells of `per_cell`."""
    pool = scheduler.pool
    count = pool.num_blocks - 1
    per_cell = max(1, -(-count // MOST_CELLS))
    cells = [FREE] * -(-count // per_cell)
    shared = set()
    for sequence in reversed(scheduler.running):  # the first in order has the last word
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
    """To be called before the plan's update: it asks what its sequences are now."""
    known = {sequence.id: sequence for sequence in scheduler.running}
    work = []
    for name, start, tokens in zip(plan.request_ids, plan.starts, plan.num_tokens, strict=True):
        sequence = known.get(name)
        if sequence is not None:  # else it has ended since the plan was made
            work.append((owner(sequence), tokens, start < sequence.num_prompt_tokens))
    return StepView(plan.step_id, tuple(work))
