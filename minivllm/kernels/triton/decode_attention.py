"""Attention of decodes in Triton, from the fused projection to the heads' outputs in one kernel.

A decode has `query_width` new tokens: one, or one and its drafts. A program computes one KV head of one sequence. The rows of its
matrix are the query heads that share the KV head, for each new token, and below them the new keys. All of them are normalized and
rotated together:

    rows, 2 heads, width 1    | q head 0 | q head 1 | key |
    rows, 2 heads, width 2    | q head 0 | q head 1 | q' head 0 | q' head 1 | key | key' |

The online softmax starts with the new tokens' own keys and values, which are also written to the cache, and continues with the cached
ones. So a new key is never read back from memory.

    cached keys   |---- split 0 ----|---- split 1 ----|-- split 2 --|     one program each; the last one starts with the new keys

Sequences whose first blocks are the same (a shared prompt) read these blocks once. A program of `_shared_attention` computes one part
of the shared keys for the heads of several tokens, which are the rows of one matrix. Its result is merged like that of any other split
(Hydragen, Juravsky et al. 2024).

With too few sequences to fill the GPU, up to `splits` programs share the keys of a sequence (Flash-Decoding, Dao et al. 2023), at least
`min_keys` keys each. The kernel computes from the length how many splits a sequence uses, so that a captured graph serves every length.
Each program stores its average and the logarithm of its weight. The program that finishes last computes the weighted mean. It adds in
the order of the splits, so that the result does not depend on which program is last.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from minivllm.kernels.triton.attention_tile import (
    absorb_keys,
    alibi_slope,
    all_dimensions,
    cap,
    empty_sums,
    fetch,
    rotated_heads,
    scaled_queries,
)
from minivllm.kernels.triton.quantized_cache import quantize, store_scales


class DecodeShape(NamedTuple):
    """What the compiled code of a decode is specialized for."""

    num_heads: int
    heads_per_kv: int
    head_dim: int
    padded_dim: int  # a power of two, at least 16
    block_size: int  # slots of a cache block
    query_width: int  # new tokens of a sequence
    block_q: int  # tokens of a program of `_shared_attention`
    block_m: int  # rows of a tile: a power of two, at least 16
    block_n: int  # keys of a tile
    split: bool  # whether several programs share the keys of a sequence
    min_keys: int  # of a split
    shared: bool  # whether `_shared_attention` computes the first keys
    shared_multiple: int  # the number of shared keys is a multiple of this
    window: int  # 0: none
    softcap: bool
    norm: bool
    rope: bool
    quantized: bool = False  # keys and values are codes of 8 bits
    fp8: bool = False
    native: bool = False  # whether codes are converted by instructions of the GPU
    alibi: bool = False  # whether scores fall with the distance of the key
    sinks: bool = False  # whether the softmax of each head has one more score


class Parts(NamedTuple):
    """Results of programs that share the keys of a sequence: parts of the shared prefix first, then the splits."""

    mean: Any  # [parts, T, H, D] float32
    log_weight: Any  # [parts, T, H] float32
    finished: Any  # [B, KV] int32: number of splits that have finished; 0 between kernels
    shared_keys: Any  # [1] int32: number of keys that `_shared_attention` has computed


@triton.jit
def _keys_per_part(keys, parts, MULTIPLE: tl.constexpr):
    """Number of shared keys of a part: a multiple of MULTIPLE."""
    return tl.maximum(tl.cdiv(keys, parts * MULTIPLE) * MULTIPLE, MULTIPLE)


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def _shared_attention(
    parts, projection, cache, seq_lens, scale, softcap, num_tokens, num_parts,  # Parts, Projection, Cache; [B]
    SHAPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the keys that all decodes share, for block_q tokens and all query heads of one KV head."""
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    G: tl.constexpr = SHAPE.heads_per_kv
    D: tl.constexpr = SHAPE.head_dim
    DTYPE: tl.constexpr = projection.qkv.dtype.element_ty
    keys = tl.load(parts.shared_keys)
    run = _keys_per_part(keys, num_parts, SHAPE.shared_multiple)
    begin = part * run
    end = tl.minimum(keys, begin + run)
    if begin >= end:
        if PDL:
            tl.extra.cuda.gdc_wait()  # the end of this kernel implies the end of all before it
        return
    rows = tl.arange(0, SHAPE.block_m)
    dims = tl.arange(0, SHAPE.padded_dim)
    token = tl.program_id(2).to(tl.int64) * SHAPE.block_q + rows // G
    head = kv_head * G + rows % G
    live_row = (rows < SHAPE.block_q * G) & (token < num_tokens)
    live_q = live_row[:, None] & (dims < D)[None, :]
    key = begin + tl.arange(0, SHAPE.block_n)
    block = tl.load(cache.block_table + key // SHAPE.block_size, mask=key < end, other=0)
    k, v, live_key, k_scale, v_scale = fetch(cache, block, key, 0, end, kv_head, dims, SHAPE)

    source = tl.where(live_row, token, 0)[:, None]
    q = rotated_heads(projection, source, head, dims, live_q, D, SHAPE.norm, SHAPE.rope, DTYPE, PDL)
    scale *= 1.4426950408889634  # log2(e)
    q, scale = scaled_queries(q, scale, SHAPE)
    peak = tl.full([SHAPE.block_m], -float("inf"), tl.float32)
    total = tl.full([SHAPE.block_m], 0.0, tl.float32)
    acc = empty_sums(SHAPE)
    slope = alibi_slope(projection, head, live_row, SHAPE)
    position = 0
    if SHAPE.alibi:
        seq = token // SHAPE.query_width
        position = (tl.load(seq_lens + seq, mask=live_row, other=0) - SHAPE.query_width + token % SHAPE.query_width)[:, None]
    acc, peak, total = absorb_keys(q, k, v, k_scale, v_scale, live_key[None, :], acc, peak, total, scale, softcap, slope,
                                    key[None, :] - position, SHAPE)
    for start in range(begin + SHAPE.block_n, end, SHAPE.block_n):
        key = start + tl.arange(0, SHAPE.block_n)
        block = tl.load(cache.block_table + key // SHAPE.block_size, mask=key < end, other=0)
        k, v, live_key, k_scale, v_scale = fetch(cache, block, key, 0, end, kv_head, dims, SHAPE)
        acc, peak, total = absorb_keys(q, k, v, k_scale, v_scale, live_key[None, :], acc, peak, total, scale, softcap, slope,
                                        key[None, :] - position, SHAPE)
    acc = all_dimensions(acc, SHAPE)
    at = part * num_tokens * SHAPE.num_heads + token * SHAPE.num_heads + head
    tl.store(parts.mean + at[:, None] * D + dims[None, :], acc / total[:, None], mask=live_q)
    tl.store(parts.log_weight + at, peak + tl.log2(total), mask=live_row)


@triton.jit
def _divide_keys(context, splits, shared_parts, parts, SHAPE: tl.constexpr):
    """Divide the cached keys [0, context) of a sequence into splits.

    -> (the oldest key that a query sees, the first key of split 0, keys per split, splits used, parts that `_shared_attention` computed).
    """
    oldest = 0
    if SHAPE.window > 0:
        oldest = tl.maximum(context - SHAPE.window + 1, 0)
    begin = oldest // SHAPE.block_n * SHAPE.block_n
    run = context
    used = 1
    before = 0
    if SHAPE.split:
        if SHAPE.shared:
            begin = tl.load(parts.shared_keys)
            before = tl.cdiv(begin, _keys_per_part(begin, shared_parts, SHAPE.shared_multiple))
        run = tl.maximum(tl.cdiv(tl.cdiv(context - begin, SHAPE.block_n), splits) * SHAPE.block_n, SHAPE.min_keys)
        used = tl.maximum(tl.cdiv(context - begin, run), 1)
    return oldest, begin, run, used, before


@triton.jit
def _attend_to_new_token(q, projection, token, cache, row, mine, kv_head, dims, scale, softcap, SHAPE: tl.constexpr):
    """Start the averages with the one new token, if this split is the last one (`mine`): its key is a row of `q`.

    Also writes its key and value to the cache, to head `row`."""
    D: tl.constexpr = SHAPE.head_dim
    KV_HEADS: tl.constexpr = SHAPE.num_heads // SHAPE.heads_per_kv
    live_dim = dims < D
    is_key = (tl.arange(0, SHAPE.block_m) == SHAPE.heads_per_kv)[:, None]
    key = tl.sum(tl.where(is_key, q.to(tl.float32), 0.0), 0)  # [PADDED_D]; exact, since only one row is not zero
    source = projection.qkv + token * projection.stride + (SHAPE.num_heads + KV_HEADS + kv_head) * D
    value = tl.load(source + dims, mask=live_dim, other=0.0).to(tl.float32)
    once = 1.0  # the softmax weight of the new token
    if SHAPE.quantized:
        at = row * D + dims
        k_codes, keys, k_scale = quantize(key[None, :], SHAPE.fp8)
        v_codes, values, v_scale = quantize(value[None, :], SHAPE.fp8)
        if mine:
            one = tl.arange(0, 1)
            tl.store(cache.k + at[None, :], k_codes, mask=live_dim[None, :])
            tl.store(cache.v + at[None, :], v_codes, mask=live_dim[None, :])
            store_scales(cache.scales, row + one, k_scale, v_scale, one == 0)
        key = tl.sum(keys * k_scale[:, None], 0)
        even_value, odd_value = tl.split(tl.reshape(values, [SHAPE.padded_dim // 2, 2]))
        v_scale = tl.sum(v_scale, 0)
        once = 1.0 / v_scale
    elif mine:
        tl.store(cache.k + row * D + dims, key.to(q.dtype), mask=live_dim)
        tl.store(cache.v + row * D + dims, value.to(q.dtype), mask=live_dim)
    score = tl.sum(q.to(tl.float32) * key[None, :], 1) * scale
    if SHAPE.softcap:
        score = cap(score, softcap)
    if SHAPE.quantized:
        score = score + tl.log2(v_scale)
    peak = tl.where(mine, score, -float("inf"))
    total = tl.where(mine, tl.full([SHAPE.block_m], once, tl.float32), 0.0)
    if SHAPE.quantized:
        zeros = tl.full([SHAPE.block_m, SHAPE.padded_dim // 2], 0.0, tl.float32)
        acc = (tl.where(mine, zeros + even_value[None, :], 0.0), tl.where(mine, zeros + odd_value[None, :], 0.0))
    else:
        acc = tl.where(mine, tl.full([SHAPE.block_m, SHAPE.padded_dim], 0.0, tl.float32) + value[None, :], 0.0)
    return acc, peak, total


@triton.jit
def _attend_to_new_tokens(q, projection, token, query, cache, slots, mine, kv_head, dims, scale, softcap, slope, SHAPE: tl.constexpr):
    """The same for several new tokens: the rows of `q` that are keys serve as a tile of keys, causal among the new tokens.

    token: [rows, 1] of the batch; query: [rows] index of the token among the sequence's new ones; slots: those of the new ones.
    """
    D: tl.constexpr = SHAPE.head_dim
    KV_HEADS: tl.constexpr = SHAPE.num_heads // SHAPE.heads_per_kv
    QUERY_ROWS: tl.constexpr = SHAPE.query_width * SHAPE.heads_per_kv
    peak = tl.full([SHAPE.block_m], -float("inf"), tl.float32)
    total = tl.full([SHAPE.block_m], 0.0, tl.float32)
    acc = empty_sums(SHAPE)
    if mine:
        rows = tl.arange(0, SHAPE.block_m)
        is_key = (rows >= QUERY_ROWS) & (rows < QUERY_ROWS + SHAPE.query_width)
        live = is_key[:, None] & (dims < D)[None, :]
        source = projection.qkv + token * projection.stride + (SHAPE.num_heads + KV_HEADS + kv_head) * D
        values = tl.load(source + dims[None, :], mask=live, other=0.0).to(q.dtype)
        row = tl.load(slots + query, mask=is_key, other=0) * KV_HEADS + kv_head
        at = row[:, None] * D + dims[None, :]
        k_scale = is_key
        v_scale = is_key
        keys = q
        if SHAPE.quantized:
            keys, _, k_scale = quantize(q.to(tl.float32), SHAPE.fp8)
            values, _, v_scale = quantize(values.to(tl.float32), SHAPE.fp8)
            store_scales(cache.scales, row, k_scale, v_scale, is_key)
        tl.store(cache.k + at, keys, mask=live)
        tl.store(cache.v + at, values, mask=live)
        if SHAPE.quantized:
            even, odd = tl.split(tl.reshape(values, [SHAPE.block_m, SHAPE.padded_dim // 2, 2]))
            values = (even.to(tl.int16) & 0xFF) | (odd.to(tl.int16) << 8)
        visible = is_key[None, :] & (query[None, :] <= query[:, None])
        if SHAPE.window > 0:
            visible = visible & (query[None, :] > query[:, None] - SHAPE.window)
        queries, factor = scaled_queries(q, scale, SHAPE)
        acc, peak, total = absorb_keys(queries, keys, values, k_scale, v_scale, visible, acc, peak, total, factor, softcap, slope,
                                        query[None, :] - query[:, None], SHAPE)
    return acc, peak, total


@triton.jit
def _store_part(parts, mean, log_weight, at, finished, dims, live_row, live_q, D: tl.constexpr):
    """Store a split's mean [M, D] and log_weight [M] in rows `at` -> the number of splits that finished before this one."""
    tl.store(parts.mean + at[:, None] * D + dims[None, :], mean, mask=live_q)
    tl.store(parts.log_weight + at, log_weight, mask=live_row)
    tl.debug_barrier()  # all of this program's stores come before its count
    return tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _merge_parts(parts, num_parts, row, num_rows, dims, live_row, live_q, SHAPE: tl.constexpr):
    """The weighted mean [M, D] of all parts; row: [M] of the num_rows rows of each part."""
    top = tl.full([SHAPE.block_m], -float("inf"), tl.float32)
    for i in tl.range(num_parts, loop_unroll_factor=8):
        top = tl.maximum(top, tl.load(parts.log_weight + i * num_rows + row, mask=live_row, other=0.0, cache_modifier=".cg"))
    total = tl.full([SHAPE.block_m], 0.0, tl.float32)
    mean = tl.full([SHAPE.block_m, SHAPE.padded_dim], 0.0, tl.float32)
    for i in tl.range(num_parts, loop_unroll_factor=8):
        at = i * num_rows + row
        weight = tl.exp2(tl.load(parts.log_weight + at, mask=live_row, other=0.0, cache_modifier=".cg") - top)
        part = tl.load(parts.mean + at[:, None] * SHAPE.head_dim + dims[None, :], mask=live_q, other=0.0, cache_modifier=".cg")
        mean += weight[:, None] * part
        total += weight
    return mean / total[:, None]


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "splits", "shared_parts"])
def _decode_attention(
    out, parts, projection, cache, slots, seq_lens, scale, softcap,  # out: [T, H, D]; Parts, Projection, Cache
    num_seqs, table_stride, splits, shared_parts,  # shared_parts: at most so many parts come from `_shared_attention`
    SHAPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one sequence, for all query heads of one KV head."""
    kv_head = tl.program_id(0)  # programs of one sequence run side by side: together they read whole blocks
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    G: tl.constexpr = SHAPE.heads_per_kv
    W: tl.constexpr = SHAPE.query_width
    D: tl.constexpr = SHAPE.head_dim
    KV_HEADS: tl.constexpr = SHAPE.num_heads // SHAPE.heads_per_kv
    DTYPE: tl.constexpr = projection.qkv.dtype.element_ty
    # A window begins one key later for each query, so that a query may see no key of a tile.
    STAGGERED: tl.constexpr = SHAPE.window > 0 and SHAPE.query_width > 1
    # Lengths and block table are inputs of the step, older than its first kernel: they may be read before `gdc_wait`.
    context = tl.load(seq_lens + seq) - W  # keys before the new ones are cached
    oldest, begin, run, used, before = _divide_keys(context, splits, shared_parts, parts, SHAPE)
    end = context
    if SHAPE.split:
        if split >= used:
            return
        begin += split * run
        end = tl.minimum(context, begin + run)
    rows = tl.arange(0, SHAPE.block_m)
    dims = tl.arange(0, SHAPE.padded_dim)
    live_row = rows < W * G
    if W == 1:
        query = 0
        token = seq
        head = tl.where(live_row, kv_head * G + rows, SHAPE.num_heads + kv_head)
    else:
        query = tl.where(live_row, rows // G, tl.minimum(rows - W * G, W - 1))
        token = (seq * W + query)[:, None]
        head = tl.where(live_row, kv_head * G + rows % G, SHAPE.num_heads + kv_head)

    # The first tile of keys and values is older than the kernel before this one, so it is fetched while the projection still runs.
    # (In a prompt's last layer it is not older, but see `layers/attention.py`.) The block numbers of a tile are read one tile ahead, so
    # that the load of its keys need not wait for them.
    table = cache.block_table + seq * table_stride
    tile = tl.arange(0, SHAPE.block_n)
    key = begin + tile
    block = tl.load(table + key // SHAPE.block_size, mask=(key >= oldest) & (key < end), other=0)
    next_block = tl.load(table + (key + SHAPE.block_n) // SHAPE.block_size, mask=key + SHAPE.block_n < end, other=0)
    k, v, live_key, k_scale, v_scale = fetch(cache, block, key, oldest, end, kv_head, dims, SHAPE)
    if W == 1:
        new_row = tl.load(slots + seq) * KV_HEADS + kv_head

    live_head = (rows < W * G + W)[:, None] & (dims < D)[None, :]
    q = rotated_heads(projection, token, head, dims, live_head, D, SHAPE.norm, SHAPE.rope, DTYPE, PDL)
    mine = split == used - 1
    scale *= 1.4426950408889634  # log2(e)
    slope = alibi_slope(projection, head, live_row, SHAPE)
    position = context
    if W > 1:
        position = (context + query)[:, None]
    if W == 1:
        acc, peak, total = _attend_to_new_token(q, projection, token, cache, new_row, mine, kv_head, dims, scale, softcap, SHAPE)
    else:
        acc, peak, total = _attend_to_new_tokens(q, projection, token, query, cache, slots + seq * W, mine, kv_head, dims, scale, softcap,
                                                 slope, SHAPE)
    q, scale = scaled_queries(q, scale, SHAPE)
    visible = live_key[None, :]
    if STAGGERED:
        visible = visible & (key[None, :] > (context + query)[:, None] - SHAPE.window)
    acc, peak, total = absorb_keys(q, k, v, k_scale, v_scale, visible, acc, peak, total, scale, softcap, slope, key[None, :] - position,
                                    SHAPE, STAGGERED)
    for start in range(begin + SHAPE.block_n, end, SHAPE.block_n):
        key = start + tile
        k, v, live_key, k_scale, v_scale = fetch(cache, next_block, key, oldest, end, kv_head, dims, SHAPE)
        next_block = tl.load(table + (key + SHAPE.block_n) // SHAPE.block_size, mask=key + SHAPE.block_n < end, other=0)
        visible = live_key[None, :]
        if STAGGERED:
            visible = visible & (key[None, :] > (context + query)[:, None] - SHAPE.window)
        acc, peak, total = absorb_keys(q, k, v, k_scale, v_scale, visible, acc, peak, total, scale, softcap, slope,
                                        key[None, :] - position, SHAPE, STAGGERED)

    if SHAPE.sinks:
        sink = tl.load(projection.sinks + head, mask=live_row, other=0.0) * 1.4426950408889634
        total += tl.where(mine, tl.exp2(tl.minimum(sink - peak, 126.0)), 0.0)  # 2^126: the weight of the keys is 0 in float32
    if STAGGERED:
        total = tl.where(total == 0.0, 1.0, total)  # a query that has seen no key: its weight is 0, since its peak is -inf
    mean = all_dimensions(acc, SHAPE) / total[:, None]
    live_q = live_row[:, None] & (dims < D)[None, :]
    row = (seq * W + query) * SHAPE.num_heads + head  # of [T, H]
    if SHAPE.split and used + before > 1:
        finished = parts.finished + seq * KV_HEADS + kv_head
        num_rows = num_seqs * W * SHAPE.num_heads
        at = (before + split) * num_rows + row
        if _store_part(parts, mean, peak + tl.log2(total), at, finished, dims, live_row, live_q, D) < used - 1:
            return
        tl.store(finished, 0)  # for the next layer
        mean = _merge_parts(parts, before + used, row, num_rows, dims, live_row, live_q, SHAPE)
    tl.store(out + row[:, None] * D + dims[None, :], mean.to(out.dtype.element_ty), mask=live_q)
