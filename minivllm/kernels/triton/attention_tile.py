"""What attention kernels share: heads of new tokens from the fused projection, a tile of cached keys, and the softmax over tiles.

    qkv ── rotated_heads ──▶ q [M, D]        cache ── fetch ──▶ k, v [N, D], and which of them are live
                             └──────── absorb_keys ────────┘
    running averages of a query    acc: sum of weight * value    total: sum of weights    peak: largest score, in base 2

The softmax runs online (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023), in base 2. SHAPE is a `DecodeShape`.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from minivllm.kernels.triton.quantized_cache import load_scales, widen, widen_pairs


class Projection(NamedTuple):
    """The T new tokens' queries, keys and values, and how heads are normalized and rotated."""

    qkv: Any  # [T, H + 2 KV, D]
    norm_weight: Any  # [H + KV, D]
    eps: Any
    cos: Any  # [T, D]
    sin: Any  # [T, D]; it carries the sign of the rotation
    stride: Any  # of qkv, from token to token
    slopes: Any  # [H] float32 of ALiBi
    sinks: Any  # [H] float32


class Cache(NamedTuple):
    """One layer's cached keys and values."""

    k: Any  # [blocks, block_size, KV, D]
    v: Any
    v_pairs: Any  # [blocks, block_size, KV, D / 2] int16 if quantized: the values, two codes each
    scales: Any  # [blocks, block_size, KV, 2] if quantized: of the keys, and of the values
    scale_pairs: Any  # [blocks, block_size, KV] int32: the same
    block_table: Any  # [B, M]


