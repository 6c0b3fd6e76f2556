"""Products with packed weights, from a few rows to whole prompts.

With few rows, reading the weight takes the time, so its codes are read packed and become numbers in registers (`_few_rows`, and for one
row `packed_row.py`, which needs no tensor cores):

    words  [BLOCK_N, k] ──▶ codes, one plane of four bits at a time ──▶ (code - zero) * scale - min ──▶ tensor cores
    x      [rows, k of that plane] ────────────────────────────────────────────────────────────────────┘

With many rows the product takes the time. Then slices of the weight are unpacked into a buffer (`_unpack`), and cuBLAS multiplies.

`packed_weight` has the layout of the codes, and `unpacked_codes` makes weights of them.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.reference import grouped as reference
from minivllm.kernels.triton.activation import silu_and_mul, silu_mul
from minivllm.kernels.triton.device import capability, early_start, launch
from minivllm.kernels.triton.fp8 import quantize_rows
from minivllm.kernels.triton.norm import rms_norm
from minivllm.kernels.triton.packed_row import packed_matvec
from minivllm.kernels.triton.packed_weight import Format, PackedWeight
from minivllm.kernels.triton.unpacked_codes import load_words, small_codes, weights_of_plane


@triton.jit
def _norm_scale(x, m, live, eps, K: tl.constexpr):
    """1 / rms of rows of x: [M]."""
    squares = tl.zeros([m.shape[0], 512], tl.float32)
    for start in tl.static_range(0, K, 512):
        k = start + tl.arange(0, 512)
        wide = tl.load(x + m[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        squares += wide * wide
    return tl.rsqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def _sum_of_parts(y, partial, finished, n, live_n, M: tl.constexpr, N: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr):
    """Store y [OUTPUTS, BN, M], and if this split is the last to finish, the sum over all splits -> (sum, whether it is the last).

    partial: [SPLIT, tiles, OUTPUTS, N, M]. The order of the sum does not depend on which split is last.
    """
    size = tl.num_programs(1) * OUTPUTS * N * M
    at = ((tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None, None]) * N + n[None, :, None]) * M + tl.arange(0, M)[None, None, :]
    live = live_n[None, :, None]
    tl.store(partial + tl.program_id(2) * size + at, y, mask=live)
    tl.debug_barrier()  # all of this program's stores come before its count
    counter = finished + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        tl.store(counter, 0)  # for the next call
        y = tl.zeros_like(y)
        for i in tl.static_range(SPLIT):
            y += tl.load(partial + i * size + at, mask=live, other=0.0, cache_modifier=".cg")
    return y, last


@triton.jit
def _product(tile, value, acc):
    """acc + tile [1, BN, W] times value [1, W, M]: without the first dimension, the instruction for a group of four warps does it."""
    left, right = tile.reshape(tile.shape[1], tile.shape[2]), value.reshape(value.shape[1], value.shape[2])
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    out, x, p, norm_weight, bias, residual, eps, num_rows,  # [rows, N], [rows, K], Planes, [K], [N or 2N], [rows, N]
    partial, finished,  # see _sum_of_parts
    F: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A program computes BN outputs of M rows, from one of SPLIT parts of the inputs."""
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = dtype == tl.float16  # x times the norm's weight, not yet divided by the norm, may overflow float16
    PLANES: tl.constexpr = F.per_word
    N: tl.constexpr = F.n // 2 if GATED else F.n
    WORDS: tl.constexpr = F.k // PLANES
    EVEN: tl.constexpr = WORDS % W == 0 and F.k == F.inputs
    zero = tl.zeros([1, 1, 1], tl.int32)
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :, None]
    live_n = n < N
    m = tl.program_id(1) * M + tl.arange(0, M)
    live_m = m < num_rows
    PER_SPLIT: tl.constexpr = (WORDS + SPLIT * W - 1) // (SPLIT * W) * W  # words
    begin = tl.program_id(2) * PER_SPLIT
    columns = tl.arange(0, W)[None, None, :]  # words of the first iteration
    at = tl.arange(0, W)[None, :, None]  # the same
    inputs = at // 16 * (16 * PLANES) + at % 16  # of plane 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    norm_scale = tl.full([M], 1.0, tl.float32)
    if NORM and HALF:
        norm_scale = _norm_scale(x, m, live_m, eps, F.inputs)
    acc = tl.zeros([BN, M], tl.float32)
    acc_up = tl.zeros([BN, M], tl.float32)
    for start in tl.range(begin, min(WORDS, PER_SPLIT) if SPLIT == 1 else tl.minimum(begin + PER_SPLIT, WORDS), W):
        live = live_n if EVEN else live_n & (start + columns < WORDS)
        words = load_words(p, n, start + columns, live, F)
        if GATED:
            words_up = load_words(p, n + N, start + columns, live, F)
        first = start + zero
        for i in tl.static_range(PLANES):
            k = start * PLANES + inputs + i * 16
            live_x = live_m[None, None, :] if EVEN else live_m[None, None, :] & (k < F.inputs)
            value = tl.load(x + m[None, None, :] * F.inputs + k, mask=live_x, other=0.0)
            if NORM:
                factor = tl.load(norm_weight + k) if EVEN else tl.load(norm_weight + k, mask=k < F.inputs, other=0.0)
                if HALF:
                    value = (value.to(tl.float32) * norm_scale[None, None, :] * factor.to(tl.float32)).to(dtype)
                else:
                    value *= factor
            acc = _product(weights_of_plane(p, words, n, first, live_n, i, F, W, dtype, ASM), value, acc)
            if GATED:
                acc_up = _product(weights_of_plane(p, words_up, n + N, first, live_n, i, F, W, dtype, ASM), value, acc_up)
    if PDL:  # not earlier: programs of the next kernel that wait on some multiprocessors leave this kernel's programs to the others
        tl.extra.cuda.gdc_launch_dependents()
    if NORM and not HALF:  # after the loop, so that the weight's transfers do not wait for it
        norm_scale = _norm_scale(x, m, live_m, eps, F.inputs)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live_n = n < N
    y, up = acc, acc_up
    if small_codes(F, dtype, ASM):
        y, up = y * 65536.0, up * 65536.0
    if SPLIT > 1:
        if GATED:
            both, last = _sum_of_parts(tl.permute(tl.join(y, up), (2, 0, 1)), partial, finished, n, live_n, M, N, 2, SPLIT)
            y, up = tl.split(tl.permute(both, (1, 2, 0)))
        else:
            one, last = _sum_of_parts(y[None, :, :], partial, finished, n, live_n, M, N, 1, SPLIT)
            y = one.reshape(BN, M)
        if not last:
            return
    y = _finished(y, p, bias, norm_scale, n, live_n, F, NORM and not HALF, BIAS)
    if GATED:
        y = silu_mul(y, _finished(up, p, bias, norm_scale, n + N, live_n, F, NORM and not HALF, BIAS), dtype)
    live = live_n[:, None] & live_m[None, :]
    at = m[None, :] * N + n[:, None]
    if ADD:
        y += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(dtype), mask=live)


