"""The summary of a trace: tokens per step, what they were computed for, and how the memory was used.

A summary is made by replaying the trace, so it also proves that the trace replays. Tokens are of three kinds:

    prompt       a prompt token that is computed for the first time
    output       a sampled token that is computed so that the next one can be sampled
    recomputed   a token that was computed before and lost in a preemption
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.core.plan import NULL_BLOCK, BlockId, StepPlan
from minivllm.core.request import Sequence, SequenceStatus, sequence_id
from minivllm.core.scheduler import Scheduler, SchedulerStats
from minivllm.core.trace import Arrival, Mismatch, Planned, Trace, Updated, replay
from minivllm.engine_request import EngineRequest


class TokenKinds(NamedTuple):
    """Number of tokens of each kind."""

    prompt: int
    output: int
    recomputed: int


class KindCounter:
    """Counts tokens by kind. It remembers how far each sequence has been computed."""

    def __init__(self) -> None:
        self._num_prompt: dict[str, int] = {}
        self._reached: dict[str, int] = {}

    def arrive(self, new: EngineRequest) -> None:
        """A request arrives. An earlier request may have had the same id, and is forgotten."""
        for index in range(new.params.n):
            self._reached.pop(sequence_id(new.request_id, index, new.params.n), None)

    def each(self, plan: StepPlan) -> list[TokenKinds]:
        """Count each of the plan's columns. Pass every plan once, in order."""
        for admission in plan.admitted:
            self._num_prompt[admission.request_id] = admission.num_prompt_tokens
        kinds = []
        for name, start, n in zip(plan.request_ids, plan.starts, plan.num_tokens, strict=True):
            reached, end = self._reached.get(name, 0), start + n
            again = max(0, min(end, reached) - start)
            first = max(0, min(end, self._num_prompt[name]) - max(start, reached))
            kinds.append(TokenKinds(prompt=first, output=n - again - first, recomputed=again))
            self._reached[name] = max(reached, end)
        return kinds

    def count(self, plan: StepPlan) -> TokenKinds:
        """Count the whole plan."""
        kinds = self.each(plan)
        return TokenKinds(sum(k.prompt for k in kinds), sum(k.output for k in kinds), sum(k.recomputed for k in kinds))


class StepRecord(NamedTuple):
    """One step of a trace."""

    planned_at: float
    updated_at: float  # NaN: still in flight when the trace ended
    plan: StepPlan
    kinds: TokenKinds
    stats: SchedulerStats  # directly after planning, when most blocks are used
    empty_slots: int  # in blocks of running sequences, after the last planned token


def empty_slots(scheduler: Scheduler) -> int:
    """Slots in blocks of running sequences that hold no token (internal waste). A shared partly filled block counts once."""
    size = scheduler.config.block_size
    filled_slots: dict[int, int] = {}  # block that is not full -> its filled slots
    for sequence in _running(scheduler):
        index, filled = divmod(sequence.num_planned, size)
        for group in sequence.table.groups:
            for i in range(index, len(group)):
                if group[i] != NULL_BLOCK:
                    used = filled if i == index else 0
                    filled_slots[group[i]] = max(filled_slots.get(group[i], 0), used)
    return sum(size - used for used in filled_slots.values())


def block_tables(scheduler: Scheduler) -> dict[str, tuple[tuple[BlockId, ...], ...]]:
    """The physical blocks of each running sequence, by KV group and logical index. The notebooks draw them."""
    return {sequence.id: sequence.table.as_tuples() for sequence in _running(scheduler)}


def _running(scheduler: Scheduler) -> Iterator[Sequence]:
    return (s for s in scheduler.running if s.status is SequenceStatus.RUNNING)


@dataclass(frozen=True)
class Summary:
    """The totals of a trace."""

    trace: Trace
    steps: tuple[StepRecord, ...]
    num_requests: int
    finish_reasons: Counter[str]  # finish reason -> number of sequences
    num_tokens_kept: int
    mismatch: Mismatch | None  # where the replay ended early; None: it replayed to the end

    @property
    def kinds(self) -> TokenKinds:
        kinds = [step.kinds for step in self.steps]
        return TokenKinds(sum(k.prompt for k in kinds), sum(k.output for k in kinds), sum(k.recomputed for k in kinds))

    @property
    def waste(self) -> float:
        """Fraction of the slots in used blocks that hold no token, averaged over steps."""
        size = self.trace.config.block_size
        fractions = [step.empty_slots / (step.stats.num_used_blocks * size) for step in self.steps if step.stats.num_used_blocks]
        return sum(fractions) / len(fractions) if fractions else 0.0

    @property
    def duration(self) -> float:
        ends = [step.updated_at for step in self.steps if step.updated_at == step.updated_at]
        return ends[-1] - self.steps[0].planned_at if ends else 0.0


def summarize(trace: Trace) -> Summary:
    """Replay a trace and add up its totals."""
    counter = KindCounter()
    steps: list[StepRecord] = []
    started: dict[int, int] = {}  # step id -> index in `steps`
    finish_reasons: Counter[str] = Counter()
    requests = kept = 0
    mismatch = None
    for step in replay(trace):
        match step.event:
            case Arrival(new, _):
                requests += 1
                counter.arrive(new)
            case Planned(now, plan) if plan is not None and step.mismatch is None:
                started[plan.step_id] = len(steps)
                steps.append(StepRecord(now, float("nan"), plan, counter.count(plan), step.scheduler.stats(), empty_slots(step.scheduler)))
            case Updated(now, plan, _, _):
                at = started.pop(plan.step_id)
                steps[at] = steps[at]._replace(updated_at=now)
        finish_reasons.update(u.finish_reason for u in step.updates if u.finish_reason is not None)
        kept += sum(len(u.token_ids) for u in step.updates)
        mismatch = step.mismatch
    return Summary(trace, tuple(steps), requests, finish_reasons, kept, mismatch)
