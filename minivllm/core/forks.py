"""Forks: sequences that continue from another one's tokens on the same blocks, for n > 1 and for beam search."""
from __future__ import annotations

from collections import abc

from minivllm.core.request import NO_ROW, Sequence, SequenceStatus
from minivllm.core.scheduler_state import SchedulerState


def fork(state: SchedulerState, parent: Sequence, index: int, tokens: list[int]) -> Sequence:
    """A sequence that shares the parent's blocks.

    If it gets no row now, or the parent is not running, the fork waits in the queue. Later it reuses blocks that are in the prefix cache.
    """
    child = state.new_sequence(parent.request, index, tokens, parent.max_tokens_total)
    child.block_hashes = parent.block_hashes.copy()
    if parent.status is not SequenceStatus.RUNNING or not state.may_fork(parent.request):
        state.waiting.push(child)
        return child
    state.kv.fork(parent, child)
    child.inherit_prompt_report(parent)
    parent.fast_plan_limit = 0
    state.start_running(child)
    return child


def choose_beams(state: SchedulerState, request_id: str, beams: abc.Sequence[tuple[str, int]]) -> list[str]:
    """Continue a beam search with these (sequence id, newest token) only; see `Scheduler.choose_beams`."""
    request = state.requests[request_id]
    alive = {s.id: s for s in request.sequences if s.status is not SequenceStatus.FINISHED}
    has_token = all(s.num_outputs and not s.num_in_flight and s.paused == request.new.beam_search for s in alive.values())
    assert has_token, "a beam has no token yet"
    for name, sequence in alive.items():  # before the forks, which need rows
        if name not in {parent for parent, _ in beams}:
            state.finish(sequence)
    state.remove_rowless()
    continued: set[str] = set()
    ids: list[str] = []
    for name, token in beams:
        beam = alive[name]
        if name in continued:
            beam = fork(state, beam, request.next_index, beam.tokens.copy())
            request.next_index += 1
        else:
            continued.add(name)
            _resume(state, beam)
        beam.tokens[-1] = token
        ids.append(beam.id)
    # Otherwise the list would grow with every fork of the search.
    request.sequences = [s for s in request.sequences if s.status is not SequenceStatus.FINISHED]
    state.remove_if_finished(request)
    return ids


def _resume(state: SchedulerState, beam: Sequence) -> None:
    beam.must_readmit = True  # its newest token may differ from the one that the worker sampled
    beam.fast_plan_limit = 0
    if beam.paused and beam.row == NO_ROW:
        state.preempted_beams.remove(beam)
        state.waiting.push(beam)
    beam.paused = False
