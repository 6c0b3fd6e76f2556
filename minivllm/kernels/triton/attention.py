"""Paged attention in Triton: one kernel for prompt chunks and decodes, and a small one that adds up KV splits.

A program owns a tile of consecutive queries of one sequence together with all the query heads that share one KV head, packed
into the rows of one matrix, so that keys are read once for a whole group and tensor cores get full tiles:

    row m of the tile  ->  query m // HEADS_PER_KV of the tile,  head kv_head * HEADS_PER_KV + m % HEADS_PER_KV

Decodes (one query each, packed first in the batch) get a program per sequence, prompt chunks a program per tile of queries.
Which tile belongs to which sequence is found by binary search, so that the grid depends on T and B alone:

    sequence         |---- 0 ----|- 1 -|------- 2 -------|      BLOCK_Q = 4
    query_start      0           10    15                31
    first tile       0 // 4 + 0  10//4 + 1 = 3  15//4 + 2 = 5    an upper bound: some tiles are empty and return at once

The softmax runs online (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023). When a step has too few tiles to fill the
GPU, the keys of each tile are shared out over SPLITS programs (Flash-Decoding, Dao et al. 2023), each writing a partial
average and the logarithm of its weight; `_merge_splits` takes the weighted mean.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.layout import InputBatch, KVLayer

MAX_SPLITS = 32


@triton.jit
def _attention(
    out, partial, log_weight,  # [T, H, D]; [SPLITS, T, H, D] and [SPLITS, T, H] float32, unused with one split
    q, k, v,  # [T, H, D]; [blocks, BLOCK_SIZE, KV, D] twice
    query_start, seq_lens, block_table,  # [B + 1], [B], [B, M]
    scale, softcap, first_seq, num_seqs, num_tokens,
    q_stride_t, q_stride_h, kv_stride_block, kv_stride_slot, kv_stride_head, table_stride,
    NUM_HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if DECODE:
        seq = tile
        first_query = tile
        num_queries = 1
        first_in_tile = 0
    else:
        base = tl.load(query_start + first_seq) // BLOCK_Q
        low = first_seq
        high = num_seqs
        while low < high:  # the last sequence whose first tile is not after this one
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
    seq_len = tl.load(seq_lens + seq)
    context = seq_len - num_queries  # keys before the sequence's first query

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    query = first_in_tile + rows // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + rows % HEADS_PER_KV
    live_row = (rows < BLOCK_Q * HEADS_PER_KV) & (query < num_queries)
    live_dim = dims < HEAD_DIM
    token = (first_query + query).to(tl.int64)
    position = context + query  # a query sees the keys at (position - WINDOW, position]
    q_rows = q + token * q_stride_t + head * q_stride_h
    q_tile = tl.load(q_rows[:, None] + dims[None, :], mask=live_row[:, None] & live_dim[None, :], other=0.0)

    end = tl.minimum(context + first_in_tile + BLOCK_Q, seq_len)
    oldest = 0  # the first key that any of the tile's queries sees
    if WINDOW > 0:
        oldest = tl.maximum(context + first_in_tile - WINDOW + 1, 0)
    begin = oldest // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        run = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), SPLITS) * BLOCK_N
        begin += split * run
        end = tl.minimum(end, begin + run)

    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    table = block_table + seq.to(tl.int64) * table_stride
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        live_key = (key >= oldest) & (key < end)  # the rest of a block may hold anything, NaN included, and is never loaded
        block = tl.load(table + key // BLOCK_SIZE, mask=live_key, other=0).to(tl.int64)
        slot = block * kv_stride_block + (key % BLOCK_SIZE) * kv_stride_slot + kv_head * kv_stride_head
        k_tile = tl.load(k + slot[None, :] + dims[:, None], mask=live_key[None, :] & live_dim[:, None], other=0.0)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))  # softcap * tanh(scores / softcap)
        visible = (key[None, :] <= position[:, None]) & live_key[None, :]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores * 1.4426950408889634, -float("inf"))  # base 2 from here on
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        safe_peak = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # rows that have seen no key yet
        shrink = tl.exp2(peak - safe_peak)
        weights = tl.exp2(scores - safe_peak[:, None])
        v_tile = tl.load(v + slot[:, None] + dims[None, :], mask=live_key[:, None] & live_dim[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak

    row = token * NUM_HEADS + head  # of [T, H]
    store = live_row[:, None] & live_dim[None, :]
    safe_total = tl.where(total == 0.0, 1.0, total)
    if SPLITS == 1:
        tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], (acc / safe_total[:, None]).to(out.dtype.element_ty), mask=store)
    else:
        row += split.to(tl.int64) * num_tokens * NUM_HEADS
        tl.store(partial + row[:, None] * HEAD_DIM + dims[None, :], acc / safe_total[:, None], mask=store)
        tl.store(log_weight + row, tl.where(total == 0.0, -float("inf"), peak + tl.log2(safe_total)), mask=live_row)


@triton.jit
def _merge_splits(
    out, partial, log_weight, num_rows,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program per (token, head): the mean of its partial averages, weighted by 2^log_weight."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, PADDED_SPLITS)
    dims = tl.arange(0, PADDED_DIM)
    logs = tl.load(log_weight + splits * num_rows + row, mask=splits < SPLITS, other=-float("inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))  # a split that saw no key has weight 0 and is not read
    keep = (weights[:, None] > 0.0) & (dims[None, :] < HEAD_DIM)
    parts = tl.load(partial + (splits[:, None] * num_rows + row) * HEAD_DIM + dims[None, :], mask=keep, other=0.0)
    mean = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * HEAD_DIM + dims, mean.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of one program's work, chosen so that it fits 99 KB of shared memory without spilling registers."""

    block_q: int  # queries
    block_m: int  # rows: queries x heads of the KV head, a power of two
    block_n: int  # keys at a time
    num_warps: int
    num_stages: int


