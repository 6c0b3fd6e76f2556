"""What is true of a scheduler between any two calls, as assertions. Read it as the specification of who owns what."""
from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from minivllm.core.plan import NULL_BLOCK
from minivllm.core.prefix_cache import chain_digests
from minivllm.core.request import NO_ROW, Sequence, State

if TYPE_CHECKING:
    from minivllm.core.scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise AssertionError naming the sequence or block that breaks a rule."""
    running, waiting = list(scheduler.running), [*scheduler._roster.queue.sequences(), *scheduler._roster.parked]
    _check_ownership(scheduler, running, waiting)
    _check_places(scheduler, running, waiting)
    for sequence in (*running, *waiting):
        names = chain_digests(sequence.request.root, sequence.tokens[:len(sequence.digests) * scheduler.config.block_size],
                              scheduler.config.block_size)
        assert names == sequence.digests, f"{sequence.id} has names for blocks whose tokens are others"
    for sequence in running:
        _check_running(scheduler, sequence)
    for sequence in waiting:
        assert sequence.state in (State.WAITING, State.SWAPPED), f"{sequence.id} waits, and is {sequence.state}"
        assert sequence.row == NO_ROW and not list(sequence.table.blocks()), f"{sequence.id} waits, and holds a row or blocks"
        assert sequence.num_in_flight == 0 and sequence.num_placeholders == 0, f"{sequence.id} waits, and is in flight"
        assert bool(sequence.host_blocks) == (sequence.state is State.SWAPPED), f"{sequence.id} has host blocks while {sequence.state}"
        assert sequence.state is State.SWAPPED or sequence.num_computed == 0, f"{sequence.id} has nothing, and counts it as computed"


def _check_ownership(scheduler: Scheduler, running: list[Sequence], waiting: list[Sequence]) -> None:
    """Every reference to a block is a table's entry, a move's, or a retired block's that a launched plan still names."""
    device: dict[int, list[str]] = defaultdict(list)
    host: dict[int, list[str]] = defaultdict(list)
    for sequence in running:
        for block in sequence.table.blocks():
            device[block].append(f"row {sequence.row} ({sequence.id})")
    for launched in scheduler._launched:
        for block in launched.retired:
            device[block].append(f"step {launched.plan.step_id}, out of window")
    for move_id, move in scheduler.host.moves.items():
        device[move.device_block].append(f"move {move_id}")
        host[move.host_block].append(f"move {move_id}")
    for sequence in waiting:
        for blocks in sequence.host_blocks:
            for block in blocks:
                if block != NULL_BLOCK:
                    host[block].append(f"swapped {sequence.id}")
    scheduler.pool.check(device)
    scheduler.host.pool.check(host)


def _check_places(scheduler: Scheduler, running: list[Sequence], waiting: list[Sequence]) -> None:
    """Each row has one holder or is free; each unfinished sequence is in exactly one place; order is kept."""
    rows = [s.row for s in running] + scheduler._roster.free_rows
    assert sorted(rows) == list(range(scheduler.config.max_running)), f"rows {rows} are not each in one place"
    assert len(scheduler._launched) <= scheduler.config.planning_depth + 1, "too many plans in flight"
    assert [s.order for s in running] == sorted(s.order for s in running), "running sequences are out of order"
    assert len(waiting) == len(scheduler._roster.queue) + len(scheduler._roster.parked), "the queue is miscounted"
    assert all(s.paused for s in scheduler._roster.parked), "a sequence is parked, and not paused"
    placed = [*running, *waiting]
    assert len({id(s) for s in placed}) == len(placed), "a sequence is in two places"
    unfinished = [s for r in scheduler._roster.requests.values() for s in r.sequences if s.state is not State.FINISHED]
    assert {id(s) for s in unfinished} == {id(s) for s in placed if s.state is not State.FINISHED}, "a sequence is nowhere"
    for request in scheduler._roster.requests.values():
        assert not request.finished, f"{request.new.request_id} is over and still known"
    in_flight: dict[int, int] = defaultdict(int)
    for launched in scheduler._launched:
        for sequence, count in launched.shares():
            in_flight[id(sequence)] += count
    for sequence in running:
        assert sequence.num_in_flight == in_flight[id(sequence)], f"{sequence.id}: in flight is not what launched plans will confirm"


def _check_running(scheduler: Scheduler, sequence: Sequence) -> None:
    """Counters are in order, slots exist for what is planned, and nobody else reads the block that is written next."""
    name, table = sequence.id, sequence.table
    assert sequence.row != NO_ROW and sequence.state not in (State.WAITING, State.SWAPPED), f"{name} runs, and is {sequence.state}"
    leaves = sequence.state is not State.RUNNING
    assert not leaves or sequence.num_in_flight, f"{name} is {sequence.state} and in no launched plan, yet holds its row"
    assert 0 <= sequence.num_computed <= sequence.num_planned <= sequence.compute_limit, f"{name}: computed and planned are out of order"
    if sequence.state is State.FINISHED:
        return
    assert sequence.num_planned <= sequence.num_known + len(sequence.drafts), f"{name}: planned past what is known"
    assert len(sequence.tokens) <= sequence.num_known <= sequence.max_tokens_total, f"{name}: known is not tokens + placeholders"
    assert sequence.num_committed <= sequence.num_computed // table.block_size, f"{name}: committed what is not computed"
    assert len({len(group) for group in table.groups}) == 1, f"{name}: groups differ in length"
    assert table.capacity >= sequence.num_planned, f"{name}: planned past its slots"
    for group, window in enumerate(scheduler.config.kv_windows):
        first_seen = 0 if window is None else max(0, sequence.num_computed - window + 1) // table.block_size
        lost = [i for i, b in enumerate(table.groups[group]) if b == NULL_BLOCK and i >= first_seen]
        assert not lost, f"{name}: group {group} still needs logical blocks {lost}"
    if not sequence.shares_tail and sequence.num_planned < table.capacity:
        written = {group[sequence.num_planned // table.block_size] for group in table.groups}
        others = {b for s in scheduler.running if s is not sequence for b in s.table.blocks()}
        assert not written & others, f"{name} would write into blocks {written & others}, which others hold"
    if sequence.num_planned < sequence.plan_freely_until:
        special = sequence.drafts or sequence.must_readmit or sequence.dropped or sequence.shares_tail or sequence.waits_for_result
        plain = sequence.num_left_to_plan == 1 and not special and not leaves
        assert plain and sequence.plan_freely_until <= table.capacity, f"{name} is not to be planned freely"
    if sequence.num_computed < sequence.confirm_freely_until:
        assert not leaves and sequence.confirm_freely_until < sequence.max_tokens_total, f"{name} is not to be confirmed freely"
