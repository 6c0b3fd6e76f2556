"""The row table and the only packing code: from a plan's columns to the tensors of one forward pass.

A row is what the worker remembers of one sequence, so that a plan need not repeat it:

    row     tokens (on the device)        block table per group (on the host, a copy on the device)
     0      a a a a a a x .               7  3  9  .       x: sampled on the device; the host may not know it yet
     1      . . . . . . . .
     2      c c c .                       4  .  .  .
     R      (the null row)                0  0  0  .       what padded batches compute: position 0, in the null block

The plan's columns are reordered so that sequences with one query come first, and longer ones before shorter ones (attention
pads neighbours to a common length); everything that goes back is in the plan's order again. Columns are numpy arrays on the
host and reach the device in one copy (`upload`); tokens never leave it: the packer sends places in the token table, and the
newest token is written there by the sampler. Of the block tables only changes are sent.
"""
from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import NULL_BLOCK, RowAdmission, StepPlan
from minivllm.kernels.layout import SHARED_RUN, InputBatch
from minivllm.kernels.upload import upload

Array = np.ndarray[Any, Any]
_NOTHING = np.empty(0, np.int64)
LAST_ONLY = 256  # tokens beside each sequence's last one from which on it pays to spare the last layer these
SHARERS = 8  # decodes from which on it pays to look for blocks that all of them have


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """Prompt positions of one request whose logprobs this step can tell, [first, first + count)."""

    request: int  # index into the plan's columns
    first: int
    count: int
    k: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch, and where its results belong. S samples, P prompt positions owed."""

    batch: InputBatch  # logit_rows: [S + P], samples first
    sample_rows: Array  # [S] rows of the table
    sample_positions: Array  # [S] of the tokens to be sampled
    sample_places: Tensor  # [S] int64: where they go in the flat token table
    prompt_pieces: tuple[PromptPiece, ...]
    prompt_places: Tensor  # [P] int64: the tokens that the prompt's logits predict


@dataclass(frozen=True, slots=True)
class Columns:
    """A plan as numpy columns, in the batch's order: B sequences, T tokens, S samples."""

    rows: Array  # [B] of the row table
    query_lens: Array  # [B]
    seq_lens: Array  # [B]
    num_decodes: int  # sequences with one query come first
    query_start: Array  # [B + 1]
    places: Array  # [T] of the tokens, in the flat token table
    positions: Array  # [T]
    slots: list[Array]  # [G] of [T]
    source: Array  # [S] which sequence each sample comes from; samples are in the plan's order
    sample_rows: Array  # [S]
    sample_positions: Array  # [S] of the tokens to be sampled
    sample_places: Array  # [S]
    prompt_pieces: tuple[PromptPiece, ...]
    prompt_rows: Array  # [P] batch rows whose logits predict owed prompt tokens
    prompt_places: Array  # [P] of those tokens
    shared_keys: int = 0  # decodes only: so many leading keys of all sequences lie in the same blocks; whole runs of SHARED_RUN

    @property
    def last_only(self) -> bool:
        """Whether the last layer need only look at each sequence's last token, and it pays."""
        return len(self.places) - len(self.rows) >= LAST_ONLY and not self.prompt_pieces

    @property
    def simple(self) -> bool:
        """Whether each sequence has at most one sample, drawn with its own row's parameters, and no prompt logprobs are owed."""
        return not self.prompt_pieces and len(set(self.source.tolist())) == len(self.source) and bool(
            (self.rows[self.source] == self.sample_rows).all())


