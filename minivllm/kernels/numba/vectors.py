"""Vectors of float32 inside Numba functions: a type, its arithmetic, and the two loops in which attention spends its time.

Numba leaves the choice of vector instructions to LLVM, which has to guess it from scalar loops. Attention on a few query rows is fast
only if sums stay in registers. So the vectors are explicit here: each function below emits a few LLVM instructions on vectors of `lanes`
floats, and LLVM maps them to the registers of the CPU (AVX2, AVX-512, NEON ...). Memory is given by addresses (integers). `kind` says what
memory holds: 0 float32, 1 bfloat16, 2 int8, 3 fp8 (e4m3). `half` is a kind too: 1 for bfloat16, which is the upper half of a float32.

The functions use Numba's extension API (`numba.extending`) and llvmlite's IR builder. `tests/kernels/test_numba.py` names what would
have to change with another version of Numba.
"""
from __future__ import annotations

import math
import operator
from itertools import pairwise
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

F16, F32, I8, I16, I32, I64 = ir.HalfType(), ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT32, BFLOAT16, INT8, FP8 = range(4)
SIZES = (4, 2, 1, 1)  # bytes of a number of each kind
LOWEST = -3.0e38  # less than any score, but finite: the difference of two such numbers is not NaN


class Vector(types.Type):
    """`lanes` float32 numbers in registers."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"float32 x {lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(F32, kind.lanes))


def _define(operation: Any, instruction: str) -> None:
    """`a operation b` for two vectors of the same length."""
    @type_callable(operation)
    def _type_of(context: Any) -> Any:
        return lambda a, b: a if isinstance(a, Vector) and a == b else None

    lower_builtin(operation, Vector, Vector)(lambda context, builder, sig, args: getattr(builder, instruction)(*args))


for _operation, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _define(_operation, _instruction)


# --- emitting instructions -----------------------------------------------------------------------------------------


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def emit_splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def constant(value: Any, lanes: int, kind: ir.Type = F32) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def emit_load(builder: ir.IRBuilder, address: ir.Value, lanes: int, kind: int) -> ir.Value:
    """`lanes` numbers from memory. bfloat16 is widened by a shift."""
    if kind == FLOAT32:
        return builder.load(pointer(builder, address, ir.VectorType(F32, lanes)), align=4)
    narrow = builder.load(pointer(builder, address, ir.VectorType(I16 if kind == BFLOAT16 else I8, lanes)), align=SIZES[kind])
    if kind == INT8:
        return builder.sitofp(builder.sext(narrow, ir.VectorType(I32, lanes)), ir.VectorType(F32, lanes))
    if kind == FP8:
        return emit_from_fp8(builder, narrow, lanes)
    wide = builder.zext(narrow, ir.VectorType(I32, lanes))
    return builder.bitcast(builder.shl(wide, constant(16, lanes, I32)), ir.VectorType(F32, lanes))


def emit_from_fp8(builder: ir.IRBuilder, bits: ir.Value, lanes: int, factor: float = 1.0) -> ir.Value:
    """e4m3 -> float32 times a power of two.

    The way is through float16, whose exponent and mantissa are longer: the same bits there are a number 2^8 times smaller.
    """
    wide = builder.shl(builder.sext(bits, ir.VectorType(I16, lanes)), constant(7, lanes, I16))  # two copies of the sign, then seven bits
    half = builder.bitcast(builder.and_(wide, constant(0xBFFF, lanes, I16)), ir.VectorType(F16, lanes))
    return builder.fmul(builder.fpext(half, ir.VectorType(F32, lanes)), constant(256.0 * factor, lanes))


def _to_bytes(builder: ir.IRBuilder, x: ir.Value, lanes: int, kind: int) -> ir.Value:
    """Round to int8 or e4m3, ties to even. x: of at most 127.5 or 464 in magnitude."""
    ints = ir.VectorType(I32, lanes)

    def of_multiple(x: ir.Value, magic: float) -> ir.Value:  # a sum with this number has the multiple in its lowest bits
        return builder.bitcast(builder.fadd(x, constant(magic, lanes)), ints)

    if kind == INT8:
        code = of_multiple(x, 1.5 * 2**23)
    else:
        bits = builder.bitcast(x, ints)
        sign = builder.and_(builder.lshr(bits, constant(24, lanes, I32)), constant(0x80, lanes, I32))
        bits = builder.and_(bits, constant(0x7FFFFFFF, lanes, I32))
        odd = builder.and_(builder.lshr(bits, constant(20, lanes, I32)), constant(1, lanes, I32))
        rounded_bits = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFFF, lanes, I32))), constant(20, lanes, I32))
        normal = builder.sub(rounded_bits, constant((127 - 7) << 3, lanes, I32))
        small = of_multiple(builder.bitcast(bits, x.type), 1.5 * 2**14)  # below 2^-6, e4m3 has the multiples of 2^-9
        is_small = builder.icmp_unsigned("<", bits, constant((127 - 6) << 23, lanes, I32))
        code = builder.or_(builder.select(is_small, small, normal), sign)
    return builder.trunc(code, ir.VectorType(I8, lanes))


def upper_half(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """Round float32 to bfloat16, ties to even: -> 32 bits, of which the caller drops the lower half.

    A NaN from bfloat16 or from arithmetic has zeros in its lower half, so that it stays a NaN.
    """
    bits = builder.bitcast(value, ir.VectorType(I32, lanes))
    odd = builder.and_(builder.lshr(bits, constant(16, lanes, I32)), constant(1, lanes, I32))
    return builder.add(bits, builder.add(odd, constant(0x7FFF, lanes, I32)))


def emit_rounded(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """float32 numbers rounded to bfloat16, as float32."""
    return builder.bitcast(builder.and_(upper_half(builder, value, lanes), constant(0xFFFF0000, lanes, I32)), value.type)


def emit_store(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, lanes: int, kind: int) -> None:
    """`lanes` float32 numbers to memory, rounded to `kind`."""
    if kind == BFLOAT16:
        value = builder.lshr(upper_half(builder, value, lanes), constant(16, lanes, I32))
        value = builder.trunc(value, ir.VectorType(I16, lanes))
    elif kind != FLOAT32:
        value = _to_bytes(builder, value, lanes, kind)
    builder.store(value, pointer(builder, address, value.type), align=SIZES[kind])


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), f"llvm.fmuladd.v{a.type.count}f32")
    return builder.call(function, [a, b, c])


def _halves(builder: ir.IRBuilder, x: ir.Value, lanes: int) -> tuple[ir.Value, ir.Value]:
    half = lanes // 2
    mask = ir.VectorType(I32, half)
    return (builder.shuffle_vector(x, x, ir.Constant(mask, list(range(half)))),
            builder.shuffle_vector(x, x, ir.Constant(mask, list(range(half, lanes)))))


def _add_pairs(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: int) -> ir.Value:
    """-> x0 + x1, x2 + x3, y0 + y1, y2 + y3, for each four lanes."""
    kind = ir.VectorType(I32, lanes)
    masks = [ir.Constant(kind, [b + i + (lanes if i >= 4 else 0) - (4 if i >= 4 else 0) for b in range(0, lanes, 4)
                                for i in picked]) for picked in ((0, 2, 4, 6), (1, 3, 5, 7))]
    return builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks))


def _split_heads(heads: int, most: int) -> list[range]:
    """Consecutive groups of heads, of at most `most` and of nearly equal size."""
    groups = -(-heads // most)
    edges = [heads * i // groups for i in range(groups + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def at(builder: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    return builder.add(address, ir.Constant(I64, offset)) if offset else address


def emit_prefetch(builder: ir.IRBuilder, row: ir.Value, num_bytes: int) -> None:
    """Prefetch `num_bytes` from `row` on, in cache lines of 64 bytes."""
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), "llvm.prefetch.p0")
    for line in range(0, num_bytes, 64):
        builder.call(function, [builder.inttoptr(at(builder, row, line), byte), I32(0), I32(3), I32(1)])


# --- memory --------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def load(typingctx, address, lanes, kind):
    """Vector of `lanes` at `address`."""
    n, stored = lanes.literal_value, kind.literal_value
    return Vector(n)(types.int64, lanes, kind), lambda context, builder, sig, args: emit_load(builder, args[0], n, stored)


@intrinsic(prefer_literal=True)
def store(typingctx, address, value, kind):
    """Vector -> memory."""
    n, stored = value.lanes, kind.literal_value

    def emit(context, builder, sig, args):
        emit_store(builder, args[0], args[1], n, stored)
        return context.get_dummy_value()

    return types.void(types.int64, value, kind), emit


@intrinsic(prefer_literal=True)
def rounded(typingctx, value, half):
    """The vector as it would be after a store and a load."""
    n, narrow = value.lanes, half.literal_value

    def emit(context, builder, sig, args):
        return emit_rounded(builder, args[0], n) if narrow else args[0]

    return value(value, half), emit


@intrinsic(prefer_literal=True)
def load_either(typingctx, address, lanes, half):
    """As `load`, where `half` is known at run time only: nonzero for bfloat16."""
    n = lanes.literal_value

    def emit(context, builder, sig, args):
        cell = cgutils.alloca_once(builder, ir.VectorType(F32, n))
        with builder.if_else(cgutils.is_not_null(builder, args[2])) as (then, otherwise):
            for narrow, branch in ((1, then), (0, otherwise)):
                with branch:
                    builder.store(emit_load(builder, args[0], n, narrow), cell)
        return builder.load(cell)

    return Vector(n)(types.int64, lanes, types.int64), emit


@intrinsic
def store_either(typingctx, address, value, half):
    """As `store`, where `half` is known at run time only."""
    def emit(context, builder, sig, args):
        with builder.if_else(cgutils.is_not_null(builder, args[2])) as (then, otherwise):
            for narrow, branch in ((1, then), (0, otherwise)):
                with branch:
                    emit_store(builder, args[0], args[1], value.lanes, narrow)
        return context.get_dummy_value()

    return types.void(types.int64, value, types.int64), emit


@intrinsic
def rounded_either(typingctx, value, half):
    """As `rounded`, where `half` is known at run time only."""
    def emit(context, builder, sig, args):
        return builder.select(cgutils.is_not_null(builder, args[1]), emit_rounded(builder, args[0], value.lanes), args[0])

    return value(value, types.int64), emit


def _scalar_access(kind: types.Type, bits: ir.Type) -> tuple[Any, Any]:
    @intrinsic
    def get(typingctx, address):
        return kind(types.int64), lambda context, builder, sig, args: builder.load(pointer(builder, args[0], bits))

    @intrinsic
    def put(typingctx, address, value):
        def emit(context, builder, sig, args):
            builder.store(args[1], pointer(builder, args[0], bits))
            return context.get_dummy_value()

        return types.void(types.int64, kind), emit

    return get, put


@intrinsic
def address_of(typingctx, pointer):
    """A pointer as a number."""
    return types.int64(pointer), lambda context, builder, sig, args: builder.ptrtoint(args[0], I64)


get_f64, put_f64 = _scalar_access(types.float64, ir.DoubleType())
get_f32, put_f32 = _scalar_access(types.float32, F32)
get_i32, put_i32 = _scalar_access(types.int32, I32)
get_i64, put_i64 = _scalar_access(types.int64, I64)


@intrinsic
def fetch_add(typingctx, address, value):
    """Add to an int32 that threads share -> its value before. A thread that reads the sum sees everything written before the addition."""
    def emit(context, builder, sig, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], I32), args[1], "acq_rel")

    return types.int32(types.int64, types.int32), emit


@intrinsic(prefer_literal=True)
def stack(typingctx, size):
    """Address of `size` bytes that live until the function returns."""
    num_bytes = size.literal_value

    def emit(context, builder, sig, args):
        # Not `alloca_once`, which stores zeros: LLVM would spend minutes on one store of some thousand bytes.
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(ir.IntType(8), num_bytes))
        memory.align = 64
        return builder.ptrtoint(memory, I64)

    return types.int64(size), emit


@intrinsic(prefer_literal=True)
def prefetch(typingctx, address, size):
    """Prefetch `size` bytes."""
    num_bytes = size.literal_value

    def emit(context, builder, sig, args):
        emit_prefetch(builder, args[0], num_bytes)
        return context.get_dummy_value()

    return types.void(types.int64, size), emit


# --- arithmetic ----------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def splat(typingctx, value, lanes):
    """A vector with `value` in every lane."""
    n = lanes.literal_value
    return Vector(n)(types.float32, lanes), lambda context, builder, sig, args: emit_splat(builder, args[0], n)


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c."""
    return a(a, a, a), lambda context, builder, sig, args: emit_fma(builder, *args)


