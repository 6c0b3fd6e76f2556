"""Normalisation. RMSNorm (Zhang and Sennrich 2019) is x / rms(x) * weight; LayerNorm also subtracts the mean.

The residual stream of a decoder is only ever read through a norm, so "add the sublayer's output to the stream, then
normalise" is one operation: the Triton twin makes one pass over memory of it.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., N] / sqrt(mean(x^2) + eps) * weight, over the last dimension; weight: [N] or [heads, N]."""
    # Statistics in fp32 whatever x is. One reduction kernel instead of square-then-mean: half the time at decode sizes.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
    return (x * scale).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, N] -> (rms_norm(x + residual), x + residual). May overwrite `residual`."""
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension of x: [T, N]."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
