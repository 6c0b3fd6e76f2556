"""Linear layers of few rows, fused with the operations before and after them: norm, residual addition, gate.

With one to a few dozen rows, reading the weight takes most of a linear layer's time, and separate kernels for norm, activation and
addition would take longer than their arithmetic. So one kernel computes each of these:

    norm -> qkv         out = rms_norm(x) W^T            the sum of squares is computed in the same loop, and scales the result
    o, down             out = x W^T + residual
    norm -> gate | up   out = silu(x Wg^T) * (x Wu^T)    a program computes the same columns of both

A program computes BLOCK_N output columns. For one row the product is a sum over registers (`_matvec`), for more rows it is a tensor core
tile (`_few_rows`, and hopper_linear.py for some shapes on Hopper).

On Hopper each kernel starts before the kernel ahead of it has ended (programmatic dependent launch). It first fetches its weights, which
no kernel writes, and then waits for its input.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.triton.activation import silu_and_mul, silu_mul
from minivllm.kernels.triton.device import capability, early_start, gluon_kernels, launch
from minivllm.kernels.triton.norm import rms_norm


@triton.jit
def row_products(
    x, w, norm_weight, first, first_up, live_n,  # [K]; pointers to rows of the weight [BLOCK_N, 1]; [K]
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One row of x times BLOCK_N rows of a weight, whose first tiles are loaded: `first`, and `first_up` of the rows N below if GATED.

    -> (sums [BLOCK_N, BLOCK_K] over every BLOCK_K-th input, the same of the rows N below, and of the squares of x: [BLOCK_K] if NORM).
    """
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32) if GATED else acc
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live_k = k < K
        live = live_n[:, None] & live_k[None, :]
        value = tl.load(x + k, mask=live_k, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(norm_weight + k, mask=live_k, other=0.0).to(tl.float32)
        tile = first if start == 0 else tl.load(w + k[None, :], mask=live, other=0.0)
        acc += tile.to(tl.float32) * value[None, :]
        if GATED:
            tile = first_up if start == 0 else tl.load(w + N * K + k[None, :], mask=live, other=0.0)
            acc_up += tile.to(tl.float32) * value[None, :]
    return acc, acc_up, squares


@triton.jit
def _matvec(
    out, x, weight, norm_weight, bias, residual, eps,  # [N], [K], [N or 2N, K], [K], [N or 2N], [N]
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    w = weight + n.to(tl.int64)[:, None] * K
    k = tl.arange(0, BLOCK_K)
    first = tl.load(w + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
    first_up = first
    if GATED:
        first_up = tl.load(w + N * K + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc, acc_up, squares = row_products(x, w, norm_weight, first, first_up, live_n, N, K, BLOCK_N, BLOCK_K, NORM, GATED)
    y = tl.sum(acc, 1)
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps) if NORM else 1.0
    y *= scale
    if BIAS:
        y += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(acc_up, 1) * scale
        if BIAS:
            up += tl.load(bias + N + n, mask=live_n, other=0.0).to(tl.float32)
        y = silu_mul(y, up, out.dtype.element_ty)
    if ADD:
        y += tl.load(residual + n, mask=live_n, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=live_n)


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    out, x, weight, norm_weight, bias, residual, eps, rows,  # [rows, N], [rows, K], [N or 2N, K], [K], [N or 2N], [rows, N]
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each of PARTS warps multiplies one part of BLOCK_K. The product is batched over the parts, and their results are added at the end.

        k of a chunk   | part 0 ....... | part 1 ....... | part 2 ....... | part 3 ....... |
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    w = weight + n.to(tl.int64)[:, None] * K
    k = tl.arange(0, BLOCK_K)
    first = tl.load(w + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
    if GATED:
        first_up = tl.load(w + N * K + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live_m = m < rows
    source = x + m[:, None] * K
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16  # x times the norm's weight, not yet divided by the norm, may overflow float16
    squares = tl.zeros([BLOCK_M], tl.float32)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if NORM and HALF:
        for start in tl.static_range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            wide = tl.load(source + k[None, :], mask=live_m[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
            squares += tl.sum(wide * wide, 1)
        scale = tl.rsqrt(squares / K + eps)
    acc = tl.zeros([PARTS, BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([PARTS, BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live_k = k < K
        live = live_n[:, None] & live_k[None, :]
        value = tl.load(source + k[None, :], mask=live_m[:, None] & live_k[None, :], other=0.0)
        if NORM:
            wide = value.to(tl.float32)
            if HALF:
                wide *= scale[:, None]
            else:
                squares += tl.sum(wide * wide, 1)
            value = (wide * tl.load(norm_weight + k, mask=live_k, other=0.0).to(tl.float32)[None, :]).to(value.dtype)
        value = value.reshape(BLOCK_M, PARTS, BLOCK_K // PARTS).permute(1, 0, 2)
        tile = first if start == 0 else tl.load(w + k[None, :], mask=live, other=0.0)
        acc = tl.dot(value, tile.reshape(BLOCK_N, PARTS, BLOCK_K // PARTS).permute(1, 2, 0), acc, input_precision="ieee")
        if GATED:
            tile = first_up if start == 0 else tl.load(w + N * K + k[None, :], mask=live, other=0.0)
            acc_up = tl.dot(value, tile.reshape(BLOCK_N, PARTS, BLOCK_K // PARTS).permute(1, 2, 0), acc_up, input_precision="ieee")
    y = tl.sum(acc, 0)
    if NORM and not HALF:
        scale = tl.rsqrt(squares / K + eps)
        y *= scale[:, None]
    if BIAS:
        y += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = tl.sum(acc_up, 0)
        if NORM and not HALF:
            up *= scale[:, None]
        if BIAS:
            up += tl.load(bias + N + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
        y = silu_mul(y, up, out.dtype.element_ty)
    live = live_m[:, None] & live_n[None, :]
    at = m[:, None] * N + n[None, :]
    if ADD:
        y += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live)


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None, gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x: [T, K], weight: [N, K] (gated: [2N, K], gate rows first) -> [T, N]. May overwrite `residual`: [T, N]."""
    (rows, k), arch = x.shape, capability(x.device)
    n = weight.shape[0] // (2 if gated else 1)
    direct = tuning.hopper_linear_tile(rows, n, k, gated, x.element_size(), arch)
    if direct is not None and not (x.dtype == torch.float16 and norm is not None) and (hopper := gluon_kernels("hopper_linear")):
        out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
        hopper.few_rows(out, x.contiguous(), weight, bias, norm, gated, residual, direct)
        return out
    if not tuning.fuses(rows, weight.numel(), gated, x.element_size()):
        return _many_rows(x, weight, bias, norm, gated, residual)
    x = x.contiguous()
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    tile = tuning.linear_tile(rows, n, k, gated, arch)
    norm_weight, eps = norm or (x, 0.0)
    flags = dict(NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None, num_warps=tile.num_warps,
                 **early_start(x.device))
    grid = (triton.cdiv(n, tile.block_n),)
    tensors = out, x, weight, norm_weight, x if bias is None else bias, x if residual is None else residual, eps
    if rows == 1:
        launch(_matvec, grid, *tensors, N=n, K=k, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, **flags)
    else:
        launch(_few_rows, (*grid, triton.cdiv(rows, tuning.LINEAR_TILE_ROWS)),
            *tensors, rows, N=n, K=k, BLOCK_M=tuning.LINEAR_TILE_ROWS, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            PARTS=min(tile.num_warps, tile.block_k // 16), **flags,
        )  # fmt: skip
    return out


def _many_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, float] | None, gated: bool, residual: Tensor | None
) -> Tensor:
    """One kernel for each operation: with many rows, reading them once more is cheap compared with the product."""
    if norm is not None:
        x = rms_norm(x, *norm)
    if residual is not None and bias is None and not gated:
        return residual.addmm_(x, weight.t())
    y = F.linear(x, weight, bias)
    if gated:
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)
