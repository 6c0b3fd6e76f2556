"""The single-token steps with which a proposer on the device extends its draft."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minivllm.families import ModelSpec, kv_groups
from minivllm.kernels import Ops
from minivllm.kernels.layout import InputBatch
from minivllm.speculative.base import DraftTokens, ProposalInput, slots_at


def draft_group(target: ModelSpec) -> int | None:
    """The target's KV group whose blocks hold the draft's keys and values too: one whose blocks are kept. None: there is none."""
    return next((g for g, group in enumerate(kv_groups(target)) if group.window is None), None)


def in_group(batch: InputBatch, group: int, count: int, tokens: Tensor | None = None) -> InputBatch:
    """The same step for a model of `count` KV groups that all use the blocks of the target's `group`. tokens: they replace its tokens."""
    return replace(batch, tokens=batch.tokens if tokens is None else tokens.to(torch.int32), slots=(batch.slots[group],) * count,
                   block_tables=(batch.block_tables[group],) * count, last_only=False, shared=None, adapter_slots=None)


def single_tokens(x: ProposalInput, group: int, count: int, tokens: Tensor, positions: Tensor, ahead: int) -> InputBatch:
    """One token for each sequence: tokens, positions [B]. ahead: how much longer than in the target's step a sequence may be.

    Positions beyond the block table are written to the null block.
    """
    table = x.batch.block_tables[group]
    num_seqs, most = table.shape[0], table.shape[1] * x.block_size
    seq_lens = (positions + 1).clamp(1, most).to(torch.int32)
    host: Sequence[int] = seq_lens.tolist() if table.device.type == "cpu" else [min(n + ahead, most) for n in x.batch.seq_lens_host]
    slots = slots_at(table, positions, x.block_size)
    one = torch.arange(num_seqs + 1, dtype=torch.int32, device=table.device)
    return InputBatch(
        tokens=tokens.to(torch.int32), positions=positions, query_start=one, seq_lens=seq_lens, slots=(slots,) * count,
        block_tables=(table,) * count, logit_rows=one[:-1], num_decodes=num_seqs, query_lens_host=(1,) * num_seqs,
        seq_lens_host=tuple(host))


def most_probable(logits: Tensor, ops: Ops) -> Tensor:
    """logits: [B, V] -> [B] int64."""
    rows, device = len(logits), logits.device
    return ops.sample(logits, torch.zeros(rows, device=device), torch.zeros((rows, 2), dtype=torch.int32, device=device))


def drafts(tokens: Sequence[Tensor], probs: Sequence[Tensor | None]) -> DraftTokens:
    """From the tokens [B] of each step, and the distributions [B, V] that they were sampled from, if they were."""
    known = [p for p in probs if p is not None]
    return DraftTokens(torch.stack(list(tokens), 1), torch.stack(known, 1) if known else None)
