"""Continuous batching: which sequences advance in the next step, by how many tokens, and in which blocks.

    add ──> queue ──────────> running ──> finished
              ^   admission     │  row + blocks
              └── preemption ───┘

`schedule` plans a step from counts alone. `update` applies the step's result: only there a sequence advances or ends. With
planning_depth 1, the next step is planned before the result of the current one is applied.

There are no phases. `Sequence.num_left_to_plan` alone says how much work a sequence has. A step is filled with decodes first, then with
prompt chunks of running sequences, then with waiting sequences (`step_planner` has the exact order).

**Prompts never delay a decode by more than one step.** There are at most as many rows as tokens in the budget, and prompt chunks get
only the budget that decodes leave. So every decode gets its token in every step, for prompts of any length, and a step has at most
`max_num_batched_tokens` tokens. A decode waits only if it lacks blocks because sequences with higher priority need them, or if it needs
the value of its last token first.

**Every request finishes**, unless requests with lower ranks never stop arriving (see `scheduling_policy`). A sequence that needs a block
takes it from the one with the lowest priority.
The sequence with the highest priority can preempt all others, and admission control has checked that it fits alone. So it finishes,
and then the next one has the highest priority.
"""
from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from minivllm.core.admission import AdmissionControl, QueueFull
from minivllm.core.forks import choose_beams
from minivllm.core.invariants import check_state
from minivllm.core.plan import StepPlan, StepResult, Stop
from minivllm.core.plan_builder import LaunchedPlan
from minivllm.core.preemption import preempt_paused_beam
from minivllm.core.prefix_cache import root_hash
from minivllm.core.request import Request, Sequence, SequenceUpdate, sequence_id
from minivllm.core.scheduler_config import SchedulerConfig
from minivllm.core.scheduler_state import SchedulerState
from minivllm.core.step_planner import launch_plan, plan_step
from minivllm.core.step_result import confirm_step, fail_step, release_plan
from minivllm.core.stopping import StopRule
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput
from minivllm.scheduling_policy import POLICIES, Policy

