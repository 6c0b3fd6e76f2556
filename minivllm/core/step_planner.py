"""Planning one step: which sequences run, how many tokens each computes, and in which blocks.

A step is filled in this order (see `scheduler` for the reasons):

    1. decodes: the next token of every running sequence whose prompt is computed
    2. verifications: decodes with drafts to verify
    3. prompt chunks of running sequences, in priority order, from the rest of the token budget, which several owners share
    4. waiting sequences, in priority order, while rows, blocks and budget last; the first one that does not fit ends the step,
       except that later ones may pass a sequence whose LoRA adapter finds no slot (see `adapter_slots`)

Planning uses only counts. It never needs the value of a token that a launched plan is sampling.
"""
from __future__ import annotations

from collections import Counter

from minivllm.core.fair_share import TokenParts, token_parts
from minivllm.core.forks import fork
from minivllm.core.plan import DEVICE_DRAFT, BlockId, BlockMove, RowAdmission, StepPlan
from minivllm.core.plan_builder import LaunchedPlan, PlanBuilder
from minivllm.core.preemption import allocate_slots, blocks_by_owner, make_blocks_for_share, make_room_for_share
from minivllm.core.request import Sequence, SequenceStatus
from minivllm.core.scheduler_state import SchedulerState

PROBE_STEPS = 64  # one of so many steps of sequences whose drafts do not pay makes drafts all the same, to test them
MAX_PASSED = 64  # waiting sequences without a slot that a step looks behind: bounds the time of planning


def plan_step(state: SchedulerState, now: float) -> PlanBuilder:
    plan = PlanBuilder(state.next_step_id, state.config.max_num_batched_tokens, len(state.config.kv_windows))
    verifications, prompts = _plan_decodes(state, plan)
    plan.close_decodes()
    parts = _token_parts(state, plan, verifications, prompts)
    for position, sequence in enumerate(verifications):
        if sequence.status is SequenceStatus.RUNNING:  # it may have been preempted since
            _plan_verification(state, plan, sequence, parts, reserved=len(verifications) - position - 1)
    for sequence in prompts:
        owner, before = sequence.request.new.owner, plan.budget
        count = min(sequence.num_left_to_plan, parts.limit(owner, before), state.config.max_chunk)
        if sequence.status is SequenceStatus.RUNNING and count > 0:
            _plan_tokens(state, plan, sequence, count)
        parts.spend(owner, before - plan.budget)
    state.remove_rowless()
    if not plan.short_of_blocks:
        _plan_waiting(state, plan, parts, now)
    elif state.waiting.has_several_owners and (first := state.waiting.first()) is not None:
        make_blocks_for_share(state, first, state.kv.num_blocks_for(first.num_known))
    return plan


def _token_parts(state: SchedulerState, plan: PlanBuilder, verifications: list[Sequence], prompts: list[Sequence]) -> TokenParts:
    """How the owners share the tokens beside the decodes.

    Waiting sequences count as far as there are rows for them, and all of an owner like its first one.
    """
    waiting = state.waiting
    if not waiting.has_several_owners or not state.config.enable_chunked_prefill:
        return TokenParts()
    if not (verifications or prompts or (len(waiting) and state.free_rows)):
        return TokenParts()
    decodes = Counter([s.request.new.owner for s in (*plan.sequences, *verifications)])
    wanted: Counter[str] = Counter()
    for owner, first, num_rows in waiting.firsts(len(state.free_rows)):
        if not first.num_moves_out:
            wanted[owner] = num_rows * (first.num_known - state.kv.get_computed_blocks(first)[1])
    for sequence in prompts:
        wanted[sequence.request.new.owner] += sequence.num_left_to_plan
    for sequence in verifications:
        wanted[sequence.request.new.owner] += sequence.num_left_to_plan - 1
    budget = plan.budget - len(verifications)
    rows = {owner: state.share.rows.get(owner, 0) for owner in waiting.owners()}
    return token_parts(decodes, wanted, rows, budget, state.config.free_tokens, plan.step_id)


