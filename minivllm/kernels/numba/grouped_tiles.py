"""The layout of packed weights on a CPU, and the loops that read it: products with a few rows, and values for a dense product.

Outputs are divided into tiles of 16. The codes of a tile are 32-bit words, so that one vector holds words of neighboring outputs:

    words    [tiles, K / 8, 16]     word [t, j, i] holds the low four bits of eight codes: output 16 t + i, inputs 8 j to 8 j + 7
                                    (codes of 8 bits: [tiles, K / 4, 16] and four codes)
    high     [tiles, K / 32, 16]    for codes of 5 bits: bit 4 c + j holds the fifth bit of code c in word j of four
             [tiles, K / 16, 16]    for codes of 6 bits: bits 4 c + 2 j and 4 c + 2 j + 1 hold the others of code c in word j of two
    scales   [tiles, K / group, 16]     numbers of a `form`; offsets, if they are stored, in the same way
    supers   [tiles, super-groups, 1 or 2, 16] float16     the super-scales and super-mins

A code is used where it is in its word: masked and converted to float32, code c is 16^c (or 256^c) times too large, and x[c] is divided by
the same power of two beforehand, which is exact. So a vector of weights costs three instructions: and, convert, multiply-add. The scale is
applied once per group, to the sum of its products:

    y = sum over groups g of  scale[g] * (sum of code * x - zero[g] * sum of x) - min[g] * sum of x
"""
from __future__ import annotations

from collections.abc import Sequence

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minivllm.kernels.numba.vectors import (
    F32,
    I32,
    I64,
    at,
    constant,
    emit_fma,
    emit_from_fp8,
    emit_prefetch,
    emit_splat,
    emit_store,
    pointer,
)
from minivllm.kernels.tuning import CPU_PREFETCH_BYTES

I8, F16 = ir.IntType(8), ir.HalfType()
TILE = 16  # outputs
FLOAT16, FLOAT32, UINT8, INT8 = range(4)  # how scales are stored; integers are multiplied by super-scales
# Offsets: one zero for the whole weight, a uint8 zero per group, a min per group like the scales; or none, and codes are e4m3 numbers.
ONE_ZERO, ZEROS, MINS, FP8 = range(4)


class _Cursor:
    """An address that moves through memory."""

    def __init__(self, builder: ir.IRBuilder, start: ir.Value) -> None:
        self._builder, self._cell = builder, cgutils.alloca_once(builder, I64)
        builder.store(start, self._cell)

    def get(self) -> ir.Value:
        return self._builder.load(self._cell)

    def advance(self, num_bytes: ir.Value | int) -> None:
        step = I64(num_bytes) if isinstance(num_bytes, int) else num_bytes
        self._builder.store(self._builder.add(self.get(), step), self._cell)


