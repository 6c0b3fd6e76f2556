"""Continuous batching: which sequences advance in the next step, by how many tokens, in which blocks.

    add ──> queue ──────────> running ──> finished         `schedule` plans a step from counts alone
              ^   admission     │  row + blocks            `update` takes its result: the only place where a sequence advances
              └── preemption ───┘                          or ends; with depth 1 the next step is planned before that

Nothing here knows phases. `Sequence.num_left_to_plan` is the whole state of a request's work, and a step is filled in this order:

    1. decodes: every running sequence that has one token (and its drafts) left to plan
    2. prompt chunks of running sequences, in order, from what is left of the token budget
    3. sequences from the queue, in order, as long as rows, blocks and budget last; the first that does not fit ends it

**Nobody who decodes is starved.** There are never more rows than the budget has tokens, and chunks get what decodes leave, so a
decoding sequence gets its token in every step that is planned, however long the prompts beside it: between two of its tokens
lies one step of at most `max_num_batched_tokens` tokens. (It may lose its turn for two reasons of its own: blocks ran out and
it came later than the ones that need them, or it waits to see its last token's value.)

**Nobody is starved at all** (within one priority). Who lacks a block takes it from the last in order; the first in order can
make everybody give way, and the door has made sure that it fits alone, so it ends; then the next one is first.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from minivllm.core.admission import Door, QueueFull, SchedulerConfig
from minivllm.core.invariants import check_scheduler
from minivllm.core.kv_manager import KVManager
from minivllm.core.plan import BlockId, RowAdmission, StepPlan, StepResult, Stop
from minivllm.core.plan_builder import LaunchedPlan, PlanBuilder
from minivllm.core.prefix_cache import root_digest
from minivllm.core.request import Progress, Request, Sequence, State, sequence_id
from minivllm.core.roster import Roster
from minivllm.core.stopping import StopRule
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput
from minivllm.outputs import FinishReason

__all__ = ["Progress", "QueueFull", "Scheduler", "SchedulerConfig", "SchedulerStats", "sequence_id"]

_NEVER = 1 << 62
_new_progress = tuple.__new__  # Progress's own constructor costs twice as much, once per token


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot, and counters since the start."""

    num_running: int
    num_waiting: int
    num_blocks: int  # that can be used: without the null block
    num_used_blocks: int
    num_cached_blocks: int  # free, and their content can still be found
    num_free_blocks: int  # cached ones included
    num_used_host_blocks: int
    num_cached_host_blocks: int
    num_moves: int  # blocks under way to or from host memory
    prefix_queries: int  # tokens looked up in the prefix cache
    prefix_hits: int  # tokens found
    num_preemptions: int
    num_swaps: int  # preemptions that went to host memory

    @property
    def kv_usage(self) -> float:
        """Fraction of the blocks in use."""
        return self.num_used_blocks / self.num_blocks


