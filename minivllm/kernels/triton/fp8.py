"""Inputs of fp8 products: each row is quantized with its own scale, in the kernel that normalizes it."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.device import launch
from minivllm.kernels.tuning import next_power_of_2, norm_warps


@triton.jit
def _quantize_rows(out, scales, x, norm_weight, input_scale, eps, K: tl.constexpr, PADDED: tl.constexpr, NORM: tl.constexpr,
                   STATIC: tl.constexpr, PACKED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PADDED)
    value = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        value = (value * tl.rsqrt(tl.sum(value * value, 0) / K + eps)).to(x.dtype.element_ty).to(tl.float32)
        value = (value * tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
    scale = tl.load(input_scale) if STATIC else tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    quantized = tl.minimum(tl.maximum(value / scale, -448.0), 448.0).to(tl.float8e4nv)
    at = k // 32 * 32 + k % 16 * 2 + k // 16 % 2 if PACKED else k
    tl.store(out + row * K + at, quantized, mask=k < K)


def quantize_rows(
    x: Tensor, norm: tuple[Tensor, float] | None = None, input_scale: Tensor | None = None, *, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """x: [T, K] -> (e4m3 [T, K], scales [T, 1] float32) with x or its RMSNorm = e4m3 * scale; the scale is the given one, or per row.

    packed: inputs are in the order of the bytes of an fp8 weight that `pack_groups` packed.
    """
    x = x.contiguous()
    rows, k = x.shape
    out = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    norm_weight, eps = norm or (x, 0.0)
    launch(_quantize_rows, (rows,), out, scales, x, norm_weight, scales if input_scale is None else input_scale, eps, K=k,
           PADDED=next_power_of_2(k), NORM=norm is not None, STATIC=input_scale is not None, PACKED=packed, num_warps=norm_warps(k))
    return out, scales
