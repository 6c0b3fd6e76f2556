"""Three kernels for packed weights: inputs in the form that products read, products with a few rows, and values for a dense product."""
from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np

from minivllm.kernels.numba.grouped_tiles import TILE, dequantize_tile, multiply_tile
from minivllm.kernels.numba.threads import Kernel, vector_shape
from minivllm.kernels.numba.vectors import (
    address_of,
    fetch_add,
    fma,
    get_f32,
    get_f64,
    load,
    load_either,
    put_f32,
    put_i64,
    rounded_either,
    splat,
    stack,
    store,
    store_either,
    total,
)

# Arguments, 8 bytes each: addresses unless stated otherwise, strides in bytes, addresses of 0 are none. Last those of the weight: five
# arrays, each with its stride from tile to tile, three counts, the codes of a word, the group, and the zero.
WEIGHT_ARGS = struct.Struct("15qd")
CALL_ARGS = struct.Struct(f"15qd{WEIGHT_ARGS.size}s")
(COUNTER, END, OUT, OUT_STRIDE, HALF, RESIDUAL, RESIDUAL_STRIDE, BIAS, X, X_STRIDE, ROWS, NORM, INPUTS, SUMS, FLAG, EPS,
 WORDS, WORDS_STRIDE, HIGH, HIGH_STRIDE, SCALES, SCALES_STRIDE, OFFSETS, OFFSETS_STRIDE, SUPERS, SUPERS_STRIDE, NUM_SUPERS, NUM_GROUPS,
 NUM_WORDS, CODES, GROUP, ZERO, NUM_ARGS) = range(33)
SUMS_BYTES = 4 * 4 * TILE  # of four rows


