"""The sampler in Triton: logits to tokens without a sort and without a second copy of the logits.

    _thresholds      one program per row, if a row has a filter        logits -> the smallest logit that the filters keep
    _sample_chunks   one program per row and chunk of the vocabulary   the chunk's best token and its cost
    _combine_chunks  one program per row                               the best token of all chunks

The method is the reference's, with costs instead of scores. With g = -log E, the largest z + g is the smallest cost E exp(-z). So each
token needs one logarithm, and the second one is computed once per chunk. Within a chunk, z is relative to the chunk's largest logit, so
that the smallest cost is finite for every temperature. `_combine_chunks` converts the costs to scores relative to the row's largest logit.
Grids depend only on the numbers of rows and of tokens in the vocabulary, and a token never depends on other rows.

A threshold is found by bisection over integers that have the order of the logits (16 bits for 16-bit logits). Nearly always it is one of
few logits, which are kept in registers: the four largest ones of each of POSITIONS interleaved parts of the row.

    token    0 1 2 3 ... P-1 | P P+1 ... 2P-1 | 2P ...       part j: tokens j, P + j, 2P + j ...
    kept     a[P] >= b[P] >= c[P] >= d[P]                    all logits above max(d) are kept

If the threshold may be lower than max(d), because many tokens survive or are equal, passes over the whole row find it. Each pass
determines two bits. Probabilities are added as integers, whose sum does not depend on the order. So a token depends neither on the
logits' dtype nor on the compiler.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.triton.device import launch

KEY_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # low bits of a float32 that are 0 if it has this dtype's precision

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
V_MAX = tl.constexpr(1.0 - 2.0**-24)
INF = tl.constexpr(float("inf"))


# --- noise ---------------------------------------------------------------------------------------------------------


@triton.jit
def random_words(ids, key0, key1):
    """The reference's `noise_words`: uint32 from ids int32 and two uint32 of the row."""
    mul1 = tl.full([1], 0x7FEB352D, tl.uint32)
    mul2 = tl.full([1], 0x846CA68B, tl.uint32)
    x = ids.to(tl.uint32)
    x = (x ^ (x >> 16)) * mul1
    x = (x ^ (x >> 15)) * mul2
    x = x ^ (x >> 16) ^ key0
    x = (x ^ (x >> 16)) * mul1
    x = ((x ^ (x >> 15)) + key1) * mul2
    return x ^ (x >> 16)


@triton.jit
def exponential(words):
    """E = -log1p(-v), within 2 ulp for every word.

    u = 1 - v is rounded, and the rounding error is added at the end, so that E = v for a tiny v. With u = 2^e (1 + m) and m in [-1/3, 1/3],
    log(1 + m) is a polynomial with the smallest relative error. (A library's logarithm has branches for special values.)
    """
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, V_MAX)
    u = 1.0 - v
    lost = v - (1.0 - u)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # still shifted left by 23 bits; 0x3F2AAAAB is 2/3
    m = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = m * -0.12951058 + 0.14006792
    p = p * m - 0.12166707
    p = p * m + 0.14000781
    p = p * m - 0.16682336
    p = p * m + 0.20010768
    p = p * m - 0.24999717
    p = p * m + 0.33333209
    p = p * m - 0.5
    return lost - (exponent.to(tl.float32) * 2.0**-23 * LN_2 + (p * m * m + m))


