"""Rotary position embedding (Su et al. 2021): rotate each pair of a head's dimensions by an angle proportional to the position.

Dimension d pairs with d + D/2 (the layout of Llama checkpoints). With c = cos(p * f_d), s = sin(p * f_d):

    out[d]       = x[d]       * c - x[d + D/2] * s          x rolled by D/2 holds each element's partner, so with a sine
    out[d + D/2] = x[d + D/2] * c + x[d]       * s          that carries the sign both lines are x * cos + rolled * sin

A score q . k then depends only on the distance of the two positions.
"""
from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(positions: Tensor, inv_freq: Tensor, scale: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions: [T], inv_freq: [D / 2] fp32 -> (cos, signed sin), [T, 1, D] each, times `scale`: one number or [D / 2] fp32.

    Computed once per step for all layers. So no table is needed, which would limit the positions.
    """
    angles = positions.float()[:, None] * inv_freq  # [T, D / 2]
    cos, sin = angles.cos().mul_(scale), angles.sin().mul_(scale)
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x: [T, H, D] (queries and keys alike, so both in one call) by cos, sin: [T, 1, D] of `rope_angles`."""
    return torch.mul(x, cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
