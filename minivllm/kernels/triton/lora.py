"""LoRA adapters in Triton: each row of a batch is changed by its own adapter, y += (x A^T) B^T.

    one row      one kernel, with the layer's own product in it
    few rows     one kernel before the product. Its result, with the residual added, is the residual of the product
    many rows    the same in two kernels, for tiles of tokens on tensor cores. A tile is multiplied once for each adapter that it has:
                 usually one, since the tokens of a prompt are neighbors

For one and for few rows the first programs of a kernel compute h = x A^T, and all others wait for it:

    programs 0 .. s-1    x ──▶ h ──▶ words                      one word per number, EMPTY until it is there
    programs s ..        W, B loaded, x W^T ...... words ──▶ + h B^T ──▶ y

A word is a number and the sign that it is there, so that one trip to memory reads both. The waiting programs cannot keep the others from
running, because a GPU starts programs in order. The words of a call are used once. They become EMPTY when a step begins.

No shape depends on the batch's adapters, so captured graphs serve any mix. Ranks are read on the device: an adapter of rank 8 costs no
more than that in slots for rank 64. Slots, ranks and adapters do not change while kernels run early (see `device`), so they are read
before the wait. A program reads the slot and the rank of its row at the same time: with the rank behind the slot it would wait twice.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.layout import AdapterWeights
from minivllm.kernels.triton.activation import silu_mul
from minivllm.kernels.triton.device import capability, early_start, launch
from minivllm.kernels.triton.linear import row_products
from minivllm.kernels.triton.norm import rms_norm

RANKS = 16  # columns of B that a program multiplies with: slots have a multiple of it for each part
_RANKS = tl.constexpr(RANKS)
EMPTY = -1  # as a float32 a NaN that no operation makes
_EMPTY = tl.constexpr(EMPTY)
_NAN = tl.constexpr(0x7FC00000)
_LINE = 32  # words of a cache line


class LoRAStep:
    """What the layers of a step share: the slot of each token, the rank in each slot, and words for the kernels' calls."""

    __slots__ = ("_words", "ranks", "row_ranks", "slots")

    def __init__(self, slots: Tensor, ranks: Tensor) -> None:
        """slots: [T] int32, -1 for the base model; ranks: [S + 1] int32, the last one 0."""
        self.slots, self.ranks = slots, ranks
        self.row_ranks = ranks[slots]  # [T]; index -1 is the last rank
        self._words: Tensor | None = None  # those that no call has

    def take_words(self, count: int) -> Tensor:
        """Words for one call: [count] int32, EMPTY. One fill of memory makes those of many calls."""
        if self._words is None or len(self._words) < count:
            self._words = torch.full((tuning.LORA_CALLS * count,), EMPTY, dtype=torch.int32, device=self.slots.device)
        words, self._words = self._words[:count], self._words[count:]
        return words


def prepare_lora(slots: Tensor, ranks: Tensor) -> LoRAStep:
    """See the reference."""
    return LoRAStep(slots, ranks)