# --- thresholds ----------------------------------------------------------------------------------------------------


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """An integer that grows with x (float32 with SHIFT low bits of 0): consecutive values have consecutive integers."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The float32 of a key."""
    bits = (key << SHIFT).to(tl.int32)
    bits = tl.where(bits < 0, (bits | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _mass(x, peak, scale):
    """Probability relative to the most probable token's, in units of 2^-40: fine enough for a long tail of improbable tokens."""
    return (tl.exp2((x - peak) * scale) * 2.0**40).to(tl.int64)


@triton.jit
def _weight(x, peak, scale):
    """The same in units of 2^-31: needs half the registers, and is fine enough for a few thousand tokens."""
    return (tl.exp2((x - peak) * scale) * 2.0**31).to(tl.uint32)


@triton.jit
def _count_from(cut, a, b, c, d):
    """Number of kept logits >= cut."""
    return tl.sum((a >= cut).to(tl.int32) + (b >= cut).to(tl.int32) + (c >= cut).to(tl.int32) + (d >= cut).to(tl.int32), 0).to(tl.int64)


@triton.jit
def _mass_from(cut, a, b, c, d, wa, wb, wc, wd):
    """Sum of the weights of kept logits >= cut, in units of `_mass`."""
    ab = tl.where(a >= cut, wa, 0).to(tl.int64) + tl.where(b >= cut, wb, 0).to(tl.int64)
    cd = tl.where(c >= cut, wc, 0).to(tl.int64) + tl.where(d >= cut, wd, 0).to(tl.int64)
    return tl.sum(ab + cd, 0) << 9


@triton.jit
def _tile(row, start, size, POSITIONS: tl.constexpr):
    """Logits [POSITIONS / 8, 8] from `start` on: a sum over the second dimension needs one thread only."""
    ids = start + tl.arange(0, POSITIONS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.load(row + ids, mask=ids < size, other=-INF).to(tl.float32)


@triton.jit
def _search_row(row, size, peak, scale, target, low, high, BY_MASS: tl.constexpr, SHIFT: tl.constexpr, POSITIONS: tl.constexpr):
    """The largest key in [low, high) for which the logits at or above it have a mass or number of at least `target`.

    For `low` this must hold. A pass over the row tries three keys, and so determines two bits.
    """
    while high - low > 1:
        quarter = tl.maximum((high - low) >> 2, 1)
        key1 = low + quarter
        key2 = tl.minimum(key1 + quarter, high - 1)
        key3 = tl.minimum(key2 + quarter, high - 1)
        cut1, cut2, cut3 = _value(key1, SHIFT), _value(key2, SHIFT), _value(key3, SHIFT)
        sum1 = tl.zeros([POSITIONS // 8], tl.int64 if BY_MASS else tl.int32)
        sum2 = sum1
        sum3 = sum1
        for start in tl.range(0, size, POSITIONS, loop_unroll_factor=2):
            x = _tile(row, start, size, POSITIONS)
            weight = _mass(x, peak, scale) if BY_MASS else tl.full(x.shape, 1, tl.int32)
            sum1 += tl.sum(tl.where(x >= cut1, weight, 0), 1)
            sum2 += tl.sum(tl.where(x >= cut2, weight, 0), 1)
            sum3 += tl.sum(tl.where(x >= cut3, weight, 0), 1)
        enough1, enough2, enough3 = tl.sum(sum1, 0) >= target, tl.sum(sum2, 0) >= target, tl.sum(sum3, 0) >= target
        new_low = tl.where(enough3, key3, tl.where(enough2, key2, tl.where(enough1, key1, low)))
        high = tl.where(enough1, tl.where(enough2, tl.where(enough3, high, key3), key2), key1)
        low = new_low
    return low


@triton.jit
def _mass_of_row(row, size, peak, scale, cut, POSITIONS: tl.constexpr):
    """Sum of the mass of all logits >= cut."""
    total = tl.zeros([POSITIONS // 8], tl.int64)
    for start in tl.range(0, size, POSITIONS, loop_unroll_factor=2):
        x = _tile(row, start, size, POSITIONS)
        total += tl.sum(tl.where(x >= cut, _mass(x, peak, scale), 0), 1)
    return tl.sum(total, 0)


@triton.jit
def _by_min_p(peak, floor, t, bottom, SHIFT: tl.constexpr):
    """The smallest key whose z = (x - peak) / t is at least log(floor); `bottom`, the key of -inf, if the filter is off."""
    low = bottom
    high = bottom
    if floor > 0.0:
        high = _key(peak, SHIFT)
    limit = tl.log(tl.where(floor > 0.0, floor, 1.0))
    while high - low > 1:
        middle = (low + high) >> 1
        survives = tl.div_rn(_value(middle, SHIFT) - peak, t) >= limit
        high = tl.where(survives, middle, high)
        low = tl.where(survives, low, middle)
    return high


@triton.jit
def _by_top_k(row, size, k, found, missing, bottom, top, a, b, c, d, SHIFT: tl.constexpr, POSITIONS: tl.constexpr):
    """The larger of `found` and the key of the k-th largest logit."""
    low = tl.maximum(found, missing + 1)  # all logits from here on are kept
    if k < size:
        if _count_from(_value(low, SHIFT), a, b, c, d) >= k:
            high = top
            while high - low > 1:
                middle = (low + high) >> 1
                enough = _count_from(_value(middle, SHIFT), a, b, c, d) >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            found = low
        elif (found <= missing) & (missing > bottom):  # otherwise min-p leaves fewer than k tokens, and top-k removes none
            found = tl.maximum(found, _search_row(row, size, 0.0, 0.0, k, bottom, low, False, SHIFT, POSITIONS))
    return found


@triton.jit
def _by_top_p(row, size, peak, scale, p, found, missing, bottom, top, a, b, c, d, SHIFT: tl.constexpr, POSITIONS: tl.constexpr):
    """The key of the last logit needed for a fraction p of the mass at or above `found`."""
    if p < 1.0:
        wa, wb, wc, wd = _weight(a, peak, scale), _weight(b, peak, scale), _weight(c, peak, scale), _weight(d, peak, scale)
        low = tl.maximum(found, missing + 1)
        reached = _mass_from(_value(low, SHIFT), a, b, c, d, wa, wb, wc, wd)
        whole = reached
        if (found <= missing) & (missing > bottom):
            whole = _mass_of_row(row, size, peak, scale, _value(found, SHIFT), POSITIONS)
        target = (p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
        if reached >= target:
            high = top
            while high - low > 1:
                middle = (low + high) >> 1
                enough = _mass_from(_value(middle, SHIFT), a, b, c, d, wa, wb, wc, wd) >= target
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            found = low
        else:
            found = _search_row(row, size, peak, scale, target, found, low, True, SHIFT, POSITIONS)
    return found


@triton.jit
def _thresholds(
    threshold, logits, row_stride, size, temperature, top_k, top_p, min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, SHIFT: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """The smallest logit that the filters keep in each row; -inf for a row without filters."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * row_stride
    t = tl.load(temperature + r)
    k = size
    p = 1.0
    floor = 0.0
    if TOP_K:
        k = tl.load(top_k + r)
        k = tl.where((k <= 0) | (k > size), size, k)
    if TOP_P:
        p = tl.load(top_p + r)
    if MIN_P:
        floor = tl.load(min_p + r)
    if (t == 0.0) | ((k == size) & (p >= 1.0) & (floor <= 0.0)):
        tl.store(threshold + r, -INF)
        return

    position = tl.arange(0, POSITIONS)
    a = tl.full([POSITIONS], -INF, tl.float32)
    b = a
    c = a
    d = a
    for start in tl.range(0, size, POSITIONS, loop_unroll_factor=4):  # so that loads of four iterations overlap
        x = tl.load(row + start + position, mask=start + position < size, other=-INF).to(tl.float32)
        a, x = tl.maximum(a, x), tl.minimum(a, x)
        b, x = tl.maximum(b, x), tl.minimum(b, x)
        c, x = tl.maximum(c, x), tl.minimum(c, x)
        d = tl.maximum(d, x)
    peak = tl.max(a, 0)
    if peak == -INF:
        tl.store(threshold + r, -INF)
        return
    top = _key(peak, SHIFT) + 1
    bottom = top * 0 + (-0x7F800001 >> SHIFT)  # the key of -inf
    missing = _key(tl.max(d, 0), SHIFT)  # no logit above this one is missing among the kept ones
    found = bottom  # the key of the threshold so far
    if MIN_P:
        found = _by_min_p(peak, floor, t, bottom, SHIFT)
    if TOP_K:
        found = _by_top_k(row, size, k, found, missing, bottom, top, a, b, c, d, SHIFT, POSITIONS)
    if TOP_P:
        found = _by_top_p(row, size, peak, LOG2_E / t, p, found, missing, bottom, top, a, b, c, d, SHIFT, POSITIONS)
    tl.store(threshold + r, _value(found, SHIFT))


# --- sampling ------------------------------------------------------------------------------------------------------


@triton.jit
def _sample_chunks(
    peaks, costs, tokens, logits, row_stride, size, temperature, keys, threshold,  # the first three [n, chunks]
    FILTERED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The best token of one chunk of one row, its cost, and the chunk's largest logit, to which the cost is relative."""
    r = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * CHUNK
    at = r * tl.num_programs(1) + tl.program_id(1)
    ids = first + tl.arange(0, CHUNK)
    x = tl.load(logits + r * row_stride + ids, mask=ids < size, other=-INF).to(tl.float32)
    if FILTERED:
        x = tl.where(x >= tl.load(threshold + r), x, -INF)
    peak = tl.max(x, 0)
    tl.store(peaks + at, peak)
    if peak == -INF:
        tl.store(costs + at, INF)
        tl.store(tokens + at, first)
        return
    t = tl.load(temperature + r)
    if t == 0.0:  # greedy
        tl.store(costs + at, 1.0)
        tl.store(tokens + at, tl.min(tl.where(x == peak, ids, size - 1), 0))
    else:
        words = random_words(ids, tl.load(keys + 2 * r).to(tl.uint32, bitcast=True), tl.load(keys + 2 * r + 1).to(tl.uint32, bitcast=True))
        cost = exponential(words) * tl.exp2((peak - x) * (LOG2_E / t))
        cost = tl.where(x == -INF, INF, cost)
        least = tl.min(cost, 0)
        tl.store(costs + at, least)
        tl.store(tokens + at, tl.min(tl.where(cost == least, ids, size - 1), 0))


@triton.jit
def _combine_chunks(out, peaks, costs, tokens, temperature, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    """The best token of all chunks: of equally good ones the lowest id, and token 0 if all logits are -inf."""
    r = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, PADDED)
    live = chunk < CHUNKS
    at = r * CHUNKS + chunk
    peak = tl.load(peaks + at, mask=live, other=-INF)
    cost = tl.load(costs + at, mask=live, other=INF)
    token = tl.load(tokens + at, mask=live, other=0x7FFFFFFF)
    t = tl.load(temperature + r)
    largest = tl.maximum(tl.max(peak, 0), -3.4028234663852886e38)  # -inf - -inf would be NaN
    score = (peak - largest) / tl.where(t == 0.0, 1.0, t) - tl.log(cost)
    score = tl.where(peak == -INF, -INF, score)
    best = tl.max(score, 0)
    tl.store(out + r, tl.min(tl.where(score == best, token, 0x7FFFFFFF), 0).to(tl.int64))


def sample(logits: Tensor, temperature: Tensor, keys: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None,
           min_p: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """One token per row: logits [n, V] float32 or half, last dimension contiguous; the rest one value (keys: two) per row.

    Temperature 0 takes the largest logit. A filter that no row uses is None. -> [n] int64, written to `out` if it is given.
    """
    n, size = logits.shape
    assert logits.stride(1) == 1 or size == 1
    new = logits.new_empty
    if out is None:
        out = new(n, dtype=torch.int64)
    if n == 0:
        return out
    filtered = not (top_k is None and top_p is None and min_p is None)
    threshold = temperature  # unused without filters
    if filtered:
        threshold = new(n, dtype=torch.float32)
        launch(_thresholds, (n,),
            threshold, logits, logits.stride(0), size, temperature,
            temperature if top_k is None else top_k, temperature if top_p is None else top_p, temperature if min_p is None else min_p,
            TOP_K=top_k is not None, TOP_P=top_p is not None, MIN_P=min_p is not None, SHIFT=KEY_SHIFT[logits.dtype],
            POSITIONS=tuning.THRESHOLD_POSITIONS, num_warps=tuning.THRESHOLD_WARPS,
        )  # fmt: skip
    chunks = triton.cdiv(size, tuning.SAMPLER_CHUNK)
    peaks, costs = new((n, chunks), dtype=torch.float32), new((n, chunks), dtype=torch.float32)  # separate, so both are aligned
    tokens = new((n, chunks), dtype=torch.int32)
    launch(_sample_chunks, (n, chunks), peaks, costs, tokens, logits, logits.stride(0), size, temperature, keys, threshold,
           FILTERED=filtered, CHUNK=tuning.SAMPLER_CHUNK, num_warps=tuning.SAMPLER_WARPS)
    launch(_combine_chunks, (n,), out, peaks, costs, tokens, temperature, CHUNKS=chunks, PADDED=triton.next_power_of_2(chunks), num_warps=1)
    return out
