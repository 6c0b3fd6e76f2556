"""What a trace says: how full the steps were, what the tokens were for, where the memory went.

Everything is derived by replaying, so a summary is also a proof that the trace replays. Tokens come in three kinds:

    prompt       computed for the first time, before the first output
    output       a sampled token that is computed so that the next one can be sampled
    recomputed   computed before and lost: the price of preemption by recomputation
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.core.plan import NULL_BLOCK, BlockId, StepPlan
from minivllm.core.request import Sequence, State, sequence_id
from minivllm.core.scheduler import Scheduler, SchedulerStats
from minivllm.core.trace import Arrival, Mismatch, Planned, Trace, Updated, replay
from minivllm.engine_request import EngineRequest


class Kinds(NamedTuple):
    """How many of a plan's tokens are what."""

    prompt: int
    output: int
    recomputed: int


class KindCounter:
    """Tells the kinds apart by remembering how far each sequence has been computed."""

    def __init__(self) -> None:
        self._num_prompt: dict[str, int] = {}
        self._reached: dict[str, int] = {}

    def arrive(self, new: EngineRequest) -> None:
        """A request comes whose id may have been another's before."""
        for index in range(new.params.n):
            self._reached.pop(sequence_id(new.request_id, index, new.params.n), None)

    def each(self, plan: StepPlan) -> list[Kinds]:
        """Of each of the plan's columns. Plans are to be given in their order, each once."""
        for admission in plan.admitted:
            self._num_prompt[admission.request_id] = admission.num_prompt_tokens
        kinds = []
        for name, start, n in zip(plan.request_ids, plan.starts, plan.num_tokens, strict=True):
            reached, end = self._reached.get(name, 0), start + n
            again = max(0, min(end, reached) - start)
            first = max(0, min(end, self._num_prompt[name]) - max(start, reached))
            kinds.append(Kinds(prompt=first, output=n - again - first, recomputed=again))
            self._reached[name] = max(reached, end)
        return kinds

    def count(self, plan: StepPlan) -> Kinds:
        """Of the whole plan."""
        kinds = self.each(plan)
        return Kinds(sum(k.prompt for k in kinds), sum(k.output for k in kinds), sum(k.recomputed for k in kinds))


class StepRecord(NamedTuple):
    """One step of a trace."""

    planned_at: float
    updated_at: float  # NaN while it was in flight when the trace ended
    plan: StepPlan
    kinds: Kinds
    stats: SchedulerStats  # just after it was planned, when the memory is fullest
    empty_slots: int  # in blocks of running sequences, beyond the last token that is planned


def empty_slots(scheduler: Scheduler) -> int:
    """Slots that running sequences hold and do not fill: internal waste. A partly filled block that is shared counts once."""
    size = scheduler.config.block_size
    partly: dict[int, int] = {}  # block -> slots filled
    for sequence in _holders(scheduler):
        index, filled = divmod(sequence.num_planned, size)
        for group in sequence.table.groups:
            for i in range(index, len(group)):
                if group[i] != NULL_BLOCK:
                    used = filled if i == index else 0
                    partly[group[i]] = max(partly.get(group[i], 0), used)
    return sum(size - used for used in partly.values())


def block_tables(scheduler: Scheduler) -> dict[str, tuple[tuple[BlockId, ...], ...]]:
    """Each running sequence's physical blocks, by KV group and logical index: what pictures of memory are drawn from."""
    return {sequence.id: sequence.table.as_tuples() for sequence in _holders(scheduler)}


def _holders(scheduler: Scheduler) -> Iterator[Sequence]:
    return (s for s in scheduler.running if s.state is State.RUNNING)


@dataclass(frozen=True)
class Summary:
    """A trace, added up."""

    trace: Trace
    steps: tuple[StepRecord, ...]
    num_requests: int
    endings: Counter[str]  # finish reason -> sequences
    num_tokens_kept: int
    mismatch: Mismatch | None  # the replay ended early, here

    @property
    def kinds(self) -> Kinds:
        return Kinds(*(sum(column) for column in zip(*(step.kinds for step in self.steps), strict=True))) if self.steps else Kinds(0, 0, 0)

    @property
    def waste(self) -> float:
        """Share of the slots in used blocks that hold no token, averaged over steps."""
        size = self.trace.config.block_size
        shares = [step.empty_slots / (step.stats.num_used_blocks * size) for step in self.steps if step.stats.num_used_blocks]
        return sum(shares) / len(shares) if shares else 0.0

    @property
    def duration(self) -> float:
        ends = [step.updated_at for step in self.steps if step.updated_at == step.updated_at]
        return ends[-1] - self.steps[0].planned_at if ends else 0.0


def summarise(trace: Trace) -> Summary:
    """Replay a trace and add it up."""
    counter = KindCounter()
    steps: list[StepRecord] = []
    started: dict[int, int] = {}  # step id -> its place in `steps`
    endings: Counter[str] = Counter()
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
        endings.update(p.finish_reason for p in step.progress if p.finish_reason is not None)
        kept += sum(len(p.token_ids) for p in step.progress)
        mismatch = step.mismatch
    return Summary(trace, tuple(steps), requests, endings, kept, mismatch)
