"""Making room: blocks for a running sequence, taken from sequences with lower priority if too few are free.

The sequence with the lowest priority among the running ones is preempted. Two rules limit preemption:

- A sequence never preempts one with higher priority. If it has the lowest priority itself, it keeps its blocks and waits.
- If enough blocks will become free without a preemption, the sequence waits for them.
"""
from __future__ import annotations

from minivllm.core.plan import BlockId
from minivllm.core.plan_builder import PlanBuilder
from minivllm.core.request import Sequence, SequenceStatus
from minivllm.core.scheduler_state import SchedulerState


def allocate_slots(state: SchedulerState, plan: PlanBuilder, sequence: Sequence, end: int) -> tuple[tuple[BlockId, ...], ...] | None:
    """Make slots up to position `end`, preempting if necessary. Returns the new blocks by group, or None if there is no room now."""
    kv = state.kv
    while (needed := kv.num_blocks_needed(sequence, end)) > kv.pool.num_free:
        if not _preempt_lowest_priority(state, plan, sequence, needed):
            return None
    return kv.allocate_slots(sequence, end, plan.copies) if needed else plan.no_blocks


def _preempt_lowest_priority(state: SchedulerState, plan: PlanBuilder, sequence: Sequence, needed: int) -> bool:
    """Preempt one sequence for `sequence`, which needs blocks. False: nothing was preempted, and the sequence must wait."""
    plan.short_of_blocks = True
    if plan.num_blocks_to_be_freed is None:
        plan.num_blocks_to_be_freed = _count_blocks_to_be_freed(state)
    if state.kv.pool.num_free + plan.num_blocks_to_be_freed >= needed:
        return False
    victim = next((s for s in reversed(state.running) if s.status is SequenceStatus.RUNNING or s is sequence), sequence)
    if victim is sequence:
        return False
    if victim.num_in_flight:
        plan.num_blocks_to_be_freed += state.kv.num_unshared_blocks(victim)
    state.preempt(victim)
    return True


def _count_blocks_to_be_freed(state: SchedulerState) -> int:
    """Blocks that become free without a further decision: of leaving sequences, outside windows, and being moved out."""
    leaving = (s for s in state.running if s.status in (SequenceStatus.PREEMPTED, SequenceStatus.FINISHED))
    return (sum(state.kv.num_unshared_blocks(s) for s in leaving)
            + sum(len(launched.blocks_to_free) for launched in state.launched)
            + sum(move.outward for move in state.kv.offload.moves.values()))


def preempt_paused_beam(state: SchedulerState) -> bool:
    """Preempt the paused beam with the lowest priority. False if there is none."""
    paused = next((s for s in reversed(state.running) if s.paused and s.status is SequenceStatus.RUNNING), None)
    if paused is None:
        return False
    state.preempt(paused)
    state.remove_rowless()
    return True
