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

from bisect import insort
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from minivllm.core.admission import Door, QueueFull, SchedulerConfig
from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.host_tier import HostTier
from minivllm.core.invariants import check_scheduler
from minivllm.core.plan import BlockCopy, BlockId, RowAdmission, StepPlan, StepResult, Stop
from minivllm.core.plan_builder import LaunchedPlan, PlanBuilder
from minivllm.core.prefix_cache import PrefixCache, PrefixMatch, root_digest
from minivllm.core.request import NO_ROW, FinishReason, NewRequest, Progress, Request, Sequence, State, sequence_id
from minivllm.core.waiting_queue import WaitingQueue
from minivllm.errors import InvalidInput

__all__ = ["NewRequest", "Progress", "QueueFull", "Scheduler", "SchedulerConfig", "SchedulerStats", "sequence_id"]

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

    Beam search: add a request with `needs_result_each_step` (and `ignore_eos`), and after each update that brought its
    sequences' tokens call `choose_beams` with the beams to go on with. Forks share all blocks, so a beam costs one partly
    filled block.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.host = HostTier(self.pool, config.num_host_blocks)
        host_pool = self.host.pool if config.num_host_blocks else None
        self.cache = PrefixCache(self.pool, host_pool, config.block_size, config.kv_windows)
        self._door = Door(config)
        self._requests: dict[str, Request] = {}  # unfinished ones
        self._queue = WaitingQueue()
        self._running: list[Sequence] = []  # everybody who has a row, in order
        self._free_rows = list(range(config.max_running - 1, -1, -1))
        self._launched: deque[LaunchedPlan] = deque()
        self._windows = [(g, w) for g, w in enumerate(config.kv_windows) if w is not None]
        self._next_step_id = self._next_arrival = 0
        self._prefix_queries = self._prefix_hits = self._num_preemptions = self._num_swaps = 0

    # Requests come and go.

    def add(self, new: NewRequest) -> None:
        """Let a request in. `InvalidInput` if it can never be served, `QueueFull` if too many wait already."""
        if new.request_id in self._requests:
            raise InvalidInput(f"request id {new.request_id!r} is in use: choose another", "request_id")
        max_tokens_total = self._door.max_tokens_total(new)
        if self.config.max_queue is not None and len(self._queue) >= self.config.max_queue:
            raise QueueFull(f"{len(self._queue)} requests wait, and max_queue is {self.config.max_queue}: try again later", "max_queue")
        priority = new.priority if self.config.policy == "priority" else 0
        request = Request(new, (priority, self._next_arrival), root_digest(new.adapter, new.cache_salt))
        self._next_arrival += 1
        self._requests[new.request_id] = request
        self._queue.push(self._new_sequence(request, 0, list(new.prompt_token_ids), max_tokens_total))

    def abort(self, request_id: str) -> bool:
        """End a request and its children; False if there is no such request. Blocks are free once no launched plan names them."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        request.num_unforked = 0
        for sequence in request.sequences:
            self._end(sequence)
        self._forget_rowless()
        return True

    def has_unfinished(self) -> bool:
        """Whether there is something to schedule or to update."""
        return bool(self._requests or self._launched)

    @property
    def num_in_flight(self) -> int:
        """Launched plans that are not updated yet."""
        return len(self._launched)

    def reset_prefix_cache(self) -> None:
        """Find nothing of what was computed so far again: not finished requests' blocks, nor those of running ones."""
        self.pool.forget_all()
        self.host.forget_all()
        for sequence in (*self._running, *self._queue.sequences()):
            sequence.commits = sequence.commits and sequence.num_computed == 0 and sequence.num_planned == 0

    def readmit_all(self) -> None:
        """The worker lost its rows: tell it everything again, each sequence with its next plan."""
        for sequence in self._running:
            sequence.must_readmit = True
            sequence.plan_freely_until = 0

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self._running), num_waiting=len(self._queue), num_blocks=self.pool.num_blocks - 1,
            num_used_blocks=self.pool.num_used, num_cached_blocks=self.pool.num_cached, num_free_blocks=self.pool.num_free,
            num_used_host_blocks=self.host.pool.num_used, num_cached_host_blocks=self.host.pool.num_cached,
            num_moves=len(self.host.moves), prefix_queries=self._prefix_queries, prefix_hits=self._prefix_hits,
            num_preemptions=self._num_preemptions, num_swaps=self._num_swaps,
        )

    def check(self) -> None:
        """Assert every invariant. Costs time in proportion to all there is: for tests."""
        check_scheduler(self)

    # Planning a step.

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can be planned before the oldest launched plan is updated (or a request comes)."""
        if len(self._launched) > self.config.planning_depth:
            return None
        plan = PlanBuilder(self._next_step_id, self.config.max_num_batched_tokens, len(self.config.kv_windows))
        verifications, prompts = self._plan_decodes(plan)
        plan.close_decodes()
        for position, sequence in enumerate(verifications):  # drafts get what is left when everybody has one token
            reserved = len(verifications) - position - 1
            if sequence.state is State.RUNNING:
                self._plan_tokens(plan, sequence, min(sequence.num_left_to_plan, plan.budget - reserved))
        for sequence in prompts:
            if sequence.state is State.RUNNING and plan.budget:
                self._plan_tokens(plan, sequence, min(sequence.num_left_to_plan, plan.budget, self.config.max_chunk))
        self._forget_rowless()
        if not plan.short_of_blocks:
            self._plan_waiting(plan, now)
        return self._launch(plan)

    def _plan_decodes(self, plan: PlanBuilder) -> tuple[list[Sequence], list[Sequence]]:
        """Plan everybody's single next token. Returns who has drafts to verify, and who has a prompt to compute."""
        verifications: list[Sequence] = []
        prompts: list[Sequence] = []
        sequences, starts = plan.sequences, plan.starts
        for sequence in self._running:
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
        if sequence.state is not State.RUNNING or sequence.num_left_to_plan <= 0:
            return False
        return sequence.num_placeholders == 0 or not (sequence.waits_for_result or sequence.must_readmit)

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
        sequence.num_planned = end
        if end >= sequence.num_known and sequence.num_known < sequence.max_tokens_total:
            plan.add_sample(column, sequence)
            sequence.num_known += 1
            if sequence.request.num_unforked:
                self._fork_children(plan, column, sequence)
            self._set_plan_freely(sequence)

    def _set_plan_freely(self, sequence: Sequence) -> None:
        """The position up to which this decode needs no thought; see `Sequence`."""
        if sequence.waits_for_result or sequence.shares_tail:
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
            block_ids=sequence.table.as_tuples(), params=new.params, seed=new.seed, child_index=sequence.index,
            prompt_logprobs_from=owed if owed is not None and owed < sequence.num_prompt_tokens else None,
        )

    def _launch(self, plan: PlanBuilder) -> StepPlan | None:
        if self.config.num_host_blocks and not plan.short_of_blocks:
            self.host.spill(self.config.max_num_batched_tokens // self.config.block_size + 1)
        moves_out, moves_in = self.host.take_moves()
        # With nothing to compute only a move that finishes can help, and only a result tells of it: an empty step fetches that.
        must_wait = self.host.moves and self._requests and not self._launched
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
        table, start = sequence.table, sequence.num_planned
        while True:
            shared = table.shared_at(self.pool, start) if sequence.shares_tail else []
            missing = table.num_blocks_to_hold(end)
            needed = missing + len(shared)
            if self.pool.num_free >= needed:
                break
            if not self._make_someone_give_way(plan, sequence, needed):
                return None
        for group in shared:
            index, source, own = table.copy_on_write(self.pool, group, start)
            plan.copies.append(BlockCopy(source, own, sequence.row, group, index))
        sequence.shares_tail = False
        return table.grow(self.pool, end) if missing else plan.no_blocks

    def _make_someone_give_way(self, plan: PlanBuilder, sequence: Sequence, needed: int) -> bool:
        """Preempt the last in order, if that is after `sequence` and not enough is on its way back already. Whether to look again."""
        plan.short_of_blocks = True
        if plan.blocks_coming is None:
            plan.blocks_coming = self._count_blocks_coming()
        if self.pool.num_free + plan.blocks_coming >= needed:
            return False
        victim = next((s for s in reversed(self._running) if s.state is State.RUNNING or s is sequence), sequence)
        if victim is sequence:
            return False  # nobody behind it: it keeps its blocks and waits for those before it
        self._preempt(plan, victim)
        return True

    def _count_blocks_coming(self) -> int:
        """Blocks that will be free without any further decision: leavers', out-of-window ones, and ones being moved out."""
        leaving = (s.table for s in self._running if s.state in (State.PREEMPTED, State.FINISHED))
        return (sum(1 for table in leaving for block in table.blocks() if self.pool.ref_counts[block] == 1)
                + sum(len(launched.retired) for launched in self._launched)
                + sum(move.outward for move in self.host.moves.values()))

    def _preempt(self, plan: PlanBuilder, victim: Sequence) -> None:
        """Make a sequence give way: at once if no launched plan names it (this one included), else with its last update."""
        self._num_preemptions += 1
        victim.num_preemptions += 1
        victim.state = State.PREEMPTED
        victim.plan_freely_until = victim.confirm_freely_until = 0
        if victim.num_in_flight:
            assert plan.blocks_coming is not None
            plan.blocks_coming += sum(self.pool.ref_counts[block] == 1 for block in victim.table.blocks())
        else:
            self._leave_row(victim)

    def _leave_row(self, sequence: Sequence) -> None:
        """A PREEMPTED or FINISHED sequence, which no launched plan names any more, gives its row and blocks back."""
        self._free_rows.append(sequence.row)
        sequence.row = NO_ROW
        if sequence.state is State.PREEMPTED:
            computed = sequence.num_computed
            if self.config.swap_pays(computed, sum(1 for _ in sequence.table.blocks())) and self.host.swap_out(sequence):
                self._num_swaps += 1
                sequence.state = State.SWAPPED
            else:
                sequence.table.release(self.pool)
                sequence.state, computed = State.WAITING, 0
                sequence.num_committed, sequence.commits = 0, True
            sequence.reset_computed(computed)
            self._queue.push(sequence)
        else:
            sequence.table.release(self.pool)

    def _forget_rowless(self) -> None:
        if any(s.row == NO_ROW for s in self._running):
            self._running = [s for s in self._running if s.row != NO_ROW]

    # Admission.

    def _plan_waiting(self, plan: PlanBuilder, now: float) -> None:
        while plan.budget and self._free_rows:
            sequence = self._queue.first()
            if sequence is None or not self._admit(plan, sequence, now):
                return  # nobody overtakes the first in line

    def _admit(self, plan: PlanBuilder, sequence: Sequence, now: float) -> bool:
        """Give the first in line a row, the blocks it already has somewhere, and its first tokens; False if it does not fit."""
        if sequence.num_moves:
            return False  # its blocks are still on their way to host memory
        swapped = sequence.state is State.SWAPPED
        match = self.host.match_swapped(sequence) if swapped else self._match_prefix(sequence)
        computed = sequence.num_computed if swapped else match.num_blocks * self.config.block_size
        left = min(sequence.num_known, sequence.compute_limit) - computed
        count = min(left, plan.budget, self.config.max_chunk)
        if count < left and not self.config.enable_chunked_prefill:
            return False
        if not self._fits(match, computed + count):
            plan.short_of_blocks = True
            return False
        self._queue.pop()
        sequence.table = self._take(match)
        if swapped:
            self.host.release(sequence)
        sequence.num_committed = 0 if match.host else min(match.num_blocks, computed // self.config.block_size)
        sequence.num_computed = sequence.num_planned = computed
        if not swapped:
            self._prefix_queries += len(sequence.tokens)
            self._prefix_hits += computed
        if sequence.first_scheduled_time is None:
            sequence.first_scheduled_time = now
            sequence.num_cached_tokens = computed
        self._start_running(sequence)
        self._plan_tokens(plan, sequence, count)
        return True

    def _match_prefix(self, sequence: Sequence) -> PrefixMatch:
        """What of this sequence is already computed. The last token is computed always: something must be sampled from.

        A token whose prompt log-probability is owed needs the position before it computed, so hits end before that.
        """
        limit = len(sequence.tokens) - 1
        if sequence.logprobs_owed_from is not None:
            limit = min(limit, sequence.logprobs_owed_from - 1)
        if not self.config.enable_prefix_caching or limit < self.config.block_size:
            return PrefixMatch(0, ((),) * len(self.config.kv_windows))
        self.cache.extend_digests(sequence.digests, sequence.request.root, sequence.tokens, limit)
        return self.cache.match(sequence.digests[:limit // self.config.block_size])

    def _fits(self, match: PrefixMatch, num_tokens: int) -> bool:
        """Whether there are blocks for this many tokens, given what was found. Beside others, one in a hundred is left for decodes."""
        revived = sum(self.pool.ref_counts[block] == 0 for block in match.hits)  # free now, but not for long
        growth = -(-num_tokens // self.config.block_size) - match.num_blocks
        reserve = self.config.num_blocks // 100 if self._running else 0
        return revived + len(match.host) + growth * len(self.config.kv_windows) + reserve <= self.pool.num_free

    def _take(self, match: PrefixMatch) -> BlockTable:
        """A table of the matched blocks: those on the device are shared, those in host memory get a new block and a move."""
        for block in match.hits:  # before anything is allocated: that could evict them
            self.pool.touch(block)
        groups = [list(blocks) for blocks in match.device]
        for group, index, host_block in match.host:
            groups[group][index] = self.pool.allocate()
            self.host.start_in(host_block, groups[group][index])
        return BlockTable(self.config.block_size, groups)

    def _start_running(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        sequence.row = self._free_rows.pop()
        sequence.must_readmit = True
        insort(self._running, sequence, key=_order)

    # Forks.

    def _new_sequence(self, request: Request, index: int, tokens: list[int], max_tokens_total: int) -> Sequence:
        table = BlockTable(self.config.block_size, [[] for _ in self.config.kv_windows])
        sequence = Sequence(request, index, tokens, max_tokens_total, table)
        request.sequences.append(sequence)
        return sequence

    def _fork(self, parent: Sequence, index: int, tokens: list[int]) -> Sequence:
        """A sequence that shares the parent's blocks, if there is a row for it; else one that waits, and finds what is cached."""
        child = self._new_sequence(parent.request, index, tokens, parent.max_tokens_total)
        child.digests = parent.digests.copy()
        if parent.state is not State.RUNNING or not self._free_rows:
            self._queue.push(child)
            return child
        child.table = parent.table.fork(self.pool)
        child.num_computed, child.num_planned = parent.num_computed, parent.num_planned
        child.num_committed, child.commits = parent.num_committed, parent.commits
        child.num_cached_tokens, child.first_scheduled_time = parent.num_cached_tokens, parent.first_scheduled_time
        parent.shares_tail = child.shares_tail = parent.num_planned < parent.table.capacity
        parent.plan_freely_until = 0
        self._start_running(child)
        return child

    def _fork_children(self, plan: PlanBuilder, column: int, parent: Sequence) -> None:
        """The prompt's last token is planned: each child draws its own first token from the same logits."""
        request = parent.request
        first, request.num_unforked = request.new.params.n - request.num_unforked, 0
        for index in range(first, request.new.params.n):
            child = self._fork(parent, index, list(request.new.prompt_token_ids))
            if child.state is State.RUNNING:
                child.num_known += 1
                self._tell_worker(plan, child, plan.no_blocks)
                # What launched plans compute for the parent is confirmed for the child with this plan, in one piece.
                plan.forks.append((child, plan.add_sample(column, child), child.num_in_flight))

    def choose_beams(self, request_id: str, beams: Listing[tuple[str, int]]) -> list[str]:
        """Beam search: go on with these (sequence id, newest token) only. Returns the ids under which the beams go on, in order.

        The newest token of each beam replaces the one the sampler drew. A sequence named once goes on itself, one named again
        is forked, one not named is over. Nothing of the request may be in flight, which `needs_result_each_step` ensures
        between an update and the next `schedule`.
        """
        request = self._requests[request_id]
        alive = {s.id: s for s in request.sequences if s.state is not State.FINISHED}
        assert all(s.num_outputs and not s.num_in_flight and not s.num_placeholders for s in alive.values()), "beams are in flight"
        chosen: dict[str, Sequence] = {}
        ids: list[str] = []
        for parent_id, token in beams:
            parent = alive[parent_id]
            if parent_id in chosen:
                beam = self._fork(parent, request.next_index, parent.tokens.copy())
                request.next_index += 1
            else:
                beam = chosen[parent_id] = parent
            beam.tokens[-1] = token
            beam.must_readmit = True
            beam.plan_freely_until = 0
            ids.append(beam.id)
        for parent_id, sequence in alive.items():
            if parent_id not in chosen:
                self._end(sequence)
        self._forget_rowless()
        self._forget_if_finished(request)
        return ids

    # Taking a result.

    def update(self, plan: StepPlan, result: StepResult, stops: Mapping[int, Stop], now: float) -> list[Progress]:
        """Confirm what the oldest launched plan computed. `stops`: the detokenizer's verdicts by sample index."""
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
        for sample, sequence in enumerate(launched.sequences[:launched.num_decodes]):
            token_ids = result.token_ids[sample]
            computed = sequence.num_computed + 1
            if computed < sequence.confirm_freely_until and token_ids[0] not in sequence.stop_ids and sample not in stops:
                sequence.num_computed = computed
                sequence.tokens.append(token_ids[0])
                progress.append(_new_progress(Progress, (
                    sequence.request.new.request_id, sequence.index, sequence.id, sample, token_ids, None, None,
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
            self._settle(sequence)
            return
        token_ids = result.token_ids[sample] if sample is not None else ()
        accepted = len(token_ids) - 1 if num_drafts else 0
        sequence.num_computed += count - num_drafts + accepted
        if sequence.logprobs_owed_from is not None:
            sequence.logprobs_owed_from = max(sequence.logprobs_owed_from, sequence.num_computed + 1)
        kept, reason, stop_reason = self._cut(sequence, token_ids, stops.get(sample) if sample is not None else None)
        sequence.tokens.extend(kept)
        if num_drafts:  # rejected drafts are simply not confirmed
            sequence.num_planned, sequence.num_known, sequence.drafts = sequence.num_computed, len(sequence.tokens), ()
        self._commit_blocks(sequence)
        if sequence.num_computed >= sequence.num_prompt_tokens == sequence.max_tokens_total:
            reason = "length"  # max_tokens = 0: the prompt was all there was to do
        if reason is None:
            if kept:
                progress.append(sequence.progress(sample, kept, None, None))
            self._drop_out_of_window(sequence)
            self._set_confirm_freely(sequence)
            self._settle(sequence)
        else:
            progress.append(sequence.progress(sample, kept, reason, stop_reason))
            self._finish(sequence, reason, progress)

    @staticmethod
    def _cut(
        sequence: Sequence, token_ids: tuple[int, ...], stop: Stop | None,
    ) -> tuple[tuple[int, ...], FinishReason | None, int | str | None]:
        """(tokens to keep, why it ends, what ended it): the earliest of a stop token, a stop string and the length limit."""
        new = sequence.request.new
        end = len(token_ids) if stop is None else stop.keep
        for position, token in enumerate(token_ids[:end]):
            num_before = sequence.num_outputs + position
            if token in sequence.stop_ids and num_before >= new.params.min_tokens:
                is_eos = token in new.eos_token_ids and not new.params.ignore_eos
                return token_ids[:position + 1], "stop", None if is_eos else token
            if len(sequence.tokens) + position + 1 >= sequence.max_tokens_total and not (stop and position + 1 == end):
                return token_ids[:position + 1], "length", None
        return (token_ids, None, None) if stop is None else (token_ids[:end], "stop", stop.matched)

    def _commit_blocks(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full now: both their tokens and their content are confirmed."""
        full = sequence.num_computed // self.config.block_size
        if full > sequence.num_committed and sequence.commits and self.config.enable_prefix_caching:
            self.cache.extend_digests(sequence.digests, sequence.request.root, sequence.tokens, full * self.config.block_size)
            self.cache.commit(sequence.table, sequence.digests, sequence.num_committed, full)
            sequence.num_committed = full

    def _drop_out_of_window(self, sequence: Sequence) -> None:
        """Give window groups' blocks back that no position from the first unconfirmed one on can see."""
        for group, window in self._windows:
            dropped = sequence.table.drop_before(group, max(0, sequence.num_computed - window + 1))
            if not dropped:
                continue
            for index, block in dropped:
                sequence.dropped.append((group, index))
                if self._launched:  # a plan that was launched meanwhile still names it
                    self._launched[-1].retired.append(block)
                else:
                    self.pool.free(block)
            sequence.plan_freely_until = 0  # the next plan must tell the worker

    def _set_confirm_freely(self, sequence: Sequence) -> None:
        """The computed count below which a token fills no block and reaches no limit; see `Sequence`."""
        if sequence.state is not State.RUNNING:
            sequence.confirm_freely_until = 0
            return
        size = self.config.block_size
        at_edge = self.config.enable_prefix_caching or self._windows
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
        shares = [*zip(launched.sequences, launched.counts, strict=True), *((child, count) for child, _, count in launched.forks)]
        for sequence, count in shares:
            sequence.num_computed += count
            if sequence.state is not State.FINISHED:
                progress.append(sequence.progress(None, (), "error", None))
                self._finish(sequence, "error", progress)
            else:
                self._settle(sequence)
        self.host.finish(finished_moves)
        for sequence in self.host.abandon(launched.move_ids):
            self.host.release(sequence)
            sequence.state, sequence.num_committed, sequence.commits = State.WAITING, 0, True
            sequence.reset_computed(0)
        self._retire(launched, ())
        return progress

    def _finish(self, sequence: Sequence, reason: FinishReason, progress: list[Progress]) -> None:
        """End a sequence; children that were never forked end with it."""
        request = sequence.request
        n = request.new.params.n
        for index in range(n - request.num_unforked, n):
            request.num_unforked -= 1
            child = self._new_sequence(request, index, list(request.new.prompt_token_ids), sequence.max_tokens_total)
            child.state = State.FINISHED
            child.num_cached_tokens, child.first_scheduled_time = sequence.num_cached_tokens, sequence.first_scheduled_time
            progress.append(child.progress(None, (), reason, None))
        self._end(sequence)
        self._forget_if_finished(request)

    def _end(self, sequence: Sequence) -> None:
        """FINISHED, wherever it was; blocks and row go back as soon as no launched plan names them."""
        before, sequence.state = sequence.state, State.FINISHED
        sequence.plan_freely_until = sequence.confirm_freely_until = 0
        if before in (State.WAITING, State.SWAPPED):
            self._queue.count_out(sequence)
            self.host.release(sequence)
        elif before is not State.FINISHED:
            self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Let a sequence that is to leave do so, if this was the last plan that names it."""
        if sequence.state in (State.PREEMPTED, State.FINISHED) and not sequence.num_in_flight and sequence.row != NO_ROW:
            self._leave_row(sequence)

    def _forget_if_finished(self, request: Request) -> None:
        if request.finished and self._requests.get(request.new.request_id) is request:
            del self._requests[request.new.request_id]

    def _pop_launched(self, plan: StepPlan) -> LaunchedPlan:
        assert self._launched and self._launched[0].plan.step_id == plan.step_id, "plans are updated in launch order"
        return self._launched.popleft()

    def _retire(self, launched: LaunchedPlan, finished_moves: Listing[int]) -> None:
        """After an update nothing names what only this plan named."""
        self.host.finish(finished_moves)
        for block in launched.retired:
            self.pool.free(block)
        self._forget_rowless()


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
