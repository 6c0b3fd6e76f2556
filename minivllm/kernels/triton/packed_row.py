"""Products of one row with packed weights: as `linear._matvec`, sums in registers, without tensor cores and shared memory.

A thread loads 8 words (16 bytes) of each of a few rows of the weight at a time, with the scales of these words, before the row x is there.
It multiplies the codes by x, and its sum by the scale, where the tensor core kernel scales every weight:

    sum over a group of scale * (code - zero) * x    =    scale * (sum of code * x  -  zero * sum of x)

`packed_weight` has the layout of the codes. Arguments `p` are its `Planes`, and F is its `Format`.
"""
# Tuples grow in Triton's loops, and it compiles no starred expressions:
# ruff: noqa: RUF005
# mypy: disable-error-code=assignment
from __future__ import annotations

import triton
import triton.language as tl

from minivllm.kernels.triton.activation import silu_mul
from minivllm.kernels.triton.packed_weight import PLANE, Format
from minivllm.kernels.triton.unpacked_codes import half

# PTX: the bytes of two words as float32: $0 and $1 are plane 0 of both words, $2 and $3 plane 1.
_FP8_ASM = tl.constexpr(
    "{.reg .b16 a, b, c, d; .reg .b32 s, t; mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 s, a; cvt.rn.f16x2.e4m3x2 t, b; "
    "mov.b32 {a, b}, s; mov.b32 {c, d}, t; cvt.f32.f16 $0, a; cvt.f32.f16 $1, c; cvt.f32.f16 $2, b; cvt.f32.f16 $3, d;}")


@triton.constexpr_function
def _integer_asm(bits: int, i: int) -> str:
    """PTX: plane i of two words as subnormal float16: the lowest bits of the float are the code, so it is code * 2^-24.

    Odd planes of four bits stay where they are, times 16, which saves a shift. $2: the bits from the fifth on, of 5-bit and 6-bit codes.
    """
    if bits == 8:
        return f"{{.reg .b32 t; shr.b32 t, $1, {8 * i}; and.b32 $0, t, 0x00ff00ff;}}"
    if bits == 4:
        return f"{{.reg .b32 t; shr.b32 t, $1, {i // 2 * 8}; and.b32 $0, t, {'0x00f000f0' if i % 2 else '0x000f000f'};}}"
    width = bits - 4
    shift, mask = 4 - i * width, ((1 << width) - 1) << 4
    move = f"shl.b32 u, $2, {shift};" if shift >= 0 else f"shr.b32 u, $2, {-shift};"
    low = f"shr.b32 t, $1, {4 * i}; and.b32 t, t, 0x000f000f;"
    return f"{{.reg .b32 t, u; {low} {move} lop3.b32 $0, u, 0x{mask:04x}{mask:04x}, t, 0xea;}}"  # (u & mask) | t


@triton.constexpr_function
def _unit(F: Format, i: int, asm: bool) -> float:
    """What `_codes` must be multiplied by, in plane i. The kernel multiplies x by it."""
    if F.fp8 or not asm:
        return 1.0
    return 2.0**20 if F.bits == 4 and i % 2 else 2.0**24


@triton.constexpr_function
def _sets(F: Format) -> int:
    """Groups of a chunk: the planes of a word are in so many different groups."""
    chunk = PLANE * F.per_word
    return 1 if F.row_scale or F.group >= chunk else chunk // F.group


@triton.jit
def _codes(words, rest, i: tl.constexpr, F: tl.constexpr, ASM: tl.constexpr):
    """Plane i: [W] float32, in the unit of `_unit`."""
    if ASM and F.fp8:
        both = tl.inline_asm_elementwise(_FP8_ASM, "=r,=r,=r,=r,r", [words], dtype=(tl.float32, tl.float32), is_pure=True, pack=2)
        code = both[i]
    elif ASM:
        asm: tl.constexpr = _integer_asm(F.bits, i)
        code = tl.inline_asm_elementwise(asm, "=r,r,r", [words, rest], dtype=tl.float16, is_pure=True, pack=2)
    elif F.bits == 8:
        code = (words.to(tl.int32) >> 8 * i) & 255
        if F.fp8:
            code = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        code = (words.to(tl.int32) >> 4 * i) & 15
        if F.bits > 4:
            code |= (rest.to(tl.int32) >> (F.bits - 4) * i & ((1 << (F.bits - 4)) - 1)) << 4
    return code.to(tl.float32)


