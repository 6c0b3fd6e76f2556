"""Attention of few decodes on Hopper and later, in Gluon: each warp has its own keys, and waits for no other warp until the end.

`decode_attention.py` serves every model and batch. With few sequences, most of its time is latency: Triton's language takes each tile of
keys from memory to the tensor cores through shared memory, with barriers between warps. In Gluon the layout of a tile is chosen by hand.
Here each thread loads from memory exactly the numbers that the tensor cores expect from it:

    keys of a tile     | warp 0: KEYS | warp 1: KEYS | ... | warp P - 1: KEYS |
    scores             q [P, 16, D] times keys [P, D, KEYS]       rows 0 to 7: query heads, rows 8 to 15: the new key
    weighted values    values [P, D, KEYS] times weights [P, KEYS, 8]

The two halves of a head are two operands, so that the rotation pairs numbers of one thread. The order in which a product adds up its
inputs is free: so the dimensions of keys and queries are permuted alike until a thread's share is 16 consecutive bytes (k_width), and the
dimensions of values until the weights, as the first product leaves them, are the operand of the second. Only the end merges the warps.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.kernels import tuning
from minivllm.kernels.triton.attention_tile import Cache, Projection
from minivllm.kernels.triton.decode_attention import Parts
from minivllm.kernels.triton.device import early_start, launch

KEYS = gl.constexpr(16)  # keys of a warp at a time: two instructions' worth of scores
FLOOR = gl.constexpr(-1e30)  # a peak below every score, and finite: the difference of two is no NaN
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of Triton 3.7, of 3.6


@gluon.jit
def _fetch(cells, block, key, end, kv_head, dims, BLOCK_SIZE: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr):
    row = (block.to(gl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head
    return gl.load(cells + row * D + dims, mask=key < end, other=0.0)


@gluon.jit
def _halves(x):
    """Rows 0 to 7 and rows 8 to 15 of x [P, 16, N]."""
    P: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[2]
    return gl.split(gl.permute(gl.reshape(x, [P, 2, 8, N]), [0, 2, 3, 1]))


@gluon.jit
def _merge(
    out, parts, row, size, used, G: gl.constexpr, PADDED_G: gl.constexpr, D: gl.constexpr, CHUNK: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The weighted mean of `used` splits. Each has `size` rows, and the first of the G heads is in row `row`. CHUNK: splits at a time."""
    SPLITS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    split = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, SPLITS))[:, None]
    head = gl.arange(0, PADDED_G, layout=gl.SliceLayout(0, SPLITS))[None, :]
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    peak = gl.full([CHUNK, PADDED_G], FLOOR, gl.float32, SPLITS)
    total = gl.zeros([CHUNK, PADDED_G], gl.float32, SPLITS)
    acc = gl.zeros([CHUNK, PADDED_G, D], gl.float32, LAYOUT)
    for first in range(0, used, CHUNK):
        live = (split + first < used) & (head < G)
        at = (split + first) * size + row + head
        log_weight = gl.load(parts.log_weight + at, mask=live, other=-float("inf"), cache_modifier=".cg")
        mean = gl.load(parts.mean + at[:, :, None] * D + dims, mask=live[:, :, None], other=0.0, cache_modifier=".cg")
        new_peak = gl.maximum(peak, log_weight)
        shrink = gl.exp2(peak - new_peak)
        weight = gl.exp2(log_weight - new_peak)
        acc = acc * shrink[:, :, None] + weight[:, :, None] * mean
        total = total * shrink + weight
        peak = new_peak
    factor = gl.exp2(peak - gl.max(peak, 0)[None, :])
    MEAN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    sums = gl.convert_layout(gl.sum(total * factor, 0), gl.SliceLayout(1, MEAN))
    mean = gl.sum(acc * factor[:, :, None], 0) / sums[:, None]
    head = gl.arange(0, PADDED_G, layout=gl.SliceLayout(1, MEAN))[:, None]
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, MEAN))[None, :]
    gl.store(out + (row + head) * D + dims, mean.to(out.dtype.element_ty), mask=(head < G) & (dims < D))


