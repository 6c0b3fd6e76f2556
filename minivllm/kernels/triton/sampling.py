"""The sampler in Triton: logits to tokens without a sort and without a second copy of the logits.

    _thresholds   one program per row, only if some row filters     logits -> the smallest logit that survives
    _draw         one program per row and chunk of the vocabulary   the chunk's winner, relative to the chunk's largest logit
    _combine      one program per row                               the winner of the chunks

The draw is the reference's, written as a race. The largest of z + g with g = -log E is the smallest of E exp(-z), so a token
costs one logarithm and the other is taken once per chunk. z counts from the chunk's largest logit, which wins its chunk with
a finite cost whatever the temperature; `_combine` moves the chunks' scores to the row's largest. Row and vocabulary size
alone fix the grids, and no token depends on the rows beside it.

A threshold is searched by bisection on integers in the order of the logits (16 bits where they have 16), and nearly always
among few tokens, which registers hold: each of POSITIONS interleaved parts of the row keeps its four largest logits.

    token    0 1 2 3 ... P-1 | P P+1 ... 2P-1 | 2P ...       part j: tokens j, P + j, 2P + j ...
    kept     a[P] >= b[P] >= c[P] >= d[P]                    above max(d), nothing is missing

If the threshold may be lower than that (many tokens survive, or tie), passes over the whole row find it, two bits
a pass. Probabilities are added as integers: such sums do not depend on their order, so a token never depends on the logits'
dtype, nor on what the compiler made of it.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.triton.device import launch

KEY_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # low bits of a float32 that this dtype leaves empty

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
    """E = -log1p(-v), exact within 2 ulp for every word.

    u = 1 - v rounds; what it lost is added again, so a tiny v is its own E. log u splits u into 2^e (1 + m), m in [-1/3, 1/3],
    and log(1 + m) is a polynomial fitted for the smallest relative error (a library's logarithm branches for special values).
    """
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, V_MAX)
    u = 1.0 - v
    lost = v - (1.0 - u)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # in the bits' place; 0x3F2AAAAB is 2/3
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
    """An integer that grows with x (float32, with SHIFT empty low bits): neighbouring values have neighbouring integers."""
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
    """Probability as a multiple of 2^-40 of the most probable token's, so that a long tail of improbable tokens counts too."""
    return (tl.exp2((x - peak) * scale) * 2.0**40).to(tl.int64)


@triton.jit
def _weight(x, peak, scale):
    """The same as a multiple of 2^-31: half the registers, and fine enough for a few thousand tokens."""
    return (tl.exp2((x - peak) * scale) * 2.0**31).to(tl.uint32)


@triton.jit
def _count_from(cut, a, b, c, d):
    """How many of the kept logits are >= cut."""
    return tl.sum((a >= cut).to(tl.int32) + (b >= cut).to(tl.int32) + (c >= cut).to(tl.int32) + (d >= cut).to(tl.int32), 0).to(tl.int64)


@triton.jit
def _mass_from(cut, a, b, c, d, wa, wb, wc, wd):
    """The sum of their weights, in units of `_mass`."""
    ab = tl.where(a >= cut, wa, 0).to(tl.int64) + tl.where(b >= cut, wb, 0).to(tl.int64)
    cd = tl.where(c >= cut, wc, 0).to(tl.int64) + tl.where(d >= cut, wd, 0).to(tl.int64)
    return tl.sum(ab + cd, 0) << 9


@triton.jit
def _tile(row, start, size, POSITIONS: tl.constexpr):
    """The logits [POSITIONS / 8, 8] from `start`: sums over the second dimension stay within a thread."""
    ids = start + tl.arange(0, POSITIONS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.load(row + ids, mask=ids < size, other=-INF).to(tl.float32)


@triton.jit
def _search_row(row, size, peak, scale, target, low, high, BY_MASS: tl.constexpr, SHIFT: tl.constexpr, POSITIONS: tl.constexpr):
    """The largest key in [low, high) such that the logits at or above it reach `target`, a mass or a number; low is known to.

    A pass over the row tries three keys, so it settles two bits.
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
    """The mass of all logits >= cut."""
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
    low = tl.maximum(found, missing + 1)  # from here on nothing is missing
    if k < size:
        if _count_from(_value(low, SHIFT), a, b, c, d) >= k:
            high = top
            while high - low > 1:
                middle = (low + high) >> 1
                enough = _count_from(_value(middle, SHIFT), a, b, c, d) >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            found = low
        elif (found <= missing) & (missing > bottom):  # otherwise fewer than k survive min-p, and all of them are kept
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
    """The smallest logit that survives in each row; -inf where nothing is filtered."""
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
    for start in tl.range(0, size, POSITIONS, loop_unroll_factor=4):  # the loads of four turns are under way at once
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
    missing = _key(tl.max(d, 0), SHIFT)  # a logit that was not kept is this or less
    found = bottom  # the key of the threshold so far
    if MIN_P:
        found = _by_min_p(peak, floor, t, bottom, SHIFT)
    if TOP_K:
        found = _by_top_k(row, size, k, found, missing, bottom, top, a, b, c, d, SHIFT, POSITIONS)
    if TOP_P:
        found = _by_top_p(row, size, peak, LOG2_E / t, p, found, missing, bottom, top, a, b, c, d, SHIFT, POSITIONS)
    tl.store(threshold + r, _value(found, SHIFT))


# --- drawing -------------------------------------------------------------------------------------------------------


@triton.jit
def _draw(
    peaks, costs, winners, logits, row_stride, size, temperature, keys, threshold,  # the first three [n, chunks]
    FILTERED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The winner of one chunk of one row: its token, its cost, and the largest logit that the cost counts from."""
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
        tl.store(winners + at, first)
        return
    t = tl.load(temperature + r)
    if t == 0.0:  # greedy
        tl.store(costs + at, 1.0)
        tl.store(winners + at, tl.min(tl.where(x == peak, ids, size - 1), 0))
    else:
        words = random_words(ids, tl.load(keys + 2 * r).to(tl.uint32, bitcast=True), tl.load(keys + 2 * r + 1).to(tl.uint32, bitcast=True))
        cost = exponential(words) * tl.exp2((peak - x) * (LOG2_E / t))
        cost = tl.where(x == -INF, INF, cost)
        least = tl.min(cost, 0)
        tl.store(costs + at, least)
        tl.store(winners + at, tl.min(tl.where(cost == least, ids, size - 1), 0))


@triton.jit
def _combine(out, peaks, costs, winners, temperature, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    """The best chunk's winner; of equals the lowest token, and token 0 where there is nothing but -inf."""
    r = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, PADDED)
    live = chunk < CHUNKS
    at = r * CHUNKS + chunk
    peak = tl.load(peaks + at, mask=live, other=-INF)
    cost = tl.load(costs + at, mask=live, other=INF)
    winner = tl.load(winners + at, mask=live, other=0x7FFFFFFF)
    t = tl.load(temperature + r)
    largest = tl.maximum(tl.max(peak, 0), -3.4028234663852886e38)  # -inf - -inf would be NaN
    score = (peak - largest) / tl.where(t == 0.0, 1.0, t) - tl.log(cost)
    score = tl.where(peak == -INF, -INF, score)
    best = tl.max(score, 0)
    tl.store(out + r, tl.min(tl.where(score == best, winner, 0x7FFFFFFF), 0).to(tl.int64))


def sample(logits: Tensor, temperature: Tensor, keys: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None,
           min_p: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """One token per row: logits [n, V] float32 or half, last dimension contiguous; the rest one value (keys: two) per row.

    temperature 0 takes the largest logit. Filters that no row asks for are None. -> [n] int64, in `out` if it is given.
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
    peaks, costs = new((n, chunks), dtype=torch.float32), new((n, chunks), dtype=torch.float32)  # aligned both: one compiled kernel
    winners = new((n, chunks), dtype=torch.int32)
    launch(_draw, (n, chunks), peaks, costs, winners, logits, logits.stride(0), size, temperature, keys, threshold,
                       FILTERED=filtered, CHUNK=tuning.SAMPLER_CHUNK, num_warps=tuning.SAMPLER_WARPS)
    launch(_combine, (n,), out, peaks, costs, winners, temperature, CHUNKS=chunks, PADDED=triton.next_power_of_2(chunks), num_warps=1)
    return out
