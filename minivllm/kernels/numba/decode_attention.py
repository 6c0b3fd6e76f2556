"""Attention of decodes on a CPU, from the fused projection to the heads' outputs in one compiled call.

A task is one sequence's run of up to SPLIT keys, for all KV heads or some of them:

    cached keys   |---- split 0 ----|---- split 1 ----|-- split 2 --|     the last split's task writes the new key and value
    positions     0                SPLIT            2 SPLIT       length

It normalises and rotates its heads' queries and then visits the keys, TILE at a time, where the block table says they lie:
scores, online softmax in base 2 (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023), weighted values. All heads that share a KV
head are served by one reading of a key. Threads take tasks from a counter, so that one that starts late does less. Splits
begin at multiples of SPLIT whatever the batch and the number of threads are, so a sequence's output does not depend on them: of
more than one split each leaves its sums, and the task that finishes last adds them up in the splits' order.
"""
from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from minivllm.kernels.numba.threads import DTYPE_NAMES, Kernel, vector_shape
from minivllm.kernels.numba.vectors import (
    LOWEST,
    add_weighted,
    address_of,
    exp2,
    fetch_add,
    fma,
    four_scores,
    get_f32,
    get_f64,
    get_i32,
    get_i64,
    largest,
    load,
    prefetch,
    put_f32,
    put_i32,
    put_i64,
    rounded,
    splat,
    stack,
    store,
    total,
)

SPLIT = 128  # keys of a task
TILE = 16  # keys whose scores are held at a time
LOG2_E = 1.4426950408889634
# Arguments, 8 bytes each: addresses unless said otherwise, strides in bytes. First what each layer changes.
LAYER_ARGS = struct.Struct("10q3d")  # the last three: numbers; softcap 0 is none, and so are addresses 0
(COUNTER, OUT, QKV, QKV_STRIDE, CACHE_K, CACHE_V, NORM, COS, SIN, SLOTS, EPS, SCALE, SOFTCAP,
 TABLE, TABLE_STRIDE, SEQ_LENS, FIRST_TASKS, NUM_TASKS, PARTIAL, TICKETS, WINDOW, HEADS, KV_HEADS, BLOCK_SIZE, NUM_ARGS) = range(25)
STEP_ARGS = struct.Struct("11q")  # from TABLE on


def first_tasks(lengths: Sequence[int], window: int) -> list[int]:
    """How many splits the sequences before each one have, and at the end all of them."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + (length - 1) // SPLIT - max(0, length - window) // SPLIT + 1)
    return starts


def heads_at_once(head_dim: int, group: int, kv_heads: int) -> int:
    """KV heads of a task: as many as keep queries and sums in the L1 cache beside a tile of keys."""
    return min(kv_heads, max(1, 1024 // (head_dim * group)))


@njit(inline="always")
def power(x):
    """2^x of one number."""
    return largest(exp2(splat(x, 4)))


@njit(inline="always")
def capped(x, softcap):
    """softcap * tanh(x / softcap) * log2(e)."""
    c = splat(softcap, TILE)
    one = splat(np.float32(1.0), TILE)
    e = exp2(x * splat(np.float32(2.0 * LOG2_E), TILE) / c)
    return c * splat(np.float32(LOG2_E), TILE) * (one - (one + one) / (e + one))


@njit(inline="always")
def locate(places, table, start, n, block_size, slot_bytes):
    """Where the keys start ... start + n - 1 lie, in bytes from the cache's beginning; the last one fills up a group of four."""
    block, offset = start // block_size, start % block_size
    base = np.int64(get_i32(table + block * 4)) * block_size
    for j in range(n):
        if offset == block_size:
            block, offset = block + 1, 0
            base = np.int64(get_i32(table + block * 4)) * block_size
        put_i64(places + j * 8, (base + offset) * slot_bytes)
        offset += 1
    for j in range(n, TILE):
        put_i64(places + j * 8, get_i64(places + (n - 1) * 8))


@njit(inline="always")
def rotate(token, head, out, norm, eps, rope, cos, sin, dim, lanes, half):
    """Head `head` of a token's projection, normalised and rotated, in float32 at `out`: [dim]. Rounds where the reference does."""
    item = 2 if half else 4
    row = token + head * dim * item
    if norm == 0:
        for c in range(0, dim, lanes):
            store(out + c * 4, load(row + c * item, lanes, half), 0)
    else:
        squares = splat(np.float32(0.0), lanes)
        for c in range(0, dim, lanes):
            x = load(row + c * item, lanes, half)
            squares = fma(x, x, squares)
        scale = splat(np.float32(1.0 / math.sqrt(total(squares) / np.float32(dim) + eps)), lanes)
        weight = norm + head * dim * item
        for c in range(0, dim, lanes):
            x = rounded(load(row + c * item, lanes, half) * scale, half)
            store(out + c * 4, rounded(x * load(weight + c * item, lanes, half), half), 0)
    if rope != 0:
        middle = dim // 2
        for c in range(0, middle, lanes):
            a, b = load(out + c * 4, lanes, 0), load(out + (c + middle) * 4, lanes, 0)
            first = rounded(a * load(cos + c * item, lanes, half), half)
            second = rounded(b * load(cos + (c + middle) * item, lanes, half), half)
            store(out + c * 4, rounded(fma(b, load(sin + c * item, lanes, half), first), half), 0)
            store(out + (c + middle) * 4, rounded(fma(a, load(sin + (c + middle) * item, lanes, half), second), half), 0)


