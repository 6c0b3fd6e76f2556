"""Attention of prompt chunks for Hopper, in Gluon, over keys that lie in order: after FlashAttention-3 (Shah et al. 2024).

Triton's language hides which warp does what. Gluon, which is part of Triton, does not: a program here has three parts that run at the
same time and exchange tiles of keys and values through shared memory.

    producer, 1 warp        load K0, V0   load K1, V1   load K2, V2 ...         tensor memory accelerator: one thread starts a copy
    consumer 0, 4 warps     K0 q    softmax 0, then:   K1 q  V0 p | softmax 1   K2 q  V1 p | softmax 2 ...      rows 0 to 63
    consumer 1, 4 warps     the same with rows 64 to 127

In one iteration a consumer starts two products: the scores of tile i, and the weighted values of tile i - 1. It computes the softmax of
tile i while the tensor cores still multiply values. And while both products of one consumer run, the other one computes its softmax. So
tensor cores, which do almost all of the arithmetic, seldom wait. Weights stay in registers, and so do the running sums.

    barrier    full[slot]: the copy into the slot has arrived          free[slot]: both consumers have read the slot
    phase      a slot is used again every STAGES tiles. The parity of that count tells a wait which use is meant

Tiles of keys are taken from the last to the first: only the first few that a consumer sees need the causal mask.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minivllm.kernels import tuning
from minivllm.kernels.triton.device import launch

ROWS = gl.constexpr(64)  # of a consumer: those that one instruction of a warpgroup multiplies
BLOCK_N = gl.constexpr(128)  # keys of a tile
STAGES = gl.constexpr(2)  # tiles of keys, and of values, in shared memory
assert tuning.GATHER_TILE % BLOCK_N.value == 0, "a tile of gathered keys would end in rows that nothing wrote"


class Tiles(NamedTuple):
    """Tiles in shared memory, [STAGES, BLOCK_N, D], and their barriers."""

    k: Any
    v: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any


class Work(NamedTuple):
    """What a program computes: queries of one sequence, for the query heads of one KV head."""

    first_token: Any  # row of the sequence's first query
    first_query: Any  # of the program, counted in the sequence
    num_queries: Any  # of the sequence
    context: Any  # keys before the sequence's first query
    kv_head: Any
    whole: Any  # tiles that all queries of the program see in full
    tiles: Any  # tiles that some of them see


@gluon.jit
def _narrow(x, DTYPE: gl.constexpr):
    """float32 to 16 bits, for bfloat16 two neighbors in one instruction: the compiler's own conversion moves each half into its place."""
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return x.to(DTYPE)


