"""Linear layers of two to 16 rows on Hopper and later, in Gluon: weights go from memory directly to the tensor cores' registers.

Triton's language takes each tile through shared memory, because threads load it in another order than tensor cores expect it. In Gluon
the order can be chosen. A product adds up its inputs in any order, so they are permuted until a thread's share of a tile is 16 consecutive
bytes of a row (k_width 8), for the weight and for x alike. Nothing is exchanged between warps before the sum at the end:

    inputs of a tile   | warp 0: KP | warp 1: KP | ... | warp P - 1: KP |      KP: BLOCK_K / P
    product            weight [P, BLOCK_N, KP] times x [P, KP, 8 or 16]        the weight is the left operand, which has 16 rows or more

The weight's first tile is loaded before the kernel waits for the kernel ahead of it. For small layers this is often the whole weight.
"""
from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm.kernels.triton.device import early_start, launch
from minivllm.kernels.tuning import LinearTile


@gluon.jit
def _load(x, w, w_up, norm_weight, start, x_at, w_at, k, live_row, NORM: gl.constexpr, GATED: gl.constexpr):
    """The tiles of all operands at inputs `start` and following. What the kernel does not have is any tile."""
    tile = gl.load(w + start + w_at)
    up = tile
    if GATED:
        up = gl.load(w_up + start + w_at)
    value = gl.load(x + start + x_at, mask=live_row, other=0.0)
    factor = value
    if NORM:
        factor = gl.load(norm_weight + start + k)
    return tile, up, value, factor


@gluon.jit
def _multiply(tile, up, value, factor, acc, acc_up, squares, NORM: gl.constexpr, GATED: gl.constexpr):
    if NORM:
        wide = value.to(gl.float32)
        squares += gl.sum(wide * wide, 1)
        value = (wide * factor.to(gl.float32)).to(value.dtype)
    acc = gl.nvidia.ampere.mma_v2(tile, value, acc)
    if GATED:
        acc_up = gl.nvidia.ampere.mma_v2(up, value, acc_up)
    return acc, acc_up, squares


@gluon.jit(do_not_specialize=["rows"])
def _hopper_rows(
    out, x, weight, norm_weight, bias, residual, eps, rows,  # see `linear._few_rows`
    N: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, P: gl.constexpr,
    NORM: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows. N and K are multiples of the blocks. P: warps."""
    KP: gl.constexpr = BLOCK_K // P
    DTYPE: gl.constexpr = out.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [P, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    first = gl.program_id(0) * BLOCK_N
    warp = gl.arange(0, P, layout=gl.SliceLayout(1, gl.SliceLayout(2, LEFT)))[:, None, None]
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))[None, :, None] + first
    k = gl.arange(0, KP, layout=gl.SliceLayout(0, gl.SliceLayout(1, LEFT)))[None, None, :] + warp * KP
    w_at = n * K + k
    warp = gl.arange(0, P, layout=gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))[:, None, None]
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))[None, None, :]
    k = gl.arange(0, KP, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))[None, :, None] + warp * KP
    x_at = m * K + k
    w_up = weight + N * K
    tile = gl.load(weight + w_at)
    up = tile
    if GATED:
        up = gl.load(w_up + w_at)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, P], [0, 1])
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, OUT))[:, None] + first
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, OUT))[None, :]
    at = row * N + n
    live = (row < rows) & (n < N)
    added = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, OUT)
    if ADD:
        added = gl.load(residual + at, mask=live, other=0.0).to(gl.float32)
    value = gl.load(x + x_at, mask=m < rows, other=0.0)
    factor = value
    if NORM:
        factor = gl.load(norm_weight + k)
    squares = gl.zeros([P, BLOCK_M], gl.float32, gl.SliceLayout(1, RIGHT))
    acc = gl.zeros([P, BLOCK_N, BLOCK_M], gl.float32, MMA)
    acc_up = acc
    for start in range(BLOCK_K, K, BLOCK_K):  # the next tile is on its way while one is multiplied
        next_tile, next_up, next_value, next_factor = _load(x, weight, w_up, norm_weight, start, x_at, w_at, k, m < rows, NORM, GATED)
        acc, acc_up, squares = _multiply(tile, up, value, factor, acc, acc_up, squares, NORM, GATED)
        tile = next_tile
        up = next_up
        value = next_value
        factor = next_factor
    acc, acc_up, squares = _multiply(tile, up, value, factor, acc, acc_up, squares, NORM, GATED)
    y = gl.convert_layout(gl.sum(acc, 0), OUT)
    scale = gl.full([1, BLOCK_M], 1.0, gl.float32, OUT)
    if NORM:
        scale = gl.rsqrt(gl.convert_layout(gl.sum(squares, 0), gl.SliceLayout(0, OUT)) / K + eps)[None, :]
    y *= scale
    if BIAS:
        y += gl.load(bias + n).to(gl.float32)
    if GATED:
        up = gl.convert_layout(gl.sum(acc_up, 0), OUT) * scale
        if BIAS:
            up += gl.load(bias + N + n).to(gl.float32)
        gate = y.to(DTYPE).to(gl.float32)  # rounded as in `silu_mul`
        y = (gate / (1.0 + gl.exp(-gate))).to(DTYPE).to(gl.float32) * up.to(DTYPE).to(gl.float32)
    gl.store(out + at, (y + added).to(DTYPE), mask=live)


def few_rows(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, float] | None, gated: bool, residual: Tensor | None,
    tile: LinearTile,
) -> None:
    """See `linear.fused_linear`. x: [rows, K] contiguous, of 16 bits; out: [rows, N]. The tile divides N and K."""
    (rows, n), k = out.shape, x.shape[1]
    norm_weight, eps = norm or (x, 0.0)
    launch(_hopper_rows, (n // tile.block_n,),
        out, x, weight, norm_weight, x if bias is None else bias, x if residual is None else residual, eps, rows,
        N=n, K=k, BLOCK_M=max(8, triton.next_power_of_2(rows)), BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, P=tile.num_warps,
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None, num_warps=tile.num_warps,
        **early_start(x.device),
    )  # fmt: skip
