"""LoRA adapters in Triton: each row of a batch is changed by its own adapter, y += (x A^T) B^T.

    one row       one kernel: a program computes its columns of x W^T, and x A^T for itself. Reading A again in every program (from the L2
                  cache) takes less time than another launch
    few rows      shrink: a program per row and 16 rows of A; expand: a program per row and block of columns, with the gate included
    many rows     tiles of tokens on tensor cores. A tile is multiplied once for each adapter that it has: usually one, since the tokens of
                  a prompt are neighbors

No shape depends on the batch's adapters, so captured graphs serve any mix. Ranks are read on the device: an adapter of rank 8 costs no
more than that in slots for rank 64. Slots and adapters do not change while kernels run early (see `device`), so they are read before
the wait.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.layout import AdapterWeights
from minivllm.kernels.triton.activation import silu_and_mul, silu_mul
from minivllm.kernels.triton.device import capability, early_start, launch
from minivllm.kernels.triton.linear import row_products
from minivllm.kernels.triton.norm import rms_norm

RANKS = 16  # rows of A that a program multiplies with: slots have a multiple of it for each part
_RANKS = tl.constexpr(RANKS)


class LoRAStep(NamedTuple):
    """What the layers of a step share."""

    slots: Tensor  # [T] int32, -1 for the base model
    ranks: Tensor  # [S] int32


def prepare_lora(slots: Tensor, ranks: Tensor) -> LoRAStep:
    """See the reference."""
    return LoRAStep(slots, ranks)


@triton.jit
def _shrink_rows(
    h, x, a, slots, ranks, norm_weight, eps, stride, rows,  # [SPLITS, rows, PARTS * R] fp32, [rows, K], [S, PARTS * R, K], [rows], [S]
    K: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """stride: numbers of a slot. WIDTH: PARTS * R. A program reads SPLIT_K inputs, all K with a norm."""
    row, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)
    rank = tl.load(ranks + slot, mask=slot >= 0, other=0)
    active = (block * _RANKS) % R < rank
    r = block * _RANKS + tl.arange(0, _RANKS)
    weights = a + slot.to(tl.int64) * stride + r[:, None] * K
    begin = split * SPLIT_K
    k = begin + tl.arange(0, BLOCK_K)
    first = tl.load(weights + k[None, :], mask=active & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if active:
        acc = tl.zeros([_RANKS, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.static_range(0, SPLIT_K, BLOCK_K):
            k = begin + start + tl.arange(0, BLOCK_K)
            live = k < K
            value = tl.load(x + row.to(tl.int64) * K + k, mask=live, other=0.0).to(tl.float32)
            if NORM:
                squares += value * value
                value *= tl.load(norm_weight + k, mask=live, other=0.0).to(tl.float32)
            tile = first if start == 0 else tl.load(weights + k[None, :], mask=live[None, :], other=0.0)
            acc += tile.to(tl.float32) * value[None, :]
        y = tl.sum(acc, 1)
        if NORM:
            y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
        tl.store(h + (split * rows + row).to(tl.int64) * WIDTH + r, y)


@triton.jit
def _changes(h, b, n, live, part, slot, rank, first, stride, row, rows, SPLITS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr):
    """h B^T of one row for columns n: [BLOCK_N] fp32. part: of each column; first: the columns' first RANKS numbers of B."""
    r = tl.arange(0, _RANKS)
    acc = tl.zeros([n.shape[0]], tl.float32)
    for start in range(0, rank, _RANKS):
        tile = first
        if start > 0:
            tile = tl.load(b + slot.to(tl.int64) * stride + n[:, None] * R + start + r[None, :], mask=live[:, None], other=0.0)
        for split in tl.static_range(SPLITS):
            at = h + (split * rows + row).to(tl.int64) * WIDTH + part[:, None] * R + start + r[None, :]
            acc += tl.sum(tile.to(tl.float32) * tl.load(at, mask=live[:, None], other=0.0), 1)
    return acc