@triton.jit
def _per_thread(a):
    """Sums over the 8 words of each thread: [W] -> [W / 8]."""
    return tl.sum(a.reshape(a.shape[0] // 8, 8), 1)


@triton.jit
def _load_row(p, n, start, F: tl.constexpr, W: tl.constexpr):
    """Row n from word `start` on -> (words [W], the rest of their codes [W], scales of each of `_sets` [W / 8], super-scales [W / 8])."""
    WORDS: tl.constexpr = F.k // F.per_word
    WHOLE: tl.constexpr = WORDS % W == 0
    SPAN: tl.constexpr = 8 * F.per_word  # inputs of a thread's words
    word = start + tl.arange(0, W)
    thread = start // 8 + tl.arange(0, W // 8)
    live = None if WHOLE else word < WORDS
    live_thread = None if WHOLE else thread < WORDS // 8
    other = None if WHOLE else 0
    words = tl.load(p.words + n * WORDS + word, mask=live, other=other)
    rest = words
    if F.bits == 5:
        rest = tl.load(p.high + n * (WORDS // 2) + word // 2, mask=live, other=other)
    if F.bits == 6:
        rest = tl.load(p.high + n * WORDS + word, mask=live, other=other)
    scales, supers = (), words
    if not F.row_scale:
        row = p.scales + n // F.rows * (F.k // F.group)
        if _sets(F) == 1:
            scales = (tl.load(row + thread * SPAN // F.group, mask=live_thread, other=other),)
        else:  # see `packed_weight._group_order`; two threads have a chunk
            for j in tl.static_range(_sets(F)):
                scales = scales + (tl.load(row + j * (WORDS // 16) + thread // 2, mask=live_thread, other=other),)
        if F.super_group > 0:
            supers = tl.load(p.supers + n * (F.k // F.super_group) + thread * SPAN // F.super_group, mask=live_thread, other=other)
    return words, rest, scales, supers


@triton.jit
def _load_rows(p, n, N: tl.constexpr, start, F: tl.constexpr, R: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr):
    """Rows n .. n + R, and if GATED those N below: a tuple of `_load_row`. The last row stands for those behind it."""
    rows = ()
    for r in tl.static_range(R):
        rows = rows + (_load_row(p, tl.minimum(n + r, N - 1).to(tl.int64), start, F, W),)
    if GATED:
        for r in tl.static_range(R):
            rows = rows + (_load_row(p, tl.minimum(n + r, N - 1).to(tl.int64) + N, start, F, W),)
    return rows


@triton.jit
def _product(row, values, sums, F: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
    """A loaded row times x: [W / 8]. values: x of each plane, times its unit; sums: of x over each set of planes."""
    words, rest, scales, supers = row
    if F.bits > 4 and F.bits < 8:
        rest = rest.to(tl.int16)
        if F.bits == 5:
            rest = rest >> (tl.arange(0, W) % 2 * 4).to(tl.int16)
    PLANES: tl.constexpr = F.per_word // _sets(F)
    y = tl.zeros([W // 8], tl.float32)
    for j in tl.static_range(_sets(F)):
        each = tl.zeros([W], tl.float32)
        for i in tl.static_range(j * PLANES, (j + 1) * PLANES):
            each += _codes(words, rest, i, F, ASM) * values[i]
        dot = _per_thread(each)
        if F.zero > 0:
            dot -= F.zero * sums[j]
        if F.row_scale:
            y += dot
        elif F.super_group > 0 and F.mins:
            y += (scales[j] & 255).to(tl.float32) * (dot * half(supers, 0, True))
            y -= (scales[j] >> 8 & 255).to(tl.float32) * (sums[j] * half(supers, 1, True))
        elif F.super_group > 0:
            y += scales[j].to(tl.float32) * (dot * half(supers, 0, True))
        elif F.mins:
            y += half(scales[j], 0, F.half_scales) * dot - half(scales[j], 1, F.half_scales) * sums[j]
        elif F.zero < 0:
            y += half(scales[j], 0, F.half_scales) * (dot - (scales[j] >> 16 & 255).to(tl.float32) * sums[j])
        else:
            y += scales[j].to(tl.float32) * dot
    return y


@triton.jit
def packed_matvec(
    out, x, p, norm_weight, bias, residual, eps,  # [N], [K], Planes, [K], [N or 2N], [N]
    F: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A program computes R outputs (of gate and up each), W words of each row at a time: 8 per thread."""
    N: tl.constexpr = F.n // 2 if GATED else F.n
    PLANES: tl.constexpr = F.per_word
    WORDS: tl.constexpr = F.k // PLANES
    WHOLE: tl.constexpr = WORDS % W == 0 and F.k == F.inputs
    ROWS: tl.constexpr = 2 * R if GATED else R
    n = tl.program_id(0) * R
    rows = _load_rows(p, n, N, 0, F, R, W, GATED)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    squares = tl.zeros([W // 8], tl.float32)
    acc = (squares,) * ROWS
    for start in tl.static_range(0, WORDS, W):
        following = rows
        if start + W < WORDS:
            following = _load_rows(p, n, N, start + W, F, R, W, GATED)
        word = start + tl.arange(0, W)
        values, sums = (), ()
        for j in tl.static_range(_sets(F)):
            total = tl.zeros([W], tl.float32)
            for i in tl.static_range(j * (PLANES // _sets(F)), (j + 1) * (PLANES // _sets(F))):
                k = word // 16 * (16 * PLANES) + i * 16 + word % 16
                live = None if WHOLE else k < F.inputs
                value = tl.load(x + k, mask=live, other=None if WHOLE else 0.0).to(tl.float32)
                if NORM:
                    squares += _per_thread(value * value)
                    value *= tl.load(norm_weight + k, mask=live, other=None if WHOLE else 0.0).to(tl.float32)
                total += value
                values = values + (value * _unit(F, i, ASM),)
            sums = sums + (_per_thread(total),)
        added = ()
        for r in tl.static_range(ROWS):
            added = added + (acc[r] + _product(rows[r], values, sums, F, W, ASM),)
        acc, rows = added, following
    scale = tl.rsqrt(tl.sum(squares, 0) / F.inputs + eps) if NORM else 1.0
    n += tl.arange(0, R)
    live = n < N
    y = _finished(tl.sum(_joined(acc, 0, R), 0), p, bias, scale, n, live, F, BIAS)
    if GATED:
        y = silu_mul(y, _finished(tl.sum(_joined(acc, R, R), 0), p, bias, scale, n + N, live, F, BIAS), out.dtype.element_ty)
    if ADD:
        y += tl.load(residual + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def _joined(acc, at: tl.constexpr, R: tl.constexpr):
    """acc[at], acc[at + 1], ..., [L] each -> [L, R], for R = 2, 4 or 8. The order of the pairs is that of the bits of a column's number."""
    if R == 2:
        found = tl.join(acc[at], acc[at + 1])
    elif R == 4:
        found = tl.join(tl.join(acc[at], acc[at + 2]), tl.join(acc[at + 1], acc[at + 3])).reshape(acc[at].shape[0], 4)
    else:
        even = tl.join(tl.join(acc[at], acc[at + 4]), tl.join(acc[at + 2], acc[at + 6])).reshape(acc[at].shape[0], 4)
        odd = tl.join(tl.join(acc[at + 1], acc[at + 5]), tl.join(acc[at + 3], acc[at + 7])).reshape(acc[at].shape[0], 4)
        found = tl.join(even, odd).reshape(acc[at].shape[0], 8)
    return found


@triton.jit
def _finished(y, p, bias, scale, n, live, F: tl.constexpr, BIAS: tl.constexpr):
    """Sums [R] of outputs n -> times the norm's scale and the outputs' scales, plus their bias."""
    y *= scale
    if F.row_scale:
        y *= tl.load(p.scales + n // F.rows, mask=live, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    return y