__all__ = ["QueueFull", "Scheduler", "SchedulerConfig", "SchedulerStats", "SequenceUpdate", "sequence_id"]


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Numbers of this moment, and counters since the start."""

    num_running: int
    num_waiting: int
    num_blocks: int  # usable blocks: without the null block
    num_used_blocks: int
    num_cached_blocks: int  # cached and evictable: free, with content that can be found
    num_free_blocks: int  # including cached ones
    num_used_host_blocks: int
    num_cached_host_blocks: int
    num_moves: int  # pending moves between device and host memory
    prefix_queries: int  # tokens looked up in the prefix cache
    prefix_hits: int  # tokens found
    num_preemptions: int
    num_swaps: int  # preemptions that swapped out

    @property
    def kv_usage(self) -> float:
        """Fraction of the blocks in use."""
        return self.num_used_blocks / self.num_blocks


class Scheduler:
    """The control plane. It has no clock, no randomness and no tensors: the same calls give the same plans.

    Call `schedule` and launch its plan, again and again, until it returns None. Then call `update` (or `fail`) for the oldest
    launched plan, and start over.

    Beam search: add a request with `beam_search`, and with `ignore_eos`, because the search itself decides what an EOS means. Its
    sequences pause after each token. When all of them have theirs, call `choose_beams` with the beams to continue. Forks share
    all full blocks, so a beam costs one partly filled block. A paused beam keeps its row and blocks until no other sequence can
    continue without them.

    `policy` ranks the requests in place of the one that `config.policy` names: to try one that has no name yet.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy | None = None) -> None:
        self.config = config
        self._policy = policy or POLICIES[config.policy]
        self._admission = AdmissionControl(config)
        self._state = SchedulerState(config)
        self.pool, self.offload = self._state.kv.pool, self._state.kv.offload

    # Requests.

    def add(self, new: EngineRequest, seed: int = 0) -> StopRule:
        """Queue a request. Returns the rule that ends its outputs.

        `seed`: 64 bits, drawn by the engine if the user gave none. Raises `InvalidInput` if the request can never be served, and
        `QueueFull` if too many requests wait.
        """
        state = self._state
        if new.request_id in state.requests:
            raise InvalidInput(f"request id {new.request_id!r} is in use: choose another", "request_id")
        max_tokens_total = self._admission.max_tokens_total(new)
        self.check_room(new.owner)
        rank = self._policy(new)
        assert rank == rank, "the rank of a policy is a number, and not NaN: NaN has no place in an order"
        rule = StopRule.of(new.params, self.config.eos_token_ids, max_tokens_total - len(new.prompt_token_ids))
        request = Request(new, seed, rule, (rank, state.next_arrival), root_hash(new.adapter_id, new.cache_salt))
        state.next_arrival += 1
        state.requests[new.request_id] = request
        state.waiting.push(state.new_sequence(request, 0, list(new.prompt_token_ids), max_tokens_total))
        return rule

    def abort(self, request_id: str) -> bool:
        """Finish a request and its children. False if the id is unknown. Blocks become free when no launched plan includes them."""
        request = self._state.requests.pop(request_id, None)
        if request is None:
            return False
        request.num_unforked = 0
        for sequence in request.sequences:
            self._state.finish(sequence)
        request.sequences = []  # as in `remove_if_finished`
        self._state.remove_rowless()
        return True

    def has_room(self, owner: str = "", num_preparing: int = 0) -> bool:
        """Whether `add` takes another request of this owner.

        At most `max_queue` requests wait. `num_preparing` of them are not in the scheduler yet. If the queue is full, an owner that
        uses less than its share of it may still add one, so that no other owner can fill it for all.
        """
        waiting, limit = self._state.waiting, self.config.max_queue
        if limit is None or waiting.num_requests + num_preparing < limit:
            return True
        owners = waiting.num_owners_with(owner)
        return owners > 1 and waiting.num_requests_of(owner) < max(1, limit // owners)

    def check_room(self, owner: str = "", num_preparing: int = 0) -> None:
        """Raise `QueueFull` unless `has_room`."""
        if not self.has_room(owner, num_preparing):
            raise QueueFull(f"Rate limit reached: max_queue ({self.config.max_queue}) requests wait already: try again later", "max_queue")

    def choose_beams(self, request_id: str, beams: abc.Sequence[tuple[str, int]]) -> list[str]:
        """Beam search: continue with these (sequence id, newest token) only. Returns the ids of the continued beams, in order.

        Call it when every sequence of the request has its token. The given token replaces the sampled one. A sequence named once
        continues. Each further mention of it is a fork. A sequence that is not named is finished.
        """
        return choose_beams(self._state, request_id, beams)

    # Steps.

    def schedule(self, now: float) -> StepPlan | None:
        """The next step's plan. None: nothing can be planned before the oldest launched plan is updated or a request is added."""
        state = self._state
        if len(state.launched) > self.config.planning_depth:
            return None
        plan = plan_step(state, now)
        while not (plan.sequences or state.launched or self.offload.moves) and preempt_paused_beam(state):
            plan = plan_step(state, now)  # nothing could be planned while paused beams held rows and blocks
        return launch_plan(state, plan)

    def prepare(self) -> None:
        """Hash the prompt blocks that the newest plan fills, while it runs: `update` will need the hashes.

        Optional, after a plan is launched. It saves time and changes no decision.
        """
        if self._state.launched:
            launched = self._state.launched[-1]
            for sequence in launched.sequences[launched.num_decodes:]:
                self._state.kv.hash_blocks(sequence, sequence.num_planned)

    def update(self, plan: StepPlan, result: StepResult, stops: abc.Mapping[int, Stop], now: float) -> list[SequenceUpdate]:
        """Apply the result of the oldest launched plan. `stops`: stops found outside the core, by sample index.

        `now` has no effect; a trace records it.
        """
        if result.error is not None:
            return self.fail(plan, result.finished_moves)
        launched = self._pop_launched(plan)
        assert len(result.token_ids) == len(plan.sample_rows), "a result has one entry per sample"
        updates = confirm_step(self._state, launched, result, stops)
        release_plan(self._state, launched, result.finished_moves)
        return updates

    def fail(self, plan: StepPlan, finished_moves: abc.Sequence[int] = ()) -> list[SequenceUpdate]:
        """The oldest launched plan failed: its sequences finish with an error. All other sequences continue.

        Only `update` caches blocks, so no later request finds a block that the failed step wrote. Its moves count as not made: a
        swapped sequence that lost blocks is recomputed.
        """
        launched = self._pop_launched(plan)
        updates = fail_step(self._state, launched, finished_moves)
        self._state.adapters.repeat_loads(launched)
        release_plan(self._state, launched, ())
        return updates

    def _pop_launched(self, plan: StepPlan) -> LaunchedPlan:
        launched = self._state.launched
        assert launched and launched[0].plan.step_id == plan.step_id, "plans are updated in launch order"
        return launched.popleft()

    # The worker and the prefix cache.

    def readmit_all(self) -> None:
        """The worker lost its rows: send each row again, with the next plan that includes it."""
        for sequence in self._state.running:
            sequence.must_readmit = True
            sequence.fast_plan_limit = 0
        self._state.adapters.repeat_loads()

    def reset_prefix_cache(self) -> None:
        """Make everything computed so far unfindable, including blocks that running sequences will fill up later."""
        self.pool.evict_all()
        self.offload.reset_prefix_cache()
        for sequence in self._state.unfinished_sequences():
            sequence.cacheable = sequence.cacheable and sequence.num_computed == 0 and sequence.num_planned == 0

    # Observation.

    def uses_adapter(self, adapter_id: int) -> bool:
        """Whether an unfinished request, or a launched plan, has this LoRA adapter."""
        return any(r.new.adapter_id == adapter_id for r in self._state.requests.values()) or self._state.adapters.users(adapter_id) > 0

    def has_unfinished(self) -> bool:
        """Whether there is anything to schedule or to update."""
        return bool(self._state.requests or self._state.launched)

    @property
    def running(self) -> abc.Sequence[Sequence]:
        """Every sequence that has a row, in priority order. Read-only."""
        return self._state.running

    @property
    def waiting(self) -> list[Sequence]:
        """Every sequence in the queue, in no particular order. Read-only."""
        return self._state.waiting.sequences()

    def stats(self) -> SchedulerStats:
        state, pool, host_pool = self._state, self.pool, self.offload.pool
        return SchedulerStats(
            num_running=len(state.running), num_waiting=len(state.waiting), num_blocks=pool.num_blocks - 1,
            num_used_blocks=pool.num_used, num_cached_blocks=pool.num_cached, num_free_blocks=pool.num_free,
            num_used_host_blocks=host_pool.num_used, num_cached_host_blocks=host_pool.num_cached,
            num_moves=len(self.offload.moves), prefix_queries=state.prefix_queries, prefix_hits=state.prefix_hits,
            num_preemptions=state.num_preemptions, num_swaps=state.num_swaps,
        )

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to all blocks and sequences: for tests."""
        check_state(self._state)
