"""The row table and the only packing code: from a plan's columns to the tensors of one forward pass.

A row is the worker's memory of one sequence, so that a plan need not repeat it:

    row     tokens (on the device)        block table per group (on the host, a copy on the device)
     0      a a a a a a x .               7  3  9  .       x: sampled on the device; the host may not know it yet
     1      . . . . . . . .
     2      c c c d d .                   4  .  .  .       d: drafts, written there by the plan that verifies them
     R      (the null row)                0  0  0  .       padding of captured batches: a token at position 0, in the null block

The plan's columns are reordered. Decodes come first: sequences with exactly `query_width` tokens, which is 1 plus the number of
drafts that most decodes of the step carry. Longer sequences come before shorter ones, because attention pads neighbors to a common
length. Results go back in the plan's order.

Columns are numpy arrays on the host and reach the device in one copy (`upload`). Tokens never leave the device: the packer sends
indices into the token table, and the sampler writes the newest token there. Only changed block-table entries are sent.
"""
from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.core.plan import DEVICE_DRAFT, NULL_BLOCK, RowAdmission, StepPlan
from minivllm.kernels import tuning
from minivllm.kernels.layout import InputBatch
from minivllm.kernels.upload import upload

Array = np.ndarray[Any, Any]
_NONE = np.empty(0, np.int64)
_NO_SLOTS = np.empty(0, np.int32)
_LAST, _ALL = 1, 2  # what a row's pooling needs


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Prompt positions [first, first + count) of one request whose logprobs this step computes."""

    request: int  # index into the plan's columns
    first: int
    count: int
    k: int  # alternatives per position


@dataclass(frozen=True, slots=True)
class PoolSpan:
    """Tokens of one request whose final hidden states are added up."""

    request: int  # index into the plan's columns
    index: int  # of the sequence, in the batch's order
    first: int  # position of the first token
    begin: int  # the tokens are [begin, end) of the T tokens; of the request's last token only, or of all that this step computes
    end: int
    every: bool  # all that this step computes


@dataclass(frozen=True, slots=True)
class Columns:
    """A plan as numpy columns, in the batch's order: B sequences, T tokens; and in the plan's order: L logits rows.

    A sample with k drafts has 1 + k logits rows. Row j decides the token after the j-th draft.
    """

    rows: Array  # [B] row numbers
    query_lens: Array  # [B]
    seq_lens: Array  # [B]
    num_decodes: int  # the first num_decodes sequences have query_width tokens each
    query_width: int
    query_start: Array  # [B + 1]
    token_index: Array  # [T] of the tokens, in the flat token table
    positions: Array  # [T]
    slots: list[Array]  # [G] of [T]
    draft_index: Array  # [D] where the plan's drafts go, in the flat token table
    drafts: Array  # [D] int32
    source: Array  # [L] the sequence that each logits row belongs to
    logits_rows: Array  # [L] indices of the T tokens
    sample_rows: Array  # [L] numbers of the rows that receive the tokens
    sample_positions: Array  # [L] of the tokens to be sampled
    sample_index: Array  # [L] of these tokens, in the flat token table
    prompt_spans: tuple[PromptSpan, ...]
    prompt_rows: Array  # [P] of the T tokens: their logits predict prompt tokens whose logprobs are needed
    prompt_index: Array  # [P] of those prompt tokens, in the flat token table
    pool_spans: tuple[PoolSpan, ...]
    adapter_slots: Array  # [T] int32: slot of each token's LoRA adapter, -1 for the base model; [0] if no token has one
    drafting: DraftColumns | None = None  # of a worker with a proposer
    all_hidden: bool = False  # hidden states of all tokens are needed
    padded: bool = False  # decodes with fewer drafts than others were lengthened to one width (`widened`)
    shared_keys: int = 0  # decodes only: leading keys that all sequences have in the same blocks, a multiple of SHARED_KEYS_MULTIPLE

    @property
    def last_only(self) -> bool:
        """Whether the last layer computes each sequence's last token only. It pays from MIN_SKIPPED_TOKENS other tokens on."""
        pays = len(self.token_index) - len(self.rows) >= tuning.MIN_SKIPPED_TOKENS
        return pays and not (self.prompt_spans or self.has_drafts or self.all_hidden or any(span.every for span in self.pool_spans))

    @property
    def has_drafts(self) -> bool:
        """Whether any sequence has drafts."""
        return bool(len(self.drafts)) or (self.drafting is not None and bool(self.drafting.num_drafts.any()))

    @property
    def simple(self) -> bool:
        """Whether a captured graph can compute it.

        Each sequence has at most one sample, which uses its own row's parameters. If there are drafts, all sequences are decodes of one
        width. No prompt logprobs and no pooling are needed.
        """
        if self.padded:
            return True
        rows_of_a_sample = self.query_width if self.has_drafts else 1
        if self.prompt_spans or self.pool_spans:
            return False
        if rows_of_a_sample > 1 and not self.num_decodes == len(self.rows) == len(self.source) / rows_of_a_sample:
            return False
        sources = self.source[::rows_of_a_sample]
        return len(set(sources.tolist())) == len(sources) and bool((self.rows[self.source] == self.sample_rows).all())

    def widened(self, width: int, null_index: int) -> Columns:
        """The same decodes with `width` tokens each. A filler is the token at `null_index`; it writes to the null block, and nothing reads
        its results. It has a position after the sequence's own, so the queries before it see the same keys."""
        n, token_source = len(self.rows), np.repeat(np.arange(len(self.rows)), self.query_lens)
        index = token_source * width + np.arange(len(token_source)) - self.query_start[token_source]
        first = self.positions[self.query_start[:-1]]

        def spread(column: Array, filler: int) -> Array:
            wide = np.full(n * width, filler, column.dtype)
            wide[index] = column
            return wide

        return replace(
            self, query_lens=np.full(n, width), seq_lens=first + width, num_decodes=n, query_width=width, padded=True,
            query_start=np.arange(n + 1) * width, token_index=spread(self.token_index, null_index),
            positions=(first[:, None] + np.arange(width)).reshape(-1), slots=[spread(slots, 0) for slots in self.slots],
            logits_rows=index[self.logits_rows],
            adapter_slots=np.repeat(self.adapter_slots[self.query_start[:-1]], width) if len(self.adapter_slots) else self.adapter_slots,
            drafting=None if self.drafting is None else replace(self.drafting, token_source=np.repeat(np.arange(n), width)))