@triton.jit
def _finished(y, p, bias, norm_scale, n, live_n, F: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr):
    """Sums y [BN, M] of outputs n [BN] -> y divided by the norm, times the outputs' scales, plus their bias."""
    if NORM:
        y *= norm_scale[None, :]
    if F.row_scale:
        y *= tl.load(p.scales + n // F.rows, mask=live_n, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        y += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _unpack(out, p, ids, num_rows, F: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, GATHER: tl.constexpr, ASM: tl.constexpr):
    """Rows ids[0 .. num_rows) of the weight, or with GATHER off the rows from `ids` on, into out [num_rows, inputs]."""
    dtype: tl.constexpr = out.dtype.element_ty
    PLANES: tl.constexpr = F.per_word
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.load(ids + row, mask=row < num_rows, other=0) if GATHER else ids + row
    n, live = n[None, :, None], (row < num_rows)[None, :, None]
    start, part = tl.program_id(1) * W, tl.zeros([1, 1, 1], tl.int32)
    word = start + tl.arange(0, W)[None, None, :]
    words = load_words(p, n, word, live & (word < F.k // F.per_word), F)
    for i in tl.static_range(PLANES):
        tile = weights_of_plane(p, words, n, start + part, live, i, F, W, dtype, ASM)
        if small_codes(F, dtype, ASM):
            tile *= 65536.0
        if F.row_scale:
            scale = tl.load(p.scales + n // F.rows, mask=live, other=0.0).to(tl.float32)
            tile = (tile.to(tl.float32) * scale).to(dtype)
        k = word // 16 * (16 * F.per_word) + i * 16 + word % 16
        tl.store(out + row[None, :, None].to(tl.int64) * F.inputs + k, tile, mask=live & (k < F.inputs))


def grouped_linear(
    x: Tensor, packed: PackedWeight | reference.PackedGroups, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None,
    gated: bool = False, residual: Tensor | None = None,
) -> Tensor:
    """x: [T, K] -> [T, N], or [T, N / 2] if gated (gate rows first). May overwrite `residual`."""
    if isinstance(packed, reference.PackedGroups):
        return reference.grouped_linear(x, packed, bias, norm=norm, gated=gated, residual=residual)
    rows, form = x.shape[0], packed.form
    if rows > tuning.PACKED_MAX_ROWS or x.dtype == torch.float32:
        return _many_rows(x, packed, bias, norm, gated, residual)
    if norm is not None and rows > tuning.PACKED_NORM_ROWS:
        x, norm = rms_norm(x, *norm), None
    x = x.contiguous()
    n = form.n // (2 if gated else 1)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    norm_weight, eps = norm or (x, 0.0)
    arch = capability(x.device)
    options = dict(F=form, NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None, ASM=_compiled(x.device),
                   **early_start(x.device))
    args = out, x, packed.planes, norm_weight, x if bias is None else bias, x if residual is None else residual, eps
    if rows == 1 and not (form.fp8 and 0 < arch < 89):  # older GPUs have no instruction that converts fp8
        outputs, words = tuning.packed_row_tile(n, form.k, form.bits, form.super_group > 0, gated)
        launch(packed_matvec, (triton.cdiv(n, outputs),), *args, R=outputs, W=words, num_warps=words // 256, num_stages=1, **options)
        return out
    tile = tuning.packed_tile(rows, n, form.k, form.bits, gated, arch)
    grid = triton.cdiv(n, tile.block_n), triton.cdiv(rows, tile.block_m), tile.splits
    partial = out
    if tile.splits > 1:
        partial = torch.empty(tile.splits * grid[1] * tile.block_m * form.n, dtype=torch.float32, device=x.device)
    launch(_few_rows, grid,
        *args, rows, partial, packed.finished, M=tile.block_m, BN=tile.block_n, W=tile.words, SPLIT=tile.splits,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **options,
    )  # fmt: skip
    return out


def _compiled(device: torch.device) -> bool:
    """False in the interpreter, which runs no machine code."""
    return device.type == "cuda"


def grouped_rows(packed: PackedWeight | reference.PackedGroups, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table: ids [T] -> [T, K] in `dtype`."""
    if isinstance(packed, reference.PackedGroups):
        return reference.grouped_rows(packed, ids, dtype)
    out = torch.empty(len(ids), packed.form.inputs, dtype=dtype, device=ids.device)
    _launch_unpack(out, packed, ids)
    return out


def _launch_unpack(out: Tensor, packed: PackedWeight, first: Tensor | int) -> None:
    gather, width = isinstance(first, Tensor), packed.form.k // packed.form.per_word
    block = 1 if gather else tuning.UNPACK_ROWS
    launch(_unpack, (triton.cdiv(len(out), block), triton.cdiv(width, tuning.UNPACK_WORDS)), out, packed.planes, first, len(out),
           F=packed.form, W=tuning.UNPACK_WORDS, BN=block, GATHER=gather, ASM=_compiled(out.device), num_warps=4)


def _many_rows(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, norm: tuple[Tensor, float] | None, gated: bool, residual: Tensor | None
) -> Tensor:
    """cuBLAS, and separate kernels for the operations before and after the product."""
    if packed.quantize_input and _multiplies_fp8(x, packed.form):
        y = _fp8_product(x, packed, norm)
    else:
        y = _unpacked_product(x if norm is None else rms_norm(x, *norm), packed)
    if bias is not None:
        y += bias
    if gated:
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)


def _unpacked_product(x: Tensor, packed: PackedWeight) -> Tensor:
    """Unpack a slice of the weight, multiply, and so on: the whole weight in 16 bits may not fit into memory."""
    n, k = packed.form.n, packed.form.inputs
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    step = min(n, max(256, tuning.UNPACK_ELEMENTS // k // 256 * 256))
    weight = torch.empty(step, k, dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        rows = weight[: min(step, n - start)]
        _launch_unpack(rows, packed, start)
        torch.mm(x, rows.t(), out=y[:, start : start + len(rows)])
    return y


def _multiplies_fp8(x: Tensor, form: Format) -> bool:
    """Whether PyTorch multiplies fp8 matrices with a scale per row on this GPU: from sm_89 on, and only into bfloat16."""
    right = capability(x.device) >= 89 and x.dtype == torch.bfloat16
    return right and form.fp8 and form.row_scale and form.n % 16 == 0 and form.inputs == form.k


def _fp8_product(x: Tensor, packed: PackedWeight, norm: tuple[Tensor, float] | None) -> Tensor:
    """x is quantized too, in the kernel that normalizes it, and in the order in which the weight's bytes are packed."""
    form = packed.form
    quantized, scales = quantize_rows(x, norm, packed.input_scale, packed=True)
    weight_scales = packed.planes.scales.float().repeat_interleave(form.rows, 0).view(1, -1)
    return torch._scaled_mm(quantized, packed.planes.words.view(torch.float8_e4m3fn).t(), scales, weight_scales,
                            out_dtype=x.dtype, use_fast_accum=True)
