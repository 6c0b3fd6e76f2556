"""RMSNorm in Triton, one program per row. The fused form adds a sublayer's output to the residual stream on the way, so the
stream is read and written once; PyTorch would pass over memory three times."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    out, x, residual, weight, eps, x_stride_row, x_stride_head, heads,
    N: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Row r of x viewed as [rows, heads, N]; weight is [N], or [heads, N] if PER_HEAD."""
    r = tl.program_id(0).to(tl.int64)
    head = r % heads
    columns = tl.arange(0, PADDED)
    live = columns < N
    source = x + (r // heads) * x_stride_row + head * x_stride_head
    value = tl.load(source + columns, mask=live, other=0.0).to(tl.float32)
    if ADD:
        stream = residual + r * N + columns
        value += tl.load(stream, mask=live, other=0.0).to(tl.float32)
        value = value.to(residual.dtype.element_ty)
        tl.store(stream, value, mask=live)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / N + eps)
    w = tl.load(weight + (head * N if PER_HEAD else 0) + columns, mask=live, other=0.0)
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)  # rounded as the reference rounds
    tl.store(out + r * N + columns, (normed * w.to(tl.float32)).to(out.dtype.element_ty), mask=live)


def warps_for(width: int) -> int:
    return min(8, max(1, triton.next_power_of_2(width) // 256))


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x: [T, N] or [T, H, N], last dimension contiguous; weight: [N] or [H, N]."""
    n = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm[(x.numel() // n,)](
        out, x, x if residual is None else residual, weight, eps, x.stride(0), x.stride(1) if x.dim() == 3 else 0, heads,
        N=n, PADDED=triton.next_power_of_2(n), ADD=residual is not None, PER_HEAD=weight.dim() == 2, num_warps=warps_for(n),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., N] -> the same shape; weight: [N] or [heads, N]."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, N] -> (rms_norm(x + residual), x + residual). Overwrites `residual`."""
    return _launch(x, residual, weight, eps), residual