@dataclass(frozen=True, slots=True)
class DraftColumns:
    """What a worker with a proposer also needs: B sequences and T tokens in the batch's order, L logits rows of S samples in the plan's."""

    known_ends: Array  # [B] the plan's number of known tokens of a sequence that samples; -1: of a sequence that does not
    num_drafts: Array  # [B]
    own_sample: Array  # [B] the sequence's own sample; -1: none
    token_source: Array  # [T] the sequence of each token
    sample_of_row: Array  # [L]
    first_row: Array  # [S] each sample's first logits row
    has_draft: Array  # [L] whether a draft follows

    @classmethod
    def of(cls, c: Columns, num_drafts: Array, rows_of_sample: Array) -> DraftColumns:
        """num_drafts [B]; rows_of_sample [S]: number of logits rows."""
        first = rows_of_sample.cumsum() - rows_of_sample
        own = np.full(len(c.rows), -1)
        is_own = c.sample_rows[first] == c.rows[c.source[first]]
        own[c.source[first][is_own]] = np.flatnonzero(is_own)
        has_draft = np.ones(len(c.source), np.bool_)
        has_draft[first + rows_of_sample - 1] = False
        return cls(np.where(own >= 0, c.seq_lens - num_drafts, -1), num_drafts, own, np.repeat(np.arange(len(c.rows)), c.query_lens),
                   np.repeat(np.arange(len(first)), rows_of_sample), first, has_draft)


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch on the device, and where its results belong."""

    columns: Columns
    batch: InputBatch  # logit_rows: [L + P], those of samples first
    sample_index: Tensor  # [L] int64, as in the columns
    prompt_index: Tensor  # [P] int64, likewise
    shift: Tensor | None = None  # [L] int64: positions by which the columns of each logits row are ahead of the truth. None: exact


class RowTable:
    """Every row's tokens and blocks. A cache: `admit` alone can rebuild it."""

    def __init__(self, num_rows: int, num_groups: int, max_model_len: int, block_size: int, device: torch.device,
                 sharing: Sequence[int] = (), proposals: int = 0, all_hidden: bool = False) -> None:
        """sharing: KV groups checked for a prefix shared by all decodes. Empty: no check.
        proposals: drafts that the worker proposes for each sequence. all_hidden: the proposer needs all hidden states."""
        width = -(-max_model_len // block_size)
        self.null_row, self.sharing, self.max_model_len = num_rows, tuple(sharing), max_model_len
        self._stride = _stride(max_model_len)  # of the token table
        self.tokens = torch.zeros((num_rows + 1, self._stride), dtype=torch.int32, device=device)
        self.block_tables = np.full((num_groups, num_rows + 1, width), NULL_BLOCK, np.int32)
        shared = torch.from_numpy(self.block_tables)
        self.device_tables = shared if device.type == "cpu" else shared.to(device)  # [G, R + 1, M]
        self._mirrored = device.type != "cpu"
        self._changed: list[tuple[int, int]] = []  # spans of the flat block tables that the device does not have yet
        self._num_blocks = np.zeros((num_groups, num_rows), np.int64)
        self._num_prompt = np.zeros(num_rows, np.int64)
        self._logprobs_from = np.full(num_rows, -1, np.int64)  # first prompt position whose logprobs are still needed; -1: none
        self._prompt_k = np.zeros(num_rows, np.int64)
        self._adapter_slot = np.full(num_rows, -1, np.int32)
        self._pooling = np.zeros(num_rows, np.int8)  # 0: none; _LAST: the last prompt token; _ALL: every prompt token
        self._num_with_logprobs = 0  # rows that need prompt logprobs; usually none, and then no row is checked
        self._flat_tokens = self.tokens.view(-1)
        self.proposals, self._all_hidden = proposals, all_hidden
        # Number of known tokens of each row. Only the device knows it while drafts are unverified.
        self.lengths = torch.ones(num_rows + 1, dtype=torch.int64, device=device)
        self._block_size, self._device = block_size, device

    @staticmethod
    def num_bytes(num_rows: int, num_groups: int, max_model_len: int, block_size: int) -> int:
        """Memory on the device."""
        return (num_rows + 1) * (_stride(max_model_len) + num_groups * -(-max_model_len // block_size)) * 4

    def reset(self) -> None:
        """Forget all rows; the tensors stay, since captured graphs hold their addresses."""
        self.block_tables.fill(NULL_BLOCK)
        self.device_tables.fill_(NULL_BLOCK)
        self._changed.clear()
        self.tokens.zero_()
        self.lengths.fill_(1)
        self._num_blocks.fill(0)
        self._adapter_slot.fill(-1)
        self._logprobs_from.fill(-1)
        self._num_with_logprobs = 0
        self._pooling.fill(0)

    # -- what plans say about rows --------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan) -> None:
        """Apply everything that a plan says about rows, in the order that `StepPlan` states."""
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
        assert max(lens) <= self.max_model_len
        tokens = upload([np.concatenate([np.frombuffer(array("i", a.token_ids), np.int32) for a in admissions])], self._device)[0]
        for a, some in zip(admissions, tokens.split(lens), strict=True):
            row = a.row
            self.tokens[row, : len(some)] = some
            for group, blocks in enumerate(a.block_ids):
                surplus = max(0, int(self._num_blocks[group, row]) - len(blocks))  # left by the sequence that had the row before
                self._put(group, row, len(blocks), (NULL_BLOCK,) * surplus)
                self._num_blocks[group, row] = 0
                self._append(group, row, blocks)
            self._num_prompt[row] = a.num_prompt_tokens
            if self.proposals:
                self.lengths[row] = len(a.token_ids)
            self._need_logprobs(row, -1 if a.prompt_logprobs_from is None else max(a.prompt_logprobs_from, 1))  # nothing predicts token 0
            self._prompt_k[row] = a.params.prompt_logprobs or 0
            self._pooling[row] = 0 if a.params.pooling is None else _ALL if a.params.pooling.needs_all else _LAST
            self._adapter_slot[row] = a.adapter_slot

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
        """Block-table entries that the device does not have yet: indices into the flat tables [C] int64, and values [C] int32.

        Call `changes_sent` after sending them. An entry that was changed twice occurs twice, each time with its last value."""
        if not self._changed:
            return _NONE, _NONE.astype(np.int32)
        index = np.concatenate([np.arange(*span) for span in self._changed])
        return index, self.block_tables.reshape(-1)[index]

    def changes_sent(self) -> None:
        """The device's copy of the block tables is up to date."""
        self._changed.clear()

    def send_changes(self) -> None:
        """Bring the device's copy of the block tables up to date."""
        if self._changed:
            index, values = upload(self.changes(), self._device)
            self.device_tables.view(-1).index_copy_(0, index, values)
            self.changes_sent()

    def _need_logprobs(self, row: int, first: int) -> None:
        self._num_with_logprobs += (first >= 0) - int(self._logprobs_from[row] >= 0)
        self._logprobs_from[row] = first

    def write_tokens(self, index: Tensor, token_ids: Tensor) -> None:
        """Tokens to the flat token table, on the device: index [n] int64, token_ids [n]."""
        self._flat_tokens.index_copy_(0, index, token_ids.to(torch.int32))

    # -- packing --------------------------------------------------------------------------------------------------------

    def pack(self, plan: StepPlan) -> Packed:
        """The forward pass of a plan that was applied. Reads no device value on the host."""
        return self.send(self.columns(plan))

    def columns(self, plan: StepPlan) -> Columns:
        """The host's part of packing."""
        rows, starts, counts = np.array(plan.rows, np.int64), np.array(plan.starts, np.int64), np.array(plan.num_tokens, np.int64)
        num_drafts = np.array([len(drafts) for drafts in plan.drafts], np.int64) if any(plan.drafts) else None
        query_width = 1 if num_drafts is None else _query_width(counts, num_drafts)
        is_decode = counts == query_width
        num_decodes = int(is_decode.sum())
        batch_index = None  # request -> its index in the batch; None: the order is the plan's
        order = np.lexsort((-starts - counts, ~is_decode))  # decodes first, the longest sequence first
        if (order[1:] < order[:-1]).any():
            batch_index = np.empty_like(order)
            batch_index[order] = np.arange(len(order))
            rows, starts, counts = rows[order], starts[order], counts[order]
        ends = starts + counts
        query_start = np.zeros(len(rows) + 1, np.int64)
        counts.cumsum(out=query_start[1:])

        if num_decodes == len(rows) and query_width == 1:
            token_rows, positions = rows, starts
        else:  # of each of the T tokens
            token_rows = np.repeat(rows, counts)
            positions = np.arange(query_start[-1]) - np.repeat(query_start[:-1] - starts, counts)
        row_slots = self._adapter_slot[rows]
        adapter_slots = _NO_SLOTS if row_slots.max(initial=-1) < 0 else self._adapter_slot[token_rows]
        block = positions // self._block_size
        offset = positions - block * self._block_size
        slots = [table[token_rows, block].astype(np.int64) * self._block_size + offset for table in self.block_tables]

        source = np.array(plan.sample_from, np.int64)
        sample_rows = np.array(plan.sample_rows, np.int64)
        back = np.zeros(len(source), np.int64)  # distance of each logits row from its sequence's last token
        if num_drafts is not None:  # a sample has a logits row for its sequence's last token, and one before each of its drafts
            each = 1 + num_drafts[source]
            back = np.repeat(each.cumsum(), each) - 1 - np.arange(each.sum())
            source, sample_rows = np.repeat(source, each), np.repeat(sample_rows, each)
        if batch_index is not None:
            source = batch_index[source]
        sample_positions = ends[source] - back
        assert not len(source) or sample_positions.max() < self.max_model_len
        draft_index, drafts = (_NONE, _NONE) if num_drafts is None else self._drafts(plan, num_drafts)
        spans, span_rows, span_index = self._prompt_spans(plan, batch_index, query_start)
        checks_sharing = self.sharing and num_decodes == len(rows) >= tuning.MIN_SHARING_DECODES
        columns = Columns(
            rows=rows, query_lens=counts, seq_lens=ends, num_decodes=num_decodes, query_width=query_width, query_start=query_start,
            token_index=token_rows * self._stride + positions, positions=positions, slots=slots,
            draft_index=draft_index, drafts=drafts, source=source, logits_rows=query_start[source + 1] - 1 - back,
            sample_rows=sample_rows, sample_positions=sample_positions, sample_index=sample_rows * self._stride + sample_positions,
            prompt_spans=spans, prompt_rows=span_rows, prompt_index=span_index,
            pool_spans=self._pool_spans(plan, batch_index, query_start), adapter_slots=adapter_slots,
            shared_keys=self._shared_keys(rows, int(starts.min())) if checks_sharing else 0, all_hidden=self._all_hidden)
        if not self.proposals:
            return columns
        of_request = np.zeros(len(rows), np.int64) if num_drafts is None else num_drafts
        of_batch = of_request.copy()
        if batch_index is not None:
            of_batch[batch_index] = of_request
        return replace(columns, drafting=DraftColumns.of(columns, of_batch, 1 + of_request[np.array(plan.sample_from, np.int64)]))

    def _drafts(self, plan: StepPlan, num_drafts: Array) -> tuple[Array, Array]:
        """Where a plan's drafts go, and the drafts: the last tokens of what each request computes. The worker's own are there already."""
        if all(not drafts or drafts[0] == DEVICE_DRAFT for drafts in plan.drafts):
            return _NONE, _NONE
        ends = np.array(plan.starts, np.int64) + plan.num_tokens
        first = np.array(plan.rows, np.int64) * self._stride + ends - num_drafts
        index = np.arange(num_drafts.sum()) + np.repeat(first - num_drafts.cumsum() + num_drafts, num_drafts)
        drafts = np.array([token for drafts in plan.drafts for token in drafts], np.int64)
        known = drafts != DEVICE_DRAFT
        return index[known], drafts[known]

    def _shared_keys(self, rows: Array, shortest: int) -> int:
        """Number of leading keys that all rows have in the same blocks, at most `shortest`."""
        multiple, groups, width = tuning.SHARED_KEYS_MULTIPLE, np.array(self.sharing)[:, None], shortest // self._block_size
        if shortest < multiple:
            return 0
        here = self.block_tables[groups, rows, (multiple - 1) // self._block_size]  # one block: a cheap check before the whole tables
        if (here != here[:, :1]).any():
            return 0
        tables = self.block_tables[groups, rows, :width]  # [G, B, width]
        same = (tables == tables[:, :1]).all((0, 1))
        blocks = width if same.all() else int(same.argmin())
        return blocks * self._block_size // multiple * multiple

    def send(self, c: Columns) -> Packed:
        """Upload the columns in one copy, and in a second one if block tables have changed. Then gather on the device."""
        logits_rows = c.source if c.last_only else c.logits_rows
        self.send_changes()
        uploaded = upload([
            c.token_index, c.positions, np.concatenate([logits_rows, c.prompt_rows]) if c.prompt_spans else logits_rows,
            c.sample_index, c.prompt_index, c.draft_index, c.drafts, c.query_start.astype(np.int32), c.seq_lens.astype(np.int32), c.rows,
            c.adapter_slots, *(() if c.drafting is None else (c.drafting.known_ends, c.drafting.token_source, c.source)), *c.slots],
            self._device)
        (token_index, positions, logit_rows, sample_index, prompt_index, draft_index, drafts, query_start, seq_lens, rows, adapter_slots,
         *slots) = uploaded
        if len(c.drafts):
            self.write_tokens(draft_index, drafts)
        ahead = 1 + self.proposals if self.proposals else 0  # the proposer's tokens
        width = min(-(-(int(c.seq_lens.max()) + ahead) // self._block_size), self.device_tables.shape[2])
        tables = tuple(table[:, :width].index_select(0, rows) for table in self.device_tables)
        shift = None
        if c.drafting is not None:
            known_ends, token_source, source = slots[:3]
            behind = lag(known_ends, self.lengths.index_select(0, rows))
            per_token = behind.index_select(0, token_source)
            token_index, positions, seq_lens = token_index - per_token, positions - per_token, (seq_lens - behind).to(torch.int32)
            slots = [slots_of(table, token_source, positions, self._block_size) for table in tables]
            shift = behind.index_select(0, source)
            sample_index = sample_index - shift
        # Kernels of a CPU need exact lengths, and can read them here. On a GPU an upper bound is enough.
        lens_host = c.seq_lens if self._mirrored else seq_lens.numpy()
        batch = InputBatch(
            tokens=self._flat_tokens.index_select(0, token_index), positions=positions, query_start=query_start, seq_lens=seq_lens,
            slots=tuple(slots), block_tables=tables, logit_rows=logit_rows, num_decodes=c.num_decodes,
            query_lens_host=tuple(c.query_lens.tolist()), seq_lens_host=tuple(lens_host.tolist()), last_only=c.last_only,
            query_width=c.query_width, adapter_slots=adapter_slots if len(c.adapter_slots) else None)
        return Packed(c, batch, sample_index, prompt_index, shift)

    def _prompt_spans(self, plan: StepPlan, batch_index: Array | None, query_start: Array) -> tuple[tuple[PromptSpan, ...], Array, Array]:
        """Prompt logprobs that this step computes: the spans, the rows that predict them (of T), the tokens' indices in the token table.

            positions computed      start  start+1  ...  end-1
            tokens predicted               start+1  ...  end-1  end       kept: those of the prompt, from the first one needed
        """
        if not self._num_with_logprobs:
            return (), _NONE, _NONE
        spans: list[PromptSpan] = []
        batch_rows, index = [_NONE], [_NONE]
        for i in np.flatnonzero(self._logprobs_from[list(plan.rows)] >= 0).tolist():
            row, start, end = plan.rows[i], plan.starts[i], plan.starts[i] + plan.num_tokens[i]
            first, after = max(start + 1, int(self._logprobs_from[row])), min(end + 1, int(self._num_prompt[row]))
            if after == self._num_prompt[row]:
                self._need_logprobs(row, -1)
            if first >= after:
                continue
            spans.append(PromptSpan(i, first, after - first, int(self._prompt_k[row])))
            targets = np.arange(first, after)
            batch_rows.append(query_start[i if batch_index is None else batch_index[i]] + targets - 1 - start)
            index.append(row * self._stride + targets)
        return tuple(spans), np.concatenate(batch_rows), np.concatenate(index)

    def _pool_spans(self, plan: StepPlan, batch_index: Array | None, query_start: Array) -> tuple[PoolSpan, ...]:
        """The tokens of this step whose final hidden states requests with pooling need."""
        spans: list[PoolSpan] = []
        if not self._pooling.any():
            return ()
        for i in np.flatnonzero(self._pooling[list(plan.rows)]).tolist():
            row, start, end = plan.rows[i], plan.starts[i], plan.starts[i] + plan.num_tokens[i]
            every, complete = self._pooling[row] == _ALL, end == self._num_prompt[row]
            if complete:
                self._pooling[row] = 0
            if every or complete:
                index = i if batch_index is None else int(batch_index[i])
                begin, after = int(query_start[index]), int(query_start[index + 1])
                spans.append(PoolSpan(i, index, start if every else end - 1, begin if every else after - 1, after, bool(every)))
        return tuple(spans)


def lag(known_ends: Tensor, lengths: Tensor) -> Tensor:
    """Positions by which a plan is ahead: known_ends [B] by the plan, -1 for a sequence that does not sample; lengths [B] in truth."""
    return torch.where(known_ends >= 0, known_ends - lengths, 0)


def slots_of(table: Tensor, source: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots of T tokens: table [B, M], source [T] of each token, positions [T] -> [T] int64."""
    block = torch.div(positions, block_size, rounding_mode="floor")
    return table[source, block].long() * block_size + (positions - block * block_size)


def _stride(max_model_len: int) -> int:
    """Columns of the token table: at least 2, because the samples of padding go to position 1 of the null row."""
    return max(max_model_len, 2)


def _query_width(counts: Array, num_drafts: Array) -> int:
    """The most frequent width among a step's decodes; on a tie, the larger one.

    Other sequences with drafts are computed like prompt chunks, which gives the same tokens."""
    widths = Counter(counts[counts == 1 + num_drafts].tolist())
    return int(max(widths, key=lambda width: (widths[width], width), default=1))
