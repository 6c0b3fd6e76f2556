"""A step plan while it is being written, and what is remembered of it until its result comes back."""
from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Column

from minivllm.core.plan import BlockCopy, BlockId, BlockMove, RowAdmission, StepPlan
from minivllm.core.request import Sequence


class PlanBuilder:
    """Columns under construction. Plain decodes come first: one token each, and one sample each at the same index.

    They are almost all of almost every plan, so they cost two appends; the other columns are filled in by `close_decodes`.
    """

    __slots__ = (
        "_decode_blocks",
        "admitted",
        "blocks_coming",
        "budget",
        "copies",
        "counts",
        "drafts",
        "forks",
        "freed_blocks",
        "new_blocks",
        "no_blocks",
        "num_decodes",
        "sample_from",
        "samplers",
        "sequences",
        "short_of_blocks",
        "starts",
        "step_id",
    )

    def __init__(self, step_id: int, budget: int, num_groups: int) -> None:
        self.step_id = step_id
        self.budget = budget  # tokens left
        self.no_blocks: tuple[tuple[BlockId, ...], ...] = ((),) * num_groups
        self.sequences: list[Sequence] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.new_blocks: list[tuple[tuple[BlockId, ...], ...]] = []
        self.drafts: list[tuple[int, ...]] = []
        self.num_decodes = 0
        self.sample_from: list[int] = []
        self.samplers: list[Sequence] = []
        self.forks: list[tuple[Sequence, int, int]] = []  # (child, its sample, tokens that this step confirms for it)
        self.admitted: list[RowAdmission] = []
        self.freed_blocks: list[tuple[int, int, int]] = []
        self.copies: list[BlockCopy] = []
        self.blocks_coming: int | None = None  # blocks that updates of launched plans will free; counted when first asked for
        self.short_of_blocks = False  # somebody who runs could not be planned: nobody new is admitted
        self._decode_blocks: list[tuple[int, tuple[tuple[BlockId, ...], ...]]] = []

    def add_decode(self, sequence: Sequence, start: int, new_blocks: tuple[tuple[BlockId, ...], ...]) -> None:
        """One token, and the sample after it."""
        if new_blocks is not self.no_blocks:
            self._decode_blocks.append((len(self.sequences), new_blocks))
        self.sequences.append(sequence)
        self.starts.append(start)

    def close_decodes(self) -> None:
        count = self.num_decodes = len(self.sequences)
        self.budget -= count
        self.counts = [1] * count
        self.new_blocks = [self.no_blocks] * count
        for index, blocks in self._decode_blocks:
            self.new_blocks[index] = blocks
        self.drafts = [()] * count
        self.sample_from = list(range(count))
        self.samplers = self.sequences.copy()

    def add(self, sequence: Sequence, start: int, count: int, new_blocks: tuple[tuple[BlockId, ...], ...], drafts: tuple[int, ...]) -> int:
        """Any other piece of work; its column index."""
        self.sequences.append(sequence)
        self.starts.append(start)
        self.counts.append(count)
        self.new_blocks.append(new_blocks)
        self.drafts.append(drafts)
        self.budget -= count
        return len(self.sequences) - 1

    def add_sample(self, column: int, sequence: Sequence) -> int:
        """`sequence` draws a token from the last position of this column; the sample's index."""
        self.sample_from.append(column)
        self.samplers.append(sequence)
        return len(self.samplers) - 1

    def build(self, moves_out: Column[BlockMove], moves_in: Column[BlockMove]) -> StepPlan:
        ids = tuple([s.id for s in self.sequences])
        rows = tuple([s.row for s in self.sequences])
        only_decodes = self.num_decodes == len(self.sequences)
        return StepPlan(
            step_id=self.step_id, request_ids=ids, rows=rows, starts=tuple(self.starts), num_tokens=tuple(self.counts),
            new_blocks=tuple(self.new_blocks), drafts=tuple(self.drafts), sample_from=tuple(self.sample_from),
            sample_rows=rows if only_decodes else tuple([s.row for s in self.samplers]),
            sample_ids=ids if only_decodes else tuple([s.id for s in self.samplers]),
            admitted=tuple(self.admitted), freed_blocks=tuple(self.freed_blocks), copies=tuple(self.copies),
            moves_out=tuple(moves_out), moves_in=tuple(moves_in),
        )


class LaunchedPlan:
    """A plan that was handed out. Everything it names stays untouched until it is updated."""

    __slots__ = ("counts", "drafts", "forks", "num_decodes", "plan", "retired", "sample_of", "samplers", "sequences")

    def __init__(self, plan: StepPlan, builder: PlanBuilder) -> None:
        self.plan = plan
        self.sequences = builder.sequences
        self.counts = builder.counts
        self.num_decodes = builder.num_decodes
        self.drafts = builder.drafts
        self.samplers = builder.samplers
        self.forks = builder.forks
        # column -> its own sample, for the columns after the decodes (for which the two are equal)
        self.sample_of: dict[int, int] = {}
        for sample in range(builder.num_decodes, len(builder.samplers)):
            column = builder.sample_from[sample]
            if builder.samplers[sample] is builder.sequences[column]:
                self.sample_of[column] = sample
        self.retired: list[BlockId] = []  # blocks that nobody needs after this plan, freed with its update

    def shares(self) -> Iterator[tuple[Sequence, int]]:
        """Each sequence of the plan, and how many tokens its update confirms for it."""
        yield from zip(self.sequences, self.counts, strict=True)
        for child, _, count in self.forks:
            yield child, count

    def forked(self) -> Iterator[tuple[Sequence, Sequence]]:
        """(child, parent)"""
        for child, sample, _ in self.forks:
            yield child, self.sequences[self.plan.sample_from[sample]]

    @property
    def move_ids(self) -> list[int]:
        return [move.move_id for move in (*self.plan.moves_out, *self.plan.moves_in)]