@gluon.jit
def _softmax(scores, peak, sums, scale, first_key, position, MASK: gl.constexpr, SCORES: gl.constexpr):
    """-> weights [ROWS, BLOCK_N], factor of the sums so far [ROWS], peak [ROWS] and sums [ROWS, 8] with this tile.

    sums: eight of a row, each of columns that one thread holds, so that threads exchange nothing before the end."""
    if MASK:
        key = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where(key[None, :] <= position[:, None], scores, -float("inf"))
    peak_now = gl.maximum(peak, gl.max(scores, 1) * scale)
    base = peak_now
    if MASK:
        base = gl.where(peak_now == -float("inf"), 0.0, peak_now)  # rows that have seen no key yet
    weights = gl.exp2(scores * scale - base[:, None])
    shrink = gl.exp2(peak - base)
    part = gl.sum(gl.reshape(weights, [ROWS, BLOCK_N // 8, 8]), 1)
    sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, part.type.layout))[:, None] + part
    return weights, shrink, peak_now, sums


@gluon.jit
def _next_tile(i, q, tiles, work, weights, acc, peak, sums, scale, position, MASK: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr):
    """The scores of tile i, counted from the last, and the weighted values of tile i - 1."""
    slot = i % STAGES
    before = (i - 1) % STAGES
    phase = (i // STAGES) & 1
    mbarrier.wait(tiles.k_full.index(slot), phase)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, layout=SCORES)
    scores = warpgroup_mma(q, tiles.k.index(slot).permute([1, 0]), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(weights, tiles.v.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(tiles.k_free.index(slot))
    first_key = (work.tiles - 1 - i) * BLOCK_N
    unrounded, shrink, peak, sums = _softmax(scores, peak, sums, scale, first_key, position, MASK, SCORES)
    # Not needed before the next iteration. Here its branch keeps the compiler from moving the softmax behind the next wait.
    mbarrier.wait(tiles.v_full.index(slot), phase)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(tiles.v_free.index(before))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
    weights = gl.convert_layout(_narrow(unrounded, q.dtype), gl.DotOperandLayout(0, OUT, 2))
    return weights, acc, peak, sums


@gluon.jit
def _consume(out, queries, q, tiles, work, scale, q_stride, NUM_HEADS: gl.constexpr, HEADS_PER_KV: gl.constexpr, D: gl.constexpr,
             FIRST_ROW: gl.constexpr):
    """Rows [FIRST_ROW, FIRST_ROW + ROWS) of the program. q: shared memory for them, [ROWS, D]."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    LIVE_ROWS: gl.constexpr = 2 * ROWS // HEADS_PER_KV * HEADS_PER_KV
    row = FIRST_ROW + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
    query = work.first_query + row // HEADS_PER_KV
    live = (row < LIVE_ROWS) & (query < work.num_queries)
    at = (work.first_token + query).to(gl.int64) * q_stride + (work.kv_head * HEADS_PER_KV + row % HEADS_PER_KV) * D
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, LOAD))
    q.store(gl.load(queries + at[:, None] + dims[None, :], mask=live[:, None], other=0.0))
    fence_async_shared()

    position = work.context + work.first_query + (FIRST_ROW + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))) // HEADS_PER_KV
    peak = gl.full([ROWS], -float("inf"), gl.float32, layout=gl.SliceLayout(1, SCORES))
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, layout=SCORES)
    sums = gl.sum(gl.reshape(zeros, [ROWS, BLOCK_N // 8, 8]), 1)
    acc = gl.full([ROWS, D], 0.0, gl.float32, layout=OUT)

    mbarrier.wait(tiles.k_full.index(0), 0)
    scores = warpgroup_mma(q, tiles.k.index(0).permute([1, 0]), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(tiles.k_free.index(0))
    first_key = (work.tiles - 1) * BLOCK_N
    unrounded, _, peak, sums = _softmax(scores, peak, sums, scale, first_key, position, True, SCORES)
    weights = gl.convert_layout(_narrow(unrounded, q.dtype), gl.DotOperandLayout(0, OUT, 2))
    mbarrier.wait(tiles.v_full.index(0), 0)
    masked = work.tiles - gl.minimum(work.whole, work.tiles - 1)
    for i in range(1, masked):
        weights, acc, peak, sums = _next_tile(i, q, tiles, work, weights, acc, peak, sums, scale, position, True, SCORES, OUT)
    for i in range(masked, work.tiles):
        weights, acc, peak, sums = _next_tile(i, q, tiles, work, weights, acc, peak, sums, scale, position, False, SCORES, OUT)
    acc = warpgroup_mma(weights, tiles.v.index((work.tiles - 1) % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    total = gl.sum(sums, 1)
    total = gl.where(total == 0.0, 1.0, total)
    mean = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    row_out = FIRST_ROW + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    query_out = work.first_query + row_out // HEADS_PER_KV
    head_out = work.kv_head * HEADS_PER_KV + row_out % HEADS_PER_KV
    at_out = ((work.first_token + query_out).to(gl.int64) * NUM_HEADS + head_out) * D
    dims_out = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    live_out = (row_out < LIVE_ROWS) & (query_out < work.num_queries)
    gl.store(out + at_out[:, None] + dims_out[None, :], mean.to(q.dtype), mask=live_out[:, None])


@gluon.jit
def _produce(k, v, tiles, num_tiles, first_row, k_column, v_column):
    for i in range(num_tiles):
        slot = i % STAGES
        phase = (i // STAGES) & 1
        row = first_row + (num_tiles - 1 - i) * BLOCK_N
        mbarrier.wait(tiles.k_free.index(slot), phase ^ 1)
        mbarrier.expect(tiles.k_full.index(slot), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [row, k_column], tiles.k_full.index(slot), tiles.k.index(slot))
        mbarrier.wait(tiles.v_free.index(slot), phase ^ 1)
        mbarrier.expect(tiles.v_full.index(slot), v.block_type.nbytes)
        tma.async_copy_global_to_shared(v, [row, v_column], tiles.v_full.index(slot), tiles.v.index(slot))


@gluon.jit
def _barriers(count: gl.constexpr):
    """[STAGES] barriers that complete a phase after `count` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit(do_not_specialize=["first_head", "first_seq", "end_seq", "num_tiles"])
def _hopper_attention(
    out, q, k, v, query_start, seq_lens, key_start,  # as `attend`; k, v: descriptors
    scale, first_head, first_seq, end_seq, num_tiles, q_stride, k_column, v_column,
    NUM_HEADS: gl.constexpr, HEADS_PER_KV: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, KV heads). A program finds its sequence as in prompt_attention.py."""
    BLOCK_Q: gl.constexpr = 2 * ROWS // HEADS_PER_KV
    tile = num_tiles - 1 - gl.program_id(0)  # the last queries see the most keys, so they start first
    base = gl.load(query_start + first_seq) // BLOCK_Q
    low = first_seq
    high = end_seq
    while low < high:
        middle = (low + high) // 2
        if gl.load(query_start + middle) // BLOCK_Q - base + middle - first_seq <= tile:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    first_token = gl.load(query_start + seq)
    num_queries = gl.load(query_start + seq + 1) - first_token
    first_query = (tile - (first_token // BLOCK_Q - base + seq - first_seq)) * BLOCK_Q
    if first_query < num_queries:
        context = gl.load(seq_lens + seq) - num_queries
        keys = gl.minimum(first_query + BLOCK_Q, num_queries) + context
        work = Work(first_token, first_query, num_queries, context, first_head + gl.program_id(1),
                    (context + first_query + 1) // BLOCK_N, (keys + BLOCK_N - 1) // BLOCK_N)
        DTYPE: gl.constexpr = q.dtype.element_ty
        Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
        q0 = gl.allocate_shared_memory(DTYPE, [ROWS, D], Q_LAYOUT)
        q1 = gl.allocate_shared_memory(DTYPE, [ROWS, D], Q_LAYOUT)
        tiles = Tiles(gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], k.layout),
                      gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], v.layout),
                      _barriers(1), _barriers(2), _barriers(1), _barriers(2))
        fence_async_shared()
        scale *= 1.4426950408889634  # log2(e)
        gl.warp_specialize([
            (_consume, (out, q, q0, tiles, work, scale, q_stride, NUM_HEADS, HEADS_PER_KV, D, 0)),
            (_consume, (out, q, q1, tiles, work, scale, q_stride, NUM_HEADS, HEADS_PER_KV, D, ROWS)),
            (_produce, (k, v, tiles, work.tiles, gl.load(key_start + seq) - gl.load(key_start + first_seq),
                        k_column + gl.program_id(1) * D, v_column + gl.program_id(1) * D)),
        ], [4, 1], [240, 24])  # warps and registers per thread of the second consumer and of the producer


def attend(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, seq_lens: Tensor, key_start: Tensor, *, scale: float,
    first_head: int, kv_heads: int, heads_per_kv: int, seqs: tuple[int, int], num_tokens: int, k_column: int, v_column: int,
) -> None:
    """Causal attention of the sequences [seqs[0], seqs[1]), which have num_tokens queries, for kv_heads KV heads from first_head on.

    out: [T, H * D]; q: [T, heads, D], of which the first H are read; k, v: [rows, columns], 16 bits, D 64 or 128. The key at position p of
    sequence b is in row key_start[b] - key_start[seqs[0]] + p, and those of the first of the KV heads begin in column k_column. Rows of
    other keys up to the end of a tile of BLOCK_N must be finite: their weight is 0."""
    d = q.shape[2]
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    block = [BLOCK_N.value, d]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    tiles = num_tokens // (2 * ROWS.value // heads_per_kv) + seqs[1] - seqs[0] + 1
    launch(_hopper_attention, (tiles, kv_heads),
        out, q, TensorDescriptor.from_tensor(k, block, layout), TensorDescriptor.from_tensor(v, block, layout), query_start, seq_lens,
        key_start, scale, first_head, *seqs, tiles, q.stride(0), k_column, v_column,
        NUM_HEADS=out.shape[1] // d, HEADS_PER_KV=heads_per_kv, D=d, num_warps=4,
    )  # fmt: skip