class RowTable:
    """Every row's tokens and blocks. A cache: `admit` alone can rebuild it."""

    def __init__(self, num_rows: int, num_groups: int, max_model_len: int, block_size: int, device: torch.device,
                 sharing: Sequence[int] = ()) -> None:
        """sharing: KV groups of whose blocks it is of interest whether all decodes have the same; none: nobody looks."""
        width = -(-max_model_len // block_size)
        self.null_row, self.sharing = num_rows, tuple(sharing)
        self.tokens = torch.zeros((num_rows + 1, max_model_len), dtype=torch.int32, device=device)
        self.block_tables = np.full((num_groups, num_rows + 1, width), NULL_BLOCK, np.int32)
        shared = torch.from_numpy(self.block_tables)
        self.device_tables = shared if device.type == "cpu" else shared.to(device)  # [G, R + 1, M]
        self._mirrored = device.type != "cpu"
        self._changed: list[tuple[int, int]] = []  # spans of the flat block tables that the device does not know yet
        self._num_blocks = np.zeros((num_groups, num_rows), np.int64)
        self._num_prompt = np.zeros(num_rows, np.int64)
        self._owed_from = np.full(num_rows, -1, np.int64)  # first prompt position whose logprobs are owed; -1: none are
        self._prompt_k = np.zeros(num_rows, np.int64)
        self._num_owing = 0  # rows that owe any: mostly none, and then nobody looks
        self._flat_tokens = self.tokens.view(-1)
        self._block_size, self._max_model_len, self._device = block_size, max_model_len, device

    def reset(self) -> None:
        """Forget all rows; the tensors stay, since captured graphs hold their addresses."""
        self.block_tables.fill(NULL_BLOCK)
        self.device_tables.fill_(NULL_BLOCK)
        self._changed.clear()
        self.tokens.zero_()
        self._num_blocks.fill(0)
        self._owed_from.fill(-1)
        self._num_owing = 0

    # -- what plans say about rows --------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan) -> None:
        """Take in everything a plan says about rows, in the order that `StepPlan` states."""
        if plan.admitted:
            self._admit(plan.admitted)
        for row, group, index in plan.freed_blocks:
            self._put(group, row, index, (NULL_BLOCK,))
        for copy in plan.copies:
            assert self.block_tables[copy.group][copy.row, copy.index] in (copy.src, copy.dst)
            self._put(copy.group, copy.row, copy.index, (copy.dst,))
        for row, per_group in zip(plan.rows, plan.new_blocks, strict=True):
            for group, blocks in enumerate(per_group):
                if blocks:
                    self._append(group, row, blocks)

    def _admit(self, admissions: Sequence[RowAdmission]) -> None:
        lens = [len(a.token_ids) for a in admissions]
        assert max(lens) <= self._max_model_len
        tokens = upload([np.concatenate([np.frombuffer(array("i", a.token_ids), np.int32) for a in admissions])], self._device)[0]
        for a, some in zip(admissions, tokens.split(lens), strict=True):
            row = a.row
            self.tokens[row, : len(some)] = some
            for group, blocks in enumerate(a.block_ids):
                surplus = max(0, int(self._num_blocks[group, row]) - len(blocks))  # of who had the row before
                self._put(group, row, len(blocks), (NULL_BLOCK,) * surplus)
                self._num_blocks[group, row] = 0
                self._append(group, row, blocks)
            self._num_prompt[row] = a.num_prompt_tokens
            self._owe(row, -1 if a.prompt_logprobs_from is None else max(a.prompt_logprobs_from, 1))  # nothing predicts position 0
            self._prompt_k[row] = a.params.prompt_logprobs or 0

    def _append(self, group: int, row: int, blocks: tuple[int, ...]) -> None:
        at = int(self._num_blocks[group, row])
        self._put(group, row, at, blocks)
        self._num_blocks[group, row] = at + len(blocks)

    def _put(self, group: int, row: int, index: int, blocks: tuple[int, ...]) -> None:
        self.block_tables[group, row, index : index + len(blocks)] = blocks
        if self._mirrored and blocks:
            _, rows, width = self.block_tables.shape
            at = (group * rows + row) * width + index
            self._changed.append((at, at + len(blocks)))

    def changes(self) -> tuple[Array, Array]:
        """Places in the flat block tables that the device does not know yet, and what is there: [C] int64 and int32.

        Whoever brings them there says so with `changes_sent`. What was changed twice is there twice, with the same, last value."""
        if not self._changed:
            return _NOTHING, _NOTHING.astype(np.int32)
        places = np.concatenate([np.arange(*span) for span in self._changed])
        return places, self.block_tables.reshape(-1)[places]

    def changes_sent(self) -> None:
        """The device's copy of the block tables is up to date."""
        self._changed.clear()

    def send_changes(self) -> None:
        """Bring the device's copy of the block tables up to date."""
        if self._changed:
            where, values = upload(self.changes(), self._device)
            self.device_tables.view(-1).index_copy_(0, where, values)
            self.changes_sent()

    def _owe(self, row: int, first: int) -> None:
        self._num_owing += (first >= 0) - int(self._owed_from[row] >= 0)
        self._owed_from[row] = first

    def write_sampled(self, places: Tensor, token_ids: Tensor) -> None:
        """Each sampled token at its place, on the device."""
        self._flat_tokens.index_copy_(0, places, token_ids.to(torch.int32))

    # -- packing --------------------------------------------------------------------------------------------------------

    def pack(self, plan: StepPlan) -> Packed:
        """The forward pass of a plan that was applied. Reads no device value on the host."""
        return self.send(self.columns(plan))

    def columns(self, plan: StepPlan) -> Columns:
        """The host's part of packing."""
        rows, starts, counts = np.array(plan.rows, np.int64), np.array(plan.starts, np.int64), np.array(plan.num_tokens, np.int64)
        assert not any(plan.drafts), "a plan with drafts needs a verifier"
        single = counts == 1
        num_decodes = int(single.sum())
        where = None  # request -> its place in the batch; None: the same
        order = np.lexsort((-starts - counts, ~single))  # single queries first, the longest sequence first
        if (order[1:] < order[:-1]).any():
            where = np.empty_like(order)
            where[order] = np.arange(len(order))
            rows, starts, counts = rows[order], starts[order], counts[order]
        ends = starts + counts
        query_start = np.zeros(len(rows) + 1, np.int64)
        counts.cumsum(out=query_start[1:])

        if num_decodes == len(rows):
            token_rows, positions = rows, starts
        else:  # of each of the T tokens
            token_rows = np.repeat(rows, counts)
            positions = np.arange(query_start[-1]) - np.repeat(query_start[:-1] - starts, counts)
        block = positions // self._block_size
        offset = positions - block * self._block_size
        slots = [table[token_rows, block].astype(np.int64) * self._block_size + offset for table in self.block_tables]

        source = np.array(plan.sample_from, np.int64)
        if where is not None:
            source = where[source]
        sample_rows, sample_positions = np.array(plan.sample_rows, np.int64), ends[source]
        assert not len(source) or sample_positions.max() < self._max_model_len
        pieces, piece_rows, piece_places = self._prompt_pieces(plan, where, query_start)
        return Columns(
            rows=rows, query_lens=counts, seq_lens=ends, num_decodes=num_decodes, query_start=query_start,
            places=token_rows * self._max_model_len + positions, positions=positions, slots=slots, source=source,
            sample_rows=sample_rows, sample_positions=sample_positions, sample_places=sample_rows * self._max_model_len + sample_positions,
            prompt_pieces=pieces, prompt_rows=piece_rows, prompt_places=piece_places,
            shared_keys=self._shared_keys(rows, int(starts.min())) if self.sharing and num_decodes == len(rows) >= SHARERS else 0)

    def _shared_keys(self, rows: Array, shortest: int) -> int:
        """Leading keys that all rows have in the same blocks, `shortest` at most."""
        groups, run, width = np.array(self.sharing)[:, None], (SHARED_RUN - 1) // self._block_size, shortest // self._block_size
        if shortest < SHARED_RUN:
            return 0
        here = self.block_tables[groups, rows, run]  # of the last key of a first run; the whole tables are large
        if (here != here[:, :1]).any():
            return 0
        tables = self.block_tables[groups, rows, :width]  # [G, B, width]
        same = (tables == tables[:, :1]).all((0, 1))
        blocks = width if same.all() else int(same.argmin())
        return blocks * self._block_size // SHARED_RUN * SHARED_RUN

    def send(self, c: Columns) -> Packed:
        """The device's part: a copy, one more if block tables have changed, and a few gathers there."""
        last_rows = c.source if c.last_only else c.query_start[c.source + 1] - 1
        self.send_changes()
        uploaded = upload([
            c.places, c.positions, np.concatenate([last_rows, c.prompt_rows]) if c.prompt_pieces else last_rows,
            c.sample_places, c.prompt_places, c.query_start.astype(np.int32), c.seq_lens.astype(np.int32), c.rows, *c.slots], self._device)
        places, positions, logit_rows, sample_places, prompt_places, query_start, seq_lens, rows, *slots = uploaded
        width = -(-int(c.seq_lens.max()) // self._block_size)
        batch = InputBatch(
            tokens=self._flat_tokens.index_select(0, places), positions=positions, query_start=query_start, seq_lens=seq_lens,
            slots=tuple(slots), block_tables=tuple(table[:, :width].index_select(0, rows) for table in self.device_tables),
            logit_rows=logit_rows, num_decodes=c.num_decodes, query_lens_host=tuple(c.query_lens.tolist()),
            seq_lens_host=tuple(c.seq_lens.tolist()), last_only=c.last_only)
        return Packed(batch, c.sample_rows, c.sample_positions, sample_places, c.prompt_pieces, prompt_places)

    def _prompt_pieces(self, plan: StepPlan, where: Array | None, query_start: Array) -> tuple[tuple[PromptPiece, ...], Array, Array]:
        """Prompt logprobs owed by this step's requests: the pieces, the batch rows that predict them, the tokens' places.

            positions computed      start  start+1  ...  end-1
            tokens predicted               start+1  ...  end-1  end       kept: those of the prompt, from the first one owed
        """
        if not self._num_owing:
            return (), _NOTHING, _NOTHING
        pieces: list[PromptPiece] = []
        batch_rows, places = [_NOTHING], [_NOTHING]
        for i in np.flatnonzero(self._owed_from[list(plan.rows)] >= 0).tolist():
            row, start, end = plan.rows[i], plan.starts[i], plan.starts[i] + plan.num_tokens[i]
            first, after = max(start + 1, int(self._owed_from[row])), min(end + 1, int(self._num_prompt[row]))
            if after == self._num_prompt[row]:
                self._owe(row, -1)
            if first >= after:
                continue
            pieces.append(PromptPiece(i, first, after - first, int(self._prompt_k[row])))
            targets = np.arange(first, after)
            batch_rows.append(query_start[i if where is None else where[i]] + targets - 1 - start)
            places.append(row * self._max_model_len + targets)
        return tuple(pieces), np.concatenate(batch_rows), np.concatenate(places)
