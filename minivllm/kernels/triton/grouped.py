"""Products with packed weights, from a few rows to whole prompts.

With few rows, reading the weight takes the time, so its codes are read packed and become numbers in registers (`_few_rows`):

    words  [BLOCK_N, k] ──▶ codes, one plane of four bits at a time ──▶ (code - zero) * scale - min ──▶ tensor cores
    x      [rows, k of that plane] ────────────────────────────────────────────────────────────────────┘

With many rows the product takes the time. Then slices of the weight are unpacked into a buffer (`_unpack`), and cuBLAS multiplies.

`packed_weight` has the layout of the codes.
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
from minivllm.kernels.triton.packed_weight import Format, PackedWeight


@triton.constexpr_function
def _unpack_asm(bits: int, i: int, magic: int) -> str:
    """PTX: plane i of the words in both halves of a register, each put into the lowest mantissa bits of the float `magic`.

    A 16-bit float whose exponent says 2^7 (bfloat16) or 2^10 (float16) and whose lowest bits are a code is that power plus the code. So
    a shift and one logical operation convert two codes, where a conversion instruction takes several cycles for each. lop3 with 0xea is
    (a & b) | c.
    """
    low = f"shr.b32 t, $1, {4 * i}; lop3.b32 t, t, 0x000f000f, 0x{magic:04x}{magic:04x}, 0xea;"
    if bits == 4:
        return f"{{.reg .b32 t; {low} mov.b32 $0, t;}}"
    width = bits - 4  # of the rest, which comes with its first bit at i * width of each half
    shift = 4 - i * width
    mask = ((1 << width) - 1) << 4
    move = f"shl.b32 u, $2, {shift};" if shift >= 0 else f"shr.b32 u, $2, {-shift};"
    return f"{{.reg .b32 t, u; {low} {move} lop3.b32 $0, u, 0x{mask:04x}{mask:04x}, t, 0xea;}}"


@triton.constexpr_function
def _fp8_asm(i: int) -> str:
    """PTX: e4m3 in byte i of both halves -> bfloat16 times 2^-120, because only the exponents' biases differ (7 and 127).

    NaN becomes 480.
    """
    first = "shl.b32 t, $1, 8;" if i == 0 else "mov.b32 t, $1;"
    return f"{{.reg .b32 t, u; {first} shr.b32 u, t, 4; and.b32 t, t, 0x80008000; lop3.b32 $0, u, 0x07f007f0, t, 0xea;}}"


@triton.jit
def _plane(words, rest, i: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr, SMALL: tl.constexpr = False):
    """Plane i as numbers that are too large by 128 (bfloat16) or 1024 (float16), or without ASM by nothing. words, rest: [...] int16.

    SMALL: as subnormal numbers, the codes times 2^-133 (bfloat16).
    """
    if not ASM:
        plane = (words.to(tl.int32) >> 4 * i) & 15
        if BITS > 4:
            plane |= (rest.to(tl.int32) >> (BITS - 4) * i & ((1 << (BITS - 4)) - 1)) << 4
    else:
        asm: tl.constexpr = _unpack_asm(BITS, i, 0x6400 if dtype == tl.float16 else 0 if SMALL else 0x4300)
        if dtype == tl.float16:
            plane = tl.inline_asm_elementwise(asm, "=r,r,r", [words, rest], dtype=tl.float16, is_pure=True, pack=2)
        else:
            plane = tl.inline_asm_elementwise(asm, "=r,r,r", [words, rest], dtype=tl.bfloat16, is_pure=True, pack=2)
    return plane.to(dtype)


@triton.jit
def _byte_plane(words, i: tl.constexpr, zero: tl.constexpr, FP8: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Plane i of words with two 8-bit codes, less `zero`: [...] int16 -> [...]."""
    if FP8 and ASM and dtype == tl.bfloat16:
        small = tl.inline_asm_elementwise(_fp8_asm(i), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        values = small * 1.329227995784916e36  # 2^120
    elif FP8:
        values = ((words.to(tl.int32) >> 8 * i) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    elif not ASM:
        values = ((words.to(tl.int32) >> 8 * i) & 255) - zero
    else:
        BIAS: tl.constexpr = 1024 if dtype == tl.float16 else 128
        # Two digits of four bits: every step is exact.
        high = _plane(words, words, 2 * i + 1, 4, dtype, ASM) - (BIAS + zero // 16)
        values = high * 16.0 + (_plane(words, words, 2 * i, 4, dtype, ASM) - (BIAS + zero % 16))
    return values.to(dtype)


@triton.jit
def _load_words(p, n, word, live, F: tl.constexpr):
    """n: [.., BN, 1], word: [.., 1, W] -> [.., BN, W]."""
    return tl.load(p.words + n.to(tl.int64) * (F.k // F.per_word) + word, mask=live, other=0)


@triton.jit
def _of_groups(pointer, n, group, live, WIDTH: tl.constexpr):
    """Numbers of groups: [P, BN, G]. WIDTH: numbers in a row of the tensor."""
    return tl.load(pointer + n.to(tl.int64) * WIDTH + group, mask=live & (group < WIDTH), other=0)


@triton.jit
def _half(pairs, i: tl.constexpr, F16: tl.constexpr):
    """The 16-bit float in half i of each int32, as float32."""
    bits = (pairs >> 16 * i).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) if F16 else bits.to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def _repeat(found, W: tl.constexpr):
    """[P, BN, G] -> [P, BN, W]: one number for the words of each group."""
    P: tl.constexpr = found.shape[0]
    BN: tl.constexpr = found.shape[1]
    G: tl.constexpr = found.shape[2]
    return tl.broadcast_to(found[:, :, :, None], [P, BN, G, W // G]).reshape(P, BN, W)


@triton.constexpr_function
def _excess(F: Format, dtype: tl.dtype, asm: bool) -> int:
    """How much the codes of fewer than 8 bits are too large."""
    return 0 if F.bits == 8 or not asm else 1024 if dtype == tl.float16 else 128


@triton.constexpr_function
def _small(F: Format, dtype: tl.dtype, asm: bool) -> bool:
    """Whether `_weights` reads codes as subnormal bfloat16 numbers, code * 2^-133, so that one fused operation scales and shifts them.

    Its results are weights * 2^-16, because scales * 2^133 would overflow. A zero other than a power of two, times its scale, would be
    rounded, so weights with a zero per group are excluded.
    """
    return asm and F.bits < 8 and F.zero >= 0 and not F.row_scale and dtype == tl.bfloat16


@triton.jit
def _codes(p, words, n, first, live_n, i: tl.constexpr, F: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr,
           SMALL: tl.constexpr = False):  # fmt: skip
    """The codes of plane i, too large by `_excess`, or if SMALL too small by 2^-133: words [P, BN, W], loaded -> [P, BN, W].

    n: [1, BN, 1]; first: [P, 1, 1], the first word of each part.
    """
    if F.bits == 8:
        return _byte_plane(words, i, max(F.zero, 0), F.fp8, dtype, ASM)
    rest = words
    if F.bits > 4:
        word = first + tl.arange(0, W)[None, None, :]
        live = live_n & (word < F.k // 4)
        if F.bits == 6:
            rest = tl.load(p.high + n.to(tl.int64) * (F.k // 4) + word, mask=live, other=0).to(tl.int16)
        else:
            rest = tl.load(p.high + n.to(tl.int64) * (F.k // 8) + word // 2, mask=live, other=0).to(tl.int16) >> (word % 2 * 4).to(tl.int16)
    return _plane(words, rest, i, F.bits, dtype, ASM, SMALL)


@triton.jit
def _weights(p, words, n, first, live_n, i: tl.constexpr, F: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """The weights of plane i, times 2^-16 if `_small`, without the scales of a whole row. Arguments and result as for `_codes`."""
    SMALL: tl.constexpr = _small(F, dtype, ASM)
    EXCESS: tl.constexpr = 0 if SMALL else _excess(F, dtype, ASM)
    UNIT: tl.constexpr = 2.0**117 if SMALL else 1.0  # of scales
    SHIFT: tl.constexpr = 2.0**-16 if SMALL else 1.0  # of what is subtracted
    # Groups of fewer inputs than a chunk are not the same for all planes of a word.
    SPAN: tl.constexpr = max(F.group // F.per_word, 16)  # words whose plane i is in one group
    STEP: tl.constexpr = SPAN * F.per_word // F.group  # groups in these words
    GROUPS: tl.constexpr = F.k // F.group
    codes = _codes(p, words, n, first, live_n, i, F, W, dtype, ASM, SMALL)
    if not SMALL and F.zero >= 0 and F.bits < 8 and F.zero + EXCESS > 0:
        codes -= F.zero + EXCESS
    if F.row_scale:
        return codes
    # See `_group_order`: the groups of one plane are next to each other.
    group = first // SPAN + tl.arange(0, max(1, W // SPAN))[None, None, :]
    live_group = live_n & (group < GROUPS // STEP)
    group += (i * 16 // F.group if STEP > 1 else 0) * (GROUPS // STEP)
    numbers = _of_groups(p.scales, n // F.rows, group, live_group, GROUPS)
    if F.super_group > 0:
        above = first * F.per_word // F.super_group + tl.arange(0, max(1, W * F.per_word // F.super_group))[None, None, :]
        supers = _of_groups(p.supers, n, above, live_n, F.k // F.super_group)
        G: tl.constexpr = max(1, W // SPAN)
        if F.mins:
            scales = (numbers & 255).to(tl.float32) * _repeat(_half(supers, 0, True) * UNIT, G)
            offsets = (numbers >> 8 & 255).to(tl.float32) * _repeat(_half(supers, 1, True) * SHIFT, G)
        else:
            scales = numbers.to(tl.float32) * _repeat(_half(supers, 0, True) * UNIT, G)
    elif F.mins or F.zero < 0:
        scales = _half(numbers, 0, F.half_scales) * UNIT
        if F.mins:
            offsets = _half(numbers, 1, F.half_scales) * SHIFT
        else:
            codes -= _repeat(((numbers >> 16 & 255).to(tl.float32) + EXCESS).to(dtype), W)
    else:
        scales = numbers.to(tl.float32) * UNIT
    values = codes * _repeat(scales.to(dtype), W)
    if F.mins:
        values -= _repeat(offsets.to(dtype), W)
    elif SMALL and F.zero > 0:
        values -= _repeat((scales * (F.zero * 2.0**-133)).to(dtype), W)
    return values


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
def _product(tile, value, acc, P: tl.constexpr):
    """acc + tile [P, BN, W] times value [P, W, M]. A matrix without parts is multiplied with the instruction for a group of four warps."""
    if P == 1:
        acc = tl.dot(tile.reshape(tile.shape[1], tile.shape[2]), value.reshape(value.shape[1], value.shape[2]), acc, input_precision="ieee")
    else:
        acc = tl.dot(tile, value, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    out, x, p, norm_weight, bias, residual, eps, num_rows,  # [rows, N], [rows, K], Planes, [K], [N or 2N], [rows, N]
    partial, finished,  # see _sum_of_parts
    F: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SPLIT: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A program computes BN outputs of M rows, from one of SPLIT parts of the inputs.

    Inside a program the inputs are split again into P parts, so that warps multiply different ones. Their sums are added at the end.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = dtype == tl.float16  # x times the norm's weight, not yet divided by the norm, may overflow float16
    PLANES: tl.constexpr = F.per_word
    N: tl.constexpr = F.n // 2 if GATED else F.n
    WORDS: tl.constexpr = F.k // PLANES
    EVEN: tl.constexpr = WORDS % (P * W) == 0 and F.k == F.inputs
    part = tl.arange(0, P)[:, None, None]
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :, None]
    live_n = n < N
    m = tl.program_id(1) * M + tl.arange(0, M)
    live_m = m < num_rows
    PER_SPLIT: tl.constexpr = (WORDS + SPLIT * P * W - 1) // (SPLIT * P * W) * P * W  # words
    begin = tl.program_id(2) * PER_SPLIT
    columns = part * W + tl.arange(0, W)[None, None, :]  # [P, 1, W]: words of the first iteration
    at = part * W + tl.arange(0, W)[None, :, None]  # [P, W, 1]: the same
    inputs = at // 16 * (16 * PLANES) + at % 16  # of plane 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    norm_scale = tl.full([M], 1.0, tl.float32)
    if NORM and HALF:
        norm_scale = _norm_scale(x, m, live_m, eps, F.inputs)
    acc = tl.zeros([BN, M] if P == 1 else [P, BN, M], tl.float32)
    acc_up = tl.zeros([BN, M] if P == 1 else [P, BN, M], tl.float32)
    for start in tl.range(begin, min(WORDS, PER_SPLIT) if SPLIT == 1 else tl.minimum(begin + PER_SPLIT, WORDS), P * W):
        live = live_n if EVEN else live_n & (start + columns < WORDS)
        words = _load_words(p, n, start + columns, live, F)
        if GATED:
            words_up = _load_words(p, n + N, start + columns, live, F)
        first = start + part * W
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
            acc = _product(_weights(p, words, n, first, live_n, i, F, W, dtype, ASM), value, acc, P)
            if GATED:
                acc_up = _product(_weights(p, words_up, n + N, first, live_n, i, F, W, dtype, ASM), value, acc_up, P)
    if PDL:  # not earlier: programs of the next kernel that wait on some multiprocessors leave this kernel's programs to the others
        tl.extra.cuda.gdc_launch_dependents()
    if NORM and not HALF:  # after the loop, so that the weight's transfers do not wait for it
        norm_scale = _norm_scale(x, m, live_m, eps, F.inputs)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live_n = n < N
    y = acc if P == 1 else tl.sum(acc, 0)  # [BN, M]
    up = acc_up if P == 1 else tl.sum(acc_up, 0)
    if _small(F, dtype, ASM):
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
    words = _load_words(p, n, word, live & (word < F.k // F.per_word), F)
    for i in tl.static_range(PLANES):
        tile = _weights(p, words, n, start + part, live, i, F, W, dtype, ASM)
        if _small(F, dtype, ASM):
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
    tile = tuning.packed_tile(rows, n, form.k, form.bits, gated, capability(x.device))
    norm_weight, eps = norm or (x, 0.0)
    grid = triton.cdiv(n, tile.block_n), triton.cdiv(rows, tile.block_m), tile.splits
    partial = out
    if tile.splits > 1:
        partial = torch.empty(tile.splits * grid[1] * tile.block_m * form.n, dtype=torch.float32, device=x.device)
    launch(_few_rows, grid,
        out, x, packed.planes, norm_weight, x if bias is None else bias, x if residual is None else residual, eps, rows,
        partial, packed.finished,
        F=form, M=tile.block_m, BN=tile.block_n, W=tile.words, P=tile.parts, SPLIT=tile.splits,
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None, ASM=_compiled(x.device),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **early_start(x.device),
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