@lru_cache(maxsize=1)
def inputs_kernel() -> Kernel:
    """x, normalized if there is a norm, divided by the codes' powers of two -> INPUTS: blocks of [K, 4 rows]. SUMS: of each group.

    If one row is left, its block is [K, 1]. Two or three are filled up with zeros. FLAG is set to 1 if a sum is not finite. One thread
    computes it: for a few rows the others would start too late.
    """
    LANES = 8

    def arrange(p: Any) -> None:
        args = address_of(p)
        factors = stack(32)
        codes, group, rows, half = p[CODES], p[GROUP], p[ROWS], p[HALF]
        item = 2 if half else 4
        groups = p[NUM_SUPERS] * p[NUM_GROUPS]
        n = groups * group
        for c in range(8):
            power = c & (codes - 1)
            put_f32(factors + 4 * c, np.float32(1.0 if power == codes - 1 else 1.0 / (1 << (power * (32 // codes)))))
        factor, zeros = load(factors, LANES, 0), splat(np.float32(0.0), LANES)
        temporary = p[INPUTS] + (rows + 3) * n * 4
        for row in range(rows if rows & 3 < 2 else (rows + 3) & ~3):
            squares = zeros
            for c in range(0, n, LANES):
                x = zeros
                if row < rows:
                    x = load_either(p[X] + row * p[X_STRIDE] + c * item, LANES, half)
                squares = fma(x, x, squares)
                store(temporary + c * 4, x, 0)
            scale = splat(np.float32(1.0 / math.sqrt(total(squares) / np.float32(n) + np.float32(get_f64(args + 8 * EPS)))), LANES)
            first = row & ~3
            width = 1 if first == rows - 1 else 4
            out = p[INPUTS] + (first * n + row - first) * 4
            sums = p[SUMS] + (first * groups + row - first) * 4
            for g in range(groups):
                part = zeros
                for c in range(g * group, (g + 1) * group, LANES):
                    x = load(temporary + c * 4, LANES, 0)
                    if p[NORM] != 0:  # rounded where the reference rounds
                        x = rounded_either(rounded_either(x * scale, half) * load_either(p[NORM] + c * item, LANES, half), half)
                    part = part + x
                    place = temporary if width > 1 else out
                    store(place + c * 4, x * factor, 0)
                    if width > 1:
                        for i in range(c, c + LANES):
                            put_f32(out + i * 16, get_f32(temporary + i * 4))
                s = total(part)
                put_f32(sums + g * width * 4, s)
                if not math.isfinite(s):
                    put_i64(args + 8 * FLAG, 1)

    return Kernel(arrange, "the inputs of products with packed weights")


@lru_cache(maxsize=32)
def product_kernel(bits: int, number: int, offset: int) -> Kernel:
    """OUT = inputs times the weight, plus bias and residual; a task is a tile of 16 outputs."""
    BITS, NUMBER, OFFSET, LANES = bits, number, offset, vector_shape()[0]

    def multiply(p: Any) -> None:
        args = address_of(p)
        zero = np.float32(get_f64(args + 8 * ZERO))
        sums = stack(SUMS_BYTES)
        rows, supers, groups, words = p[ROWS], p[NUM_SUPERS], p[NUM_GROUPS], p[NUM_WORDS]
        n = supers * groups * words * p[CODES]
        half = p[HALF]
        item = 2 if half else 4
        while True:
            tile = fetch_add(args, 1)
            if tile >= p[END]:
                break
            a, b, c = p[WORDS] + tile * p[WORDS_STRIDE], p[HIGH] + tile * p[HIGH_STRIDE], p[SCALES] + tile * p[SCALES_STRIDE]
            d, e = p[OFFSETS] + tile * p[OFFSETS_STRIDE], p[SUPERS] + tile * p[SUPERS_STRIDE]
            row = 0
            while row < rows:
                width = min(4, rows - row)
                x, s = p[INPUTS] + row * n * 4, p[SUMS] + row * supers * groups * 4
                if width > 1:
                    multiply_tile(sums, a, b, c, d, e, x, s, supers, groups, words, zero, BITS, NUMBER, OFFSET, LANES, 4)
                else:
                    multiply_tile(sums, a, b, c, d, e, x, s, supers, groups, words, zero, BITS, NUMBER, OFFSET, LANES, 1)
                for r in range(width):
                    for i in range(0, TILE, LANES):
                        column = (tile * TILE + i) * item
                        y = load(sums + (r * TILE + i) * 4, LANES, 0)
                        if p[BIAS] != 0:
                            y = y + load_either(p[BIAS] + column, LANES, half)
                        if p[RESIDUAL] != 0:
                            y = y + load_either(p[RESIDUAL] + (row + r) * p[RESIDUAL_STRIDE] + column, LANES, half)
                        store_either(p[OUT] + (row + r) * p[OUT_STRIDE] + column, y, half)
                row += width

    return Kernel(multiply, f"products with packed weights of {bits} bits")


@lru_cache(maxsize=32)
def values_kernel(bits: int, number: int, offset: int) -> Kernel:
    """OUT = columns of the transposed weight: [K, 16 per tile]. A task is two tiles, so that threads write to different cache lines."""
    BITS, NUMBER, OFFSET, LANES = bits, number, offset, vector_shape()[0]

    def unpack(p: Any) -> None:
        args = address_of(p)
        zero = np.float32(get_f64(args + 8 * ZERO))
        while True:
            pair = fetch_add(args, 1)
            if 2 * pair >= p[END]:
                break
            for tile in range(2 * pair, min(2 * pair + 2, p[END])):
                a, b, c = p[WORDS] + tile * p[WORDS_STRIDE], p[HIGH] + tile * p[HIGH_STRIDE], p[SCALES] + tile * p[SCALES_STRIDE]
                d, e = p[OFFSETS] + tile * p[OFFSETS_STRIDE], p[SUPERS] + tile * p[SUPERS_STRIDE]
                if p[HALF]:
                    dequantize_tile(p[OUT] + tile * TILE * 2, p[OUT_STRIDE], a, b, c, d, e, p[NUM_SUPERS], p[NUM_GROUPS], p[NUM_WORDS],
                                    zero, BITS, NUMBER, OFFSET, LANES, 1)
                else:
                    dequantize_tile(p[OUT] + tile * TILE * 4, p[OUT_STRIDE], a, b, c, d, e, p[NUM_SUPERS], p[NUM_GROUPS], p[NUM_WORDS],
                                    zero, BITS, NUMBER, OFFSET, LANES, 0)

    return Kernel(unpack, f"the values of packed weights of {bits} bits")
