"""Attention of decodes on a CPU, from the fused projection to the heads' outputs in one compiled call.

A task is up to CPU_SPLIT_KEYS keys of one sequence (a split), for all KV heads or some of them:

    cached keys   |---- split 0 ----|---- split 1 ----|-- split 2 --|     each new key is written by the task whose split it is in
    positions     0                128               256        length

A task normalizes and rotates its queries, writes its new keys and values, and then visits its keys, CPU_TILE_KEYS at a time, where the
block table says they are: scores, online softmax in base 2 (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023), weighted values.
All heads of a KV head's group use a key while it is loaded. A tile of keys stays in the L1 cache for all new tokens of the sequence.

Threads take tasks from a counter, so that a thread that starts late computes less. Splits begin at multiples of CPU_SPLIT_KEYS for
every batch and every number of threads, so a sequence's output does not depend on them. With more than one split, each task stores its
sums, and the task that finishes last adds them in the order of the splits.

A quantized cache has one scale per key and head. Keys and values are converted to float32 while they are loaded, and the scales multiply
scores and weights instead: one number per key.
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
    BFLOAT16,
    INT8,
    LOWEST,
    SIZES,
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
    larger,
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
from minivllm.kernels.reference.kv_cache import SMALLEST_SCALE
from minivllm.kernels.tuning import CPU_MAX_QUERIES, CPU_SPLIT_KEYS, CPU_TASK_FLOATS, CPU_TILE_KEYS

LOG2_E = 1.4426950408889634
# Arguments, 8 bytes each: addresses unless stated otherwise, strides in bytes. First those that change with each layer.
SCALE_BYTES = 4  # from one key's scale to the next: a scale of its value is between
LAYER_ARGS = struct.Struct("14q3d")  # the last three are numbers; a softcap of 0 is none, and so are addresses of 0
(COUNTER, OUT, QKV, QKV_STRIDE, CACHE_K, CACHE_V, SCALES_K, SCALES_V, NORM, COS, SIN, SLOTS, SLOPES, SINKS, EPS, SCALE, SOFTCAP,
 TABLE, TABLE_STRIDE, SEQ_LENS, FIRST_SPLITS, NUM_TASKS, PARTIAL, FINISHED, WINDOW, HEADS, KV_HEADS, BLOCK_SIZE, WIDTH,
 MOST_HEADS, NUM_ARGS) = range(31)
STEP_ARGS = struct.Struct("13q")  # from TABLE on


def first_splits(lengths: Sequence[int], window: int, query_width: int = 1) -> list[int]:
    """The number of splits of all sequences before each one, and at the end of all sequences."""
    starts = [0]
    for length in lengths:
        oldest = max(0, length - query_width + 1 - window)  # the first key that a query sees
        starts.append(starts[-1] + (length - 1) // CPU_SPLIT_KEYS - oldest // CPU_SPLIT_KEYS + 1)
    return starts


def heads_at_once(head_dim: int, group: int, kv_heads: int) -> int:
    """KV heads of a task, for `group` queries per KV head: as many as keep queries and sums in the L1 cache beside a tile of keys."""
    return min(kv_heads, max(1, CPU_TASK_FLOATS // (head_dim * group)))


@njit(inline="always")
def power(x):
    """2^x of one number."""
    return largest(exp2(splat(x, 4)))


@njit(inline="always")
def capped(x, softcap):
    """softcap * tanh(x / softcap) * log2(e)."""
    c = splat(softcap, CPU_TILE_KEYS)
    one = splat(np.float32(1.0), CPU_TILE_KEYS)
    e = exp2(x * splat(np.float32(2.0 * LOG2_E), CPU_TILE_KEYS) / c)
    return c * splat(np.float32(LOG2_E), CPU_TILE_KEYS) * (one - (one + one) / (e + one))


@njit(inline="always")
def locate(offsets, table, start, n, block_size, slot_bytes):
    """Where the keys start ... start + n - 1 are, in bytes from the cache's beginning. The last offset fills up a group of four."""
    block, offset = start // block_size, start % block_size
    base = np.int64(get_i32(table + block * 4)) * block_size
    for j in range(n):
        if offset == block_size:
            block, offset = block + 1, 0
            base = np.int64(get_i32(table + block * 4)) * block_size
        put_i64(offsets + j * 8, (base + offset) * slot_bytes)
        offset += 1
    for j in range(n, CPU_TILE_KEYS):
        put_i64(offsets + j * 8, get_i64(offsets + (n - 1) * 8))


