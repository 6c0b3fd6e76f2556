"""Keys and values of 8 bits in Triton: how new ones are stored, and how tiles of them become numbers that tensor cores multiply.

A cache of fp8 or int8 is read and written as int8 *codes*. Stored codes and scales are computed with integers, so that all GPUs and
the interpreter agree with the reference in every bit.

Scales are not multiplied into tiles. Those of keys multiply the scores: one multiplication per score instead of one per element.
Those of values multiply the softmax weights. These products may be too small or too large for 16 bits, so the online softmax keeps
the largest of them at 1 (and not the largest weight): its running maximum is that of score + log2(scale of the value).
"""
from __future__ import annotations

import triton
import triton.language as tl

from minivllm.kernels.reference.kv_cache import SMALLEST_SCALE

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def quantize(x, FP8: tl.constexpr):
    """x: [rows, N] float32 -> codes [rows, N] int8, the numbers that they stand for [rows, N] float32, and scales [rows] float32."""
    scale = tl.max(tl.abs(x), 1) * ((1.0 / 448.0) if FP8 else (1.0 / 127.0))
    bits = tl.maximum(scale, _SMALLEST_SCALE).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000  # as bfloat16, ties to even
    scale = bits.to(tl.float32, bitcast=True)
    x = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    if FP8:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)  # ties to even
        multiple = (size.to(tl.float32, bitcast=True) + 24576.0).to(tl.int32, bitcast=True)  # of 2^-9: 1.5 * 2^14 ends there
        code = tl.where(size < (127 - 6) << 23, multiple & 0xFF, normal) | ((bits >> 24) & 0x80)
        half = ((code & 0x7F) << 7) | ((code & 0x80) << 8)  # the same bits in float16 are a number 2^8 times smaller
        x = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        codes = code.to(tl.int8)
    else:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: to a whole number, ties to even
        codes = x.to(tl.int8)
    return codes, x, scale


@triton.constexpr_function
def _int8_asm(first: str, second: str) -> str:
    """PTX: four int8 codes in a register -> two registers of two float16 numbers, whose bytes the two selectors choose.

    The bits of the float16 number 1024 + n are 0x6400 + n, and n is the code + 128.
    """
    return f"""{{
        .reg .b32 t, low, high, shift;
        mov.b32 shift, 0x64806480;
        xor.b32 t, $2, 0x80808080;
        prmt.b32 low, t, 0x64646464, {first};
        prmt.b32 high, t, 0x64646464, {second};
        sub.f16x2 $0, low, shift;
        sub.f16x2 $1, high, shift;
    }}"""


@triton.jit
def widen(codes, DTYPE: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr = False):
    """The numbers that codes stand for, without their scales. Exact in float16 and float32, and in bfloat16. NATIVE: see `widen_pairs`."""
    if FP8:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    elif NATIVE:
        numbers = tl.inline_asm_elementwise(_int8_asm("0x4140", "0x4342"), "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        numbers = codes.to(DTYPE)
    return numbers


@triton.jit
def widen_pairs(pairs, DTYPE: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Two codes per int16, [N, D / 2] -> the numbers of the lower and of the upper codes: [N, D / 2] each.

    Values are loaded in this way because shared memory is transposed for tensor cores in units of 16 bits. NATIVE: compiled for a GPU, to
    float16: two neighbors in a register are converted together.
    """
    if NATIVE:
        FROM_FP8: tl.constexpr = """{
            .reg .b32 t; .reg .b16 low, high;
            prmt.b32 t, $2, 0, 0x3120;
            mov.b32 {low, high}, t;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
        }"""
        low, high = tl.inline_asm_elementwise(
            FROM_FP8 if FP8 else _int8_asm("0x4240", "0x4341"), "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)
    else:
        low = widen(pairs.to(tl.int8), DTYPE, FP8)
        high = widen((pairs >> 8).to(tl.int8), DTYPE, FP8)
    return low, high


@triton.jit
def load_scales(scale_pairs, row, live):
    """Scales of the keys and of the values of the heads `row`: [N] float32 each; 1 where not live.

    Both are loaded together, because only loads of at least four bytes can be started ahead of their use.
    """
    pairs = tl.load(scale_pairs + row, mask=live, other=0x3F803F80)  # twice 1 in bfloat16
    return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def store_scales(scales, row, k_scale, v_scale, live):
    """Store the scales of a key and of a value in the heads `row`."""
    tl.store(scales + row * 2, k_scale.to(tl.bfloat16), mask=live)
    tl.store(scales + row * 2 + 1, v_scale.to(tl.bfloat16), mask=live)
