"""From packed words to weights in registers: what each kernel with a packed weight does with its tiles.

    words  [BLOCK_N, k] ──▶ codes, one plane of four bits at a time ──▶ (code - zero) * scale - min

`packed_weight` has the layout of the codes. Arguments `p` are its `Planes`, and F is its `Format`.
"""
from __future__ import annotations

import triton
import triton.language as tl

from minivllm.kernels.triton.packed_weight import Format


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
def load_words(p, n, word, live, F: tl.constexpr):
    """n: [.., BN, 1], word: [.., 1, W] -> [.., BN, W]."""
    return tl.load(p.words + n.to(tl.int64) * (F.k // F.per_word) + word, mask=live, other=0)


@triton.jit
def _of_groups(pointer, n, group, live, WIDTH: tl.constexpr):
    """Numbers of groups: [P, BN, G]. WIDTH: numbers in a row of the tensor."""
    return tl.load(pointer + n.to(tl.int64) * WIDTH + group, mask=live & (group < WIDTH), other=0)


@triton.jit
def half(pairs, i: tl.constexpr, F16: tl.constexpr):
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
def small_codes(F: Format, dtype: tl.dtype, asm: bool) -> bool:
    """Whether `weights_of_plane` reads codes as subnormal bfloat16 numbers, code * 2^-133: then one fused operation scales and shifts.

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
def weights_of_plane(p, words, n, first, live_n, i: tl.constexpr, F: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """The weights of plane i, times 2^-16 if `small_codes`, without the scales of a whole row. Arguments and result as for `_codes`."""
    SMALL: tl.constexpr = small_codes(F, dtype, ASM)
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
            scales = (numbers & 255).to(tl.float32) * _repeat(half(supers, 0, True) * UNIT, G)
            offsets = (numbers >> 8 & 255).to(tl.float32) * _repeat(half(supers, 1, True) * SHIFT, G)
        else:
            scales = numbers.to(tl.float32) * _repeat(half(supers, 0, True) * UNIT, G)
    elif F.mins or F.zero < 0:
        scales = half(numbers, 0, F.half_scales) * UNIT
        if F.mins:
            offsets = half(numbers, 1, F.half_scales) * SHIFT
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
