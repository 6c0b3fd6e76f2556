"""A tiny planner: tests choose the order, the chunks and the batch of each step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from minivllm.core.plan import RowAdmission, StepPlan
from minivllm.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


@dataclass
class Sequence:
    """One sequence: counts and blocks."""

    name: str
    row: int
    prompt: tuple[int, ...]
    max_tokens: int
    params: SamplingParams = field(default_factory=lambda: GREEDY)
    seed: int = 0
    child: int = 0
    outputs: list[int] = field(default_factory=list)  # known ones; planned ones may be ahead
    num_planned: int = 0  # tokens computed by launched plans
    num_sampled: int = 0  # tokens that launched plans sample
    blocks: list[list[int]] = field(default_factory=list)
    admitted: bool = False
    owed_from: int | None = None
    adapter_slot: int = -1

    @property
    def total(self) -> int:
        return len(self.prompt) + self.num_sampled

    @property
    def done(self) -> bool:
        return self.num_sampled >= self.max_tokens

    @property
    def left(self) -> int:
        return 0 if self.done else self.total - self.num_planned


class Planner:
    """Allocates blocks and makes plans; `windows` gives the KV groups."""

    def __init__(self, block_size: int, free_blocks: list[int], windows: tuple[int | None, ...] = (None,)) -> None:
        self.block_size, self.windows = block_size, windows
        self.free = deque(free_blocks)
        self.step_id = 0

    def plan(self, work: list[tuple[Sequence, int]], copies=(), moves_out=(), moves_in=(), drafts=()) -> StepPlan:
        """Compute this many tokens of each sequence; those that reach their end sample one. drafts: of each sequence, beyond its end."""
        drafts = drafts or ((),) * len(work)
        admitted, new_blocks, freed, starts, samples = [], [], [], [], []
        for i, (s, count) in enumerate(work):
            assert 1 <= count <= s.left and (not drafts[i] or count == s.left)
            starts.append(s.num_planned)
            dropped = self._drop(s, s.num_planned)  # an admission says so itself
            s.num_planned += count + len(drafts[i])
            appended = self._grow(s)
            if s.admitted:
                freed += dropped
                new_blocks.append(appended)
            else:
                new_blocks.append(((),) * len(self.windows))
                admitted.append(self.admission(s))
                s.admitted = True
            if s.num_planned == s.total + len(drafts[i]):
                samples.append(i)
                s.num_sampled += 1
        self.step_id += 1
        return StepPlan(
            step_id=self.step_id,
            request_ids=tuple(s.name for s, _ in work),
            rows=tuple(s.row for s, _ in work),
            starts=tuple(starts),
            num_tokens=tuple(n + len(d) for (_, n), d in zip(work, drafts, strict=True)),
            new_blocks=tuple(new_blocks),
            drafts=tuple(tuple(d) for d in drafts),
            sample_from=tuple(samples),
            sample_rows=tuple(work[i][0].row for i in samples),
            sample_ids=tuple(work[i][0].name for i in samples),
            admitted=tuple(admitted),
            freed_blocks=tuple(freed),
            copies=tuple(copies),
            moves_out=tuple(moves_out),
            moves_in=tuple(moves_in),
        )

    def admission(self, s: Sequence) -> RowAdmission:
        return RowAdmission(
            row=s.row,
            request_id=s.name,
            token_ids=(*s.prompt, *s.outputs),
            num_prompt_tokens=len(s.prompt),
            block_ids=tuple(tuple(b) for b in s.blocks),
            params=s.params,
            seed=s.seed,
            child_index=s.child,
            prompt_logprobs_from=s.owed_from,
            adapter_slot=s.adapter_slot,
        )

    def _grow(self, s: Sequence) -> tuple[tuple[int, ...], ...]:
        if not s.blocks:
            s.blocks = [[] for _ in self.windows]
        appended = []
        for blocks in s.blocks:
            new = [self.free.popleft() for _ in range(-(-s.num_planned // self.block_size) - len(blocks))]
            blocks += new
            appended.append(tuple(new))
        return tuple(appended)

    def _drop(self, s: Sequence, start: int) -> list[tuple[int, int, int]]:
        """Window blocks that no query from `start` on sees: the query at p sees keys p - window + 1 ... p."""
        freed = []
        for group, window in enumerate(self.windows):
            for index in range((start - window + 1) // self.block_size if window else 0):
                if s.blocks[group][index]:
                    self.free.append(s.blocks[group][index])
                    s.blocks[group][index] = 0
                    freed.append((s.row, group, index))
        return freed