@njit(inline="always")
def store_head(out, scale_at, source, kind, dim, lanes, cache):
    """A head's numbers [dim] at `source` -> the cache; quantized as in the reference if `cache`, the kind there, has scales."""
    factor = np.float32(1.0)
    if cache >= INT8:
        most = splat(np.float32(0.0), lanes)
        for c in range(0, dim, lanes):
            most = larger(most, load(source + c * SIZES[kind], lanes, kind))
        per_unit = np.float32(1.0 / 127.0) if cache == INT8 else np.float32(1.0 / 448.0)
        scale = splat(max(largest(most) * per_unit, np.float32(SMALLEST_SCALE)), 1)
        store(scale_at, scale, BFLOAT16)
        factor = np.float32(1.0) / largest(rounded(scale, BFLOAT16))
    for c in range(0, dim, lanes):
        x = load(source + c * SIZES[kind], lanes, kind)
        if cache >= INT8:
            x = x * splat(factor, lanes)
        store(out + c * SIZES[cache], x, cache)


@njit(inline="always")
def load_scales(out, scales, offsets, first_head, heads, dim):
    """The scales of a tile's keys for some heads: [heads, CPU_TILE_KEYS] float32. offsets: of the keys, one byte per number."""
    for j in range(CPU_TILE_KEYS):
        at = scales + (get_i64(offsets + j * 8) // dim + first_head) * SCALE_BYTES
        for h in range(heads):
            put_f32(out + (h * CPU_TILE_KEYS + j) * 4, largest(load(at + h * SCALE_BYTES, 1, BFLOAT16)))


@njit(inline="always")
def rotate(token, head, out, norm, eps, rope, cos, sin, dim, lanes, half):
    """Head `head` of a token's projection, normalized and rotated, in float32 at `out`: [dim]. Rounds where the reference rounds."""
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


@njit(inline="always")
def start_task(p, queries, sums, peaks, totals, seq, first_head, heads, first_new, num_new, eps, factor, dim, group, width, lanes, half,
               cache):
    """The task's queries [heads, width * group, dim] times `factor`, with averages that have seen no key; its new keys to the cache.

    first_new, num_new: the new tokens whose keys are in the task's split.
    """
    item = 2 if half else 4
    num_heads, kv_heads = p[HEADS], p[KV_HEADS]
    rows = heads * width * group
    scale = splat(np.float32(factor), lanes)
    # Queries and new keys in one loop, so that `rotate` is compiled once.
    for i in range(rows + heads * num_new):
        h = first_head + i // (width * group)
        w = i // group % width
        source = h * group + i % group
        if i >= rows:
            h = first_head + (i - rows) % heads
            w = first_new + (i - rows) // heads
            source = num_heads + h
        token = seq * width + w
        row = p[QKV] + token * p[QKV_STRIDE]
        head = queries + min(i, rows) * dim * 4
        rotate(row, source, head, p[NORM], eps, p[COS], p[COS] + token * dim * item, p[SIN] + token * dim * item, dim, lanes, half)
        value = row + (num_heads + kv_heads + h) * dim * item
        slot = get_i64(p[SLOTS] + 8 * token) * kv_heads + h
        if i < rows:
            for c in range(0, dim, lanes):
                store(head + c * 4, load(head + c * 4, lanes, 0) * scale, 0)
                store(sums + (i * dim + c) * 4, splat(np.float32(0.0), lanes), 0)
        else:
            store_head(p[CACHE_K] + slot * dim * SIZES[cache], p[SCALES_K] + slot * SCALE_BYTES, head, 0, dim, lanes, cache)
            store_head(p[CACHE_V] + slot * dim * SIZES[cache], p[SCALES_V] + slot * SCALE_BYTES, value, half, dim, lanes, cache)
    for i in range(rows):
        put_f32(peaks + i * 4, np.float32(LOWEST))
        put_f32(totals + i * 4, np.float32(0.0))


@njit(inline="always")
def weigh(scores, k_scales, v_scales, peaks, totals, shrink, n, softcap, slopes, start, context, window, group, width, cache):
    """Softmax of a tile's scores [width * group, CPU_TILE_KEYS], n of them valid, into weights; `shrink`: factors of the sums so far.

    The tile begins at position `start`; the query of new token w is at position context + w. k_scales, v_scales: [CPU_TILE_KEYS] of a
    quantized cache. slopes: [group] of ALiBi, or 0.
    """
    for r in range(width * group):
        s = scores + r * CPU_TILE_KEYS * 4
        if cache >= INT8:
            store(s, load(s, CPU_TILE_KEYS, 0) * load(k_scales, CPU_TILE_KEYS, 0), 0)
        if softcap != 0.0:
            store(s, capped(load(s, CPU_TILE_KEYS, 0), softcap), 0)
        if slopes != 0:
            slope = get_f32(slopes + r % group * 4) * np.float32(LOG2_E)
            for j in range(n):
                put_f32(s + j * 4, get_f32(s + j * 4) + slope * np.float32(start + j - context - r // group))
        for j in range(n, CPU_TILE_KEYS):
            put_f32(s + j * 4, np.float32(LOWEST))
        if width > 1:  # LOWEST is finite: weights of rows that have seen no key yet vanish with the first key
            position = context + r // group
            for j in range(n):
                if start + j > position or start + j <= position - window:
                    put_f32(s + j * 4, np.float32(LOWEST))
        x = load(s, CPU_TILE_KEYS, 0)
        i = r * 4
        old = get_f32(peaks + i)
        peak = max(old, largest(x))
        weights = exp2(x - splat(peak, CPU_TILE_KEYS))
        store(s, weights if cache < INT8 else weights * load(v_scales, CPU_TILE_KEYS, 0), 0)
        less = power(old - peak)
        put_f32(shrink + i, less)
        put_f32(peaks + i, peak)
        put_f32(totals + i, get_f32(totals + i) * less + total(weights))


@njit(inline="always")
def store_mean(out, sums, weight_sum, dim, lanes, half):
    """sums: [dim] float32 / weight_sum -> out: [dim]."""
    mean = splat(np.float32(1.0) / weight_sum, lanes)
    for c in range(0, dim, lanes):
        store(out + c * (2 if half else 4), load(sums + c * 4, lanes, 0) * mean, half)


@njit(inline="always")
def store_part(part, sums, peak, weight_sum, dim, lanes):
    """A query's sums [dim], peak and total of one split, in PARTIAL."""
    for c in range(0, dim, lanes):
        store(part + c * 4, load(sums + c * 4, lanes, 0), 0)
    put_f32(part + dim * 4, peak)
    put_f32(part + dim * 4 + 4, weight_sum)


@njit(inline="always")
def merge_parts(sums, part, splits, stride, dim, lanes):
    """Add a query's sums of all splits, `stride` bytes apart, to sums: [dim] -> their total."""
    peak = np.float32(LOWEST)
    for k in range(splits):
        peak = max(peak, get_f32(part + k * stride + dim * 4))
    for c in range(0, dim, lanes):
        store(sums + c * 4, splat(np.float32(0.0), lanes), 0)
    weight_sum = np.float32(0.0)
    for k in range(splits):
        at = part + k * stride
        weight = power(get_f32(at + dim * 4) - peak)
        weight_sum += weight * get_f32(at + dim * 4 + 4)
        w = splat(weight, lanes)
        for c in range(0, dim, lanes):
            store(sums + c * 4, fma(load(at + c * 4, lanes, 0), w, load(sums + c * 4, lanes, 0)), 0)
    return weight_sum


@lru_cache(maxsize=64)
def kernel(head_dim: int, group: int, half: int, cache: int) -> Kernel:
    """The kernel for `group` query heads per KV head, and for up to CPU_MAX_QUERIES new tokens per sequence.

    half, cache: kinds of numbers (see vectors.py), of the model and in its KV cache.
    """
    D, G, HALF, CACHE = head_dim, group, half, cache
    LANES, REGISTERS = vector_shape()
    while D % LANES:
        LANES //= 2
    PAIR = LANES  # lanes for the rotation, whose two halves of a head are apart
    while (D // 2) % PAIR:
        PAIR //= 2
    # A task has at most this many rows: queries of all its KV heads. See heads_at_once.
    MOST_ROWS = max(CPU_TASK_FLOATS // D, G * CPU_MAX_QUERIES)
    ROW_BYTES, PART_BYTES = SIZES[cache] * D, 4 * (D + 2)  # of a head in the cache; of a query in PARTIAL: sums, peak, total
    OUT_BYTES = SIZES[half] * D  # of a head in OUT
    SUMS_BYTES, QUERIES_BYTES, HEADS_BYTES, SHRINK_BYTES, SCORES_BYTES, OFFSETS_BYTES, SCALES_BYTES = (
        4 * MOST_ROWS * D, 4 * (MOST_ROWS + 1) * D, 4 * MOST_ROWS, 4 * G * CPU_MAX_QUERIES, 4 * G * CPU_MAX_QUERIES * CPU_TILE_KEYS,
        8 * CPU_TILE_KEYS, 4 * MOST_ROWS * CPU_TILE_KEYS if cache >= INT8 else 64)

    def decode(p: Any) -> None:
        queries = stack(QUERIES_BYTES)  # one more row: a new key
        sums = stack(SUMS_BYTES)
        peaks = stack(HEADS_BYTES)
        totals = stack(HEADS_BYTES)
        shrink = stack(SHRINK_BYTES)
        scores = stack(SCORES_BYTES)
        offsets = stack(OFFSETS_BYTES)
        ahead = stack(OFFSETS_BYTES)
        k_scales = stack(SCALES_BYTES)
        v_scales = stack(SCALES_BYTES)
        kv_heads, block_size, num_heads, width, most_heads = p[KV_HEADS], p[BLOCK_SIZE], p[HEADS], p[WIDTH], p[MOST_HEADS]
        per_head = width * G  # queries of a KV head
        args = address_of(p)
        eps, scale, softcap = (np.float32(get_f64(args + 8 * EPS)), np.float32(get_f64(args + 8 * SCALE)),
                               np.float32(get_f64(args + 8 * SOFTCAP)))
        factor = scale * LOG2_E if softcap == 0.0 else scale
        tasks_per_split = (kv_heads + most_heads - 1) // most_heads
        seq = 0
        while True:
            t = fetch_add(args + 8 * COUNTER, 1)
            if t >= p[NUM_TASKS]:
                break
            row = t // tasks_per_split  # split among those of all sequences
            while get_i32(p[FIRST_SPLITS] + seq * 4 + 4) <= row:  # tasks come in order
                seq += 1
            first_row = get_i32(p[FIRST_SPLITS] + seq * 4)
            splits = get_i32(p[FIRST_SPLITS] + seq * 4 + 4) - first_row
            first_head = t % tasks_per_split * most_heads
            heads = min(most_heads, kv_heads - first_head)
            length = get_i32(p[SEQ_LENS] + 4 * seq)
            context = length - width
            begin = max(0, context + 1 - p[WINDOW])
            split = begin // CPU_SPLIT_KEYS + row - first_row
            begin = max(begin, split * CPU_SPLIT_KEYS)
            end = min(length, (split + 1) * CPU_SPLIT_KEYS)
            first_new = max(0, begin - context)
            start_task(p, queries, sums, peaks, totals, seq, first_head, heads, first_new, max(0, end - context - first_new), eps, factor,
                       D, G, width, PAIR, HALF, CACHE)
            if p[SINKS] != 0 and row == first_row:  # one split of a sequence begins with the sinks
                for i in range(heads * per_head):
                    sink = get_f32(p[SINKS] + ((first_head + i // per_head) * G + i % G) * 4)
                    put_f32(peaks + i * 4, sink * np.float32(LOG2_E))
                    put_f32(totals + i * 4, np.float32(1.0))

            # The next tile's keys are located and prefetched while a tile is computed. The iteration before the first tile only does that.
            table = p[TABLE] + seq * p[TABLE_STRIDE]
            for start in range(begin - CPU_TILE_KEYS, end, CPU_TILE_KEYS):
                following = min(CPU_TILE_KEYS, end - start - CPU_TILE_KEYS)
                if following > 0:
                    locate(ahead, table, start + CPU_TILE_KEYS, following, block_size, kv_heads * ROW_BYTES)
                if start < begin:
                    for j in range(following):
                        for h in range(first_head, first_head + heads):
                            prefetch(p[CACHE_K] + get_i64(ahead + j * 8) + h * ROW_BYTES, ROW_BYTES)
                            prefetch(p[CACHE_V] + get_i64(ahead + j * 8) + h * ROW_BYTES, ROW_BYTES)
                    offsets, ahead = ahead, offsets
                    continue
                n = min(CPU_TILE_KEYS, end - start)
                near = ahead if following > 0 else offsets
                if CACHE >= INT8:
                    load_scales(k_scales, p[SCALES_K], offsets, first_head, heads, D)
                    load_scales(v_scales, p[SCALES_V], offsets, first_head, heads, D)
                for h in range(heads):
                    keys, values = p[CACHE_K] + (first_head + h) * ROW_BYTES, p[CACHE_V] + (first_head + h) * ROW_BYTES
                    first = h * per_head
                    for r in range(0, per_head, G):
                        for j in range(0, n, 4):
                            four_scores(scores + (r * CPU_TILE_KEYS + j) * 4, queries + (first + r) * D * 4, offsets + j * 8,
                                        near + j * 8, keys, D, G, CPU_TILE_KEYS, LANES, CACHE, REGISTERS)
                    tile_scales = h * CPU_TILE_KEYS * 4
                    slopes = p[SLOPES] if p[SLOPES] == 0 else p[SLOPES] + (first_head + h) * G * 4
                    weigh(scores, k_scales + tile_scales, v_scales + tile_scales, peaks + first * 4, totals + first * 4, shrink, n, softcap,
                          slopes, start, context, p[WINDOW], G, width, CACHE)
                    for r in range(0, per_head, G):
                        add_weighted(sums + (first + r) * D * 4, shrink + r * 4, scores + r * CPU_TILE_KEYS * 4, offsets, near, values, n,
                                     D, G, CPU_TILE_KEYS, LANES, CACHE, REGISTERS)
                offsets, ahead = ahead, offsets

            parts = p[PARTIAL] + first_head * per_head * PART_BYTES
            stride = num_heads * width * PART_BYTES  # from split to split
            if splits > 1:
                for i in range(heads * per_head):
                    store_part(parts + row * stride + i * PART_BYTES, sums + i * D * 4, get_f32(peaks + i * 4), get_f32(totals + i * 4),
                               D, PAIR)
                finished = p[FINISHED] + (seq * kv_heads + first_head) * 4
                if fetch_add(finished, 1) < splits - 1:
                    continue
                put_i32(finished, 0)  # for the next layer
            for i in range(heads * per_head):
                if splits > 1:
                    first_part = parts + first_row * stride + i * PART_BYTES
                    put_f32(totals + i * 4, merge_parts(sums + i * D * 4, first_part, splits, stride, D, PAIR))
                head = (seq * width + i // G % width) * num_heads + (first_head + i // per_head) * G + i % G
                store_mean(p[OUT] + head * OUT_BYTES, sums + i * D * 4, get_f32(totals + i * 4), D, PAIR, HALF)

    name = f"decode attention in {DTYPE_NAMES[half]} (heads of {head_dim}, {group} per KV head)"
    if cache != half:
        name += f" with a KV cache in {DTYPE_NAMES[cache]}"
    return Kernel(decode, name)
