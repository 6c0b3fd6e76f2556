"""Attention of prompt chunks in Triton, and the kernel before it: norm, rotation and the write to the cache.

A program computes a tile of consecutive queries of one sequence, for all query heads that share a KV head. They are the rows of one
matrix, so that keys are read once for the whole group and tensor cores get full tiles:

    row m of the tile  ->  query m // HEADS_PER_KV of the tile,  head kv_head * HEADS_PER_KV + m % HEADS_PER_KV

Its keys come from two sources. Keys of earlier steps are in scattered blocks, and all of them are visible. Keys of the chunk itself are
contiguous in the projection's output, and causal. Only the tiles on the diagonal need a mask:

    keys       | context, paged | own chunk ....... | diagonal |
    mask       | its end        | none              | causal   |         (a sliding window masks all of them)

A program finds its sequence by binary search, so that the grid depends only on T and B:

    sequence         |---- 0 ----|- 1 -|------- 2 -------|      BLOCK_Q = 4
    query_start      0           10    15                31
    first tile       0 // 4 + 0  10//4 + 1 = 3  15//4 + 2 = 5    an upper bound: programs of empty tiles return at once

With a quantized cache, `_position_and_store` also writes the new keys and values as they can be read back from the cache, and these are
the chunk's own keys and values. So the result does not depend on how a prompt is cut into chunks.

The softmax runs online (FlashAttention-2, Dao 2023), in base 2.
"""
from __future__ import annotations

import triton
import triton.language as tl

from minivllm.kernels.triton.attention_tile import cap, rotated_heads
from minivllm.kernels.triton.quantized_cache import quantize, widen