@lru_cache(maxsize=64)
def kernel(head_dim: int, group: int, most_heads: int, half: int) -> Kernel:
    """The kernel for `group` query heads per KV head, up to `most_heads` KV heads in a task."""
    D, G, MOST_HEADS, HALF = head_dim, group, most_heads, half
    ITEM = 2 if half else 4
    LANES, REGISTERS = vector_shape()
    while D % LANES:
        LANES //= 2
    PAIR = LANES  # lanes for the rotation, whose two halves of a head are apart
    while (D // 2) % PAIR:
        PAIR //= 2
    ROW = G * D  # floats of one KV head's queries or sums
    SUMS_BYTES, QUERIES_BYTES, HEADS_BYTES, SHRINK_BYTES, SCORES_BYTES, PLACES_BYTES, ROW_BYTES = (
        4 * most_heads * ROW, 4 * most_heads * ROW + 4 * D, 4 * most_heads * G, 4 * G, 4 * G * TILE, 8 * TILE, ITEM * D)

    def decode(p: Any) -> None:
        queries = stack(QUERIES_BYTES)
        sums = stack(SUMS_BYTES)
        peaks = stack(HEADS_BYTES)
        totals = stack(HEADS_BYTES)
        shrink = stack(SHRINK_BYTES)
        scores = stack(SCORES_BYTES)
        places = stack(PLACES_BYTES)
        ahead = stack(PLACES_BYTES)
        kv_heads, block_size, num_heads = p[KV_HEADS], p[BLOCK_SIZE], p[HEADS]
        args = address_of(p)
        eps, scale, softcap = (np.float32(get_f64(args + 8 * EPS)), np.float32(get_f64(args + 8 * SCALE)),
                               np.float32(get_f64(args + 8 * SOFTCAP)))
        slot_bytes = kv_heads * D * ITEM
        tasks_per_split = (kv_heads + MOST_HEADS - 1) // MOST_HEADS
        seq = 0
        while True:
            t = fetch_add(args + 8 * COUNTER, 1)
            if t >= p[NUM_TASKS]:
                break
            row = t // tasks_per_split  # of PARTIAL, if the sequence has several splits
            while get_i32(p[FIRST_TASKS] + seq * 4 + 4) <= row:  # tasks come in order
                seq += 1
            first_row = get_i32(p[FIRST_TASKS] + seq * 4)
            splits = get_i32(p[FIRST_TASKS] + seq * 4 + 4) - first_row
            first_head = t % tasks_per_split * MOST_HEADS
            heads = min(MOST_HEADS, kv_heads - first_head)
            length = get_i32(p[SEQ_LENS] + 4 * seq)
            begin = max(0, length - p[WINDOW])
            split = begin // SPLIT + row - first_row
            begin = max(begin, split * SPLIT)
            end = min(length, (split + 1) * SPLIT)
            token = p[QKV] + seq * p[QKV_STRIDE]
            cos = p[COS] + seq * D * ITEM
            sin = p[SIN] + seq * D * ITEM

            # Queries and, in the last split's task, the new keys, in one loop: what is called once is compiled once.
            factor = splat(np.float32(scale * LOG2_E if softcap == 0.0 else scale), PAIR)
            slot = get_i64(p[SLOTS] + 8 * seq) * slot_bytes
            for i in range(heads * G + (heads if end == length else 0)):
                h = first_head + i - heads * G  # KV head of a new key
                head = queries + min(i, heads * G) * D * 4
                rotate(token, first_head * G + i if i < heads * G else num_heads + h, head, p[NORM], eps, p[COS], cos, sin, D, PAIR, HALF)
                value = token + (num_heads + kv_heads + h) * D * ITEM
                for c in range(0, D, PAIR):
                    x = load(head + c * 4, PAIR, 0)
                    if i < heads * G:
                        store(head + c * 4, x * factor, 0)
                        store(sums + (i * D + c) * 4, splat(np.float32(0.0), PAIR), 0)
                    else:
                        at = slot + h * D * ITEM + c * ITEM
                        store(p[CACHE_K] + at, x, HALF)
                        store(p[CACHE_V] + at, load(value + c * ITEM, PAIR, HALF), HALF)
            for i in range(heads * G):
                put_f32(peaks + i * 4, np.float32(LOWEST))
                put_f32(totals + i * 4, np.float32(0.0))

            # Each tile's keys are located, and brought near, while the tile before is computed; first of all the first one's.
            table = p[TABLE] + seq * p[TABLE_STRIDE]
            for start in range(begin - TILE, end, TILE):
                following = min(TILE, end - start - TILE)
                if following > 0:
                    locate(ahead, table, start + TILE, following, block_size, slot_bytes)
                if start < begin:
                    for j in range(following):
                        for h in range(first_head, first_head + heads):
                            prefetch(p[CACHE_K] + get_i64(ahead + j * 8) + h * D * ITEM, ROW_BYTES)
                            prefetch(p[CACHE_V] + get_i64(ahead + j * 8) + h * D * ITEM, ROW_BYTES)
                    places, ahead = ahead, places
                    continue
                n = min(TILE, end - start)
                near = ahead if following > 0 else places
                for h in range(heads):
                    offset = (first_head + h) * D * ITEM
                    keys, values = p[CACHE_K] + offset, p[CACHE_V] + offset
                    for j in range(0, n, 4):
                        four_scores(scores + j * 4, queries + h * ROW * 4, places + j * 8, near + j * 8, keys,
                                    D, G, TILE, LANES, HALF, REGISTERS)
                    for g in range(G):
                        s = scores + g * TILE * 4
                        if softcap != 0.0:
                            store(s, capped(load(s, TILE, 0), softcap), 0)
                        for j in range(n, TILE):
                            put_f32(s + j * 4, np.float32(LOWEST))
                        x = load(s, TILE, 0)
                        i = (h * G + g) * 4
                        old = get_f32(peaks + i)
                        peak = max(old, largest(x))
                        weights = exp2(x - splat(peak, TILE))
                        store(s, weights, 0)
                        less = power(old - peak)
                        put_f32(shrink + g * 4, less)
                        put_f32(peaks + i, peak)
                        put_f32(totals + i, get_f32(totals + i) * less + total(weights))
                    add_weighted(sums + h * ROW * 4, shrink, scores, places, near, values, n, D, G, TILE, LANES, HALF, REGISTERS)
                places, ahead = ahead, places

            out = p[OUT] + (seq * num_heads + first_head * G) * D * ITEM
            if splits == 1:
                for i in range(heads * G):
                    mean = splat(np.float32(1.0) / get_f32(totals + i * 4), PAIR)
                    for c in range(0, D, PAIR):
                        store(out + (i * D + c) * ITEM, load(sums + (i * D + c) * 4, PAIR, 0) * mean, HALF)
                continue
            width = (D + 2) * 4  # bytes of a head in PARTIAL: sums, peak, total
            mine = p[PARTIAL] + (row * num_heads + first_head * G) * width
            for i in range(heads * G):
                for c in range(0, D, PAIR):
                    store(mine + i * width + c * 4, load(sums + (i * D + c) * 4, PAIR, 0), 0)
                put_f32(mine + i * width + D * 4, get_f32(peaks + i * 4))
                put_f32(mine + i * width + D * 4 + 4, get_f32(totals + i * 4))
            ticket = p[TICKETS] + (seq * kv_heads + first_head) * 4
            if fetch_add(ticket, 1) < splits - 1:
                continue
            put_i32(ticket, 0)  # as it was, for the next layer
            for i in range(heads * G):
                part = p[PARTIAL] + (first_row * num_heads + first_head * G + i) * width
                peak = np.float32(LOWEST)
                for k in range(splits):
                    peak = max(peak, get_f32(part + k * num_heads * width + D * 4))
                for c in range(0, D, PAIR):
                    store(sums + c * 4, splat(np.float32(0.0), PAIR), 0)
                weight_sum = np.float32(0.0)
                for k in range(splits):
                    at = part + k * num_heads * width
                    weight = power(get_f32(at + D * 4) - peak)
                    weight_sum += weight * get_f32(at + D * 4 + 4)
                    w = splat(weight, PAIR)
                    for c in range(0, D, PAIR):
                        store(sums + c * 4, fma(load(at + c * 4, PAIR, 0), w, load(sums + c * 4, PAIR, 0)), 0)
                mean = splat(np.float32(1.0) / weight_sum, PAIR)
                for c in range(0, D, PAIR):
                    store(out + (i * D + c) * ITEM, load(sums + c * 4, PAIR, 0) * mean, HALF)

    return Kernel(decode, f"decode attention in {DTYPE_NAMES[half]} (heads of {head_dim}, {group} per KV head)")
