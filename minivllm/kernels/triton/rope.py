"""The cosines and sines of rotary position embeddings, for all layers of a step, in one kernel. The formulas: the reference."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.device import launch


@triton.jit
def _rope_angles(cos, sin, positions, inv_freq, scales, HALF: tl.constexpr, PADDED: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED)
    live = d < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + d, mask=live, other=0.0)
    scale = tl.load(scales + d, mask=live, other=0.0)
    c = (tl.cos(angle) * scale).to(cos.dtype.element_ty)
    s = tl.sin(angle) * scale
    at = token * 2 * HALF + d
    tl.store(cos + at, c, mask=live)
    tl.store(cos + at + HALF, c, mask=live)
    tl.store(sin + at, (-s).to(sin.dtype.element_ty), mask=live)
    tl.store(sin + at + HALF, s.to(sin.dtype.element_ty), mask=live)


def rope_angles(positions: Tensor, inv_freq: Tensor, scale: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions: [T], inv_freq: [D / 2] fp32 -> (cos, signed sin), [T, 1, D] each, times `scale`. See the reference."""
    half = inv_freq.shape[0]
    scales = scale if isinstance(scale, Tensor) else torch.full_like(inv_freq, scale)
    cos, sin = torch.empty((2, positions.shape[0], 1, 2 * half), dtype=dtype, device=positions.device)
    launch(_rope_angles, (positions.shape[0],), cos, sin, positions, inv_freq, scales, HALF=half, PADDED=triton.next_power_of_2(half),
           num_warps=1)
    return cos, sin
