"""What a step with drafts does besides the model, in a few small kernels: see `kernels/reference/drafts.py`.

In PyTorch each function is 10 to 30 kernels of one to two microseconds, which is a tenth of a small model's step. n-gram lookup reads the
whole text of each sequence once, with one program per sequence, from its end. It stops when the result is known.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.reference.drafts import CANDIDATES, ExactStep, PlannedStep
from minivllm.kernels.reference.sampling import KEYS_PER_POSITION
from minivllm.kernels.triton.device import launch
from minivllm.splitmix64 import GOLDEN, MULTIPLIERS

BLOCK = 128  # tokens of a program
NOISE = {"KEYS": KEYS_PER_POSITION, "GOLDEN": GOLDEN, "MUL1": MULTIPLIERS[0], "MUL2": MULTIPLIERS[1]}


@triton.jit
def _ahead(known_ends, lengths, rows, b, mask):
    """Positions by which the plan is ahead of sequence b."""
    known = tl.load(known_ends + b, mask=mask, other=-1)
    length = tl.load(lengths + tl.load(rows + b, mask=mask, other=0), mask=mask, other=0)
    return tl.where(known >= 0, known - length, 0)


@triton.jit
def _store_keys(keys, streams, at, position, mask, KEYS: tl.constexpr, GOLDEN: tl.constexpr, MUL1: tl.constexpr, MUL2: tl.constexpr):
    """The reference's `stream_keys` of the first key of each position."""
    counter = (position * KEYS + 1).to(tl.uint64)
    x = tl.load(streams + at, mask=mask, other=0).to(tl.uint64, bitcast=True) + counter * tl.full([1], GOLDEN, tl.uint64)
    x = (x ^ (x >> 30)) * tl.full([1], MUL1, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([1], MUL2, tl.uint64)
    x = x ^ (x >> 31)
    tl.store(keys + 2 * at, x.to(tl.uint32).to(tl.int32, bitcast=True), mask=mask)
    tl.store(keys + 2 * at + 1, (x >> 32).to(tl.uint32).to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def _exact_step(
    behind, seq_lens, tokens, positions, slots, sample_index, keys,  # ExactStep
    rows, known_ends, planned_lens, token_source, is_token, planned_positions, token_index, planned_sample_index, streams,  # PlannedStep
    text, lengths, tables, group_stride, table_stride, num_tokens, num_seqs, null_index,
    GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, EVERY_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, GOLDEN: tl.constexpr, MUL1: tl.constexpr, MUL2: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < num_tokens
    source = tl.load(token_source + at, mask=live, other=0)
    ahead = _ahead(known_ends, lengths, rows, source, live)
    real = tl.load(is_token + at, mask=live, other=0) != 0
    shift = tl.where(real, ahead, 0)
    position = tl.load(planned_positions + at, mask=live, other=0) - shift
    tl.store(positions + at, position, mask=live)
    tl.store(tokens + at, tl.load(text + tl.load(token_index + at, mask=live, other=0) - shift, mask=live, other=0), mask=live)
    row = tl.load(rows + source, mask=live, other=0)
    for group in tl.static_range(GROUPS):
        entry = tables + group * group_stride + row * table_stride + position // BLOCK_SIZE
        slot = tl.load(entry, mask=live & real, other=0).to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(slots + group * num_tokens + at, tl.where(real, slot, 0), mask=live)

    seq = at < num_seqs
    of_seq = _ahead(known_ends, lengths, rows, at, seq)
    length = tl.load(planned_lens + at, mask=seq, other=0) - of_seq
    tl.store(behind + at, of_seq, mask=seq)
    tl.store(seq_lens + at, length.to(tl.int32), mask=seq)

    sample = live if EVERY_TOKEN else seq
    index = tl.load(planned_sample_index + at, mask=sample, other=0)
    index = tl.where(index == null_index, index, index - (ahead if EVERY_TOKEN else of_seq))
    tl.store(sample_index + at, index, mask=sample)
    _store_keys(keys, streams, at, position + 1 if EVERY_TOKEN else length, sample, KEYS, GOLDEN, MUL1, MUL2)


def exact_step(plan: PlannedStep, text: Tensor, lengths: Tensor, tables: Tensor, block_size: int, null_index: int,
               every_token: bool) -> ExactStep:
    """As the reference."""
    num_tokens, num_seqs, num_rows = len(plan.positions), len(plan.rows), len(plan.sample_index)
    out = ExactStep(
        torch.empty_like(plan.known_ends), torch.empty_like(plan.seq_lens), text.new_empty(num_tokens), torch.empty_like(plan.positions),
        plan.positions.new_empty((len(tables), num_tokens)), torch.empty_like(plan.sample_index), text.new_empty((num_rows, 2)))
    launch(_exact_step, (triton.cdiv(max(num_tokens, num_seqs), BLOCK),),
           out.behind, out.seq_lens, out.tokens, out.positions, out.slots, out.sample_index, out.keys,
           plan.rows, plan.known_ends, plan.seq_lens, plan.token_source, plan.is_token.view(torch.uint8), plan.positions, plan.token_index,
           plan.sample_index, plan.streams, text, lengths, tables, tables.stride(0), tables.stride(1), num_tokens, num_seqs, null_index,
           GROUPS=len(tables), BLOCK_SIZE=block_size, EVERY_TOKEN=every_token, BLOCK=BLOCK, num_warps=4, **NOISE)
    return out


@triton.jit
def _accept_drafts(kept, before, text, lengths, rows, known_ends, seq_lens, sample_index, sampled, has_draft,
                   WIDTH: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """One program per sequence, which has WIDTH logits rows."""
    b = tl.program_id(0)
    j = tl.arange(0, PADDED)
    live = j < WIDTH
    at = b * WIDTH + j
    index = tl.load(sample_index + at, mask=live, other=0)
    token = tl.load(sampled + at, mask=live, other=0).to(tl.int32)
    draft = tl.load(text + index, mask=live, other=0)
    tl.store(before + at, draft, mask=live)
    tl.store(text + index, token, mask=live)
    right = tl.load(has_draft + b * (WIDTH - 1) + j, mask=j < WIDTH - 1, other=0) != 0
    count = 1 + tl.min(tl.where(right & (draft == token), PADDED, j), 0).to(tl.int64)
    tl.store(kept + b, count)
    if tl.load(known_ends + b) >= 0:
        tl.store(lengths + tl.load(rows + b), tl.load(seq_lens + b).to(tl.int64) - WIDTH + 1 + count)


def accept_drafts(text: Tensor, lengths: Tensor, rows: Tensor, known_ends: Tensor, seq_lens: Tensor, sample_index: Tensor, sampled: Tensor,
                  has_draft: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    count, width = len(rows), len(sampled) // len(rows)
    kept, before = torch.empty_like(known_ends), text.new_empty(len(sampled))
    launch(_accept_drafts, (count,), kept, before, text, lengths, rows, known_ends, seq_lens, sample_index, sampled,
           has_draft.view(torch.uint8), WIDTH=width, PADDED=triton.next_power_of_2(width), num_warps=1)
    return kept, before


@triton.jit
def _proposer_inputs(following, newest, first, text, stride, num_places, rows, token_source, positions, last, num_tokens, num_seqs,
                     BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < num_tokens
    row = tl.load(rows + tl.load(token_source + at, mask=live, other=0), mask=live, other=0)
    after = tl.minimum(row * stride + tl.load(positions + at, mask=live, other=0) + 1, num_places - 1)
    tl.store(following + at, tl.load(text + after, mask=live, other=0).to(tl.int64), mask=live)
    seq = at < num_seqs
    token = tl.load(last + at, mask=seq, other=0)
    row = tl.load(rows + tl.load(token_source + token, mask=seq, other=0), mask=seq, other=0)
    position = tl.load(positions + token, mask=seq, other=0)
    after = tl.minimum(row * stride + position + 1, num_places - 1)
    tl.store(newest + at, tl.load(text + after, mask=seq, other=0).to(tl.int64), mask=seq)
    tl.store(first + at, position + 2, mask=seq)


def proposer_inputs(text: Tensor, rows: Tensor, token_source: Tensor, positions: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    following, newest, first = torch.empty_like(positions), torch.empty_like(last), torch.empty_like(last)
    num_tokens, num_seqs = len(positions), len(last)
    launch(_proposer_inputs, (triton.cdiv(max(num_tokens, num_seqs), BLOCK),), following, newest, first, text, text.stride(0), text.numel(),
           rows, token_source, positions, last, num_tokens, num_seqs, BLOCK=BLOCK, num_warps=4)
    return following, newest, first


@triton.jit
def _single_tokens(positions, slots, seq_lens, table, table_stride, first, num_seqs, total, most, BLOCK_SIZE: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    b = at % num_seqs
    position = tl.load(first + b, mask=live, other=0) + at // num_seqs
    block = tl.load(table + b * table_stride + position // BLOCK_SIZE, mask=live & (position < most), other=0).to(tl.int64)
    tl.store(positions + at, position, mask=live)
    tl.store(slots + at, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=live)
    tl.store(seq_lens + at, tl.maximum(tl.minimum(position + 1, most), 1).to(tl.int32), mask=live)


def single_tokens(table: Tensor, first: Tensor, count: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    num_seqs, width = table.shape
    positions, slots, seq_lens = (first.new_empty((count, num_seqs), dtype=d) for d in (torch.int64, torch.int64, torch.int32))
    if count:
        launch(_single_tokens, (triton.cdiv(count * num_seqs, BLOCK),), positions, slots, seq_lens, table, table.stride(0), first, num_seqs,
               count * num_seqs, width * block_size, BLOCK_SIZE=block_size, BLOCK=BLOCK, num_warps=4)
    return positions, slots, seq_lens


@triton.jit
def _write_drafts(text, stride, rows, known_ends, first, drafts, max_model_len, COUNT: tl.constexpr, PADDED: tl.constexpr):
    b = tl.program_id(0)
    i = tl.arange(0, PADDED)
    draft = tl.load(drafts + b * COUNT + i, mask=i < COUNT, other=-1)
    position = tl.load(first + b) + i
    written = (draft >= 0) & (position < max_model_len) & (tl.load(known_ends + b) >= 0)
    tl.store(text + tl.load(rows + b) * stride + position, draft.to(tl.int32), mask=written)


def write_drafts(text: Tensor, rows: Tensor, known_ends: Tensor, first: Tensor, drafts: Tensor, max_model_len: int) -> None:
    """As the reference."""
    count = drafts.shape[1]
    launch(_write_drafts, (len(rows),), text, text.stride(0), rows, known_ends, first, drafts.contiguous(), max_model_len, COUNT=count,
           PADDED=triton.next_power_of_2(count), num_warps=1)


@triton.jit
def _find_ngrams(
    out, text, stride, rows, lengths, LOW: tl.constexpr, HIGH: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence. A match is one number: its length times 2^32, plus the position after it. The largest one is chosen."""
    b = tl.program_id(0)
    tokens = text + tl.load(rows + b) * stride
    size = tl.load(lengths + b).to(tl.int32)
    best = tl.zeros([1], tl.int64)
    full = tl.full([1], HIGH, tl.int64) << 32
    best = tl.max(best, 0)
    full = tl.max(full, 0)
    seen = size * 0  # occurrences of the last LOW tokens
    top = size  # positions from here on were compared
    while (top > LOW) & (seen < CANDIDATES) & (best < full):
        end = top - 1 - tl.arange(0, BLOCK)  # position after an occurrence
        agrees = end >= LOW
        length = tl.zeros([BLOCK], tl.int32)
        for back in tl.static_range(1, HIGH + 1):
            token = tl.load(tokens + end - back, mask=end >= back, other=-1)
            agrees = agrees & (token == tl.load(tokens + size - back, mask=size >= back, other=-2))
            length += agrees.to(tl.int32)
        found = (length >= LOW).to(tl.int32)
        latest = seen + tl.cumsum(found, 0) <= CANDIDATES
        match = (length.to(tl.int64) << 32) | end.to(tl.int64)
        best = tl.maximum(best, tl.max(tl.where((found != 0) & latest, match, 0), 0))
        seen += tl.sum(found, 0)
        top -= BLOCK
    start = (best & 0xFFFFFFFF).to(tl.int32)
    i = tl.arange(0, PADDED)
    period = tl.maximum(tl.minimum(size - start, COUNT), 1)
    draft = tl.load(tokens + start + i % period, mask=(i < COUNT) & (best > 0), other=-1)
    tl.store(out + b * COUNT + i, draft.to(tl.int64), mask=i < COUNT)


def find_ngrams(text: Tensor, rows: Tensor, lengths: Tensor, low: int, high: int, count: int) -> Tensor:
    """As the reference."""
    out = lengths.new_empty((len(rows), count))
    launch(_find_ngrams, (len(rows),), out, text, text.stride(0), rows, lengths, LOW=low, HIGH=high, COUNT=count,
           PADDED=triton.next_power_of_2(count), CANDIDATES=CANDIDATES, BLOCK=tuning.NGRAM_BLOCK, num_warps=tuning.NGRAM_WARPS)
    return out