@triton.jit
def _expand_rows(
    out, y, h, b, slots, ranks, stride, rows,  # [rows, N], [rows, N or 2N], [SPLITS, rows, WIDTH] fp32, [S, N or 2N, R], [rows], [S]
    N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """END0, END1: where the first and the second part of the outputs end. GATED: y is [gate | up]."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    slot = tl.load(slots + row)
    rank = tl.load(ranks + slot, mask=slot >= 0, other=0)
    r = tl.arange(0, _RANKS)
    weights = b + slot.to(tl.int64) * stride + n[:, None] * R + r[None, :]
    adapted = live[:, None] & (rank > 0)
    first = tl.load(weights, mask=adapted, other=0.0)
    if GATED:
        first_up = tl.load(weights + N * R, mask=adapted, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if GATED:
        source = y + row.to(tl.int64) * 2 * N + n
        gate, up = tl.load(source, mask=live, other=0.0).to(tl.float32), tl.load(source + N, mask=live, other=0.0).to(tl.float32)
        zero = n * 0
        gate += _changes(h, b, n, live, zero, slot, rank, first, stride, row, rows, SPLITS, R, WIDTH)
        up += _changes(h, b, n + N, live, zero + 1, slot, rank, first_up, stride, row, rows, SPLITS, R, WIDTH)
        tl.store(out + row.to(tl.int64) * N + n, silu_mul(gate, up, out.dtype.element_ty).to(out.dtype.element_ty), mask=live)
    elif rank > 0:
        part = (n >= END0).to(tl.int32) + (n >= END1).to(tl.int32)
        at = row.to(tl.int64) * N + n
        value = tl.load(y + at, mask=live, other=0.0).to(tl.float32)
        value += _changes(h, b, n, live, part, slot, rank, first, stride, row, rows, SPLITS, R, WIDTH)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_tokens"])
def _shrink_tiles(
    h, x, a, slots, ranks, stride, num_tokens,  # [T, WIDTH], [T, K], [S, WIDTH, K], [T], [S]
    K: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows of other adapters count as zero, so the products of all adapters of a tile add up to the result."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1)
    r = block * _RANKS + tl.arange(0, _RANKS)
    left = tl.load(slots + m, mask=m < num_tokens, other=-1)
    acc = tl.zeros([BLOCK_M, _RANKS], tl.float32)
    slot = tl.max(left, 0)
    while slot >= 0:
        mine = left == slot
        if (block * _RANKS) % R < tl.load(ranks + slot):
            for start in range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                live = (k < K)[None, :]
                value = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=mine[:, None] & live, other=0.0)
                tile = tl.load(a + slot.to(tl.int64) * stride + r[:, None] * K + k[None, :], mask=live, other=0.0)
                acc = tl.dot(value, tile.T, acc, input_precision="ieee")
        left = tl.where(mine, -1, left)
        slot = tl.max(left, 0)
    tl.store(h + m.to(tl.int64)[:, None] * WIDTH + r[None, :], acc.to(h.dtype.element_ty), mask=(m < num_tokens)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_tiles(
    y, h, b, slots, ranks, stride, num_tokens,  # [T, N], [T, WIDTH], [S, N, R], [T], [S]
    N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Each part has its own blocks of columns: those of part 0, then those of part 1, then those of part 2.
    blocks0, blocks1 = tl.cdiv(END0, BLOCK_N), tl.cdiv(END1 - END0, BLOCK_N)
    block = tl.program_id(1)
    part = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    begin = tl.where(part == 0, 0, tl.where(part == 1, END0, END1))
    end = tl.where(part == 0, END0, tl.where(part == 1, END1, N))
    n = begin + (block - tl.where(part == 0, 0, tl.where(part == 1, blocks0, blocks0 + blocks1))) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < end
    left = tl.load(slots + m, mask=m < num_tokens, other=-1)
    adapted = left >= 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slot = tl.max(left, 0)
    while slot >= 0:
        mine = left == slot
        for start in range(0, tl.load(ranks + slot), _RANKS):
            r = start + tl.arange(0, _RANKS)
            value = tl.load(h + m.to(tl.int64)[:, None] * WIDTH + part * R + r[None, :], mask=mine[:, None], other=0.0)
            tile = tl.load(b + slot.to(tl.int64) * stride + n[:, None] * R + r[None, :], mask=live_n[:, None], other=0.0)
            acc = tl.dot(value, tile.T, acc, input_precision="ieee")
        left = tl.where(mine, -1, left)
        slot = tl.max(left, 0)
    at, live = y + m.to(tl.int64)[:, None] * N + n[None, :], adapted[:, None] & live_n[None, :]
    tl.store(at, (tl.load(at, mask=live, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=live)


@triton.jit
def _shrunk(x, norm_weight, weights, first, adapted, K: tl.constexpr, BLOCK_A: tl.constexpr, NORM: tl.constexpr):
    """x A^T of the only row: [RANKS] fp32, not yet divided by the norm. weights: RANKS rows of A; first: their first BLOCK_A numbers."""
    acc = tl.zeros([_RANKS, BLOCK_A], tl.float32)
    for start in tl.static_range(0, K, BLOCK_A):
        k = start + tl.arange(0, BLOCK_A)
        live = k < K
        value = tl.load(x + k, mask=live, other=0.0).to(tl.float32)
        if NORM:
            value *= tl.load(norm_weight + k, mask=live, other=0.0).to(tl.float32)
        tile = first if start == 0 else tl.load(weights + k[None, :], mask=adapted & live[None, :], other=0.0)
        acc += tile.to(tl.float32) * value[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _one_row(
    out, x, weight, norm_weight, bias, residual, eps, a, b, slots, stride,  # as linear._matvec; [S, WIDTH, K], [S, N or 2N, RANKS], [1]
    N: tl.constexpr, K: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`linear._matvec` with an adapter. The columns of a program belong to one part of a fused layer."""
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    live_n = n < N
    w = weight + n.to(tl.int64)[:, None] * K
    k, ka, r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_A), tl.arange(0, _RANKS)
    slot = tl.load(slots)
    adapted = slot >= 0
    part = 0 if GATED else (n0 >= END0).to(tl.int32) + (n0 >= END1).to(tl.int32)
    rows_a = a + slot.to(tl.int64) * stride + (part * _RANKS + r)[:, None] * K
    rows_b = b + slot.to(tl.int64) * stride + n[:, None] * _RANKS + r[None, :]
    first = tl.load(w + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
    first_a = tl.load(rows_a + ka[None, :], mask=adapted & (ka < K)[None, :], other=0.0)
    tile_b = tl.load(rows_b, mask=adapted & live_n[:, None], other=0.0)
    first_up = first
    if GATED:
        first_up = tl.load(w + N * K + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc, acc_up, squares = row_products(x, w, norm_weight, first, first_up, live_n, N, K, BLOCK_N, BLOCK_K, NORM, GATED)
    h = _shrunk(x, norm_weight, rows_a, first_a, adapted, K, BLOCK_A, NORM)
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps) if NORM else 1.0
    y = (tl.sum(acc, 1) + tl.sum(tile_b.to(tl.float32) * h[None, :], 1)) * scale
    if BIAS:
        y += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)
    if GATED:
        rows_up = rows_a + _RANKS * K
        h = _shrunk(x, norm_weight, rows_up, tl.load(rows_up + ka[None, :], mask=adapted & (ka < K)[None, :], other=0.0), adapted, K,
                    BLOCK_A, NORM)
        tile_b = tl.load(rows_b + N * _RANKS, mask=adapted & live_n[:, None], other=0.0)
        up = (tl.sum(acc_up, 1) + tl.sum(tile_b.to(tl.float32) * h[None, :], 1)) * scale
        if BIAS:
            up += tl.load(bias + N + n, mask=live_n, other=0.0).to(tl.float32)
        y = silu_mul(y, up, out.dtype.element_ty)
    if ADD:
        y += tl.load(residual + n, mask=live_n, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=live_n)


