"""What is true of a scheduler between any two calls, as assertions. It specifies which part of the scheduler owns what."""
from __future__ import annotations

from collections import Counter, defaultdict

from minivllm.core.plan import NULL_BLOCK
from minivllm.core.prefix_cache import chain_hashes
from minivllm.core.request import NO_ROW, Sequence, SequenceStatus
from minivllm.core.scheduler_state import SchedulerState


def check_state(state: SchedulerState) -> None:
    """Raise AssertionError naming the sequence or block that breaks a rule."""
    running, waiting = list(state.running), [*state.waiting.sequences(), *state.preempted_beams]
    _check_block_owners(state, running, waiting)
    _check_sequences(state, running, waiting)
    _check_in_flight(state, running)
    state.adapters.check(Counter(a for s in running if (a := s.request.new.adapter_id)))
    size = state.config.block_size
    for sequence in (*running, *waiting):
        hashes = chain_hashes(sequence.request.root_hash, sequence.tokens[:len(sequence.block_hashes) * size], size)
        assert hashes == sequence.block_hashes, f"{sequence.id} has block hashes that do not belong to its tokens"
    for sequence in running:
        _check_running(state, sequence)
    _check_shares(state, running)
    for sequence in waiting:
        _check_waiting(sequence)


def _check_block_owners(state: SchedulerState, running: list[Sequence], waiting: list[Sequence]) -> None:
    """Every reference to a block belongs to a table entry, a pending move, or a launched plan that frees the block later."""
    device: dict[int, list[str]] = defaultdict(list)
    host: dict[int, list[str]] = defaultdict(list)
    for sequence in running:
        for block in sequence.table.blocks():
            device[block].append(f"row {sequence.row} ({sequence.id})")
    for launched in state.launched:
        for block in launched.blocks_to_free:
            device[block].append(f"step {launched.plan.step_id}, outside the window")
    offload = state.kv.offload
    for move_id, move in offload.moves.items():
        device[move.device_block].append(f"move {move_id}")
        host[move.host_block].append(f"move {move_id}")
    for sequence in waiting:
        for blocks in sequence.host_blocks:
            for block in blocks:
                if block != NULL_BLOCK:
                    host[block].append(f"swapped {sequence.id}")
    state.kv.pool.check(device)
    offload.pool.check(host)


def _check_sequences(state: SchedulerState, running: list[Sequence], waiting: list[Sequence]) -> None:
    """Each row belongs to one sequence or is free. Each unfinished sequence is in exactly one list. The order is kept."""
    rows = [s.row for s in running] + state.free_rows
    assert sorted(rows) == list(range(state.config.max_running)), f"rows {rows} do not each occur once"
    assert len(state.launched) <= state.config.planning_depth + 1, "too many plans are in flight"
    assert [s.order for s in running] == sorted(s.order for s in running), "running sequences are not in priority order"
    assert len(waiting) == len(state.waiting) + len(state.preempted_beams), "the length of the queue is wrong"
    assert all(s.paused for s in state.preempted_beams), "a sequence in preempted_beams is not paused"
    listed = [*running, *waiting]
    assert len({id(s) for s in listed}) == len(listed), "a sequence is in two lists"
    unfinished = [s for r in state.requests.values() for s in r.sequences if s.status is not SequenceStatus.FINISHED]
    assert {id(s) for s in unfinished} == {id(s) for s in listed if s.status is not SequenceStatus.FINISHED}, "a sequence is in no list"
    for request in state.requests.values():
        assert not request.finished, f"{request.new.request_id} is finished and was not removed"


def _check_shares(state: SchedulerState, running: list[Sequence]) -> None:
    """Counts of rows and of waiting sequences by owner and by request."""
    counted = [s for s in running if s.status is SequenceStatus.RUNNING]
    rows = Counter(s.request.new.owner for s in counted)
    assert rows == +Counter(state.share.rows), f"rows by owner are {dict(rows)}, and {state.share.rows} were counted"
    waiting = Counter(id(s.request) for s in state.waiting.sequences())
    for request in state.requests.values():
        assert request.num_rows == sum(s.request is request for s in counted), f"{request.new.request_id} has another number of rows"
        assert request.num_waiting == waiting[id(request)], f"{request.new.request_id} has another number of waiting sequences"
    assert len(state.waiting) == waiting.total()
    assert state.waiting.num_requests == len(waiting)


