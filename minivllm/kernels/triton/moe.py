"""The experts of a layer: four kernels, with fixed shapes and nothing read by the host, so that a CUDA graph can record them.

    ids [T, k]        token 0: 5 2     token 1: 2 7     token 2: 5 2         a pair is a token and one of its experts: 0 1 | 2 3 | 4 5
    group_pairs       expert 2: 1 2 5      expert 5: 0 4      expert 7: 3    order of the pairs, and where each expert's pairs begin
    gate | up         [pairs, I]     a program computes BLOCK_M pairs of one expert, so its weights are read once for all of them
    down              [pairs, H]
    combine           [T, H] = residual + the weighted sum over the k pairs of a token, in the order of its experts

Nothing is added by atomics, so a token's output depends on no other token. A decode of few tokens has at most BLOCK_M pairs per expert:
then each chosen expert is read exactly once.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.layout import ExpertWeights
from minivllm.kernels.triton.activation import silu_mul
from minivllm.kernels.triton.device import capability, launch


@triton.jit
def _group_pairs(order, starts, ids, pairs, E: tl.constexpr, BLOCK: tl.constexpr):  # [pairs], [E + 1], [pairs]
    """Program e finds the pairs of expert e, in their order."""
    expert = tl.program_id(0)
    p = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for at in range(0, pairs, BLOCK):
        before += (tl.load(ids + at + p, mask=at + p < pairs, other=E) < expert).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(starts + expert, start)
    if expert == E - 1:
        tl.store(starts + E, pairs)
    for at in range(0, pairs, BLOCK):
        mine = (tl.load(ids + at + p, mask=at + p < pairs, other=E) == expert).to(tl.int32)
        tl.store(order + start + tl.cumsum(mine, 0) - 1, at + p, mask=mine > 0)
        start += tl.sum(mine, 0)


@triton.jit
def _expert_product(
    out, x, weight, bias, order, starts,  # [pairs, N], [pairs / TOP, K], [E, N or 2N, K], [E, N or 2N], [pairs], [E + 1]
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr, TOP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    CLAMP: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of x times the expert of their pair. GATED: the product of rows | gate | up |, activated."""
    e = tl.arange(0, PADDED_E)
    begin = tl.load(starts + e, mask=e < E, other=0)
    end = tl.load(starts + e + 1, mask=e < E, other=0)
    blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(blocks, 0)
    block = tl.program_id(1)
    expert = tl.sum((ends <= block).to(tl.int32), 0)  # there are more programs than blocks: then no expert has this number
    first = tl.sum(tl.where(e == expert, begin + (block - ends + blocks) * BLOCK_M, 0), 0)
    last = tl.sum(tl.where(e == expert, end, 0), 0)
    if first < last:
        row = first + tl.arange(0, BLOCK_M)
        live_m = row < last
        pair = tl.load(order + row, mask=live_m, other=0)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        live_n = n < N
        ROWS: tl.constexpr = 2 * N if GATED else N
        source = x + (pair // TOP).to(tl.int64)[:, None] * K
        w = weight + (expert.to(tl.int64) * ROWS + n)[:, None] * K
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            live_k = k < K
            value = tl.load(source + k[None, :], mask=live_m[:, None] & live_k[None, :], other=0.0)
            tile = tl.load(w + k[None, :], mask=live_n[:, None] & live_k[None, :], other=0.0)
            acc = tl.dot(value, tl.trans(tile), acc, input_precision="ieee")
            if GATED:
                tile = tl.load(w + N * K + k[None, :], mask=live_n[:, None] & live_k[None, :], other=0.0)
                acc_up = tl.dot(value, tl.trans(tile), acc_up, input_precision="ieee")
        if BIAS:
            acc += tl.load(bias + expert * ROWS + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            if BIAS:
                acc_up += tl.load(bias + expert * ROWS + N + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
            if CLAMP:
                gate = tl.minimum(acc, LIMIT)
                acc = gate / (1.0 + tl.exp(-ALPHA * gate)) * (tl.maximum(tl.minimum(acc_up, LIMIT), -LIMIT) + 1.0)
            else:
                acc = silu_mul(acc, acc_up, out.dtype.element_ty)
        at = pair.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


@triton.jit
def _combine(out, residual, outputs, weights, size, TOP: tl.constexpr, BLOCK: tl.constexpr):  # [T, H], [T, H], [T, TOP, H], [T, TOP]
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = n < size
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP):
        pair = token * TOP + j
        acc += tl.load(outputs + pair * size + n, mask=live, other=0.0).to(tl.float32) * tl.load(weights + pair)
    acc += tl.load(residual + token * size + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * size + n, acc.to(out.dtype.element_ty), mask=live)


def group_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids: [T, k] -> (the T * k pairs in the order of their experts, where each expert's pairs begin: [E + 1]), both int32."""
    pairs = ids.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    block = min(tuning.MOE_PAIRS_AT_ONCE, triton.next_power_of_2(pairs))
    launch(_group_pairs, (num_experts,), order, starts, ids, pairs, E=num_experts, BLOCK=block, num_warps=4)
    return order, starts


def fused_experts(x: Tensor, experts: ExpertWeights, ids: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """See `reference.moe.fused_experts`."""
    (tokens, hidden), top, (num_experts, _, inner) = x.shape, ids.shape[1], experts.down.shape
    x, pairs, arch = x.contiguous(), tokens * top, capability(x.device)
    order, starts = group_pairs(ids, num_experts)
    tile = tuning.moe_tile(pairs, num_experts, x.element_size(), arch)
    # An expert with c pairs has ceil(c / block_m) blocks: at most one more than c / block_m for each of the experts that have pairs.
    blocks = min(pairs, pairs // tile.block_m + min(pairs, num_experts))
    alpha, limit = experts.clamp or (1.0, 1.0)
    shared = dict(E=num_experts, PADDED_E=triton.next_power_of_2(num_experts), CLAMP=experts.clamp is not None, ALPHA=alpha, LIMIT=limit,
                  BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages)
    activated = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    bias = experts.gate_up_bias
    launch(_expert_product, (triton.cdiv(inner, tile.block_n), blocks), activated, x, experts.gate_up, x if bias is None else bias, order,
           starts, N=inner, K=hidden, TOP=top, GATED=True, BIAS=bias is not None, **shared)
    outputs = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    bias = experts.down_bias
    launch(_expert_product, (triton.cdiv(hidden, tile.block_n), blocks), outputs, activated, experts.down, x if bias is None else bias,
           order, starts, N=hidden, K=inner, TOP=1, GATED=False, BIAS=bias is not None, **shared)
    block = min(1024, triton.next_power_of_2(hidden))
    launch(_combine, (tokens, triton.cdiv(hidden, block)), residual, residual, outputs, weights, hidden, TOP=top, BLOCK=block, num_warps=4)
    return residual