class Scheduler:
    """The control plane. No clock, no randomness, no tensors: the same calls give the same plans.

    Call `schedule` and launch what it returns until it returns None, then `update` (or `fail`) the oldest launched plan, and so on.

    Beam search: add a request with `beam_search` (and `ignore_eos`, since what an ending means is the searcher's business). Its
    sequences pause after each token; when all have theirs, call `choose_beams` with the beams to go on with. Forks share all
    blocks, so a beam costs one partly filled block. Paused beams keep rows and blocks, until nobody else can go on without.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.kv = KVManager(config)
        self.pool, self.host = self.kv.pool, self.kv.host
        self._door = Door(config)
        self._roster = Roster(self.kv, config.max_running)
        self._launched: deque[LaunchedPlan] = deque()
        self._any_window = any(window is not None for window in config.kv_windows)
        self._next_step_id = self._next_arrival = self._prefix_queries = self._prefix_hits = 0

    # Requests come and go.

    def add(self, new: EngineRequest, seed: int = 0) -> StopRule:
        """Queue a request. Returns the rule that ends its outputs.

        `seed`: 64 bits, drawn by the engine if the user gave none. Raises `InvalidInput` if the request can never be served, and
        `QueueFull` if too many wait already.
        """
        if new.request_id in self._roster.requests:
            raise InvalidInput(f"request id {new.request_id!r} is in use: choose another", "request_id")
        max_tokens_total = self._door.max_tokens_total(new)
        if self.config.max_queue is not None and len(self._roster.queue) >= self.config.max_queue:
            raise QueueFull(f"max_queue ({self.config.max_queue}) requests wait already: try again later", "max_queue")
        priority = new.priority if self.config.policy == "priority" else 0
        rule = StopRule.of(new.params, self.config.eos_token_ids, max_tokens_total - len(new.prompt_token_ids))
        request = Request(new, seed, rule, (priority, self._next_arrival), root_digest(new.adapter, new.cache_salt))
        self._next_arrival += 1
        self._roster.requests[new.request_id] = request
        self._roster.queue.push(self._roster.new_sequence(request, 0, list(new.prompt_token_ids), max_tokens_total))
        return rule

    def abort(self, request_id: str) -> bool:
        """End a request and its children; False if there is no such request. Blocks are free once no launched plan names them."""
        request = self._roster.requests.pop(request_id, None)
        if request is None:
            return False
        request.num_unforked = 0
        for sequence in request.sequences:
            self._roster.end(sequence)
        self._roster.tidy()
        return True

    def has_unfinished(self) -> bool:
        """Whether there is something to schedule or to update."""
        return bool(self._roster.requests or self._launched)

    @property
    def num_in_flight(self) -> int:
        """Launched plans that are not updated yet."""
        return len(self._launched)

    @property
    def running(self) -> Listing[Sequence]:
        """Everybody who has a row, in order: to look at, for pictures and checks."""
        return self._roster.running

    @property
    def waiting(self) -> list[Sequence]:
        """Everybody in the queue, in no particular order: likewise to look at."""
        return self._roster.queue.sequences()

    def reset_prefix_cache(self) -> None:
        """Find nothing of what was computed so far again: not finished requests' blocks, nor those of running ones."""
        self.pool.forget_all()
        self.host.forget_all()
        for sequence in (*self._roster.running, *self._roster.parked, *self._roster.queue.sequences()):
            sequence.commits = sequence.commits and sequence.num_computed == 0 and sequence.num_planned == 0

    def readmit_all(self) -> None:
        """The worker lost its rows: tell it everything again, each sequence with its next plan."""
        for sequence in self._roster.running:
            sequence.must_readmit = True
            sequence.plan_freely_until = 0

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._roster.running), num_waiting=len(self._roster.queue), num_blocks=self.pool.num_blocks - 1,
            num_used_blocks=self.pool.num_used, num_cached_blocks=self.pool.num_cached, num_free_blocks=self.pool.num_free,
            num_used_host_blocks=self.host.pool.num_used, num_cached_host_blocks=self.host.pool.num_cached,
            num_moves=len(self.host.moves), prefix_queries=self._prefix_queries, prefix_hits=self._prefix_hits,
            num_preemptions=self._roster.num_preemptions, num_swaps=self._roster.num_swaps,
        )

    def check(self) -> None:
        """Assert every invariant. Costs time in proportion to all there is: for tests."""
        check_scheduler(self)

    # Planning a step.

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can be planned before the oldest launched plan is updated (or a request comes)."""
        if len(self._launched) > self.config.planning_depth:
            return None
        plan = self._fill(now)
        while not (plan.sequences or self._launched or self.host.moves) and self._roster.park_a_beam():
            plan = self._fill(now)  # nothing could be planned, and paused beams hold what is lacking
        return self._launch(plan)

    def prepare(self) -> None:
        """What `update` will need of the newest plan, done while it runs: names for the blocks that its prompts fill.

        To be called, or not, once a plan is launched: it changes no decision."""
        if self._launched:
            launched = self._launched[-1]
            for sequence in launched.sequences[launched.num_decodes:]:
                self.kv.name_blocks(sequence, sequence.num_planned)

    def _fill(self, now: float) -> PlanBuilder:
        """The three passes of the module's docstring."""
        plan = PlanBuilder(self._next_step_id, self.config.max_num_batched_tokens, len(self.config.kv_windows))
        verifications, prompts = self._plan_decodes(plan)
        plan.close_decodes()
        for position, sequence in enumerate(verifications):
            if sequence.state is State.RUNNING:
                self._plan_verification(plan, sequence, reserved=len(verifications) - position - 1)
        for sequence in prompts:
            if sequence.state is State.RUNNING and plan.budget:
                self._plan_tokens(plan, sequence, min(sequence.num_left_to_plan, plan.budget, self.config.max_chunk))
        self._roster.tidy()
        if not plan.short_of_blocks:
            self._plan_waiting(plan, now)
        return plan

    def _plan_decodes(self, plan: PlanBuilder) -> tuple[list[Sequence], list[Sequence]]:
        """Plan everybody's single next token. Returns who has drafts to verify, and who has a prompt to compute."""
        verifications: list[Sequence] = []
        prompts: list[Sequence] = []
        sequences, starts = plan.sequences, plan.starts
        for sequence in self._roster.running:
            start = sequence.num_planned
            if start < sequence.plan_freely_until:  # the common case
                sequence.num_planned = start + 1
                sequence.num_known += 1
                sequences.append(sequence)
                starts.append(start)
            elif self._may_be_planned(sequence):
                if sequence.num_known - start > 1 or sequence.num_known == sequence.num_prompt_tokens:
                    prompts.append(sequence)
                elif sequence.drafts:
                    verifications.append(sequence)
                else:
                    self._plan_decode(plan, sequence)
        return verifications, prompts

    @staticmethod
    def _may_be_planned(sequence: Sequence) -> bool:
        if sequence.state is not State.RUNNING or sequence.paused or sequence.num_left_to_plan <= 0:
            return False
        return sequence.num_placeholders == 0 or not (sequence.waits_for_result or sequence.must_readmit or sequence.drafts)

    def _plan_decode(self, plan: PlanBuilder, sequence: Sequence) -> None:
        """A decode that needs a block, a copy or a row before its token."""
        start = sequence.num_planned
        new_blocks = self._make_room(plan, sequence, start + 1)
        if new_blocks is None:
            return
        plan.add_decode(sequence, start, self._tell_worker(plan, sequence, new_blocks))
        sequence.num_planned = start + 1
        sequence.num_known += 1
        self._set_plan_freely(sequence)

    def _plan_tokens(self, plan: PlanBuilder, sequence: Sequence, count: int) -> None:
        """Any other work: a prompt chunk, drafts. If it reaches the last known token, a token is sampled."""
        start, end = sequence.num_planned, sequence.num_planned + count
        new_blocks = self._make_room(plan, sequence, end)
        if new_blocks is None:
            return
        drafts = sequence.drafts[:max(0, end - sequence.num_known)]
        column = plan.add(sequence, start, count, self._tell_worker(plan, sequence, new_blocks), drafts)
        sequence.num_planned, sequence.drafts = end, drafts  # drafts there was no room for are given up
        if end >= sequence.num_known and sequence.num_known < sequence.max_tokens_total:
            plan.add_sample(column, sequence)
            sequence.num_known += 1
            if sequence.request.num_unforked:
                self._fork_children(plan, column, sequence)
            self._set_plan_freely(sequence)

    def _plan_verification(self, plan: PlanBuilder, sequence: Sequence, reserved: int) -> None:
        """A decode with drafts. They are a luxury: the budget keeps a token for each that comes after, and nobody gives way for them."""
        count = min(sequence.num_left_to_plan, plan.budget - reserved, self.config.max_chunk)
        if sequence.table.num_blocks_to_hold(sequence.num_planned + count) > self.pool.num_free:
            count = 1
        self._plan_tokens(plan, sequence, count)

    def _set_plan_freely(self, sequence: Sequence) -> None:
        """The position up to which this decode needs no thought; see `Sequence`."""
        if sequence.waits_for_result or sequence.shares_tail or sequence.drafts:
            sequence.plan_freely_until = 0
        else:
            sequence.plan_freely_until = min(sequence.table.capacity, sequence.compute_limit)

    def _tell_worker(
        self, plan: PlanBuilder, sequence: Sequence, new_blocks: tuple[tuple[BlockId, ...], ...],
    ) -> tuple[tuple[BlockId, ...], ...]:
        """What the row must know before the step: everything (then no new blocks are left to tell), or what left its window."""
        if sequence.must_readmit:
            sequence.must_readmit = False
            sequence.dropped.clear()
            plan.admitted.append(self._admission(sequence))
            return plan.no_blocks
        for group, index in sequence.dropped:
            plan.freed_blocks.append((sequence.row, group, index))
        sequence.dropped.clear()
        return new_blocks

    def _admission(self, sequence: Sequence) -> RowAdmission:
        new, owed = sequence.request.new, sequence.logprobs_owed_from
        return RowAdmission(
            row=sequence.row, request_id=sequence.id, token_ids=tuple(sequence.tokens), num_prompt_tokens=sequence.num_prompt_tokens,
            block_ids=sequence.table.as_tuples(), params=new.params, seed=sequence.request.seed, child_index=sequence.index,
            prompt_logprobs_from=owed if owed is not None and owed < sequence.num_prompt_tokens else None,
        )

    def _launch(self, plan: PlanBuilder) -> StepPlan | None:
        if plan.sequences and not plan.short_of_blocks and self.config.num_host_blocks:
            self.host.spill(self.config.max_num_batched_tokens // self.config.block_size + 1)
        moves_out, moves_in = self.host.take_moves()
        # With nothing to compute only a move that finishes can help, and only a result tells of it: an empty step fetches that.
        must_wait = self.host.moves and self._roster.requests and not self._launched
        if not (plan.sequences or moves_out or must_wait):
            assert not moves_in
            return None
        self._next_step_id += 1
        launched = LaunchedPlan(plan.build(moves_out, moves_in), plan)
        self._launched.append(launched)
        return launched.plan

    # Blocks: finding them, and making others give way.

    def _make_room(self, plan: PlanBuilder, sequence: Sequence, end: int) -> tuple[tuple[BlockId, ...], ...] | None:
        """Slots up to position `end`, and sole ownership of the block written first. The new blocks, or None: no room now."""
        while (needed := self.kv.room_needed(sequence, end)) > self.pool.num_free:
            if not self._make_someone_give_way(plan, sequence, needed):
                return None
        return self.kv.make_room(sequence, end, plan.copies) if needed else plan.no_blocks

    def _make_someone_give_way(self, plan: PlanBuilder, sequence: Sequence, needed: int) -> bool:
        """Preempt the last in order, if that is after `sequence` and not enough is on its way back already. Whether to look again."""
        plan.short_of_blocks = True
        if plan.blocks_coming is None:
            plan.blocks_coming = self._count_blocks_coming()
        if self.pool.num_free + plan.blocks_coming >= needed:
            return False
        victim = next((s for s in reversed(self._roster.running) if s.state is State.RUNNING or s is sequence), sequence)
        if victim is sequence:
            return False  # nobody behind it: it keeps its blocks and waits for those before it
        if victim.num_in_flight:
            plan.blocks_coming += self.kv.num_freed_by(victim)
        self._roster.give_way(victim)
        return True

    def _count_blocks_coming(self) -> int:
        """Blocks that will be free without any further decision: leavers', out-of-window ones, and ones being moved out."""
        leaving = (s for s in self._roster.running if s.state in (State.PREEMPTED, State.FINISHED))
        return (sum(self.kv.num_freed_by(s) for s in leaving)
                + sum(len(launched.retired) for launched in self._launched)
                + sum(move.outward for move in self.host.moves.values()))

    # Admission.

    def _plan_waiting(self, plan: PlanBuilder, now: float) -> None:
        while plan.budget and self._roster.free_rows:
            sequence = self._roster.queue.first()
            if sequence is None or not self._admit(plan, sequence, now):
                return  # nobody overtakes the first in line

    def _admit(self, plan: PlanBuilder, sequence: Sequence, now: float) -> bool:
        """Give the first in line a row, the blocks it already has somewhere, and its first tokens; False if it does not fit."""
        if sequence.num_moves:
            return False  # its blocks are still on their way to host memory
        match, computed = self.kv.match(sequence)
        left = min(sequence.num_known, sequence.compute_limit) - computed
        count = min(left, plan.budget, self.config.max_chunk)
        if count < left and not self.config.enable_chunked_prefill:
            return False
        reserve = self.config.num_blocks // 100 if self._roster.running else 0  # for those who decode
        if not self.kv.fits(match, computed + count, reserve):
            plan.short_of_blocks = True
            return False
        self._roster.queue.pop()
        if sequence.state is State.WAITING:
            self._prefix_queries += len(sequence.tokens)
            self._prefix_hits += computed
        self.kv.take(sequence, match, computed)
        if sequence.first_scheduled_time is None:
            sequence.first_scheduled_time = now
            sequence.num_cached_tokens = computed
        self._roster.start_running(sequence)
        self._plan_tokens(plan, sequence, count)
        return True

    # Forks.

    def _fork_children(self, plan: PlanBuilder, column: int, parent: Sequence) -> None:
        """The prompt's last token is planned: each child draws its own first token from the same logits."""
        request = parent.request
        first, request.num_unforked = request.new.params.n - request.num_unforked, 0
        for index in range(first, request.new.params.n):
            child = self._roster.fork(parent, index, list(request.new.prompt_token_ids))
            if child.state is State.RUNNING:
                child.num_known += 1
                self._tell_worker(plan, child, plan.no_blocks)
                # What launched plans compute for the parent is confirmed for the child with this plan, in one piece.
                plan.forks.append((child, plan.add_sample(column, child), child.num_in_flight))

    def choose_beams(self, request_id: str, beams: Listing[tuple[str, int]]) -> list[str]:
        """Beam search: go on with these (sequence id, newest token) only. Returns the ids under which the beams go on, in order.

        To be called when every sequence of the request has brought its token. The newest token of each beam replaces the one
        the sampler drew. A sequence named once goes on itself, one named again is forked, one not named is over.
        """
        request, roster = self._roster.requests[request_id], self._roster
        alive = {s.id: s for s in request.sequences if s.state is not State.FINISHED}
        has_token = all(s.num_outputs and not s.num_in_flight and s.paused == request.new.beam_search for s in alive.values())
        assert has_token, "a beam has no token yet"
        for name, sequence in alive.items():  # first, so that forks find their rows
            if name not in {parent for parent, _ in beams}:
                roster.end(sequence)
        roster.tidy()
        gone_on: set[str] = set()
        ids: list[str] = []
        for name, token in beams:
            beam = alive[name]
            if name in gone_on:
                beam = roster.fork(beam, request.next_index, beam.tokens.copy())
                request.next_index += 1
            else:
                gone_on.add(name)
                roster.resume(beam)
            beam.tokens[-1] = token
            ids.append(beam.id)
        request.sequences = [s for s in request.sequences if s.state is not State.FINISHED]  # else a search would keep every fork it made
        roster.forget_if_finished(request)
        return ids

    # Taking a result.

    def update(self, plan: StepPlan, result: StepResult, stops: Mapping[int, Stop], now: float) -> list[Progress]:
        """Confirm what the oldest launched plan computed. `stops`: the detokenizer's verdicts by sample index.

        Nothing depends on `now`; a trace records it.
        """
        if result.error is not None:
            return self.fail(plan, result.finished_moves)
        launched = self._pop_launched(plan)
        assert len(result.token_ids) == len(plan.sample_rows), "one entry per sample"
        progress = self._confirm_decodes(launched, result, stops)
        for column in range(launched.num_decodes, len(launched.sequences)):
            self._confirm(launched.sequences[column], launched.counts[column], len(launched.drafts[column]),
                          launched.sample_of.get(column), result, stops, progress)
        for child, sample, count in launched.forks:
            self._confirm(child, count, 0, sample, result, stops, progress)
        for sample, drafts in enumerate(result.drafts):
            self._propose(launched.samplers[sample], drafts)
        self._retire(launched, result.finished_moves)
        return progress

    def _confirm_decodes(self, launched: LaunchedPlan, result: StepResult, stops: Mapping[int, Stop]) -> list[Progress]:
        progress: list[Progress] = []
        append = progress.append
        decodes = zip(launched.sequences[:launched.num_decodes], result.token_ids, strict=False)
        for sample, (sequence, token_ids) in enumerate(decodes):
            token, computed = token_ids[0], sequence.num_computed + 1
            if computed < sequence.confirm_freely_until and token not in sequence.stop_ids and sample not in stops:
                sequence.num_computed = computed
                sequence.tokens.append(token)
                append(_new_progress(Progress, (
                    sequence.request_id, sequence.index, sequence.id, sample, token_ids, None, None,
                    sequence.num_cached_tokens, sequence.num_preemptions, sequence.first_scheduled_time)))
            else:
                self._confirm(sequence, 1, 0, sample, result, stops, progress)
        return progress

    def _confirm(
        self, sequence: Sequence, count: int, num_drafts: int, sample: int | None,
        result: StepResult, stops: Mapping[int, Stop], progress: list[Progress],
    ) -> None:
        """One sequence's share of a step: `count` tokens computed, of them `num_drafts` guesses, and what was sampled after them."""
        if sequence.state is State.FINISHED:  # ended since the plan was made: its surplus token is dropped
            sequence.num_computed += count
            self._roster.settle(sequence)
            return
        token_ids = result.token_ids[sample] if sample is not None else ()
        accepted = len(token_ids) - 1 if num_drafts else 0
        sequence.num_computed += count - num_drafts + accepted
        if sequence.logprobs_owed_from is not None:
            sequence.logprobs_owed_from = max(sequence.logprobs_owed_from, sequence.num_computed + 1)
        stop = stops.get(sample) if sample is not None else None
        kept, reason, stop_reason = sequence.request.stop_rule.cut(sequence.num_outputs, token_ids, stop)
        sequence.tokens.extend(kept)
        if num_drafts:  # rejected drafts are simply not confirmed
            sequence.num_planned, sequence.num_known, sequence.drafts = sequence.num_computed, len(sequence.tokens), ()
        self.kv.commit(sequence)
        if sequence.num_computed >= sequence.num_prompt_tokens == sequence.max_tokens_total:
            reason = "length"  # max_tokens = 0: the prompt was all there was to do
        if reason is None:
            if kept:
                progress.append(sequence.progress(sample, kept, None, None))
                sequence.paused = sequence.request.new.beam_search
            if self._any_window:
                self._free_out_of_window(sequence)
            self._set_confirm_freely(sequence)
            if sequence.state is not State.RUNNING:
                self._roster.settle(sequence)
        else:
            progress.append(sequence.progress(sample, kept, reason, stop_reason))
            self._finish(sequence, reason, progress)

    def _free_out_of_window(self, sequence: Sequence) -> None:
        blocks = self.kv.drop_out_of_window(sequence)
        if not blocks:
            return
        sequence.plan_freely_until = 0  # the next plan must tell the worker
        if self._launched:  # a plan that was launched meanwhile still names them
            self._launched[-1].retired.extend(blocks)
            return
        self.pool.free_all(blocks)

    def _set_confirm_freely(self, sequence: Sequence) -> None:
        """The computed count below which a token fills no block and reaches no limit; see `Sequence`."""
        if sequence.state is not State.RUNNING or sequence.paused:
            sequence.confirm_freely_until = 0
            return
        size = self.config.block_size
        at_edge = self.config.enable_prefix_caching or self._any_window
        next_edge = (sequence.num_computed // size + 1) * size if at_edge else _NEVER
        sequence.confirm_freely_until = min(next_edge, sequence.max_tokens_total - 1)

    def _propose(self, sequence: Sequence, drafts: tuple[int, ...]) -> None:
        """Guesses for the next tokens; of no use to a sequence whose next token is already planned."""
        if drafts and sequence.state is State.RUNNING and not sequence.num_in_flight:
            sequence.drafts = drafts[:sequence.max_tokens_total - sequence.num_known - 1]
            sequence.plan_freely_until = 0

    # Ending.

    def fail(self, plan: StepPlan, finished_moves: Listing[int] = ()) -> list[Progress]:
        """The oldest launched plan failed: its sequences end, and nothing it wrote is ever found. Everybody else lives on.

        Keys are given to blocks by `update` alone, so the failed step's blocks have none. Its moves count as not made: a
        swapped sequence that lost blocks is computed again.
        """
        launched = self._pop_launched(plan)
        progress: list[Progress] = []
        for sequence, count in launched.shares():
            sequence.num_computed += count
            self._end_in_error(sequence, progress)
        for later in self._launched:  # forked since: what the failed step wrote is theirs too
            for child, parent in later.forked():
                if parent.state is State.FINISHED and any(parent is s for s in launched.sequences):
                    self._end_in_error(child, progress)
        self.host.finish(finished_moves)
        for sequence in self.host.abandon(launched.move_ids):
            self.kv.start_over(sequence)
            sequence.state = State.WAITING
        self._retire(launched, ())
        return progress

    def _end_in_error(self, sequence: Sequence, progress: list[Progress]) -> None:
        if sequence.state is State.FINISHED:
            self._roster.settle(sequence)
        else:
            progress.append(sequence.progress(None, (), "error", None))
            self._finish(sequence, "error", progress)

    def _finish(self, sequence: Sequence, reason: FinishReason, progress: list[Progress]) -> None:
        """End a sequence; children that were never forked end with it."""
        request = sequence.request
        n = request.new.params.n
        for index in range(n - request.num_unforked, n):
            request.num_unforked -= 1
            child = self._roster.new_sequence(request, index, list(request.new.prompt_token_ids), sequence.max_tokens_total)
            child.state = State.FINISHED
            child.inherit_report(sequence)
            progress.append(child.progress(None, (), reason, None))
        self._roster.end(sequence)
        self._roster.forget_if_finished(request)

    def _pop_launched(self, plan: StepPlan) -> LaunchedPlan:
        assert self._launched and self._launched[0].plan.step_id == plan.step_id, "plans are updated in launch order"
        return self._launched.popleft()

    def _retire(self, launched: LaunchedPlan, finished_moves: Listing[int]) -> None:
        """After an update nothing names what only this plan named."""
        self.host.finish(finished_moves)
        self.pool.free_all(launched.retired)
        self._roster.tidy()