@triton.jit(do_not_specialize=["first"])
def _position_and_store(
    qk, projection, cache, slots, first,  # qk: [T, H + KV, D], or with a quantized cache [T, H + 2 KV, D]; Projection, Cache
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, QUANTIZED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One program per HEADS heads of a token, from token `first` on: queries and keys to `qk`, keys and values to the cache.

    With a quantized cache `qk` gets the values too, and keys and values there are those that can be read back from the cache."""
    token = first + tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, PADDED_D)
    live_dim = (dims < D)[None, :]
    DTYPE: tl.constexpr = projection.qkv.dtype.element_ty
    positioned = (head < NUM_HEADS + KV_HEADS)[:, None] & live_dim
    x = rotated_heads(projection, token, head, dims, positioned, D, NORM, ROPE, DTYPE, False)
    is_key = (head >= NUM_HEADS)[:, None] & positioned
    is_value = ((head >= NUM_HEADS + KV_HEADS) & (head < NUM_HEADS + 2 * KV_HEADS))[:, None] & live_dim
    value = tl.load(projection.qkv + token * projection.stride + head[:, None] * D + dims[None, :], mask=is_value, other=0.0)
    if QUANTIZED:
        row = tl.load(slots + token) * KV_HEADS
        codes, numbers, scale = quantize(tl.where(is_value, value.to(tl.float32), x.to(tl.float32)), FP8)
        x = tl.where(is_key | is_value, (numbers * scale[:, None]).to(DTYPE), x)
        tl.store(qk + (token * (NUM_HEADS + 2 * KV_HEADS) + head)[:, None] * D + dims[None, :], x, mask=positioned | is_value)
        k_row = row + head - NUM_HEADS
        v_row = k_row - KV_HEADS
        tl.store(cache.k + k_row[:, None] * D + dims[None, :], codes, mask=is_key)
        tl.store(cache.v + v_row[:, None] * D + dims[None, :], codes, mask=is_value)
        new = (head >= NUM_HEADS) & (head < NUM_HEADS + 2 * KV_HEADS)
        pair = tl.where(head < NUM_HEADS + KV_HEADS, 2 * k_row, 2 * v_row + 1)
        tl.store(cache.scales + pair, scale.to(tl.bfloat16), mask=new)
    else:
        tl.store(qk + (token * (NUM_HEADS + KV_HEADS) + head)[:, None] * D + dims[None, :], x, mask=positioned)
        row = tl.load(slots + token) * KV_HEADS * D
        tl.store(cache.k + row + (head - NUM_HEADS)[:, None] * D + dims[None, :], x, mask=is_key)
        tl.store(cache.v + row + (head - NUM_HEADS - KV_HEADS)[:, None] * D + dims[None, :], value.to(DTYPE), mask=is_value)


@triton.jit
def _absorb(q, k, v, k_scale, v_scale, visible, acc, peak, total, scale, softcap, slope, distance, MASK: tl.constexpr,
            SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, QUANTIZED: tl.constexpr = False):
    """Add a tile of keys [D, N] and values [N, D] to the running averages of queries [M, D]; scale includes log2(e).

    k_scale, v_scale: [N] if QUANTIZED, else unused. See quantized_cache.py. slope: [M], for scores in base 2, and distance: [M, N], key
    minus query, if ALIBI."""
    scores = tl.dot(q, k, input_precision="ieee")
    if QUANTIZED:
        scores = scores * k_scale[None, :]
    if SOFTCAP:
        scores = cap(scores * scale, softcap)
        factor = 1.0
    elif ALIBI:
        scores = scores * scale
        factor = 1.0
    else:
        factor = scale  # multiplied below, in one instruction with the subtraction
    if ALIBI:
        scores = scores + slope[:, None] * distance.to(tl.float32)
    if MASK:
        scores = tl.where(visible, scores, -float("inf"))
    if QUANTIZED:
        new_peak = tl.maximum(peak, tl.max(scores * factor + tl.log2(v_scale)[None, :], 1))
    else:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    safe_peak = new_peak
    if MASK:
        safe_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # rows that have seen no key yet
    weights = tl.exp2(scores * factor - safe_peak[:, None])
    shrink = tl.exp2(peak - safe_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if QUANTIZED:
        weights = weights * v_scale[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=["first_seq", "num_seqs", "num_tiles", "table_stride"])
def _prompt_attention(
    out, q, k, v,  # [T, H, D]; new queries, keys and values as pointers, or k, v as descriptors of [T, heads * D]
    cache, query_start, seq_lens, slopes, sinks,  # Cache; [B + 1], [B], [H] float32 of ALiBi, [H] float32
    scale, softcap, first_seq, num_seqs, num_tiles, q_stride, k_stride, v_stride, k_column, v_column, table_stride,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, QUANTIZED: tl.constexpr, FP8: tl.constexpr, ALIBI: tl.constexpr = False, SINKS: tl.constexpr = False,
):  # fmt: skip
    tile = num_tiles - 1 - tl.program_id(0)  # the last queries see the most keys, so they start first
    kv_head = tl.program_id(1)
    KV_HEADS: tl.constexpr = NUM_HEADS // HEADS_PER_KV
    base = tl.load(query_start + first_seq) // BLOCK_Q
    low = first_seq
    high = num_seqs
    while low < high:  # finds the last sequence with its first tile at or before this tile
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q - base + middle - first_seq <= tile:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    first_query = tl.load(query_start + seq)
    num_queries = tl.load(query_start + seq + 1) - first_query
    first_in_tile = (tile - (first_query // BLOCK_Q - base + seq - first_seq)) * BLOCK_Q
    if first_in_tile >= num_queries:
        return
    context = tl.load(seq_lens + seq) - num_queries  # number of keys of earlier steps

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_D)
    query = first_in_tile + rows // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + rows % HEADS_PER_KV
    live_row = (rows < BLOCK_Q * HEADS_PER_KV) & (query < num_queries)
    live_dim = dims < D
    live_q = live_row[:, None] & live_dim[None, :]
    token = (first_query + query).to(tl.int64)
    q_tile = tl.load(q + (token * q_stride + head * D)[:, None] + dims[None, :], mask=live_q, other=0.0)

    scale *= 1.4426950408889634  # log2(e)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head, mask=live_row, other=0.0) * 1.4426950408889634
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    oldest = 0  # the first position that any of the tile's queries sees
    if WINDOW > 0:
        oldest = tl.maximum(context + first_in_tile - WINDOW + 1, 0)

    table = cache.block_table + seq.to(tl.int64) * table_stride
    for start in range(oldest // BLOCK_N * BLOCK_N, context, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        live_key = (key >= oldest) & (key < context)  # the rest of a block may hold anything, NaN included, and is never loaded
        block = tl.load(table + key // BLOCK_SIZE, mask=live_key, other=0).to(tl.int64)
        at = (block * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head
        row = at * D
        k_tile = tl.load(cache.k + row[None, :] + dims[:, None], mask=live_key[None, :] & live_dim[:, None], other=0.0)
        v_tile = tl.load(cache.v + row[:, None] + dims[None, :], mask=live_key[:, None] & live_dim[None, :], other=0.0)
        k_scale = live_key
        v_scale = live_key
        if QUANTIZED:
            k_tile = widen(k_tile, q_tile.dtype, FP8)
            v_tile = widen(v_tile, q_tile.dtype, FP8)
            # Not as pairs: these took more registers, and the prompts' tile has none left on sm_89.
            k_scale = tl.load(cache.scales + 2 * at, mask=live_key, other=1.0).to(tl.float32)
            v_scale = tl.load(cache.scales + 2 * at + 1, mask=live_key, other=1.0).to(tl.float32)
        visible = live_key[None, :]
        if WINDOW > 0:
            visible = visible & (key[None, :] > (context + query)[:, None] - WINDOW)
        acc, peak, total = _absorb(q_tile, k_tile, v_tile, k_scale, v_scale, visible, acc, peak, total, scale, softcap, slope,
                                   key[None, :] - (context + query)[:, None], True, SOFTCAP, ALIBI, QUANTIZED)

    # The chunk's own keys, counted from the chunk's beginning.
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(oldest - context, 0) // BLOCK_N * BLOCK_N
    diagonal = tl.maximum(first_in_tile // BLOCK_N * BLOCK_N, begin)
    end = tl.minimum(first_in_tile + BLOCK_Q, num_queries)
    columns_k = k_column + kv_head * D
    columns_v = v_column + kv_head * D
    for start in range(begin, diagonal, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        if DESCRIPTORS:
            k_tile = k.load([first_query + start, columns_k]).T
            v_tile = v.load([first_query + start, columns_v])
        else:
            at = (first_query + key).to(tl.int64)
            k_tile = tl.load(k + (at * k_stride + columns_k)[None, :] + dims[:, None], mask=live_dim[:, None], other=0.0)
            v_tile = tl.load(v + (at * v_stride + columns_v)[:, None] + dims[None, :], mask=live_dim[None, :], other=0.0)
        visible = live_row[:, None]
        if WINDOW > 0:
            visible = key[None, :] > query[:, None] - WINDOW
        acc, peak, total = _absorb(q_tile, k_tile, v_tile, 0, 0, visible, acc, peak, total, scale, softcap, slope,
                                   key[None, :] - query[:, None], WINDOW > 0, SOFTCAP, ALIBI)
    for start in range(diagonal, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        if DESCRIPTORS:
            k_tile = k.load([first_query + start, columns_k]).T
            v_tile = v.load([first_query + start, columns_v])
        else:
            at = (first_query + key).to(tl.int64)
            live = (key < num_queries)[:, None] & live_dim[None, :]
            k_tile = tl.trans(tl.load(k + (at * k_stride + columns_k)[:, None] + dims[None, :], mask=live, other=0.0))
            v_tile = tl.load(v + (at * v_stride + columns_v)[:, None] + dims[None, :], mask=live, other=0.0)
        visible = key[None, :] <= query[:, None]
        if WINDOW > 0:
            visible = visible & (key[None, :] > query[:, None] - WINDOW)
        acc, peak, total = _absorb(q_tile, k_tile, v_tile, 0, 0, visible, acc, peak, total, scale, softcap, slope,
                                   key[None, :] - query[:, None], True, SOFTCAP, ALIBI)

    if SINKS:
        sink = tl.load(sinks + head, mask=live_row, other=0.0) * 1.4426950408889634
        total += tl.exp2(tl.minimum(sink - peak, 126.0))  # 2^126: the weight of the keys is 0 in float32
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + ((token * NUM_HEADS + head) * D)[:, None] + dims[None, :], mean.to(out.dtype.element_ty), mask=live_q)
