"""Applying one step's result: the only place where a sequence advances, finishes, or fails with its step.

A rejected draft needs no rollback: it is not confirmed, and its slot is written again by the next plan.
"""
from __future__ import annotations

from collections import abc

from minivllm.core.plan import StepResult, Stop
from minivllm.core.plan_builder import LaunchedPlan
from minivllm.core.request import Sequence, SequenceStatus, SequenceUpdate
from minivllm.core.scheduler_state import SchedulerState
from minivllm.outputs import FinishReason

_NEVER = 1 << 62
_new_update = tuple.__new__  # once per token; SequenceUpdate's own constructor takes twice as long


def confirm_step(
    state: SchedulerState, launched: LaunchedPlan, result: StepResult, stops: abc.Mapping[int, Stop],
) -> list[SequenceUpdate]:
    """Confirm what a launched plan computed and sampled, for all its sequences."""
    updates = _confirm_decodes(state, launched, result, stops)
    for column in range(launched.num_decodes, len(launched.sequences)):
        _confirm(state, launched.sequences[column], launched.counts[column], len(launched.drafts[column]),
                 launched.sample_of.get(column), result, stops, updates)
    for child, sample, count in launched.forks:
        _confirm(state, child, count, 0, sample, result, stops, updates)
    for sample, drafts in enumerate(result.drafts):
        _set_drafts(state, launched.sample_sequences[sample], drafts)
    return updates


def _confirm_decodes(
    state: SchedulerState, launched: LaunchedPlan, result: StepResult, stops: abc.Mapping[int, Stop],
) -> list[SequenceUpdate]:
    updates: list[SequenceUpdate] = []
    append = updates.append
    decodes = zip(launched.sequences[:launched.num_decodes], result.token_ids, strict=False)
    for sample, (sequence, token_ids) in enumerate(decodes):
        token, computed = token_ids[0], sequence.num_computed + 1
        if computed < sequence.fast_confirm_limit and token not in sequence.stop_ids and sample not in stops:
            sequence.num_computed = computed
            sequence.tokens.append(token)
            append(_new_update(SequenceUpdate, (
                sequence.request_id, sequence.index, sequence.id, sample, token_ids, None, None,
                sequence.num_cached_tokens, sequence.num_preemptions, sequence.first_scheduled_time)))
        else:
            _confirm(state, sequence, 1, 0, sample, result, stops, updates)
    return updates


def _confirm(
    state: SchedulerState, sequence: Sequence, count: int, num_drafts: int, sample: int | None,
    result: StepResult, stops: abc.Mapping[int, Stop], updates: list[SequenceUpdate],
) -> None:
    """Confirm one sequence's part of a step: `count` computed tokens, `num_drafts` of them drafts, and the tokens sampled after them."""
    if sequence.status is SequenceStatus.FINISHED:  # it finished after this plan was made: the surplus token is dropped
        sequence.num_computed += count
        state.leave_row_if_idle(sequence)
        return
    token_ids = result.token_ids[sample] if sample is not None else ()
    accepted = len(token_ids) - 1 if num_drafts else 0
    before = sequence.num_computed
    sequence.num_computed += count - num_drafts + accepted
    if sequence.prompt_logprobs_from is not None:
        sequence.prompt_logprobs_from = max(sequence.prompt_logprobs_from, sequence.num_computed + 1)
    stop = stops.get(sample) if sample is not None else None
    kept, reason, stop_reason = sequence.request.stop_rule.cut(sequence.num_outputs, token_ids, stop)
    sequence.tokens.extend(kept)
    if num_drafts:  # rejected drafts, and accepted ones after a stop, are neither known nor computed nor planned
        sequence.num_computed = min(sequence.num_computed, len(sequence.tokens))
        sequence.num_planned -= count - (sequence.num_computed - before)
        sequence.num_known -= 1 + num_drafts - len(kept)
    state.kv.cache_full_blocks(sequence)
    if sequence.num_computed >= sequence.num_prompt_tokens == sequence.max_tokens_total:
        reason = "length"  # max_tokens = 0: only the prompt was to be computed
    if reason is not None:
        updates.append(sequence.report(sample, kept, reason, stop_reason))
        _finish(state, sequence, reason, updates)
        return
    if kept:
        updates.append(sequence.report(sample, kept, None, None))
        sequence.paused = sequence.request.new.beam_search
    if state.kv.has_windows:
        _free_out_of_window(state, sequence)
    _set_fast_confirm_limit(state, sequence)
    if sequence.status is not SequenceStatus.RUNNING:
        state.leave_row_if_idle(sequence)