@triton.jit
def rotated_heads(
    projection, token, head, dims, live, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Heads of a fused projection, normalized per head and rotated: [rows, PADDED_D] of DTYPE.

    token: one for all rows, or [rows, 1]. The rotation pairs dimension d with d + D/2 (mod D). Values are rounded where the reference
    rounds them. With PDL, everything but the projection is fetched before the kernel waits for the projection.
    """
    other = (dims + D // 2) % D
    if NORM:
        w = tl.load(projection.norm_weight + head[:, None] * D + dims[None, :], mask=live, other=0.0).to(tl.float32)
        if ROPE:
            w_partner = tl.load(projection.norm_weight + head[:, None] * D + other[None, :], mask=live, other=0.0).to(tl.float32)
    if ROPE:
        live_dim = (dims < D)[None, :]
        c = tl.load(projection.cos + token * D + dims[None, :], mask=live_dim, other=0.0).to(tl.float32)
        s = tl.load(projection.sin + token * D + dims[None, :], mask=live_dim, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = projection.qkv + token * projection.stride
    x = tl.load(source + head[:, None] * D + dims[None, :], mask=live, other=0.0).to(tl.float32)
    partner = x
    if ROPE:
        partner = tl.load(source + head[:, None] * D + other[None, :], mask=live, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + projection.eps)[:, None]
        x = ((x * scale).to(DTYPE).to(tl.float32) * w).to(DTYPE).to(tl.float32)
        if ROPE:
            partner = ((partner * scale).to(DTYPE).to(tl.float32) * w_partner).to(DTYPE).to(tl.float32)
    if ROPE:
        x = x * c + partner * s
    return x.to(DTYPE)


@triton.jit
def fetch(cache, block, key, oldest, end, kv_head, dims, SHAPE: tl.constexpr):
    """Keys and values [N, PADDED_D] at positions `key` in blocks `block`, and which of them lie in [oldest, end): [N] each.

    -> (keys, values, live keys, scales of the keys and of the values: [N] each, and of any value if the cache is not quantized).
    The rest of a block may hold anything, NaN included, and is never loaded."""
    KV_HEADS: tl.constexpr = SHAPE.num_heads // SHAPE.heads_per_kv
    head = (block.to(tl.int64) * SHAPE.block_size + key % SHAPE.block_size) * KV_HEADS + kv_head
    row = head * SHAPE.head_dim
    live_key = (key >= oldest) & (key < end)
    live = live_key[:, None] & (dims < SHAPE.head_dim)[None, :]
    k = tl.load(cache.k + row[:, None] + dims[None, :], mask=live, other=0.0)
    k_scale = live_key
    v_scale = live_key
    if not SHAPE.quantized:
        v = tl.load(cache.v + row[:, None] + dims[None, :], mask=live, other=0.0)
    else:
        HALF: tl.constexpr = SHAPE.head_dim // 2
        pairs = tl.arange(0, SHAPE.padded_dim // 2)
        v = tl.load(cache.v_pairs + (head * HALF)[:, None] + pairs[None, :], mask=live_key[:, None] & (pairs < HALF)[None, :], other=0)
        k_scale, v_scale = load_scales(cache.scale_pairs, head, live_key)
    return k, v, live_key, k_scale, v_scale


@triton.jit
def absorb_keys(
    q, k, v, k_scale, v_scale, visible, acc, peak, total, scale, softcap, slope, distance, SHAPE: tl.constexpr,
    SAFE: tl.constexpr = False,
):  # fmt: skip
    """Add a tile of keys and values [N, D] to the running averages of queries [M, D]; scale includes log2(e).

    visible: [M or 1, N]. SAFE: a query may have seen no key yet. slope: [M] of `alibi_slope`; distance: [M or 1, N], key minus query.
    """
    if SHAPE.quantized:
        k = widen(k, q.dtype, SHAPE.fp8, SHAPE.native)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [M, N]
    if SHAPE.quantized:
        scores = scores * k_scale[None, :]
    if SHAPE.softcap:
        scores = cap(scores, softcap)
    if SHAPE.alibi:
        scores = scores + slope[:, None] * distance.to(tl.float32)
    scores = tl.where(visible, scores, -float("inf"))
    tops = scores
    if SHAPE.quantized:
        tops = scores + tl.log2(v_scale)[None, :]
    new_peak = tl.maximum(peak, tl.max(tops, 1))
    base = new_peak
    if SAFE:
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - base)
    weights = tl.exp2(scores - base[:, None])
    if SHAPE.quantized:
        products = (weights * v_scale[None, :]).to(q.dtype)
        even, odd = acc
        v_even, v_odd = widen_pairs(v, q.dtype, SHAPE.fp8, SHAPE.native)
        acc = (even * shrink[:, None] + tl.dot(products, v_even, input_precision="ieee"),
               odd * shrink[:, None] + tl.dot(products, v_odd, input_precision="ieee"))
    else:
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, new_peak, total * shrink + tl.sum(weights, 1)


@triton.jit
def alibi_slope(projection, head, live_row, SHAPE: tl.constexpr):
    """ALiBi's slope of the rows of a tile, for scores in base 2: [M]; 0 without ALiBi."""
    slope = 0.0
    if SHAPE.alibi:
        slope = tl.load(projection.slopes + head, mask=live_row, other=0.0) * 1.4426950408889634
    return slope


@triton.jit
def empty_sums(SHAPE: tl.constexpr):
    """Sums of no values: [M, D]; for a quantized cache those of even and of odd dimensions."""
    if SHAPE.quantized:
        zeros = tl.full([SHAPE.block_m, SHAPE.padded_dim // 2], 0.0, tl.float32)
        sums = (zeros, zeros)
    else:
        sums = tl.full([SHAPE.block_m, SHAPE.padded_dim], 0.0, tl.float32)
    return sums


@triton.jit
def all_dimensions(sums, SHAPE: tl.constexpr):
    """Sums [M, D] of all dimensions."""
    if SHAPE.quantized:
        even, odd = sums
        sums = tl.reshape(tl.join(even, odd), [SHAPE.block_m, SHAPE.padded_dim])
    return sums


@triton.jit
def scaled_queries(q, scale, SHAPE: tl.constexpr):
    """-> (queries as tensor cores multiply them with keys, factor of the scores). For a quantized cache in float16, which converts from
    8 bits without loss: each row [M, D] is divided by its largest magnitude, so that it fits; the factor is then [M, 1]."""
    if SHAPE.quantized:
        DOT: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
        largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)[:, None]
        q = (q.to(tl.float32) / largest).to(DOT)
        scale = largest * scale
    return q, scale


@triton.jit
def cap(scores, softcap):
    """softcap * tanh(scores / softcap), where scores and result carry a factor log2(e)."""
    raw = scores * 0.6931471805599453
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * raw / softcap) + 1.0)) * 1.4426950408889634