@intrinsic
def total(typingctx, x):
    """Sum of the lanes."""
    def emit(context, builder, sig, args):
        v, n = args[0], x.lanes
        while n > 1:
            v, n = builder.fadd(*_halves(builder, v, n)), n // 2
        return builder.extract_element(v, I32(0))

    return types.float32(x), emit


@intrinsic
def largest(typingctx, x):
    """The largest lane. If a lane is NaN, the result is NaN or any lane."""
    def emit(context, builder, sig, args):
        v, n = args[0], x.lanes
        while n > 1:
            a, b = _halves(builder, v, n)
            v, n = builder.select(builder.fcmp_ordered(">", a, b), a, b), n // 2
        return builder.extract_element(v, I32(0))

    return types.float32(x), emit


@intrinsic
def larger(typingctx, a, x):
    """The larger one of a and |x|, lane by lane."""
    def emit(context, builder, sig, args):
        bits = builder.and_(builder.bitcast(args[1], ir.VectorType(I32, x.lanes)), constant(0x7FFFFFFF, x.lanes, I32))
        size = builder.bitcast(bits, args[1].type)
        return builder.select(builder.fcmp_ordered(">", args[0], size), args[0], size)

    return a(a, x), emit


@intrinsic
def exp2(typingctx, x):
    """2^x within a few ulp for x in [-126, 127]; 2^-126 or 2^127 outside; NaN for NaN.

    x = n + f with an integer n and |f| <= 1/2. 2^f is a Taylor series, and n becomes the exponent bits of 2^n. Adding 1.5 * 2^23 rounds x
    to an integer and leaves n in the lowest bits.
    """
    def emit(context, builder, sig, args):
        lanes = x.lanes
        v = args[0]
        for limit, sign in ((-126.0, "<"), (127.0, ">")):
            v = builder.select(builder.fcmp_ordered(sign, v, constant(limit, lanes)), constant(limit, lanes), v)
        shifted = builder.fadd(v, constant(12582912.0, lanes))
        f = builder.fsub(v, builder.fsub(shifted, constant(12582912.0, lanes)))
        series = constant(math.log(2) ** 6 / math.factorial(6), lanes)
        for k in range(5, -1, -1):
            series = emit_fma(builder, series, f, constant(math.log(2) ** k / math.factorial(k), lanes))
        bits = builder.add(builder.bitcast(shifted, ir.VectorType(I32, lanes)), constant(127, lanes, I32))
        return builder.fmul(series, builder.bitcast(builder.shl(bits, constant(23, lanes, I32)), v.type))

    return x(x), emit


