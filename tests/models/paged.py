"""Runs a Decoder as an engine does, but without an engine: several sequences, scattered blocks, several KV groups.

The unwritten cache holds NaN, so a read of an unwritten slot changes the results. Blocks that have left a sliding window are removed
from the block table, as the scheduler does.
"""
from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minivllm.kernels import Ops, select
from minivllm.kernels.layout import InputBatch
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.quantization.kv_cache import kv_format
from minivllm.worker.kv_cache import KVLayout


def make_build(dtype: torch.dtype = torch.float32, device: str = "cpu", ops: Ops | None = None) -> BuildContext:
    """ops: the kernels; None: the default ones of the device."""
    return BuildContext(torch.device(device), dtype, ops or select(torch.device(device)))


class Paged:
    """A KV cache and the block tables of `num_seqs` sequences. `run` computes the next tokens of some of them."""

    def __init__(self, model: Decoder, capacity: int, num_seqs: int = 1, block_size: int = 4, seed: int = 0,
                 kv_cache_dtype: str = "auto") -> None:
        layout = KVLayout.of(model.spec, block_size, model.build.dtype, kv_format(kv_cache_dtype))
        self.model, self.block_size, self.groups = model, block_size, layout.groups
        per_seq = -(-capacity // block_size)
        num_blocks = 1 + per_seq * num_seqs * len(self.groups)
        self.kv = layout.views(layout.allocate(num_blocks, model.build.device))
        for layer in self.kv:
            for t in (layer.k, layer.v) if layer.scales is None else (layer.scales,):
                t.fill_(math.nan)
        ids = random.Random(seed).sample(range(1, num_blocks), num_blocks - 1)
        self.tables = [[[ids.pop() for _ in range(per_seq)] for _ in range(num_seqs)] for _ in self.groups]  # [G][B][M]
        self.tokens: list[list[int]] = [[] for _ in range(num_seqs)]

    def batch(self, work: Sequence[tuple[int, Sequence[int]]]) -> InputBatch:
        """work: (sequence, its next tokens), single tokens first."""
        assert [len(t) != 1 for _, t in work] == sorted(len(t) != 1 for _, t in work)
        starts = [len(self.tokens[s]) for s, _ in work]
        for s, tokens in work:
            self.tokens[s] += tokens
        ends = [len(self.tokens[s]) for s, _ in work]
        bs = self.block_size
        slots = tuple(
            torch.tensor([table[s][p // bs] * bs + p % bs for (s, _), a, e in zip(work, starts, ends, strict=True) for p in range(a, e)])
            for table in self.tables
        )
        tables = []
        for group, table in zip(self.groups, self.tables, strict=True):
            rows = torch.tensor([table[s] for s, _ in work], dtype=torch.int32)
            for i, start in enumerate(starts):
                if group.window is not None:
                    rows[i, : max(0, start - group.window + 1) // bs] = 0
                rows[i, -(-ends[i] // bs) :] = 0
            tables.append(rows)
        lens = [len(t) for _, t in work]
        device = self.model.build.device
        return InputBatch(
            tokens=torch.tensor([t for _, ts in work for t in ts], dtype=torch.int32, device=device),
            positions=torch.cat([torch.arange(a, e) for a, e in zip(starts, ends, strict=True)]).to(device),
            query_start=torch.tensor([0, *lens]).cumsum(0).int().to(device),
            seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
            slots=tuple(s.to(device) for s in slots),
            block_tables=tuple(t.to(device) for t in tables),
            logit_rows=(torch.tensor(lens).cumsum(0) - 1).to(device),
            num_decodes=sum(n == 1 for n in lens),
            query_lens_host=tuple(lens),
            seq_lens_host=tuple(ends),
        )

    def run(self, *work: tuple[int, Sequence[int]], last_only: bool = False) -> Tensor:
        """-> logits of every token of the step: [T, vocab], or of each sequence's last one: [B, vocab], on the CPU."""
        batch = replace(self.batch(work), last_only=last_only)
        return self.model.logits(self.model.forward(batch, self.kv, self.block_size)).cpu()