def launch_plan(state: SchedulerState, plan: PlanBuilder) -> StepPlan | None:
    """Record the plan as launched, with the moves that are due. None if there is nothing to compute, move or wait for."""
    config, offload = state.config, state.kv.offload
    moves_out: list[BlockMove] = []
    moves_in: list[BlockMove] = []
    if config.num_host_blocks:
        if plan.sequences and not plan.short_of_blocks:
            offload.save_before_eviction(config.max_num_batched_tokens // config.block_size + 1)
        moves_out, moves_in = offload.pop_new_moves()
    # With nothing to compute, only a finished move can help. Moves are reported with a result, so an empty step is launched.
    must_wait = offload.moves and state.requests and not state.launched
    if not (plan.sequences or moves_out or must_wait):
        assert not moves_in
        return None
    state.next_step_id += 1
    launched = LaunchedPlan(plan.build(moves_out, moves_in, state.adapters.take_loads(), _proposes(state, plan)), plan)
    state.launched.append(launched)
    return launched.plan


def _proposes(state: SchedulerState, plan: PlanBuilder) -> bool:
    """Whether the worker's proposer makes drafts after this step.

    It does not if all sequences are plain decodes whose drafts do not pay. Then one of PROBE_STEPS steps shows whether they would pay
    again.
    """
    if not (state.config.num_device_drafts and plan.sequences):
        return True
    only_decodes = plan.num_decodes == len(plan.sequences)
    proposes = not only_decodes or state.num_unproposed >= PROBE_STEPS - 1 or any(s.wants_drafts for s in plan.sequences)
    state.num_unproposed = 0 if proposes else state.num_unproposed + 1
    return proposes


# Running sequences.


def _plan_decodes(state: SchedulerState, plan: PlanBuilder) -> tuple[list[Sequence], list[Sequence]]:
    """Plan the next token of every decode. Returns the sequences with drafts to verify, and those with a prompt to compute."""
    verifications: list[Sequence] = []
    prompts: list[Sequence] = []
    sequences, starts = plan.sequences, plan.starts
    for sequence in state.running:
        start = sequence.num_planned
        if start < sequence.fast_plan_limit:  # the common case
            sequence.num_planned = start + 1
            sequence.num_known += 1
            sequences.append(sequence)
            starts.append(start)
        elif _can_be_planned(sequence):
            if sequence.num_guesses and sequence.num_known - start == 1 and not sequence.needs_values and state.has_proposals:
                most = min(sequence.num_guesses, sequence.max_tokens_total - sequence.num_known - 1)
                sequence.drafts = (DEVICE_DRAFT,) * most
            if sequence.num_known - start > 1 or sequence.num_known == sequence.num_prompt_tokens:
                prompts.append(sequence)
            elif sequence.drafts:
                verifications.append(sequence)
            else:
                _plan_decode(state, plan, sequence)
    return verifications, prompts


def _can_be_planned(sequence: Sequence) -> bool:
    if sequence.status is not SequenceStatus.RUNNING or sequence.paused or sequence.num_left_to_plan <= 0:
        return False
    return sequence.num_placeholders == 0 or not (sequence.needs_values or sequence.must_readmit)


def _plan_decode(state: SchedulerState, plan: PlanBuilder, sequence: Sequence) -> None:
    """A decode that may need a block, a copy or an admission of its row first."""
    start = sequence.num_planned
    new_blocks = allocate_slots(state, plan, sequence, start + 1)
    if new_blocks is None:
        return
    plan.add_decode(sequence, start, _add_row_changes(state, plan, sequence, new_blocks))
    sequence.num_planned = start + 1
    sequence.num_known += 1
    _set_fast_plan_limit(sequence)


def _plan_verification(state: SchedulerState, plan: PlanBuilder, sequence: Sequence, parts: TokenParts, reserved: int) -> None:
    """A decode with drafts. Drafts leave one token of the budget to each later verification, and preempt no other sequence.

    The worker proposes the next drafts in the same step, so it gets slots for them too, if there are free blocks.
    """
    owner, before = sequence.request.new.owner, plan.budget
    count = min(sequence.num_left_to_plan, before - reserved, state.config.max_chunk)
    count = 1 + max(0, parts.limit(owner, count - 1))
    free, end = state.kv.pool.num_free, sequence.num_planned + count
    if sequence.table.num_missing_blocks(end) > free:
        count = 1
    ahead = min(end + state.config.num_device_drafts, state.config.max_model_len)
    _plan_tokens(state, plan, sequence, count, ahead if count > 1 and sequence.table.num_missing_blocks(ahead) <= free else None)
    parts.spend(owner, max(0, before - plan.budget - 1))


def _plan_tokens(state: SchedulerState, plan: PlanBuilder, sequence: Sequence, count: int, slots: int | None = None) -> None:
    """Compute `count` tokens: a prompt chunk, or a token and its drafts. If the last known token is among them, sample the next.

    slots: number of tokens that need slots; None: of those that are planned
    """
    start, end = sequence.num_planned, sequence.num_planned + count
    new_blocks = allocate_slots(state, plan, sequence, slots or end)
    if new_blocks is None:
        return
    drafts = sequence.drafts[:max(0, end - sequence.num_known)]
    column = plan.add(sequence, start, count, _add_row_changes(state, plan, sequence, new_blocks), drafts)
    sequence.num_planned, sequence.drafts = end, ()  # drafts that do not fit are dropped
    if end >= sequence.num_known and sequence.num_known < sequence.max_tokens_total:
        plan.add_sample(column, sequence)
        sequence.num_known += 1 + len(drafts)
        if sequence.request.num_unforked:
            _fork_children(state, plan, column, sequence)
        _set_fast_plan_limit(sequence)


def _fork_children(state: SchedulerState, plan: PlanBuilder, column: int, parent: Sequence) -> None:
    """The prompt's last token is planned: each child samples its own first token from the same logits."""
    request = parent.request
    first, request.num_unforked = request.new.params.n - request.num_unforked, 0
    for index in range(first, request.new.params.n):
        child = fork(state, parent, index, list(request.new.prompt_token_ids))
        if child.status is SequenceStatus.RUNNING:
            child.num_known += 1
            _add_row_changes(state, plan, child, plan.no_blocks)
            # The child confirms, with this plan, all tokens in flight for the parent.
            plan.forks.append((child, plan.add_sample(column, child), child.num_in_flight))


def _set_fast_plan_limit(sequence: Sequence) -> None:
    """Positions below the limit need no check before they are planned; see `Sequence`."""
    if sequence.needs_values or sequence.shares_last_block or sequence.num_guesses:
        sequence.fast_plan_limit = 0
    else:
        sequence.fast_plan_limit = min(sequence.table.capacity, sequence.compute_limit)


# What the worker must change in the sequence's row before the step.


def _add_row_changes(
    state: SchedulerState, plan: PlanBuilder, sequence: Sequence, new_blocks: tuple[tuple[BlockId, ...], ...],
) -> tuple[tuple[BlockId, ...], ...]:
    """Add the row's admission, or its entries that left a window. Returns the blocks to append: none after an admission."""
    if sequence.must_readmit:
        sequence.must_readmit = False
        sequence.dropped_entries.clear()
        plan.admitted.append(_row_admission(sequence, state.adapters.slot(sequence.request.new.adapter_id)))
        return plan.no_blocks
    for group, index in sequence.dropped_entries:
        plan.freed_blocks.append((sequence.row, group, index))
    sequence.dropped_entries.clear()
    return new_blocks


def _row_admission(sequence: Sequence, adapter_slot: int) -> RowAdmission:
    new, logprobs_from = sequence.request.new, sequence.prompt_logprobs_from
    return RowAdmission(
        row=sequence.row, request_id=sequence.id, token_ids=tuple(sequence.tokens), num_prompt_tokens=sequence.num_prompt_tokens,
        block_ids=sequence.table.as_tuples(), params=new.params, seed=sequence.request.seed, child_index=sequence.index,
        prompt_logprobs_from=logprobs_from if logprobs_from is not None and logprobs_from < sequence.num_prompt_tokens else None,
        adapter_slot=adapter_slot,
    )


# Waiting sequences.


def _plan_waiting(state: SchedulerState, plan: PlanBuilder, parts: TokenParts, now: float) -> None:
    if state.waiting.has_several_owners and len(state.waiting):
        state.share.blocks = blocks_by_owner(state.running)
    passed: list[Sequence] = []  # their adapters have no slot
    while plan.budget and state.free_rows and len(passed) < MAX_PASSED:
        sequence = state.waiting.first()
        if sequence is None:
            break
        adapter = sequence.request.new.adapter_id
        if adapter and not (state.adapters.fits(adapter) and (not passed or passed[0].num_passes < state.adapters.max_passes)):
            passed.append(state.waiting.pop())
            continue
        if not _admit(state, plan, sequence, parts, now):
            break  # no later sequence overtakes one that does not fit
        if adapter and passed:
            passed[0].num_passes += 1
    for sequence in passed:
        state.waiting.push(sequence)
    if not state.free_rows and (first := state.waiting.first()) is not None:
        make_room_for_share(state, first)  # also without budget, all of which the decodes of a larger share may use


def _admit(state: SchedulerState, plan: PlanBuilder, sequence: Sequence, parts: TokenParts, now: float) -> bool:
    """Give the first waiting sequence a row, its computed blocks and its first tokens. False if it does not fit."""
    owner = sequence.request.new.owner
    if sequence.num_moves_out:
        return False
    match, computed = state.kv.get_computed_blocks(sequence)
    left = min(sequence.num_known, sequence.compute_limit) - computed
    count = min(left, max(1, parts.limit(owner, plan.budget)), state.config.max_chunk)  # a row, even if the next step begins with it
    if count < left and not state.config.enable_chunked_prefill:
        return False
    reserve = state.config.num_blocks // 100 if state.running else 0  # for the next tokens of running sequences
    if not state.kv.fits(match, computed + count, reserve):
        plan.short_of_blocks = True
        make_blocks_for_share(state, sequence, state.kv.num_blocks_for(computed + count) + reserve)
        return False
    state.waiting.pop()
    if sequence.status is SequenceStatus.WAITING:
        state.prefix_queries += len(sequence.tokens)
        state.prefix_hits += computed
    state.kv.assign(sequence, match, computed)
    if sequence.first_scheduled_time is None:
        sequence.first_scheduled_time = now
        sequence.num_cached_tokens = computed
    state.start_running(sequence)
    _plan_tokens(state, plan, sequence, count)
    parts.spend(owner, count)
    return True
