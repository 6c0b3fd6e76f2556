"""LoRA adapters of many requests in one batch: each token's row is changed by its own adapter, y += (x A^T) B^T.

    x [T, K] ── shrink ──▶ h [T, parts * R] ── expand ──▶ y [T, N] += ...       R: the largest rank, far below K and N

In a layer y is the residual (or zeros), and the sum is the residual of the layer's own product: see `lora_delta`.

The tokens of one adapter are multiplied together. Tokens of the base model (slot -1) are left alone.
"""
from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels.layout import AdapterWeights
from minivllm.kernels.reference.norm import rms_norm

Tokens: TypeAlias = slice | Tensor  # indices of the T tokens
AdapterGroups: TypeAlias = tuple[tuple[int, Tokens], ...]  # (slot, its tokens)


def prepare_lora(slots: Tensor, ranks: Tensor) -> AdapterGroups:
    """What a step's layers share. slots: [T] int32, -1 for the base model; ranks: [S + 1] int32, of the adapter in each slot, then 0."""
    groups: list[tuple[int, Tokens]] = []
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            index = (slots == slot).nonzero().squeeze(1)
            first, last = int(index[0]), int(index[-1])
            groups.append((slot, slice(first, last + 1) if last - first + 1 == len(index) else index))
    return tuple(groups)


def lora_shrink(x: Tensor, weights: AdapterWeights, groups: AdapterGroups) -> Tensor:
    """x: [T, K] -> x A^T of each token's adapter: [T, parts * R]."""
    h = x.new_zeros(len(x), weights.a.shape[1])
    for slot, tokens in groups:
        h[tokens] = F.linear(x[tokens], weights.a[slot])
    return h


def lora_expand(y: Tensor, h: Tensor, weights: AdapterWeights, groups: AdapterGroups) -> Tensor:
    """y [T, N] += h B^T of each token's adapter, in place; h: of `lora_shrink`."""
    rank = weights.rank
    for slot, tokens in groups:
        start = 0
        for part, rows in enumerate(weights.rows):
            columns = slice(start, start + rows)
            y[tokens, columns] += F.linear(h[tokens, part * rank : (part + 1) * rank], weights.b[slot, columns])
            start += rows
    return y


def lora_delta(
    x: Tensor, weights: AdapterWeights, groups: AdapterGroups, *, norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x: [T, K] -> (what the adapters add to the product [T, N], plus `residual`; norm(x) [T, K]). May overwrite `residual`.

    norm: weight and epsilon of an RMSNorm; without it the second result is x.
    """
    x = x if norm is None else rms_norm(x, *norm)
    y = x.new_zeros(len(x), sum(weights.rows)) if residual is None else residual
    return lora_expand(y, lora_shrink(x, weights, groups), weights, groups), x


def lora_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, weights: AdapterWeights, groups: AdapterGroups, *,
    norm: tuple[Tensor, float] | None = None, gated: bool = False, residual: Tensor | None = None,
) -> Tensor | None:
    """`fused_linear` with the adapters' part included. None: there is no such kernel for these shapes."""
    return None
