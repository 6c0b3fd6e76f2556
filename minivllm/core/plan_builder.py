"""A step plan under construction, and the record of a launched plan, which is kept until its result is applied."""
from __future__ import annotations

from collections import abc

from minivllm.core.plan import BlockCopy, BlockId, BlockMove, RowAdmission, StepPlan
from minivllm.core.request import Sequence


class PlanBuilder:
    """The columns of a plan. Plain decodes come first: one token each, and one sample each at the same index.

    Almost all entries of a typical plan are plain decodes, so adding one is only two appends. `close_decodes` fills in the other
    columns for all of them.
    """

    __slots__ = (
        "_decode_blocks",
        "admitted",
        "budget",
        "copies",
        "counts",
        "drafts",
        "forks",
        "freed_blocks",
        "new_blocks",
        "no_blocks",
        "num_blocks_to_be_freed",
        "num_decodes",
        "sample_from",
        "sample_sequences",
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
        self.sample_sequences: list[Sequence] = []  # the sequence that receives each sample
        self.forks: list[tuple[Sequence, int, int]] = []  # (child, its sample, tokens that this step confirms for it)
        self.admitted: list[RowAdmission] = []
        self.freed_blocks: list[tuple[int, int, int]] = []
        self.copies: list[BlockCopy] = []
        self.num_blocks_to_be_freed: int | None = None  # by updates of launched plans; counted when first needed
        self.short_of_blocks = False  # a sequence got no blocks, so no waiting sequence is admitted
        self._decode_blocks: list[tuple[int, tuple[tuple[BlockId, ...], ...]]] = []

    def add_decode(self, sequence: Sequence, start: int, new_blocks: tuple[tuple[BlockId, ...], ...]) -> None:
        """Compute one token and sample the next."""
        if new_blocks is not self.no_blocks:
            self._decode_blocks.append((len(self.sequences), new_blocks))
        self.sequences.append(sequence)
        self.starts.append(start)

    def close_decodes(self) -> None:
        """Fill in the other columns of the decodes. After this call `add` adds entries."""
        count = self.num_decodes = len(self.sequences)
        self.budget -= count
        self.counts = [1] * count
        self.new_blocks = [self.no_blocks] * count
        for index, blocks in self._decode_blocks:
            self.new_blocks[index] = blocks
        self.drafts = [()] * count
        self.sample_from = list(range(count))
        self.sample_sequences = self.sequences.copy()

    def add(self, sequence: Sequence, start: int, count: int, new_blocks: tuple[tuple[BlockId, ...], ...], drafts: tuple[int, ...]) -> int:
        """Add an entry that is not a plain decode. Returns its column index."""
        self.sequences.append(sequence)
        self.starts.append(start)
        self.counts.append(count)
        self.new_blocks.append(new_blocks)
        self.drafts.append(drafts)
        self.budget -= count
        return len(self.sequences) - 1

    def add_sample(self, column: int, sequence: Sequence) -> int:
        """Sample a token for `sequence` from the last position of this column. Returns the sample's index."""
        self.sample_from.append(column)
        self.sample_sequences.append(sequence)
        return len(self.sample_sequences) - 1

    def build(
        self, moves_out: abc.Sequence[BlockMove], moves_in: abc.Sequence[BlockMove], adapter_loads: tuple[tuple[int, int], ...] = (),
        proposes: bool = True,
    ) -> StepPlan:
        ids = tuple([s.id for s in self.sequences])
        rows = tuple([s.row for s in self.sequences])
        only_decodes = self.num_decodes == len(self.sequences)
        return StepPlan(
            step_id=self.step_id, request_ids=ids, rows=rows, starts=tuple(self.starts), num_tokens=tuple(self.counts),
            new_blocks=tuple(self.new_blocks), drafts=tuple(self.drafts), sample_from=tuple(self.sample_from),
            sample_rows=rows if only_decodes else tuple([s.row for s in self.sample_sequences]),
            sample_ids=ids if only_decodes else tuple([s.id for s in self.sample_sequences]),
            admitted=tuple(self.admitted), freed_blocks=tuple(self.freed_blocks), copies=tuple(self.copies),
            moves_out=tuple(moves_out), moves_in=tuple(moves_in), adapter_loads=adapter_loads, proposes=proposes,
        )


class LaunchedPlan:
    """A plan that the scheduler returned. The rows and blocks in it must not be reused before its result is applied."""

    __slots__ = ("blocks_to_free", "counts", "drafts", "forks", "num_decodes", "plan", "sample_of", "sample_sequences", "sequences")

    def __init__(self, plan: StepPlan, builder: PlanBuilder) -> None:
        self.plan = plan
        self.sequences = builder.sequences
        self.counts = builder.counts
        self.num_decodes = builder.num_decodes
        self.drafts = builder.drafts
        self.sample_sequences = builder.sample_sequences
        self.forks = builder.forks
        # column -> its own sample, for the columns after the decodes (a decode's sample has the index of its column)
        self.sample_of: dict[int, int] = {}
        for sample in range(builder.num_decodes, len(builder.sample_sequences)):
            column = builder.sample_from[sample]
            if builder.sample_sequences[sample] is builder.sequences[column]:
                self.sample_of[column] = sample
        self.blocks_to_free: list[BlockId] = []  # outside a window since this plan was launched; freed with its update

    def tokens_in_flight(self) -> abc.Iterator[tuple[Sequence, int]]:
        """Each sequence of the plan, and the number of tokens that the update confirms for it."""
        yield from zip(self.sequences, self.counts, strict=True)
        for child, _, count in self.forks:
            yield child, count

    def forked_children(self) -> abc.Iterator[tuple[Sequence, Sequence]]:
        """(child, parent)"""
        for child, sample, _ in self.forks:
            yield child, self.sequences[self.plan.sample_from[sample]]

    @property
    def move_ids(self) -> list[int]:
        return [move.move_id for move in (*self.plan.moves_out, *self.plan.moves_in)]
