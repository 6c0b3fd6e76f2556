"""Attention of decodes in Triton, from the fused projection to the heads' outputs in one kernel.

Each sequence has one new token. A program owns one KV head of one sequence; the rows of its matrix are the query heads that
share it and, below them, the new key, all normalised and rotated together. The online softmax starts with the new token's own
key and value, which are also written to the cache, and goes on over the cached ones. So the new key is never read back.

    cached keys   |---- split 0 ----|---- split 1 ----|-- split 2 --|     one program each; the last one starts with the new key

Sequences that begin with the same blocks (a shared prompt) read them once: programs of `_shared_attention` own a run of those keys
and the heads of several sequences, as rows of one matrix, and leave parts like any other split (Hydragen, Juravsky et al. 2024).

When there are too few sequences to fill the GPU, the keys are shared out over up to `splits` programs (Flash-Decoding, Dao et
al. 2023), but never less than MIN_KEYS each: how many a sequence uses depends on its length, on the device, so a captured
graph serves every length. Each leaves a partial average and the logarithm of its weight; the one that finishes last takes
the weighted mean, in the splits' order, so it does not matter which one that is.

The softmax runs online (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023), in base 2.
"""
from __future__ import annotations

import triton
import triton.language as tl

MAX_SPLITS = 16


@triton.jit
def rotated_heads(
    token_qkv, head, dims, live, norm_weight, eps, cos, sin,
    D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of a fused projection, normalised per head and rotated: [rows, PADDED_D] of DTYPE.

    token_qkv, cos, sin: of the token, or of each row's token: [rows, 1].
    sin carries the sign, and the partner of dimension d is d + D/2 (mod D). Rounds wherever the reference does. With PDL it
    waits for the projection once it has fetched all else.
    """
    other = (dims + D // 2) % D
    if NORM:
        w = tl.load(norm_weight + head[:, None] * D + dims[None, :], mask=live, other=0.0).to(tl.float32)
        if ROPE:
            w_partner = tl.load(norm_weight + head[:, None] * D + other[None, :], mask=live, other=0.0).to(tl.float32)
    if ROPE:
        live_dim = (dims < D)[None, :]
        c = tl.load(cos + dims[None, :], mask=live_dim, other=0.0).to(tl.float32)
        s = tl.load(sin + dims[None, :], mask=live_dim, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(token_qkv + head[:, None] * D + dims[None, :], mask=live, other=0.0).to(tl.float32)
    partner = x
    if ROPE:
        partner = tl.load(token_qkv + head[:, None] * D + other[None, :], mask=live, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = ((x * scale).to(DTYPE).to(tl.float32) * w).to(DTYPE).to(tl.float32)
        if ROPE:
            partner = ((partner * scale).to(DTYPE).to(tl.float32) * w_partner).to(DTYPE).to(tl.float32)
    if ROPE:
        x = x * c + partner * s
    return x.to(DTYPE)


@triton.jit
def _fetch(
    cache_k, cache_v, block, key, oldest, end, kv_head, dims, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Keys and values [N, PADDED_D] at positions `key` in blocks `block`, and which of them lie in [oldest, end): [N] each.

    The rest of a block may hold anything, NaN included, and is never loaded."""
    place = ((block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head) * D
    visible = (key >= oldest) & (key < end)
    live = visible[:, None] & (dims < D)[None, :]
    k = tl.load(cache_k + place[:, None] + dims[None, :], mask=live, other=0.0)
    v = tl.load(cache_v + place[:, None] + dims[None, :], mask=live, other=0.0)
    return k, v, visible


@triton.jit
def _absorb_keys(q, k, v, visible, acc, peak, total, scale, softcap, SOFTCAP: tl.constexpr, SAFE: tl.constexpr = False):
    """A tile of keys and values [N, D] into the running averages of queries [M, D]; scale includes log2(e).

    visible: [M or 1, N]. SAFE: a query may have seen no key yet.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [M, N]
    if SOFTCAP:
        scores = _cap(scores, softcap)
    scores = tl.where(visible, scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = new_peak
    if SAFE:
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - base)
    weights = tl.exp2(scores - base[:, None])
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, new_peak, total * shrink + tl.sum(weights, 1)


@triton.jit
def _shared_run(keys, parts, RUN: tl.constexpr):
    """How many of the shared keys a part has; all are whole multiples of RUN."""
    return tl.maximum(tl.cdiv(keys, parts * RUN) * RUN, RUN)


@triton.jit(do_not_specialize=["num_seqs", "parts"])
def _shared_attention(
    partial, log_weight,  # [parts or more, T, H, D] and [parts or more, T, H] float32
    qkv, cache_k, cache_v, norm_weight, eps, cos, sin,  # [T, H + 2 KV, D]; [blocks, BLOCK_SIZE, KV, D] twice; [H + KV, D]; [T, D]
    block_table, shared, scale, softcap, num_seqs, qkv_stride, parts,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RUN: tl.constexpr, SOFTCAP: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q sequences, all heads of one KV head, and one part of the first shared[0] keys, which are cached."""
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    KV_HEADS: tl.constexpr = NUM_HEADS // HEADS_PER_KV
    DTYPE: tl.constexpr = cache_k.dtype.element_ty
    keys = tl.load(shared)
    run = _shared_run(keys, parts, RUN)
    begin = part * run
    end = tl.minimum(keys, begin + run)
    if begin >= end:
        if PDL:
            tl.extra.cuda.gdc_wait()  # the end of this kernel is that of all before it
        return
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_D)
    seq = tl.program_id(2).to(tl.int64) * BLOCK_Q + rows // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + rows % HEADS_PER_KV
    live_row = (rows < BLOCK_Q * HEADS_PER_KV) & (seq < num_seqs)
    live_q = live_row[:, None] & (dims < D)[None, :]
    key = begin + tl.arange(0, BLOCK_N)
    block = tl.load(block_table + key // BLOCK_SIZE, mask=key < end, other=0)
    k, v, visible = _fetch(cache_k, cache_v, block, key, 0, end, kv_head, dims, KV_HEADS, D, BLOCK_SIZE)

    token = tl.where(live_row, seq, 0)[:, None]
    q = rotated_heads(qkv + token * qkv_stride, head, dims, live_q, norm_weight, eps, cos + token * D, sin + token * D, D, NORM, ROPE,
                      DTYPE, PDL)
    scale *= 1.4426950408889634  # log2(e)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    acc, peak, total = _absorb_keys(q, k, v, visible[None, :], acc, peak, total, scale, softcap, SOFTCAP)
    for start in range(begin + BLOCK_N, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        block = tl.load(block_table + key // BLOCK_SIZE, mask=key < end, other=0)
        k, v, visible = _fetch(cache_k, cache_v, block, key, 0, end, kv_head, dims, KV_HEADS, D, BLOCK_SIZE)
        acc, peak, total = _absorb_keys(q, k, v, visible[None, :], acc, peak, total, scale, softcap, SOFTCAP)
    at = part * num_seqs * NUM_HEADS + seq * NUM_HEADS + head
    tl.store(partial + at[:, None] * D + dims[None, :], acc / total[:, None], mask=live_q)
    tl.store(log_weight + at, peak + tl.log2(total), mask=live_row)


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "splits", "shared_parts"])
def _decode_attention(
    out, partial, log_weight, tickets,  # [T, H, D]; if SPLIT: [parts, T, H, D], [parts, T, H] float32 and [seqs, KV] int32 of 0
    qkv, cache_k, cache_v, norm_weight, eps, cos, sin,  # [T, H + 2 KV, D]; [blocks, BLOCK_SIZE, KV, D] twice; [H + KV, D]; [T, D]
    slots, seq_lens, block_table, scale, softcap, num_seqs, qkv_stride, table_stride, splits,
    shared, shared_parts,  # if SHARED (and so SPLIT): [1] int32, keys of which `_shared_attention` has made at most so many parts
    NUM_HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERY_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, MIN_KEYS: tl.constexpr,
    WINDOW: tl.constexpr, SHARED: tl.constexpr, RUN: tl.constexpr, SOFTCAP: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)  # the heads of a sequence side by side: together they read whole blocks
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    KV_HEADS: tl.constexpr = NUM_HEADS // HEADS_PER_KV
    DTYPE: tl.constexpr = cache_k.dtype.element_ty
    # Lengths and block table are the step's inputs, older than its first kernel: they may be read before `gdc_wait`.
    last = tl.load(seq_lens + seq) - QUERY_WIDTH  # the first new token's position: keys before it are cached
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(last - WINDOW + 1, 0)
    begin = oldest // BLOCK_N * BLOCK_N
    end = last
    used = 1
    others = 0  # parts that are there already
    if SPLIT:
        if SHARED:
            begin = tl.load(shared)
            others = tl.cdiv(begin, _shared_run(begin, shared_parts, RUN))
        run = tl.maximum(tl.cdiv(tl.cdiv(last - begin, BLOCK_N), splits) * BLOCK_N, MIN_KEYS)
        used = tl.maximum(tl.cdiv(last - begin, run), 1)
        if split >= used:
            return
        begin += split * run
        end = tl.minimum(last, begin + run)
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_D)
    live_dim = dims < D
    table = block_table + seq * table_stride
    QUERIES: tl.constexpr = QUERY_WIDTH * HEADS_PER_KV  # rows of query heads; a row for each new key follows
    live_row = rows < QUERIES
    if QUERY_WIDTH == 1:
        head = tl.where(live_row, kv_head * HEADS_PER_KV + rows, NUM_HEADS + kv_head)
        token = seq
    else:
        head = tl.where(live_row, kv_head * HEADS_PER_KV + rows % HEADS_PER_KV, NUM_HEADS + kv_head)
        query = tl.where(live_row, rows // HEADS_PER_KV, tl.minimum(rows - QUERIES, QUERY_WIDTH - 1))  # which of the new tokens
        token = (seq * QUERY_WIDTH + query)[:, None]

    # The first keys and values are long there: they are on their way while the projection still runs. (Those of a prompt's last layer are
    # not, but see `layers/attention.py`.) The numbers of a tile's
    # blocks are read one tile ahead, so that its keys need not wait for them.
    tile = tl.arange(0, BLOCK_N)
    key = begin + tile
    block = tl.load(table + key // BLOCK_SIZE, mask=(key >= oldest) & (key < end), other=0)
    next_block = tl.load(table + (key + BLOCK_N) // BLOCK_SIZE, mask=key + BLOCK_N < end, other=0)
    k, v, live_key = _fetch(cache_k, cache_v, block, key, oldest, end, kv_head, dims, KV_HEADS, D, BLOCK_SIZE)
    if QUERY_WIDTH == 1:
        own_place = (tl.load(slots + seq) * KV_HEADS + kv_head) * D

    source = qkv + token * qkv_stride
    live_head = (rows < QUERIES + QUERY_WIDTH)[:, None] & live_dim[None, :]
    q = rotated_heads(source, head, dims, live_head, norm_weight, eps, cos + token * D, sin + token * D, D, NORM, ROPE, DTYPE, PDL)
    mine = split == used - 1
    scale *= 1.4426950408889634  # log2(e)
    if QUERY_WIDTH == 1:
        new_key = tl.sum(tl.where((rows == HEADS_PER_KV)[:, None], q.to(tl.float32), 0.0), 0)  # [PADDED_D], exact: one row
        new_value = tl.load(source + (NUM_HEADS + KV_HEADS + kv_head) * D + dims, mask=live_dim, other=0.0).to(tl.float32)
        if mine:
            tl.store(cache_k + own_place + dims, new_key.to(DTYPE), mask=live_dim)
            tl.store(cache_v + own_place + dims, new_value.to(DTYPE), mask=live_dim)
        score = tl.sum(q.to(tl.float32) * new_key[None, :], 1) * scale
        if SOFTCAP:
            score = _cap(score, softcap)
        peak = tl.where(mine, score, -float("inf"))
        total = tl.where(mine, tl.full([BLOCK_M], 1.0, tl.float32), 0.0)
        acc = tl.where(mine, tl.zeros([BLOCK_M, PADDED_D], tl.float32) + new_value[None, :], 0.0)
    else:
        peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
        if mine:
            is_new = (rows >= QUERIES) & (rows < QUERIES + QUERY_WIDTH)  # rows that are new keys: queries attend to them as to a tile
            live_new = is_new[:, None] & live_dim[None, :]
            new_values = tl.load(source + (NUM_HEADS + KV_HEADS + kv_head) * D + dims[None, :], mask=live_new, other=0.0).to(DTYPE)
            at = (tl.load(slots + seq * QUERY_WIDTH + query, mask=is_new, other=0) * KV_HEADS + kv_head) * D
            tl.store(cache_k + at[:, None] + dims[None, :], q, mask=live_new)
            tl.store(cache_v + at[:, None] + dims[None, :], new_values, mask=live_new)
            visible = is_new[None, :] & (query[None, :] <= query[:, None])
            if WINDOW > 0:
                visible = visible & (query[None, :] > query[:, None] - WINDOW)
            acc, peak, total = _absorb_keys(q, q, new_values, visible, acc, peak, total, scale, softcap, SOFTCAP)
    # A window begins one key later for each query, so that a query may see no key of a tile.
    LATER: tl.constexpr = WINDOW > 0 and QUERY_WIDTH > 1
    visible = live_key[None, :]
    if LATER:
        visible = visible & (key[None, :] > (last + query)[:, None] - WINDOW)
    acc, peak, total = _absorb_keys(q, k, v, visible, acc, peak, total, scale, softcap, SOFTCAP, LATER)
    for start in range(begin + BLOCK_N, end, BLOCK_N):
        key = start + tile
        k, v, live_key = _fetch(cache_k, cache_v, next_block, key, oldest, end, kv_head, dims, KV_HEADS, D, BLOCK_SIZE)
        next_block = tl.load(table + (key + BLOCK_N) // BLOCK_SIZE, mask=key + BLOCK_N < end, other=0)
        visible = live_key[None, :]
        if LATER:
            visible = visible & (key[None, :] > (last + query)[:, None] - WINDOW)
        acc, peak, total = _absorb_keys(q, k, v, visible, acc, peak, total, scale, softcap, SOFTCAP, LATER)

    mean = acc / (tl.where(total == 0.0, 1.0, total) if LATER else total)[:, None]  # otherwise every query has seen a key
    live_q = live_row[:, None] & live_dim[None, :]
    if QUERY_WIDTH == 1:
        row = seq * NUM_HEADS + head  # of [T, H]
    else:
        row = (seq * QUERY_WIDTH + query) * NUM_HEADS + head
    if SPLIT and used + others > 1:
        num_rows = num_seqs * QUERY_WIDTH * NUM_HEADS
        at = (others + split) * num_rows + row
        tl.store(partial + at[:, None] * D + dims[None, :], mean, mask=live_q)
        tl.store(log_weight + at, peak + tl.log2(total), mask=live_row)
        tl.debug_barrier()  # all of this program's stores come before its ticket
        ticket = tickets + seq * KV_HEADS + kv_head
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") < used - 1:
            return
        tl.store(ticket, 0)  # as it was, for the next layer
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for i in tl.range(others + used, loop_unroll_factor=8):
            top = tl.maximum(top, tl.load(log_weight + i * num_rows + row, mask=live_row, other=0.0, cache_modifier=".cg"))
        total = tl.zeros([BLOCK_M], tl.float32)
        mean = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
        for i in tl.range(others + used, loop_unroll_factor=8):
            at = i * num_rows + row
            weight = tl.exp2(tl.load(log_weight + at, mask=live_row, other=0.0, cache_modifier=".cg") - top)
            part = tl.load(partial + at[:, None] * D + dims[None, :], mask=live_q, other=0.0, cache_modifier=".cg")
            mean += weight[:, None] * part
            total += weight
        mean = mean / total[:, None]
    tl.store(out + row[:, None] * D + dims[None, :], mean.to(out.dtype.element_ty), mask=live_q)


@triton.jit
def _cap(scores, softcap):
    """softcap * tanh(scores / softcap), where scores and result carry a factor log2(e)."""
    raw = scores * 0.6931471805599453
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * raw / softcap) + 1.0)) * 1.4426950408889634
