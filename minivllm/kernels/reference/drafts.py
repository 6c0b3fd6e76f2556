"""What a step with drafts does besides the model: exact positions, acceptance, the inputs of a proposer, n-gram lookup, the token table.

All of it stays on the device (see `worker/batch.py` and `worker/drafts.py`). Names of shapes: B sequences and T tokens of a batch, in its
order; R logits rows, one or more per sequence; a token table [N, S] and the known length [N] of each of its rows; G KV groups.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minivllm.kernels.reference.sampling import KEYS_PER_POSITION, stream_keys

CANDIDATES = 8  # earlier occurrences among which n-gram lookup chooses the longest match


class PlannedStep(NamedTuple):
    """What the host knows about a step. It may be ahead of the truth, because it counts drafts that are not verified yet."""

    rows: Tensor  # [B] int64: of the token table
    known_ends: Tensor  # [B] int64: number of known tokens of a sequence that samples; -1: of a sequence that does not
    seq_lens: Tensor  # [B] int32
    token_source: Tensor  # [T] int64: the sequence of each token
    is_token: Tensor  # [T] bool: no padding
    positions: Tensor  # [T] int64
    token_index: Tensor  # [T] int64: of each token in the flat token table
    sample_index: Tensor  # [R] int64: where the sampled tokens go, in the flat token table
    streams: Tensor  # [R] int64: of the noise


class ExactStep(NamedTuple):
    """The same with true positions."""

    behind: Tensor  # [B] int64: positions by which the plan was ahead
    seq_lens: Tensor  # [B] int32
    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    slots: Tensor  # [G, T] int64
    sample_index: Tensor  # [R] int64
    keys: Tensor  # [R, 2] int32: of the noise


def exact_step(plan: PlannedStep, text: Tensor, lengths: Tensor, tables: Tensor, block_size: int, null_index: int,
               every_token: bool) -> ExactStep:
    """Subtract from a plan by how much it is ahead. Padding stays as it is, and writes to block 0.

    text [N, S] int32, lengths [N] int64; tables [G, N, M] int32, the block tables; null_index: a sample index that is padding.
    every_token: whether each token has a logits row, so that R is T; else R is B.
    """
    behind = torch.where(plan.known_ends >= 0, plan.known_ends - lengths[plan.rows], 0)
    shift = behind[plan.token_source] * plan.is_token
    positions, seq_lens = plan.positions - shift, (plan.seq_lens - behind).to(torch.int32)
    block = torch.div(positions, block_size, rounding_mode="floor")
    slots = tables[:, plan.rows[plan.token_source], block].long() * block_size + positions % block_size
    sample_index = plan.sample_index - (behind[plan.token_source] if every_token else behind)
    return ExactStep(
        behind, seq_lens, text.view(-1)[plan.token_index - shift], positions, torch.where(plan.is_token, slots, 0),
        torch.where(plan.sample_index == null_index, null_index, sample_index),
        stream_keys(plan.streams, (positions + 1 if every_token else seq_lens.long()) * KEYS_PER_POSITION))


def accept_drafts(text: Tensor, lengths: Tensor, rows: Tensor, known_ends: Tensor, seq_lens: Tensor, sample_index: Tensor, sampled: Tensor,
                  has_draft: Tensor) -> tuple[Tensor, Tensor]:
    """Write sampled tokens to the token table, where the drafts were, and the new lengths of the rows.

    text [N, S] int32, lengths [N] int64: changed. rows, known_ends [B] as in a plan; seq_lens [B], exact. sample_index, sampled [R] int64:
    R / B consecutive rows per sequence. has_draft [R - B] bool: whether a draft follows each of these but the last. ->
    (kept [B] int64: 1 + the number of leading drafts that equal the token sampled at their position, drafts before [R] int32)
    """
    count, flat = len(rows), text.view(-1)
    before = flat[sample_index]
    right = (before == sampled).view(count, -1)[:, :-1] & has_draft.view(count, -1)
    kept = 1 + right.long().cumprod(1).sum(1)
    flat[sample_index] = sampled.to(torch.int32)
    known = seq_lens.long() - len(sampled) // count + 1 + kept
    lengths[rows] = torch.where(known_ends >= 0, known, lengths[rows])
    return kept, before


def proposer_inputs(text: Tensor, rows: Tensor, token_source: Tensor, positions: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """text [N, S] int32; rows, last [B] int64; token_source, positions [T] int64 -> (next token of each token [T], that of each sequence's
    token `last` [B], its position + 1 [B]), int64."""
    flat = text.view(-1)
    after = (rows[token_source] * text.shape[1] + positions + 1).clamp_max(len(flat) - 1)
    following = flat[after].long()
    return following, following[last], positions[last] + 2


def single_tokens(table: Tensor, first: Tensor, count: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of one token per sequence at `count` positions from first [B] int64 on. table [B, M] int32: blocks.

    -> (positions, slots [count, B] int64, numbers of keys [count, B] int32). Beyond the table: block 0, and its whole length.
    """
    most = table.shape[1] * block_size
    positions = first[None] + torch.arange(count, device=first.device)[:, None]
    inside = positions < most
    block = table.t().gather(0, torch.where(inside, torch.div(positions, block_size, rounding_mode="floor"), 0)).long()
    return positions, torch.where(inside, block, 0) * block_size + positions % block_size, (positions + 1).clamp(1, most).to(torch.int32)


def write_drafts(text: Tensor, rows: Tensor, known_ends: Tensor, first: Tensor, drafts: Tensor, max_model_len: int) -> None:
    """Write drafts [B, k] to the token table from position first [B] on: those of a sequence that samples, without padding (-1)."""
    position = first[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
    written = (known_ends >= 0)[:, None] & (drafts >= 0) & (position < max_model_len)
    null = (text.shape[0] - 1) * text.shape[1] + 1  # a place in the null row that nothing reads
    index = torch.where(written, rows[:, None] * text.shape[1] + position, null)
    text.view(-1).index_copy_(0, index.view(-1), drafts.clamp_min(0).view(-1).to(torch.int32))


def find_ngrams(text: Tensor, rows: Tensor, lengths: Tensor, low: int, high: int, count: int) -> Tensor:
    """The tokens that may come next by n-gram lookup, as `speculative/ngram.py` finds them: [B, count] int64; -1: no match.

    text [N, S] int32; rows [B]; lengths [B]: number of tokens. Of the CANDIDATES latest earlier occurrences of the last `low` tokens, it is
    the one whose match is longest, up to `high` tokens, and of equally long ones the latest.
    """
    tokens, size = text[rows].long(), text.shape[1]  # [B, S]
    end = torch.arange(size, device=text.device)[None]  # position after an occurrence
    agrees = (end < lengths[:, None])
    length = torch.zeros_like(tokens)
    for back in range(1, min(high, size - 1) + 1):
        wanted = tokens.gather(1, (lengths - back).clamp_min(0)[:, None])
        same = torch.zeros_like(agrees)
        same[:, back:] = tokens[:, : size - back] == wanted
        agrees = agrees & same
        length += agrees
    found = length >= low
    latest = found.long().flip(1).cumsum(1).flip(1) <= CANDIDATES
    best = torch.where(found & latest, length * size + end, 0).amax(1, keepdim=True)
    start = best % size
    at = start + torch.arange(count, device=text.device) % (lengths[:, None] - start).clamp(1, count)
    return torch.where(best > 0, tokens.gather(1, at.clamp_max(size - 1)), -1)