# --- attention's two products --------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def four_scores(typingctx, scores, queries, offsets, ahead, keys, head_dim, heads, tile, lanes, kind, registers):
    """scores[h, j] = queries[h] . keys[offsets[j]] for four keys j and all heads h.

    queries: [heads, head_dim] and scores: [heads, tile] in float32; offsets: [4] int64, in bytes from `keys`; ahead: likewise of the keys
    to prefetch. Up to `registers` pairs of a head and a key are summed together, so that each loaded key and query is used several times.
    """
    d, h, t, n, stored = (x.literal_value for x in (head_dim, heads, tile, lanes, kind))
    most = max(1, registers.literal_value // 4)

    def emit(context, builder, sig, args):
        out, q, where, following, base = args[:5]
        rows = [builder.add(base, builder.load(pointer(builder, at(builder, where, 8 * j), I64))) for j in range(4)]
        for j in range(4):
            next_offset = builder.load(pointer(builder, at(builder, following, 8 * j), I64))
            emit_prefetch(builder, builder.add(base, next_offset), d * SIZES[stored])
        for group in _split_heads(h, most):
            sums = {(g, j): constant(0.0, n) for g in group for j in range(4)}
            for c in range(0, d, n):
                xs = {g: emit_load(builder, at(builder, q, 4 * (g * d + c)), n, 0) for g in group}
                for j, row in enumerate(rows):
                    key = emit_load(builder, at(builder, row, c * SIZES[stored]), n, stored)
                    for g in group:
                        sums[g, j] = emit_fma(builder, xs[g], key, sums[g, j])
            for g in group:
                x, y = (_add_pairs(builder, sums[g, j], sums[g, j + 1], n) for j in (0, 2))
                v, size = _add_pairs(builder, x, y, n), n
                while size > 4:
                    v, size = builder.fadd(*_halves(builder, v, size)), size // 2
                builder.store(v, pointer(builder, at(builder, out, 4 * g * t), v.type), align=16)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 5), head_dim, heads, tile, lanes, kind, registers), emit