@gluon.jit(do_not_specialize=["num_seqs", "table_stride", "splits", "min_keys"])
def _hopper_decode(
    out, parts, projection, cache, slots, seq_lens, scale, num_seqs, table_stride, splits, min_keys,  # see `_decode_attention`
    NUM_HEADS: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr, P: gl.constexpr, NORM: gl.constexpr,
    SCORES: gl.constexpr, VALUES: gl.constexpr, MEAN: gl.constexpr, PARTS: gl.constexpr,  # see `constants`
    PADDED_G: gl.constexpr, CHUNK: gl.constexpr, PDL: gl.constexpr,  # see `_merge`
):  # fmt: skip
    """One split of the keys of one sequence, for the G query heads of one KV head. P: warps."""
    KV_HEADS: gl.constexpr = NUM_HEADS // G
    HALF: gl.constexpr = D // 2
    TILE: gl.constexpr = P * KEYS
    DTYPE: gl.constexpr = projection.qkv.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [P, 1, 1], [1, 16, 8])
    K_WIDTH: gl.constexpr = 8 if D >= 128 else 4
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, K_WIDTH)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, K_WIDTH)
    kv_head = gl.program_id(0)
    seq = gl.program_id(1)
    split = gl.program_id(2)
    context = gl.load(seq_lens + seq) - 1  # keys before the new one are cached
    run = gl.maximum((((context + TILE - 1) // TILE + splits - 1) // splits) * TILE, min_keys)
    used = gl.maximum((context + run - 1) // run, 1)
    if split >= used:
        return
    begin = split * run
    end = gl.minimum(context, begin + run)
    mine = split == used - 1  # the last split also has the new token

    # The first tile is older than the kernel before this one. Block numbers are read one tile ahead.
    table = cache.block_table + seq.to(gl.int64) * table_stride
    warp = gl.arange(0, P, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    k_dims = gl.arange(0, HALF, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None]
    k_key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :] + warp * KEYS + begin
    warp = gl.arange(0, P, layout=gl.SliceLayout(1, gl.SliceLayout(2, VALUES)))[:, None, None]
    v_key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, gl.SliceLayout(2, VALUES)))[None, :, None] + warp * KEYS + begin
    v_dims = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, VALUES)))[None, None, :]
    k_block = gl.load(table + k_key // BLOCK_SIZE, mask=k_key < end, other=0)
    v_block = gl.load(table + v_key // BLOCK_SIZE, mask=v_key < end, other=0)
    k_low = _fetch(cache.k, k_block, k_key, end, kv_head, k_dims, BLOCK_SIZE, KV_HEADS, D)
    k_high = _fetch(cache.k, k_block, k_key, end, kv_head, k_dims + HALF, BLOCK_SIZE, KV_HEADS, D)
    v = _fetch(cache.v, v_block, v_key, end, kv_head, v_dims, BLOCK_SIZE, KV_HEADS, D)
    k_block = gl.load(table + (k_key + TILE) // BLOCK_SIZE, mask=k_key + TILE < end, other=0)
    v_block = gl.load(table + (v_key + TILE) // BLOCK_SIZE, mask=v_key + TILE < end, other=0)
    cell = (gl.load(slots + seq) * KV_HEADS + kv_head) * D

    # Every warp normalizes and rotates the query heads and the new key, and rounds where `rotated_heads` does.
    warp = gl.arange(0, P, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None]
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None]
    dims = gl.arange(0, HALF, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :]
    head = gl.where(row < 8, kv_head * G + gl.minimum(row, G - 1), NUM_HEADS + kv_head)
    at = head * D + dims + warp * 0
    if NORM:
        w_low = gl.load(projection.norm_weight + at).to(gl.float32)
        w_high = gl.load(projection.norm_weight + at + HALF).to(gl.float32)
    angle = seq * D + dims
    cos_low = gl.load(projection.cos + angle).to(gl.float32)
    sin_low = gl.load(projection.sin + angle).to(gl.float32)
    cos_high = gl.load(projection.cos + angle + HALF).to(gl.float32)
    sin_high = gl.load(projection.sin + angle + HALF).to(gl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source = projection.qkv + seq.to(gl.int64) * projection.stride
    low = gl.load(source + at).to(gl.float32)
    high = gl.load(source + at + HALF).to(gl.float32)
    m_dims = gl.arange(0, D, layout=gl.SliceLayout(0, MEAN))
    new_value = gl.load(source + (NUM_HEADS + KV_HEADS + kv_head) * D + m_dims)
    if NORM:
        norm = gl.rsqrt(gl.sum(low * low + high * high, 2) / D + projection.eps)[:, :, None]
        low = ((low * norm).to(DTYPE).to(gl.float32) * w_low).to(DTYPE).to(gl.float32)
        high = ((high * norm).to(DTYPE).to(gl.float32) * w_high).to(DTYPE).to(gl.float32)
    q_low = (low * cos_low + high * sin_low).to(DTYPE)
    q_high = (high * cos_high + low * sin_high).to(DTYPE)
    if mine:
        one = (row == 8) & (warp == 0) & (dims >= 0)
        to = cell + dims + row * 0 + warp * 0
        gl.store(cache.k + to, q_low, mask=one)
        gl.store(cache.k + to + HALF, q_high, mask=one)
        gl.store(cache.v + cell + m_dims, new_value)
    scale *= 1.4426950408889634  # log2(e)
    query, key = _halves(q_low.to(gl.float32))
    query_high, key_high = _halves(q_high.to(gl.float32))
    own = gl.sum(query * key + query_high * key_high, 2)  # [P, 8], the same in all warps
    own = gl.convert_layout(own, gl.SliceLayout(2, SCORES)) * scale

    peak = gl.full([P, 8], FLOOR, gl.float32, gl.SliceLayout(2, SCORES))
    total = gl.zeros([P, 8, KEYS], gl.float32, SCORES)
    acc = gl.zeros([P, D, 8], gl.float32, MMA)
    warp = gl.arange(0, P, layout=gl.SliceLayout(1, gl.SliceLayout(2, SCORES)))[:, None, None]
    s_key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, gl.SliceLayout(1, SCORES)))[None, None, :] + warp * KEYS
    for start in range(begin, end, TILE):
        k_key += TILE
        v_key += TILE
        next_low = _fetch(cache.k, k_block, k_key, end, kv_head, k_dims, BLOCK_SIZE, KV_HEADS, D)
        next_high = _fetch(cache.k, k_block, k_key, end, kv_head, k_dims + HALF, BLOCK_SIZE, KV_HEADS, D)
        next_v = _fetch(cache.v, v_block, v_key, end, kv_head, v_dims, BLOCK_SIZE, KV_HEADS, D)
        k_block = gl.load(table + (k_key + TILE) // BLOCK_SIZE, mask=k_key + TILE < end, other=0)
        v_block = gl.load(table + (v_key + TILE) // BLOCK_SIZE, mask=v_key + TILE < end, other=0)
        scores = gl.zeros([P, 16, KEYS], gl.float32, MMA)
        scores = gl.nvidia.ampere.mma_v2(q_low, k_low, scores)
        scores = gl.nvidia.ampere.mma_v2(q_high, k_high, scores)
        scores, _ = _halves(scores)
        scores = gl.convert_layout(scores, SCORES, assert_trivial=True) * scale
        scores = gl.where(s_key + start < end, scores, -float("inf"))
        new_peak = gl.maximum(peak, gl.max(scores, 2))
        shrink = gl.exp2(peak - new_peak)
        weights = gl.exp2(scores - new_peak[:, :, None])
        total = total * shrink[:, :, None] + weights
        peak = new_peak
        right = gl.convert_layout(gl.permute(weights.to(DTYPE), [0, 2, 1]), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
        left = gl.reshape(gl.permute(gl.reshape(v, [P, KEYS, D // 64, 8, 8]), [0, 2, 4, 3, 1]), [P, D, KEYS])
        left = gl.convert_layout(left, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, MMA))[:, None, :]
        acc = gl.nvidia.ampere.mma_v2(left, right, acc)
        k_low = next_low
        k_high = next_high
        v = next_v

    own = gl.where(mine, own, FLOOR)
    own = gl.max(own, 0)  # [8]
    top = gl.maximum(gl.max(peak, 0), own)
    factor = gl.exp2(peak - top[None, :])
    weight = gl.exp2(own - top)
    sums = gl.sum(gl.sum(total, 2) * factor, 0) + weight
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, MMA))[:, None, :]
    acc = gl.sum(gl.convert_layout(acc, gl.BlockedLayout([P, 1, 1], [1, 4, 8], [1, P, 1], [0, 2, 1])), 0)  # [D, 8], permuted
    acc = gl.convert_layout(gl.reshape(gl.permute(gl.reshape(acc, [D // 64, 8, 8, 8]), [3, 0, 2, 1]), [8, D]), MEAN)
    HEADS: gl.constexpr = gl.SliceLayout(1, MEAN)
    acc += gl.convert_layout(weight, HEADS)[:, None] * new_value.to(gl.float32)[None, :]
    mean = acc / gl.convert_layout(sums, HEADS)[:, None]
    m_head = gl.arange(0, 8, layout=HEADS)
    first_row = seq * NUM_HEADS + kv_head * G
    to = (first_row + m_head)[:, None] * D + m_dims[None, :]
    live = (m_head < G)[:, None] & (m_dims < D)[None, :]
    if used > 1:
        size = num_seqs * NUM_HEADS
        gl.store(parts.mean + split * size * D + to, mean, mask=live)
        gl.store(parts.log_weight + split * size + first_row + m_head, gl.convert_layout(top + gl.log2(sums), HEADS), mask=m_head < G)
        barrier()  # all of this program's stores come before its count
        finished = parts.finished + seq * KV_HEADS + kv_head
        if gl.atomic_add(finished, 1, sem="acq_rel", scope="gpu") == used - 1:
            gl.store(finished, 0)  # for the next layer
            _merge(out, parts, first_row, size, used, G, PADDED_G, D, CHUNK, PARTS)
    else:
        gl.store(out + to, mean.to(out.dtype.element_ty), mask=live)


@lru_cache(maxsize=8)
def constants(warps: int, head_dim: int, heads_per_kv: int) -> dict[str, Any]:
    """Constants of `_hopper_decode`. Its layouts say which thread holds which number: each list has the step of the next bit of an
    index, of a register, a lane or a warp."""
    def bits(size: int, first: int = 1) -> list[int]:
        return [1 << i for i in range(size.bit_length() - 1) if 1 << i >= first]

    keys, warp = KEYS.value, [[w, 0, 0] for w in bits(warps)]
    lanes, padded = min(32, head_dim // 8), tuning.next_power_of_2(heads_per_kv)
    return dict(
        G=heads_per_kv, D=head_dim, P=warps, PADDED_G=padded, CHUNK=warps * 8 // padded,
        # [P, 8, KEYS]: the upper half of the rows that a product leaves in registers
        SCORES=gl.DistributedLinearLayout([[0, 0, 1]] + [[0, 0, k] for k in bits(keys, 8)],
                                          [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]], warp, [], [warps, 8, keys]),
        # [P, KEYS, D]: 16 bytes per load, and after a permutation of dimensions the left operand of a product
        VALUES=gl.DistributedLinearLayout(
            [[0, 0, d] for d in (1, 2, 4)] + [[0, 0, d] for d in bits(head_dim, 64)] + [[0, 1, 0]] + [[0, k, 0] for k in bits(keys, 8)],
            [[0, 2, 0], [0, 4, 0], [0, 0, 8], [0, 0, 16], [0, 0, 32]], warp, [], [warps, keys, head_dim]),
        MEAN=gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0]),  # [8, D]
        PARTS=gl.BlockedLayout([1, 1, 4], [128 // head_dim, 1, head_dim // 4], [warps, 1, 1], [2, 1, 0]),  # [CHUNK, PADDED_G, D]
    )


def attend_few(
    out: Tensor, projection: Projection, cache: Cache, parts: Parts, slots: Tensor, seq_lens: Tensor, *, tile: tuning.FewDecodesTile,
    scale: float, num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, norm: bool,
) -> None:
    """Attention of `num_seqs` decodes with one new token each; also writes the new keys and values to `slots`. See `_decode_attention`."""
    launch(_hopper_decode, (num_kv_heads, num_seqs, tile.splits),
        out, parts, projection, cache, slots, seq_lens, scale, num_seqs, cache.block_table.stride(0), tile.splits, tile.min_keys,
        NUM_HEADS=num_heads, BLOCK_SIZE=block_size, NORM=norm, **constants(tile.num_warps, head_dim, num_heads // num_kv_heads),
        num_warps=tile.num_warps, **early_start(out.device),
    )  # fmt: skip
