"""Rotary position embedding in Triton: each head is read and written once. The mathematics: kernels/reference/rope.py."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _apply_rope(out, x, cos, sin, x_stride_row, x_stride_head, heads, D: tl.constexpr, PADDED: tl.constexpr):
    """One program per (token, head). sin carries the sign, and the partner of dimension d is d + D/2 (mod D)."""
    r = tl.program_id(0).to(tl.int64)
    token, head = r // heads, r % heads
    d = tl.arange(0, PADDED)
    live = d < D
    source = x + token * x_stride_row + head * x_stride_head
    value = tl.load(source + d, mask=live, other=0.0)
    partner = tl.load(source + (d + D // 2) % D, mask=live, other=0.0)
    c = tl.load(cos + token * D + d, mask=live, other=0.0)
    s = tl.load(sin + token * D + d, mask=live, other=0.0)
    turned = value.to(tl.float32) * c.to(tl.float32) + partner.to(tl.float32) * s.to(tl.float32)
    tl.store(out + r * D + d, turned.to(out.dtype.element_ty), mask=live)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, H, D] (last dimension contiguous), cos, sin: [T, 1, D] -> [T, H, D]."""
    tokens, heads, dim = x.shape
    out = torch.empty(tokens, heads, dim, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(dim)
    _apply_rope[(tokens * heads,)](out, x, cos, sin, x.stride(0), x.stride(1), heads, D=dim, PADDED=padded, num_warps=1)
    return out