def lora_shrink(x: Tensor, weights: AdapterWeights, step: LoRAStep, norm: tuple[Tensor, float] | None = None) -> Tensor:
    """x: [T, K] -> x A^T of each token's adapter, for `lora_expand` only. Few rows: [splits, T, parts * R] fp32; many: [T, parts * R]."""
    rows, k = x.shape
    a, x = weights.a, x.contiguous()
    width = a.shape[1]
    if rows > tuning.LORA_FEW_ROWS:
        x = x if norm is None else rms_norm(x, *norm)
        h = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        tile = tuning.LORA_TILE
        launch(_shrink_tiles, (triton.cdiv(rows, tile.block_m), width // RANKS), h, x, a, step.slots, step.ranks, a.stride(0), rows,
               K=k, R=weights.rank, WIDTH=width, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, num_warps=4, num_stages=2)
        return h
    block_k, split_k = tuning.lora_shrink_tile(k, norm is not None)
    splits = triton.cdiv(k, split_k)
    h = torch.empty(splits, rows, width, dtype=torch.float32, device=x.device)
    norm_weight, eps = norm or (x, 0.0)
    launch(_shrink_rows, (rows, width // RANKS, splits), h, x, a, step.slots, step.ranks, norm_weight, eps, a.stride(0), rows, K=k,
           R=weights.rank, WIDTH=width, BLOCK_K=block_k, SPLIT_K=split_k, NORM=norm is not None, num_warps=4, **early_start(x.device))
    return h


def lora_expand(y: Tensor, h: Tensor, weights: AdapterWeights, step: LoRAStep, gated: bool = False) -> Tensor:
    """See the reference."""
    rows, n = y.shape
    b, (end0, end1) = weights.b, _ends(weights)
    common = dict(R=weights.rank, WIDTH=h.shape[-1], END0=end0, END1=end1)
    if h.ndim == 2:
        tile = tuning.LORA_TILE
        blocks = sum(triton.cdiv(part, tile.block_n) for part in weights.rows)
        launch(_expand_tiles, (triton.cdiv(rows, tile.block_m), blocks), y, h, b, step.slots, step.ranks, b.stride(0), rows, N=n,
               BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=4, num_stages=2, **common)
        return silu_and_mul(y) if gated else y
    n = n // 2 if gated else n
    out = torch.empty(rows, n, dtype=y.dtype, device=y.device) if gated else y
    block_n = min(tuning.LORA_EXPAND_COLUMNS, triton.next_power_of_2(n))
    launch(_expand_rows, (rows, triton.cdiv(n, block_n)), out, y, h, b, step.slots, step.ranks, b.stride(0), rows, N=n, SPLITS=h.shape[0],
           BLOCK_N=block_n, GATED=gated, num_warps=4, **common, **early_start(y.device))
    return out


def _ends(weights: AdapterWeights) -> tuple[int, int]:
    """Where the first and the second of three parts end; missing parts are empty."""
    rows = (*weights.rows, 0, 0)
    assert len(weights.rows) <= 3
    return rows[0], rows[0] + rows[1]


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weights: AdapterWeights, step: LoRAStep, *,
    norm: tuple[Tensor, float] | None = None, gated: bool = False, residual: Tensor | None = None,
) -> Tensor | None:
    """See the reference. For one row, and slots of rank 16."""
    rows, k = x.shape
    n = weight.shape[0] // (2 if gated else 1)
    tile = tuning.linear_tile(1, n, k, gated, capability(x.device))
    if rows != 1 or weights.rank != RANKS or any(part % tile.block_n for part in weights.rows[:-1]):
        return None
    x = x.contiguous()
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    norm_weight, eps = norm or (x, 0.0)
    end0, end1 = _ends(weights)
    launch(_one_row, (triton.cdiv(n, tile.block_n),), out, x, weight, norm_weight, x if bias is None else bias,
           x if residual is None else residual, eps, weights.a, weights.b, step.slots, weights.a.stride(0), N=n, K=k, END0=end0, END1=end1,
           BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_A=min(tile.block_k, tuning.LORA_SHRINK_BLOCK), NORM=norm is not None,
           GATED=gated, BIAS=bias is not None, ADD=residual is not None, num_warps=tile.num_warps, **early_start(x.device))
    return out