def _free_out_of_window(state: SchedulerState, sequence: Sequence) -> None:
    blocks = state.kv.drop_out_of_window(sequence)
    if not blocks:
        return
    sequence.fast_plan_limit = 0  # the next plan must tell the worker
    if state.launched:  # a plan that is in flight still reads them
        state.launched[-1].blocks_to_free.extend(blocks)
    else:
        state.kv.pool.free_many(blocks)


def _set_fast_confirm_limit(state: SchedulerState, sequence: Sequence) -> None:
    """Computed counts below the limit fill no block and reach no length limit; see `Sequence`."""
    if sequence.status is not SequenceStatus.RUNNING or sequence.paused:
        sequence.fast_confirm_limit = 0
        return
    size = state.config.block_size
    full_blocks_matter = state.config.enable_prefix_caching or state.kv.has_windows
    next_full_block = (sequence.num_computed // size + 1) * size if full_blocks_matter else _NEVER
    sequence.fast_confirm_limit = min(next_full_block, sequence.max_tokens_total - 1)


def _set_drafts(state: SchedulerState, sequence: Sequence, drafts: tuple[int, ...] | None) -> None:
    """Take drafts for the next tokens. They are useless if a launched plan already samples the next token.

    With drafts of the worker, the sequence does not wait for their values: its next plans verify as many.
    """
    sequence.num_guesses = len(drafts or ()) if state.config.num_device_drafts else 0
    sequence.wants_drafts = drafts is not None
    sequence.awaits_drafts = drafts is not None and not state.config.num_device_drafts
    if drafts or sequence.awaits_drafts:
        sequence.fast_plan_limit = 0
    if drafts and sequence.status is SequenceStatus.RUNNING and not sequence.num_in_flight:
        sequence.drafts = drafts[:sequence.max_tokens_total - sequence.num_known - 1]


# Ends.


def _finish(state: SchedulerState, sequence: Sequence, reason: FinishReason, updates: list[SequenceUpdate]) -> None:
    """Finish a sequence, and with it the children that were never forked from it."""
    request = sequence.request
    n = request.new.params.n
    for index in range(n - request.num_unforked, n):
        request.num_unforked -= 1
        child = state.new_sequence(request, index, list(request.new.prompt_token_ids), sequence.max_tokens_total)
        child.status = SequenceStatus.FINISHED
        child.inherit_prompt_report(sequence)
        updates.append(child.report(None, (), reason, None))
    state.finish(sequence)
    state.remove_if_finished(request)


def fail_step(state: SchedulerState, launched: LaunchedPlan, finished_moves: abc.Sequence[int]) -> list[SequenceUpdate]:
    """Finish every sequence of a failed plan with an error, and every child that was forked from one of them since."""
    updates: list[SequenceUpdate] = []
    for sequence, count in launched.tokens_in_flight():
        sequence.num_computed += count
        _finish_with_error(state, sequence, updates)
    for later in state.launched:  # a child forked since shares blocks that the failed step wrote
        for child, parent in later.forked_children():
            if parent.status is SequenceStatus.FINISHED and any(parent is s for s in launched.sequences):
                _finish_with_error(state, child, updates)
    state.kv.offload.finish_moves(finished_moves)
    for sequence in state.kv.offload.fail_moves(launched.move_ids):  # its blocks did not arrive in host memory: recompute them
        state.kv.restart(sequence)
        sequence.status = SequenceStatus.WAITING
    return updates


def _finish_with_error(state: SchedulerState, sequence: Sequence, updates: list[SequenceUpdate]) -> None:
    if sequence.status is SequenceStatus.FINISHED:
        state.leave_row_if_idle(sequence)
    else:
        updates.append(sequence.report(None, (), "error", None))
        _finish(state, sequence, "error", updates)


def release_plan(state: SchedulerState, launched: LaunchedPlan, finished_moves: abc.Sequence[int]) -> None:
    """The plan's result is applied: free what only this plan kept in use."""
    if finished_moves:
        state.kv.offload.finish_moves(finished_moves)
    state.kv.pool.free_many(launched.blocks_to_free)
    state.remove_rowless()
