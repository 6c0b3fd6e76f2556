"""The frequencies of rotary position embeddings, and the ways to scale them beyond the trained context length.

At position p, a head's d-th pair of dimensions is rotated by p * theta^(-2d/D): the first pairs fast, the last ones slowly.

    linear    all pairs are slower by `factor`: positions are interpolated
    dynamic   a larger theta: the slow pairs are interpolated most, the fast ones least (NTK-aware scaling)
    llama3    slow pairs are slower by `factor`, fast ones unchanged, with a smooth transition between two wavelengths
    yarn      as llama3, with the transition given in turns over the original length, and sharper attention (Peng et al. 2023)
    longrope  a divisor for each pair, found by search: one set up to the original length, and one beyond it (Ding et al. 2024)

Dynamic scaling and longrope depend on a length. Transformers chooses anew for the longest sequence of a call, but cached keys keep the
frequencies with which they were computed. Here one choice serves all requests: that for the served `max_model_len`. If it is at most the
original length, dynamic scaling has no effect, exactly as in Transformers. If it is longer, the frequencies are those that Transformers
computes for a prompt of `max_model_len` tokens. So a request's tokens never depend on other requests in the batch.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.families import RopeSpec
from minivllm.layers.build import BuildContext


class RotaryEmbedding:
    """positions -> the cosines and sines that all layers of a step share."""

    __slots__ = ("_angles", "dtype", "inv_freq", "scales")

    def __init__(self, build: BuildContext, rope: RopeSpec, head_dim: int, max_model_len: int) -> None:
        dim = rope.dim or head_dim
        padding = (0, (head_dim - dim) // 2)  # dimensions that are not rotated have angle 0 and no factor
        self.inv_freq = F.pad(inverse_frequencies(rope, dim, max_model_len), padding).to(build.device)  # [head_dim / 2] fp32
        self.scales = F.pad(torch.full((dim // 2,), rope.attention_factor), padding, value=1.0).to(build.device)
        self.dtype = build.dtype
        self._angles = build.ops.rope_angles

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [T] -> (cos, signed sin): [T, 1, head_dim]."""
        return self._angles(positions, self.inv_freq, self.scales, self.dtype)


def inverse_frequencies(rope: RopeSpec, head_dim: int, max_model_len: int) -> Tensor:
    """-> [head_dim / 2] fp32: radians per position of each pair of dimensions. head_dim: only the rotated dimensions."""
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
    if rope.scaling == "longrope":
        return inv_freq / torch.tensor(rope.long_factors if max_model_len > rope.original_max_len else rope.short_factors)
    if rope.scaling == "yarn":
        return _yarn(rope, inv_freq, head_dim)
    return inv_freq


def _llama3(rope: RopeSpec, inv_freq: Tensor) -> Tensor:
    """keep = 1 for wavelengths up to original / high, 0 from original / low on, and linear in the number of turns between them."""
    turns = rope.original_max_len * inv_freq / (2 * math.pi)  # over the original length
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / rope.factor


def _yarn(rope: RopeSpec, inv_freq: Tensor, head_dim: int) -> Tensor:
    """keep = 1 up to the dimension with beta_fast turns over the original length, 0 from that with beta_slow on, linear between them."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / rope.factor