def tile_for(head_dim: int, heads_per_kv: int, decode: bool) -> Tile:
    """From a table by shape: no tuning at run time."""
    block_n = 64 if head_dim <= 128 else 32
    if decode:
        return Tile(1, max(16, triton.next_power_of_2(heads_per_kv)), block_n, 4, 3)
    block_m = max(128, triton.next_power_of_2(heads_per_kv))
    return Tile(block_m // heads_per_kv, block_m, block_n if head_dim <= 64 else 32, 8, 2)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of `_attention`: over decodes or over prompt chunks."""

    decode: bool
    first_seq: int
    num_seqs: int  # end of the range of sequences
    num_tiles: int
    tile: Tile
    splits: int


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """What every layer of a KV group shares in one step: see `prepare_attention`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int | None
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    launches: tuple[Launch, ...]
    partial: Tensor | None  # [SPLITS, T, H, D] float32
    log_weight: Tensor | None


def prepare_attention(
    batch: InputBatch,
    group: int,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> AttentionMeta:
    """Choose grids and tiles for KV group `group` from host counts alone; nothing waits for the device."""
    heads_per_kv = num_heads // num_kv_heads
    device = batch.tokens.device
    launches = []
    if batch.num_decodes:
        tile = tile_for(head_dim, heads_per_kv, True)
        longest = max(batch.seq_lens_host[: batch.num_decodes])
        splits = _splits(device, batch.num_decodes * num_kv_heads, min(longest, window or longest), tile.block_n)
        launches.append(Launch(True, 0, batch.num_decodes, batch.num_decodes, tile, splits))
    if batch.num_seqs > batch.num_decodes:
        tile = tile_for(head_dim, heads_per_kv, False)
        tiles = (sum(batch.query_lens_host) - batch.num_decodes) // tile.block_q + batch.num_seqs - batch.num_decodes + 1
        launches.append(Launch(False, batch.num_decodes, batch.num_seqs, tiles, tile, 1))
    partial = log_weight = None
    if launches[0].splits > 1:
        shape = (launches[0].splits, batch.num_decodes, num_heads, head_dim)
        partial = torch.empty(shape, dtype=torch.float32, device=device)
        log_weight = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    return AttentionMeta(
        num_heads, num_kv_heads, head_dim, block_size, window, batch.query_start, batch.seq_lens, batch.block_tables[group],
        tuple(launches), partial, log_weight,
    )  # fmt: skip


def _splits(device: torch.device, programs: int, keys: int, block_n: int) -> int:
    """As many as fill the GPU twice over, each with at least four tiles of keys."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2  # 2: for the interpreter
    splits = 1
    while splits < MAX_SPLITS and programs * splits < 2 * sms and keys > 4 * block_n * splits:
        splits *= 2
    return splits


def attention(q: Tensor, kv: KVLayer, meta: AttentionMeta, *, scale: float, softcap: float | None = None) -> Tensor:
    """q: [T, num_heads, head_dim] -> the same shape; keys and values come from the cache `kv`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    padded_dim = triton.next_power_of_2(max(meta.head_dim, 16))
    for launch in meta.launches:
        tile, split = launch.tile, launch.splits > 1
        partial, log_weight = (meta.partial, meta.log_weight) if split else (out, out)
        _attention[(launch.num_tiles, meta.num_kv_heads, launch.splits)](
            out, partial, log_weight, q, kv.k, kv.v, meta.query_start, meta.seq_lens, meta.block_table,
            scale, softcap or 0.0, launch.first_seq, launch.num_seqs, launch.num_seqs,
            q.stride(0), q.stride(1), kv.k.stride(0), kv.k.stride(1), kv.k.stride(2), meta.block_table.stride(0),
            NUM_HEADS=meta.num_heads, HEADS_PER_KV=meta.num_heads // meta.num_kv_heads, HEAD_DIM=meta.head_dim, PADDED_DIM=padded_dim,
            BLOCK_SIZE=meta.block_size, BLOCK_Q=tile.block_q, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            SPLITS=launch.splits, WINDOW=meta.window or 0, SOFTCAP=softcap is not None, DECODE=launch.decode,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if split:
            rows = launch.num_seqs * meta.num_heads
            _merge_splits[(rows,)](
                out, partial, log_weight, rows,
                HEAD_DIM=meta.head_dim, PADDED_DIM=padded_dim, SPLITS=launch.splits, PADDED_SPLITS=triton.next_power_of_2(launch.splits),
                num_warps=1 if launch.splits < 8 else 4,
            )  # fmt: skip
    return out