def _check_in_flight(state: SchedulerState, running: list[Sequence]) -> None:
    in_flight: dict[int, int] = defaultdict(int)
    for launched in state.launched:
        for sequence, count in launched.tokens_in_flight():
            in_flight[id(sequence)] += count
    for sequence in running:
        assert sequence.num_in_flight == in_flight[id(sequence)], f"{sequence.id}: num_in_flight is not what launched plans compute"


def _check_waiting(sequence: Sequence) -> None:
    name, status = sequence.id, sequence.status
    assert status in (SequenceStatus.WAITING, SequenceStatus.SWAPPED), f"{name} is waiting and has status {status}"
    assert sequence.row == NO_ROW and not list(sequence.table.blocks()), f"{name} is waiting and has a row or blocks"
    assert sequence.num_in_flight == 0 and sequence.num_placeholders == 0, f"{name} is waiting and has tokens in flight"
    assert bool(sequence.host_blocks) == (status is SequenceStatus.SWAPPED), f"{name} has host blocks and status {status}"
    assert status is SequenceStatus.SWAPPED or sequence.num_computed == 0, f"{name} has no blocks and counts tokens as computed"


def _check_running(state: SchedulerState, sequence: Sequence) -> None:
    """Counters are in order, planned tokens have slots, and the block that is written next is not shared."""
    name, table = sequence.id, sequence.table
    assert sequence.row != NO_ROW, f"{name} is running and has no row"
    assert sequence.status not in (SequenceStatus.WAITING, SequenceStatus.SWAPPED), f"{name} has a row and status {sequence.status}"
    leaving = sequence.status is not SequenceStatus.RUNNING
    assert not leaving or sequence.num_in_flight, f"{name} is {sequence.status} and in no launched plan, and still has its row"
    assert 0 <= sequence.num_computed <= sequence.num_planned <= sequence.compute_limit, f"{name}: computed and planned are out of order"
    if sequence.status is SequenceStatus.FINISHED:
        return
    assert sequence.num_planned <= sequence.num_known + len(sequence.drafts), f"{name}: more is planned than known"
    assert len(sequence.tokens) <= sequence.num_known <= sequence.max_tokens_total, f"{name}: known is not tokens + placeholders"
    assert sequence.num_cached_blocks <= sequence.num_computed // table.block_size, f"{name}: cached a block that is not computed"
    assert len({len(group) for group in table.groups}) == 1, f"{name}: groups differ in length"
    assert table.capacity >= sequence.num_planned, f"{name}: planned tokens have no slots"
    for group, window in enumerate(state.config.kv_windows):
        first_seen = 0 if window is None else max(0, sequence.num_computed - window + 1) // table.block_size
        missing = [i for i, b in enumerate(table.groups[group]) if b == NULL_BLOCK and i >= first_seen]
        assert not missing, f"{name}: group {group} still needs logical blocks {missing}"
    if not sequence.shares_last_block and sequence.num_planned < table.capacity:
        written = {group[sequence.num_planned // table.block_size] for group in table.groups}
        others = {b for s in state.running if s is not sequence for b in s.table.blocks()}
        assert not written & others, f"{name} would write into the shared blocks {written & others}"
    _check_fast_path(sequence, leaving)


def _check_fast_path(sequence: Sequence, leaving: bool) -> None:
    name = sequence.id
    if sequence.num_planned < sequence.fast_plan_limit:
        special = (sequence.drafts or sequence.num_guesses or sequence.must_readmit
                   or sequence.dropped_entries or sequence.shares_last_block
                   or sequence.needs_values)
        plain = sequence.num_left_to_plan == 1 and not special and not leaving
        assert plain and sequence.fast_plan_limit <= sequence.table.capacity, f"{name} must not be planned on the fast path"
    if sequence.num_computed < sequence.fast_confirm_limit:
        assert not leaving and sequence.fast_confirm_limit < sequence.max_tokens_total, f"{name} must not be confirmed on the fast path"
