"""Making room: blocks for a running sequence, taken from sequences with lower priority if too few are free, and rows for a fair share.

The sequence with the lowest priority among the running ones is preempted: of those whose owner has the most blocks, if there are several
owners. Two rules limit preemption:

- A sequence never preempts one with higher priority. If it has the lowest priority itself, it keeps its blocks and waits.
- If enough blocks will become free without a preemption, the sequence waits for them.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

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
    victim = _lowest_priority(state, sequence)
    if victim is sequence:
        return False
    moving_out = _num_moving_out(state)
    if victim.num_in_flight:
        plan.num_blocks_to_be_freed += state.kv.num_unshared_blocks(victim)
    state.preempt(victim)
    plan.num_blocks_to_be_freed += _num_moving_out(state) - moving_out  # swapped out: free when the moves have finished
    return True


def _count_blocks_to_be_freed(state: SchedulerState) -> int:
    """Blocks that become free without a further decision: of leaving sequences, outside windows, and being moved out."""
    leaving = (s for s in state.running if s.status in (SequenceStatus.PREEMPTED, SequenceStatus.FINISHED))
    return (sum(state.kv.num_unshared_blocks(s) for s in leaving)
            + sum(len(launched.blocks_to_free) for launched in state.launched)
            + _num_moving_out(state))


def _num_moving_out(state: SchedulerState) -> int:
    return sum(move.outward for move in state.kv.offload.moves.values())


def _lowest_priority(state: SchedulerState, sequence: Sequence) -> Sequence:
    """The victim for `sequence`: the newest of the owner with the most blocks, if there are several owners.

    An owner's only running sequence is exempt from this rule. So the running sequence with the highest priority is never a victim.
    """
    running = [s for s in state.running if s.status is SequenceStatus.RUNNING or s is sequence]
    if state.waiting.has_several_owners:
        blocks, rows = blocks_by_owner(running), state.share.rows
        rich = max((owner for owner in blocks if rows.get(owner, 0) > 1), key=lambda owner: blocks[owner], default=None)
        running = [s for s in running if rich in (None, s.request.new.owner)]
    return running[-1] if running else sequence


def blocks_by_owner(running: list[Sequence]) -> Counter[str]:
    """Blocks in the tables of these sequences. Shared ones count for each."""
    blocks: Counter[str] = Counter()
    for sequence in running:
        blocks[sequence.request.new.owner] += sequence.table.num_blocks
    return blocks


def make_room_for_share(state: SchedulerState, sequence: Sequence) -> None:
    """Preempt newest sequences of a larger share, because this waiting sequence finds no row.

    A larger share is that of the owner with the most rows, if it has two more than this owner has and will get; or that of a
    request with more than half of the rows, for a request of the same owner that has none.
    """
    share, request = state.share, sequence.request
    if not state.waiting.has_several_owners and not share.large:
        return  # the common case
    owner, waiting = request.new.owner, state.waiting.num_sequences_of(request.new.owner)
    coming = sum(s.status is not SequenceStatus.RUNNING for s in state.running)  # rows that leave: count them as given to this owner
    rich = max(share.rows, key=lambda name: share.rows[name])
    for victim in _newest_first(state, rich):
        if coming >= waiting or share.rows[rich] - 1 < share.rows.get(owner, 0) + coming + 1:
            break
        state.preempt(victim)
        coming += 1
    if share.large and not request.num_rows and not coming:
        newest = next((s for s in _newest_first(state, owner) if s.request in share.large), None)
        if newest is not None:
            state.preempt(newest)
    state.remove_rowless()


def make_blocks_for_share(state: SchedulerState, sequence: Sequence, needed: int) -> None:
    """The same for a waiting sequence that finds too few blocks: `needed` is how many. Here the owner with the most blocks has the most."""
    if not state.waiting.has_several_owners:
        return
    blocks = blocks_by_owner([s for s in state.running if s.status is SequenceStatus.RUNNING])
    coming = (sum(s.table.num_blocks for s in state.running if s.status is not SequenceStatus.RUNNING)
              + _num_moving_out(state))
    if not blocks:
        return
    rich, mine = max(blocks, key=lambda name: blocks[name]), blocks[sequence.request.new.owner]
    for victim in _newest_first(state, rich):
        size = victim.table.num_blocks
        if coming >= needed or state.share.rows[rich] < 2 or blocks[rich] - size < mine + needed:
            break
        state.preempt(victim)
        blocks[rich] -= size
        coming += size
    state.remove_rowless()


def _newest_first(state: SchedulerState, owner: str) -> Iterator[Sequence]:
    """The running sequences of an owner, the lowest priority first."""
    return (s for s in reversed(state.running)
            if s.status is SequenceStatus.RUNNING and s.request.new.owner == owner and not s.request.new.beam_search)


def preempt_paused_beam(state: SchedulerState) -> bool:
    """Preempt the paused beam with the lowest priority. False if there is none."""
    paused = next((s for s in reversed(state.running) if s.paused and s.status is SequenceStatus.RUNNING), None)
    if paused is None:
        return False
    state.preempt(paused)
    state.remove_rowless()
    return True