@triton.jit
def _shrink(
    words, normed, x, a, row, block, slot, rank, norm_weight, eps, stride,  # words of the row; [rows, K], [rows, K], [S, PARTS * R, K]
    K: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, COPIES: tl.constexpr, COPY: tl.constexpr,
    NORM: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_R numbers of x A^T of one row, into COPIES that are COPY words apart. stride: numbers of a slot.

    NORM: of norm(x) A^T, without the norm's scale unless KEEP, which also stores norm(x).
    """
    first_rank = block * BLOCK_R
    active = first_rank % R < rank
    expected = first_rank % R // _RANKS * _RANKS < rank  # `_expand` waits for RANKS at a time
    r = first_rank + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    live = k < K
    weights = a + slot.to(tl.int64) * stride + r[:, None] * K
    first = tl.load(weights + k[None, :], mask=active & live[None, :], other=0.0)
    if NORM:
        first_factor = tl.load(norm_weight + k, mask=live, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    source = x + row.to(tl.int64) * K
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live = k < K
        value = tl.load(source + k, mask=live, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            factor = first_factor if start == 0 else tl.load(norm_weight + k, mask=live, other=0.0)
            value *= factor.to(tl.float32)
        tile = first if start == 0 else tl.load(weights + k[None, :], mask=active & live[None, :], other=0.0)
        acc += tile.to(tl.float32) * value[None, :]
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps) if KEEP else 1.0
    bits = (tl.sum(acc, 1) * scale).to(tl.int32, bitcast=True)
    bits = tl.where(bits == _EMPTY, _NAN, bits)
    at = words + tl.arange(0, COPIES)[:, None] * COPY + r[None, :]
    tl.store(at, tl.broadcast_to(bits[None, :], [COPIES, BLOCK_R]), mask=expected)
    if KEEP:
        _store_normed(normed + row.to(tl.int64) * K, source, norm_weight, scale, block == 0, K, BLOCK_K)


@triton.jit
def _store_normed(normed, x, norm_weight, scale, active, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """One row, if `active`. Rounds where `_rms_norm` does."""
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live = active & (k < K)
        value = (tl.load(x + k, mask=live, other=0.0).to(tl.float32) * scale).to(x.dtype.element_ty).to(tl.float32)
        value *= tl.load(norm_weight + k, mask=live, other=0.0).to(tl.float32)
        tl.store(normed + k, value.to(x.dtype.element_ty), mask=live)


@triton.jit
def _received(words):
    """The numbers at `words` [RANKS] as soon as all of them are there: fp32."""
    bits = tl.load(words, volatile=True)
    while tl.min((bits != _EMPTY).to(tl.int32), 0) == 0:
        bits = tl.load(words, volatile=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _expand(words, rows_b, first, live, rank):
    """h B^T of one row: [BLOCK_N] fp32. words: of a part; rows_b: pointers to BLOCK_N rows of B; first: their first RANKS numbers."""
    r = tl.arange(0, _RANKS)
    acc = tl.zeros([first.shape[0]], tl.float32)
    for start in range(0, rank, _RANKS):
        tile = first
        if start > 0:
            tile = tl.load(rows_b + start, mask=live[:, None], other=0.0)
        acc += tl.sum(tile.to(tl.float32) * _received(words + start + r)[None, :], 1)
    return acc


@triton.jit
def _expand_both(words, rows_b, first, first_up, live, rank, N: tl.constexpr, R: tl.constexpr):
    """`_expand` of gate and up, whose words are R apart and whose rows of B are N apart. It waits for both at the same time."""
    words += tl.arange(0, _RANKS)
    acc = tl.zeros([first.shape[0]], tl.float32)
    acc_up = tl.zeros([first.shape[0]], tl.float32)
    for start in range(0, rank, _RANKS):
        tile, tile_up = first, first_up
        if start > 0:
            tile = tl.load(rows_b + start, mask=live[:, None], other=0.0)
            tile_up = tl.load(rows_b + N * R + start, mask=live[:, None], other=0.0)
        bits, bits_up = tl.load(words + start, volatile=True), tl.load(words + R + start, volatile=True)
        while tl.min(((bits != _EMPTY) & (bits_up != _EMPTY)).to(tl.int32), 0) == 0:
            bits, bits_up = tl.load(words + start, volatile=True), tl.load(words + R + start, volatile=True)
        acc += tl.sum(tile.to(tl.float32) * bits.to(tl.float32, bitcast=True)[None, :], 1)
        acc_up += tl.sum(tile_up.to(tl.float32) * bits_up.to(tl.float32, bitcast=True)[None, :], 1)
    return acc, acc_up


@triton.jit
def _one_row(
    out, x, weight, norm_weight, bias, residual, eps,  # as linear._matvec
    words, a, b, slots, ranks, stride,  # [COPIES, COPY], [S, WIDTH, K], [S, N or 2N, R], [1], [1]
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, COPIES: tl.constexpr, COPY: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`linear._matvec` with an adapter. WIDTH: PARTS * R. END0, END1: where the first and the second part of the outputs end.

    Each of the first WIDTH programs computes one number of x A^T, since all others wait for it. The columns of a program belong to one
    part. BLOCK_A: inputs that a program multiplies with A at a time. The next kernel may start at once, so that its programs load
    their weights while this kernel waits.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    slot, rank = tl.load(slots), tl.load(ranks)
    if program < WIDTH:
        _shrink(words, x, x, a, 0 * program, program, slot, rank, norm_weight, eps, stride, K, R, 1, BLOCK_A, COPIES, COPY, NORM, False,
                PDL)
        return
    n0 = (program - WIDTH) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    live_n = n < N
    w = weight + n.to(tl.int64)[:, None] * K
    k = tl.arange(0, BLOCK_K)
    first = tl.load(w + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
    rows_b = b + slot.to(tl.int64) * stride + n[:, None] * R + tl.arange(0, _RANKS)[None, :]
    first_b = tl.load(rows_b, mask=live_n[:, None] & (rank > 0), other=0.0)
    first_up, first_b_up = first, first_b
    if GATED:
        first_up = tl.load(w + N * K + k[None, :], mask=live_n[:, None] & (k < K)[None, :], other=0.0)
        first_b_up = tl.load(rows_b + N * R, mask=live_n[:, None] & (rank > 0), other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc, acc_up, squares = row_products(x, w, norm_weight, first, first_up, live_n, N, K, BLOCK_N, BLOCK_K, NORM, GATED)
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps) if NORM else 1.0
    y, added = tl.sum(acc, 1), tl.zeros([BLOCK_N], tl.float32)
    if BIAS:
        added += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)
    if ADD:
        added += tl.load(residual + n, mask=live_n, other=0.0).to(tl.float32)
    words += program % COPIES * COPY
    if GATED:
        up = tl.sum(acc_up, 1)
        delta, delta_up = _expand_both(words, rows_b, first_b, first_b_up, live_n, rank, N, R)
        up = (up + delta_up) * scale
        if BIAS:
            up += tl.load(bias + N + n, mask=live_n, other=0.0).to(tl.float32)
        y = silu_mul((y + delta) * scale + added, up, out.dtype.element_ty)
    else:
        part = (n0 >= END0).to(tl.int32) + (n0 >= END1).to(tl.int32)
        y = (y + _expand(words + part * R, rows_b, first_b, live_n, rank)) * scale + added
    tl.store(out + n, y.to(out.dtype.element_ty), mask=live_n)


@triton.jit
def _columns(block, N: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, BLOCK_N: tl.constexpr):
    """Each part has its own blocks of columns: those of part 0, then those of part 1, then those of part 2. -> (columns, mask, part)."""
    blocks0, blocks1 = tl.cdiv(END0, BLOCK_N), tl.cdiv(END1 - END0, BLOCK_N)
    part = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    begin = tl.where(part == 0, 0, tl.where(part == 1, END0, END1))
    end = tl.where(part == 0, END0, tl.where(part == 1, END1, N))
    n = begin + (block - tl.where(part == 0, 0, tl.where(part == 1, blocks0, blocks0 + blocks1))) * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, n < end, part


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    out, normed, x, residual, norm_weight, eps,  # [rows, N], [rows, K], [rows, K], [rows, N], [K]
    words, a, b, slots, ranks, stride, rows,  # [rows, WIDTH], [S, WIDTH, K], [S, N, R], [rows], [rows]
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = (norm(x) A^T) B^T + residual, and normed = norm(x). BLOCKS: of columns. Others as for `_one_row`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    SENDERS: tl.constexpr = WIDTH // BLOCK_R  # of a row
    program = tl.program_id(0)
    sends = program < rows * SENDERS
    index = tl.where(sends, program, program - rows * SENDERS)
    row = index // tl.where(sends, SENDERS, BLOCKS)
    slot, rank = tl.load(slots + row), tl.load(ranks + row)
    words += row * WIDTH
    if sends:
        _shrink(words, normed, x, a, row, index % SENDERS, slot, rank, norm_weight, eps, stride, K, R, BLOCK_R, BLOCK_K, 1, 0, NORM, NORM,
                PDL)
        return
    n, live, part = _columns(index % BLOCKS, N, END0, END1, BLOCK_N)
    rows_b = b + slot.to(tl.int64) * stride + n[:, None] * R + tl.arange(0, _RANKS)[None, :]
    first = tl.load(rows_b, mask=live[:, None] & (rank > 0), other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = row.to(tl.int64) * N + n
    y = tl.zeros([BLOCK_N], tl.float32)
    if ADD:
        y = tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    y += _expand(words + part * R, rows_b, first, live, rank)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_tokens"])
def _shrink_tiles(
    h, x, a, slots, ranks, stride, num_tokens,  # [T, WIDTH], [T, K], [S, WIDTH, K], [T], [S]
    K: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows of other adapters count as zero, so the products of all adapters of a tile add up to the result."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1)
    r = block * _RANKS + tl.arange(0, _RANKS)
    left = tl.load(slots + m, mask=m < num_tokens, other=-1)
    acc = tl.zeros([BLOCK_M, _RANKS], tl.float32)
    slot = tl.max(left, 0)
    while slot >= 0:
        mine = left == slot
        if (block * _RANKS) % R < tl.load(ranks + slot):
            for start in range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                live = (k < K)[None, :]
                value = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=mine[:, None] & live, other=0.0)
                tile = tl.load(a + slot.to(tl.int64) * stride + r[:, None] * K + k[None, :], mask=live, other=0.0)
                acc = tl.dot(value, tile.T, acc, input_precision="ieee")
        left = tl.where(mine, -1, left)
        slot = tl.max(left, 0)
    tl.store(h + m.to(tl.int64)[:, None] * WIDTH + r[None, :], acc.to(h.dtype.element_ty), mask=(m < num_tokens)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_tiles(
    y, h, b, slots, ranks, stride, num_tokens,  # [T, N], [T, WIDTH], [S, N, R], [T], [S]
    N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """ADD: y has the residual; else it is overwritten."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, live_n, part = _columns(tl.program_id(1), N, END0, END1, BLOCK_N)
    left = tl.load(slots + m, mask=m < num_tokens, other=-1)
    changed = left >= 0 if ADD else m < num_tokens
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slot = tl.max(left, 0)
    while slot >= 0:
        mine = left == slot
        for start in range(0, tl.load(ranks + slot), _RANKS):
            r = start + tl.arange(0, _RANKS)
            value = tl.load(h + m.to(tl.int64)[:, None] * WIDTH + part * R + r[None, :], mask=mine[:, None], other=0.0)
            tile = tl.load(b + slot.to(tl.int64) * stride + n[:, None] * R + r[None, :], mask=live_n[:, None], other=0.0)
            acc = tl.dot(value, tile.T, acc, input_precision="ieee")
        left = tl.where(mine, -1, left)
        slot = tl.max(left, 0)
    at, live = y + m.to(tl.int64)[:, None] * N + n[None, :], changed[:, None] & live_n[None, :]
    if ADD:
        acc += tl.load(at, mask=live, other=0.0).to(tl.float32)
    tl.store(at, acc.to(y.dtype.element_ty), mask=live)


def lora_delta(
    x: Tensor, weights: AdapterWeights, step: LoRAStep, *, norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    rows, k = x.shape
    x = x.contiguous()
    a, b, (width, n) = weights.a, weights.b, (weights.a.shape[1], weights.b.shape[1])
    end0, end1 = _ends(weights)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device) if residual is None else residual
    common = dict(N=n, K=k, R=weights.rank, WIDTH=width, END0=end0, END1=end1)
    if rows > tuning.LORA_FEW_ROWS:
        return _many_rows(out, x if norm is None else rms_norm(x, *norm), weights, step, residual is not None, common)
    normed = x if norm is None else torch.empty_like(x)
    block_k, block_r = tuning.lora_shrink_tile(k)
    block_n = min(tuning.LORA_EXPAND_COLUMNS, triton.next_power_of_2(n))
    blocks = sum(triton.cdiv(part, block_n) for part in weights.rows)
    norm_weight, eps = norm or (x, 0.0)
    launch(_few_rows, (rows * (width // block_r + blocks),), out, normed, x, out, norm_weight, eps, step.take_words(rows * width), a, b,
           step.slots, step.row_ranks, a.stride(0), rows, BLOCKS=blocks, BLOCK_N=block_n, BLOCK_R=block_r, BLOCK_K=block_k,
           NORM=norm is not None, ADD=residual is not None, num_warps=tuning.LORA_WARPS, **common, **early_start(x.device))
    return out, normed


def _many_rows(out: Tensor, x: Tensor, weights: AdapterWeights, step: LoRAStep, add: bool, common: dict[str, int]) -> tuple[Tensor, Tensor]:
    """add: `out` has the residual."""
    (rows, k), (a, b), tile = x.shape, (weights.a, weights.b), tuning.LORA_TILE
    h = torch.empty(rows, a.shape[1], dtype=x.dtype, device=x.device)
    blocks, row_blocks = sum(triton.cdiv(part, tile.block_n) for part in weights.rows), triton.cdiv(rows, tile.block_m)
    launch(_shrink_tiles, (row_blocks, a.shape[1] // RANKS), h, x, a, step.slots, step.ranks, a.stride(0), rows, K=k, R=common["R"],
           WIDTH=common["WIDTH"], BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, num_warps=4, num_stages=2)
    launch(_expand_tiles, (row_blocks, blocks), out, h, b, step.slots, step.ranks, b.stride(0), rows, N=common["N"], R=common["R"],
           WIDTH=common["WIDTH"], END0=common["END0"], END1=common["END1"], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, ADD=add,
           num_warps=4, num_stages=2)
    return out, x


def _ends(weights: AdapterWeights) -> tuple[int, int]:
    """Where the first and the second of three parts end; missing parts are empty."""
    rows = (*weights.rows, 0, 0)
    assert len(weights.rows) <= 3
    return rows[0], rows[0] + rows[1]


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weights: AdapterWeights, step: LoRAStep, *,
    norm: tuple[Tensor, float] | None = None, gated: bool = False, residual: Tensor | None = None,
) -> Tensor | None:
    """See the reference. For one row."""
    rows, k = x.shape
    n, width = weight.shape[0] // (2 if gated else 1), weights.a.shape[1]
    tile = tuning.linear_tile(1, n, k, gated, capability(x.device))
    if rows != 1 or any(part % tile.block_n for part in weights.rows[:-1]):
        return None
    x = x.contiguous()
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    norm_weight, eps = norm or (x, 0.0)
    end0, end1 = _ends(weights)
    copy = -(-width // _LINE) * _LINE
    launch(_one_row, (width + triton.cdiv(n, tile.block_n),),
        out, x, weight, norm_weight, x if bias is None else bias, x if residual is None else residual, eps,
        step.take_words(tuning.LORA_COPIES * copy), weights.a, weights.b, step.slots, step.row_ranks, weights.a.stride(0),
        N=n, K=k, R=weights.rank, WIDTH=width, END0=end0, END1=end1, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        BLOCK_A=tuning.lora_shrink_tile(k)[0], COPIES=tuning.LORA_COPIES, COPY=copy, NORM=norm is not None, GATED=gated,
        BIAS=bias is not None, ADD=residual is not None, num_warps=tile.num_warps, **early_start(x.device),
    )  # fmt: skip
    return out