@intrinsic(prefer_literal=True)
def add_weighted(typingctx, sums, shrink, weights, offsets, ahead, values, count, head_dim, heads, tile, lanes, kind, registers):
    """sums[h] = sums[h] * shrink[h] + sum over j < count of weights[h, j] * values[offsets[j]], for all heads h.

    sums: [heads, head_dim], shrink: [heads], weights: [heads, tile] in float32; offsets: int64, in bytes from `values`; ahead: likewise
    of the values to prefetch. As many dimensions as fit into `registers` are summed over all j before the next ones.
    """
    d, h, t, n, stored = (x.literal_value for x in (head_dim, heads, tile, lanes, kind))
    room = registers.literal_value

    def emit(context, builder, sig, args):
        out, factors, w, where, following, base, number = args[:7]
        for group in _split_heads(h, min(room, 6)):
            at_once = max(1, room // len(group))
            for part in _split_heads(d // n, at_once):  # of vectors
                kind = ir.VectorType(F32, n)
                cells = {}
                for g in group:
                    factor = emit_splat(builder, builder.load(pointer(builder, at(builder, factors, 4 * g), F32)), n)
                    for c in part:
                        cell = cells[g, c] = cgutils.alloca_once(builder, kind)
                        builder.store(builder.fmul(emit_load(builder, at(builder, out, 4 * (g * d + c * n)), n, 0), factor), cell)
                with cgutils.for_range(builder, number) as loop:
                    offset = builder.load(pointer(builder, builder.add(where, builder.shl(loop.index, I64(3))), I64))
                    row = builder.add(base, offset)
                    if part.start == 0 and group.start == 0:
                        next_offset = builder.load(pointer(builder, builder.add(following, builder.shl(loop.index, I64(3))), I64))
                        emit_prefetch(builder, builder.add(base, next_offset), d * SIZES[stored])
                    weight = builder.add(w, builder.shl(loop.index, I64(2)))
                    ps = {g: emit_splat(builder, builder.load(pointer(builder, at(builder, weight, 4 * g * t), F32)), n) for g in group}
                    for c in part:
                        value = emit_load(builder, at(builder, row, c * n * SIZES[stored]), n, stored)
                        for g in group:
                            builder.store(emit_fma(builder, ps[g], value, builder.load(cells[g, c])), cells[g, c])
                for (g, c), cell in cells.items():
                    builder.store(builder.load(cell), pointer(builder, at(builder, out, 4 * (g * d + c * n)), kind), align=4)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 7), head_dim, heads, tile, lanes, kind, registers), emit
