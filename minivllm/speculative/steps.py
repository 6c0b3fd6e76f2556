"""The single-token steps with which a proposer on the device extends its draft."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minivllm.families import ModelSpec, kv_groups
from minivllm.kernels import Ops
from minivllm.kernels.layout import InputBatch
from minivllm.speculative.base import DraftTokens, ProposalInput


def draft_group(target: ModelSpec) -> int | None:
    """The target's KV group whose blocks hold the draft's keys and values too: one whose blocks are kept. None: there is none."""
    return next((g for g, group in enumerate(kv_groups(target)) if group.window is None), None)


def in_group(batch: InputBatch, group: int, count: int, tokens: Tensor | None = None) -> InputBatch:
    """The same step for a model of `count` KV groups that all use the blocks of the target's `group`. tokens: they replace its tokens."""
    return replace(batch, tokens=batch.tokens if tokens is None else tokens.to(torch.int32), slots=(batch.slots[group],) * count,
                   block_tables=(batch.block_tables[group],) * count, last_only=False, shared=None, adapter_slots=None)


class SingleTokens:
    """The inputs of `count` steps of one token per sequence, at consecutive positions: computed at once, so that a step has few kernels."""

    def __init__(self, x: ProposalInput, group: int, num_groups: int, first: Tensor, count: int, ops: Ops) -> None:
        """first: [B] the position of the first step. Positions beyond the block table are written to the null block."""
        table, device = x.batch.block_tables[group], first.device
        num_seqs, most = table.shape[0], table.shape[1] * x.block_size
        self._table, self._num_groups, self._most = table, num_groups, most
        self.positions, self._slots, self._seq_lens = ops.single_tokens(table, first, count, x.block_size)  # [count, B] each
        self._start = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
        # Attention on a CPU needs the exact lengths. On a GPU upper bounds choose its kernels: no value is read on the host.
        self._exact = self._seq_lens.tolist() if device.type == "cpu" else None
        self._bounds = x.batch.seq_lens_host

    def batch(self, i: int, tokens: Tensor) -> InputBatch:
        """Of step i: tokens [B]."""
        seqs, groups = len(self._start) - 1, self._num_groups
        host = self._exact[i] if self._exact is not None else [min(n + 1 + i, self._most) for n in self._bounds]
        return InputBatch(
            tokens=tokens.to(torch.int32), positions=self.positions[i], query_start=self._start, seq_lens=self._seq_lens[i],
            slots=(self._slots[i],) * groups, block_tables=(self._table,) * groups, logit_rows=self._start[:-1], num_decodes=seqs,
            query_lens_host=(1,) * seqs, seq_lens_host=tuple(host))


class MostProbable:
    """Chooses the most probable token of each sequence."""

    def __init__(self, num_seqs: int, device: torch.device, ops: Ops) -> None:
        self._temperature = torch.zeros(num_seqs, device=device)
        self._keys, self._sample = torch.zeros((num_seqs, 2), dtype=torch.int32, device=device), ops.sample

    def __call__(self, logits: Tensor) -> Tensor:
        """logits: [B, V] -> [B] int64."""
        return self._sample(logits, self._temperature, self._keys)


def drafts(tokens: Sequence[Tensor], probs: Sequence[Tensor | None]) -> DraftTokens:
    """From the tokens [B] of each step, and the distributions [B, V] that they were sampled from, if they were."""
    known = [p for p in probs if p is not None]
    return DraftTokens(torch.stack(list(tokens), 1), torch.stack(known, 1) if known else None)
