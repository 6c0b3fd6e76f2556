"""Weights as small integers with one scale and one zero point per row and group of columns: w = (code - zero) * scale."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-14  # the smallest normal number of float16, in which files store scales


@dataclass(frozen=True, slots=True)
class Grid:
    """Which values a quantized weight can have."""

    bits: int
    group_size: int  # columns that share a scale; -1: all
    symmetric: bool  # the zero point is the middle code, instead of where the group's own range needs it
    lowest_zero: int  # 1 for GPTQ's layout, which stores zero - 1; 0 for AWQ's

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def of(self, weight: Tensor) -> Grid:
        """The grid of one weight [N, K], where -1 is K."""
        return replace(self, group_size=weight.shape[1]) if self.group_size == -1 else self

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest weight of each group -> its scale, as float16 stores it, and its zero point. Any shape."""
        low, high = low.clamp_max(0), high.clamp_min(0)  # the zero point is a code, so the range includes 0
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales = torch.maximum((high - low) / self.top, high / (self.top - self.lowest_zero))  # the second one: no room for negatives
        scales = scales.clamp_min(SMALLEST_SCALE).half().float()
        if self.symmetric:
            return scales, torch.full_like(scales, (self.top + 1) // 2)
        return scales, (-low / scales).round().clamp(self.lowest_zero, self.top)

    def round(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes, as floats. The shapes are broadcast."""
        return (weight / scales).round_().add_(zeros).clamp_(0, self.top)

    def split(self, weight: Tensor) -> Tensor:
        """[N, K] -> its groups [N, K / group_size, group_size]."""
        return weight.unflatten(1, (-1, self.group_size))


@dataclass(frozen=True, slots=True)
class RoundedWeight:
    """A quantized weight [N, K] with G groups."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # float32 [N, G], of values that float16 has
    zeros: Tensor  # float32 [N, G]
    groups: Tensor  # int32 [K]: the group of each column

    def dequantized(self) -> Tensor:
        """float32 [N, K]"""
        return (self.codes - self.zeros[:, self.groups]) * self.scales[:, self.groups]


def round_to_nearest(weight: Tensor, grid: Grid, limit: Tensor | None = None) -> RoundedWeight:
    """The baseline: each weight becomes the nearest value of its group's grid.

    weight: float32 [N, K]. limit: [N, K / group_size], the largest magnitude in each group; larger weights are clipped to it.
    """
    codes, scales, zeros = _nearest(weight, grid, limit)
    columns = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)
    return RoundedWeight(codes.to(torch.uint8).flatten(1), scales, zeros, columns // grid.group_size)


def nearest_values(weight: Tensor, grid: Grid, limit: Tensor | None = None) -> Tensor:
    """`round_to_nearest`, dequantized: without packing, for searches. float32 [N, K]"""
    codes, scales, zeros = _nearest(weight, grid, limit)
    return codes.sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1)


def _nearest(weight: Tensor, grid: Grid, limit: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> codes as floats [N, G, group_size], scales and zeros [N, G]"""
    groups = grid.split(weight)
    low, high = groups.aminmax(dim=-1)
    if limit is not None:
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    scales, zeros = grid.fit(low, high)
    return grid.round(groups, scales[..., None], zeros[..., None]), scales, zeros