class _Reader:
    """Emits the instructions that read a tile: its groups in order, and in each group its words."""

    def __init__(self, builder: ir.IRBuilder, addresses: Sequence[ir.Value], zero: ir.Value, form: tuple[int, ...], lanes: int) -> None:
        """addresses: of the tile's words, high, scales, offsets, supers. form: bits, how scales are stored, kind of offsets."""
        self.builder, self.lanes, self.vectors = builder, lanes, range(TILE // lanes)
        self.bits, self.number, self.offset = form
        self._words, self._high, self._scales, self._offsets, self._supers = (_Cursor(builder, address) for address in addresses)
        self._zero = [emit_splat(builder, zero, lanes)] * len(self.vectors)
        self._super_scales: list[ir.Value] = []
        self._super_mins: list[ir.Value] = []

    def next_super(self) -> None:
        """Load super-scales, if there are any."""
        if self.number in (UINT8, INT8):
            self._super_scales = self._numbers(self._supers, FLOAT16, [])
            self._super_mins = self._numbers(self._supers, FLOAT16, []) if self.offset == MINS else []

    def next_scales(self) -> tuple[list[ir.Value], list[ir.Value]]:
        """-> (scales, zeros or mins) of a group."""
        scales = self._numbers(self._scales, self.number, self._super_scales)
        if self.offset in (ONE_ZERO, FP8):
            return scales, self._zero
        number, factors = (UINT8, []) if self.offset == ZEROS else (self.number, self._super_mins)
        return scales, self._numbers(self._offsets, number, factors)

    def next_words(self, index: ir.Value) -> list[list[ir.Value]]:
        """-> word `index` of the group; for codes of 5 or 6 bits also its high bits, in their places in codes 0 to 6 and in code 7."""
        b = self.builder
        words = self._load(self._words, I32)
        emit_prefetch(b, at(b, self._words.get(), CPU_PREFETCH_BYTES), 4 * TILE)
        self._words.advance(4 * TILE)
        if self.bits not in (5, 6):
            return [words]
        width = self.bits - 4
        step = b.mul(b.and_(b.trunc(index, I32), I32(4 // width - 1)), I32(width))
        high = self._load(self._high, I32)
        self._high.advance(b.select(b.icmp_unsigned("==", step, I32(4 - width)), I64(4 * TILE), I64(0)))
        left, right = (emit_splat(b, amount, self.lanes) for amount in (b.sub(I32(4), step), b.add(I32(24), step)))
        return [words, [b.shl(h, left) for h in high], [b.lshr(h, right) for h in high]]

    def codes(self, words: list[list[ir.Value]], c: int, *, in_place: bool) -> list[ir.Value]:
        """Code c of all words as float32. In place: times a power of two, see the module's description."""
        b, width = self.builder, 8 if self.bits == 8 else 4
        shift, is_last = c * width, c == 32 // width - 1
        if self.offset == FP8:
            octets = [b.trunc(b.lshr(w, constant(shift, self.lanes, I32)), ir.VectorType(I8, self.lanes)) for w in words[0]]
            return [emit_from_fp8(b, octet, self.lanes, 2.0**shift if in_place and not is_last else 1.0) for octet in octets]
        codes = [b.lshr(w, constant(shift, self.lanes, I32)) if is_last or not in_place else w for w in words[0]]
        if not is_last:
            mask = ((1 << width) - 1) << (shift if in_place else 0)
            codes = [b.and_(w, constant(mask, self.lanes, I32)) for w in codes]
        if len(words) == 3:
            mask = ((1 << (self.bits - 4)) - 1) << 4
            high = [b.and_(h, constant(mask if is_last else mask << shift, self.lanes, I32)) for h in words[2 if is_last else 1]]
            if not is_last and not in_place:
                high = [b.lshr(h, constant(shift, self.lanes, I32)) for h in high]
            codes = [b.or_(w, h) for w, h in zip(codes, high, strict=True)]
        return [b.sitofp(w, ir.VectorType(F32, self.lanes)) for w in codes]

    def _load(self, cursor: _Cursor, kind: ir.Type) -> list[ir.Value]:
        """A row of numbers of the tile, without moving on."""
        vector, size = ir.VectorType(kind, self.lanes), TILE_BYTES[str(kind)]
        return [self.builder.load(pointer(self.builder, at(self.builder, cursor.get(), v * self.lanes * size), vector), align=size)
                for v in self.vectors]

    def _numbers(self, cursor: _Cursor, number: int, factors: list[ir.Value]) -> list[ir.Value]:
        """A row of scales, zeros or mins as float32, times `factors` if there are any."""
        b, floats = self.builder, ir.VectorType(F32, self.lanes)
        kind = (F16, F32, I8, I8)[number]
        values = self._load(cursor, kind)
        cursor.advance(TILE * TILE_BYTES[str(kind)])
        if number == FLOAT16:
            values = [b.fpext(v, floats) for v in values]
        elif number != FLOAT32:
            widen = b.zext if number == UINT8 else b.sext
            values = [b.sitofp(widen(v, ir.VectorType(I32, self.lanes)), floats) for v in values]
        return [b.fmul(v, f) for v, f in zip(values, factors, strict=True)] if factors else values


TILE_BYTES = {str(I32): 4, str(F32): 4, str(F16): 2, str(I8): 1}


@intrinsic(prefer_literal=True)
def multiply_tile(typingctx, out, words, high, scales, offsets, supers, x, sums, num_supers, num_groups, num_words, zero, bits, number,
                  offset, lanes, rows):
    """out[m, i] = product of row m of x with output i of a tile: [rows, 16] float32.

    x: [K, rows] float32, already divided by the codes' powers of two; sums: [K / group, rows] float32, of x in each group. num_supers,
    num_groups, num_words: super-groups of the tile, groups of each, words of each group.
    """
    form, n, m = (bits.literal_value, number.literal_value, offset.literal_value), lanes.literal_value, rows.literal_value

    def emit(context, builder, sig, args):
        b, zeros = builder, constant(0.0, n)
        reader = _Reader(b, args[1:6], args[11], form, n)
        x_at, sums_at = _Cursor(b, args[6]), _Cursor(b, args[7])
        cells = [(v, r) for v in reader.vectors for r in range(m)]
        chains = max(1, 8 // len(cells))  # sums per cell: enough that an addition need not wait for the previous one
        totals = {cell: cgutils.alloca_once(b, zeros.type) for cell in cells}
        parts = {(*cell, c): cgutils.alloca_once(b, zeros.type) for cell in cells for c in range(chains)}
        for total in totals.values():
            b.store(zeros, total)
        with cgutils.for_range(b, args[8]):
            reader.next_super()
            with cgutils.for_range(b, args[9]):
                for part in parts.values():
                    b.store(zeros, part)
                with cgutils.for_range(b, args[10]) as loop:
                    loaded = reader.next_words(loop.index)
                    count = 32 // (8 if form[0] == 8 else 4)
                    for c in range(count):
                        codes = reader.codes(loaded, c, in_place=True)
                        for r in range(m):
                            value = emit_splat(b, b.load(pointer(b, at(b, x_at.get(), 4 * (c * m + r)), F32)), n)
                            for v in reader.vectors:
                                part = parts[v, r, c % chains]
                                b.store(emit_fma(b, codes[v], value, b.load(part)), part)
                    x_at.advance(4 * m * count)
                scales, offsets = reader.next_scales()
                for r in range(m):
                    total_x = emit_splat(b, b.load(pointer(b, at(b, sums_at.get(), 4 * r), F32)), n)
                    for v in reader.vectors:
                        value = _sum(b, [b.load(parts[v, r, c]) for c in range(chains)])
                        minus = b.fneg(b.fmul(offsets[v], total_x))
                        before = b.load(totals[v, r])
                        if form[2] == MINS:
                            before = b.fadd(before, minus)
                        else:
                            value = b.fadd(value, minus)
                        b.store(emit_fma(b, scales[v], value, before), totals[v, r])
                sums_at.advance(4 * m)
        for (v, r), total in totals.items():
            b.store(b.load(total), pointer(b, at(b, args[0], 4 * (r * TILE + v * n)), zeros.type), align=4)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 11), types.float32, bits, number, offset, lanes, rows), emit


def _sum(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    while len(values) > 1:
        values = [builder.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@intrinsic(prefer_literal=True)
def dequantize_tile(typingctx, out, stride, words, high, scales, offsets, supers, num_supers, num_groups, num_words, zero, bits, number,
                    offset, lanes, half):
    """out[k, i] = weight of output i and input k, for all inputs: [K, 16] float32 or bfloat16 with `stride` bytes from row to row."""
    form, n, narrow = (bits.literal_value, number.literal_value, offset.literal_value), lanes.literal_value, half.literal_value

    def emit(context, builder, sig, args):
        b = builder
        reader, out_at = _Reader(b, args[2:7], args[10], form, n), _Cursor(b, args[0])
        with cgutils.for_range(b, args[7]):
            reader.next_super()
            with cgutils.for_range(b, args[8]):
                scales, offsets = reader.next_scales()
                with cgutils.for_range(b, args[9]) as loop:
                    loaded = reader.next_words(loop.index)
                    for c in range(4 if form[0] == 8 else 8):
                        for v, code in enumerate(reader.codes(loaded, c, in_place=False)):
                            if form[2] == MINS:
                                value = b.fsub(b.fmul(code, scales[v]), offsets[v])
                            else:
                                value = b.fmul(b.fsub(code, offsets[v]), scales[v])
                            emit_store(b, at(b, out_at.get(), v * n * (2 if narrow else 4)), value, n, narrow)
                        out_at.advance(args[1])
        return context.get_dummy_value()

    return types.void(*([types.int64] * 10), types.float32, bits, number, offset, lanes, half), emit
