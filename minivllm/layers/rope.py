"""The frequencies of rotary position embeddings, with every way of stretching them beyond the context trained on.

A head's pair of dimensions d turns by p * theta^(-2d/D) at position p: the first pairs fast, the last ones slowly.

    linear    all slower by `factor`: positions are interpolated
    dynamic   a larger theta: the slow pairs are interpolated most, the fast ones hardly (NTK-aware scaling)
    llama3    slow pairs slower by `factor`, fast ones untouched, a smooth transition between two wavelengths
    yarn      the same idea with borders counted in turns over the original length (Peng et al. 2023), and sharper attention

Dynamic scaling depends on a length. Transformers recomputes theta from the longest sequence of a call, while the keys it
has cached keep the theta of their day. Here one theta serves all requests: the one for the served `max_model_len`. Up to the
original length that is no scaling at all, exactly as in Transformers; beyond it, it is what Transformers computes for one
prompt of `max_model_len` tokens. A request's tokens so never depend on what else is in the batch.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from minivllm.families import RopeSpec
from minivllm.layers.build import BuildContext


class RotaryEmbedding:
    """positions -> the cosines and sines that all layers of a step share."""

    __slots__ = ("_angles", "dtype", "inv_freq", "scale")

    def __init__(self, build: BuildContext, rope: RopeSpec, head_dim: int, max_model_len: int) -> None:
        self.inv_freq = inverse_frequencies(rope, head_dim, max_model_len).to(build.device)  # [head_dim / 2] fp32
        self.scale = rope.attention_factor
        self.dtype = build.dtype
        self._angles = build.ops.rope_angles

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [T] -> (cos, signed sin): [T, 1, head_dim]."""
        return self._angles(positions, self.inv_freq, self.scale, self.dtype)


def inverse_frequencies(rope: RopeSpec, head_dim: int, max_model_len: int) -> Tensor:
    """-> [head_dim / 2] fp32: radians per position of each pair of dimensions."""
    theta = rope.theta
    if rope.scaling == "dynamic":
        length = max(max_model_len, rope.original_max_len)
        theta *= (rope.factor * length / rope.original_max_len - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / theta**exponents
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, inv_freq)
    if rope.scaling == "yarn":
        return _yarn(rope, inv_freq, head_dim)
    return inv_freq


def _llama3(rope: RopeSpec, inv_freq: Tensor) -> Tensor:
    """keep = 1 for wavelengths up to original / high, 0 from original / low on, linear in turns between."""
    turns = rope.original_max_len * inv_freq / (2 * math.pi)  # over the original length
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / rope.factor


def _yarn(rope: RopeSpec, inv_freq: Tensor, head_dim: int) -> Tensor:
    """keep = 1 up to the dimension that turns beta_fast times over the original length, 0 from beta_slow on, linear between."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / rope.factor
