"""Prompt attention over keys that lie in order: which keys those are, and the copy that puts them in order. For Hopper.

A tensor memory accelerator loads a tile of consecutive rows with one instruction, but the rows of a KV block are too few for a tile. So
keys and values of earlier steps are first gathered from their blocks into a workspace. The copy moves each key and value once; the
attention then reads them once for every 128 rows of queries, at twice the speed of a kernel that follows the block table.

    no sequence has earlier keys    the projection's output has all keys and values in order
    some have                       workspace:  | keys of sequence 0 | 0 0 | keys of sequence 1 | 0 0 0 |    values: the same
                                                  each padded with zeros to a multiple of the kernel's tile

The workspace has at most tuning.WORKSPACE_BYTES. Sequences that do not fit together are computed one after another, and of a sequence that
does not fit alone, some KV heads after the others.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.layout import InputBatch
from minivllm.kernels.triton.attention_tile import Cache
from minivllm.kernels.triton.device import capability, gluon_kernels, launch
from minivllm.kernels.triton.quantized_cache import widen


class Pass(NamedTuple):
    """Sequences that are computed at a time."""

    seqs: tuple[int, int]  # [first, end)
    tokens: int  # new tokens
    rows: int  # of the workspace. The host may know only upper bounds of lengths, so fewer may be used
    longest: int  # keys
    heads: int  # KV heads at a time


class OrderedKeys(NamedTuple):
    """Where the keys of a step's prompt chunks are."""

    start: Tensor  # [B] int32: row of each sequence's first key. Only differences count
    passes: tuple[Pass, ...]
    first_token: int | None  # the chunks' keys are rows of the projection from this one on; None: in the workspace


def hopper_kernel(device: torch.device) -> ModuleType | None:
    """The module with the kernel. None: not for this GPU, or not with this version of Triton."""
    return gluon_kernels("hopper_attention") if capability(device) // 10 == 9 else None


def order_keys(
    batch: InputBatch, first: int, num_kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype,
) -> OrderedKeys | None:
    """For the sequences from `first` on. None: the kernel that follows the block table computes them.

    The kernel has no sliding window. A captured step has other lengths each time, so its grid cannot depend on them."""
    if batch.captured or window is not None or dtype.itemsize != 2 or head_dim not in (64, 128) or not hopper_kernel(batch.tokens.device):
        return None
    queries, lens = batch.query_lens_host[first:], batch.seq_lens_host[first:]
    if not tuning.gathers(queries, lens):
        return None
    if queries == lens:
        everything = Pass((first, batch.num_seqs), sum(queries), 0, max(lens), num_kv_heads)
        return OrderedKeys(batch.query_start, (everything,), sum(batch.query_lens_host[:first]))
    passes, head_bytes = [], 2 * head_dim * dtype.itemsize
    for begin, end in group(lens, tuning.WORKSPACE_BYTES // (num_kv_heads * head_bytes)):
        rows = sum(map(_padded, lens[begin:end]))
        heads = min(num_kv_heads, tuning.WORKSPACE_BYTES // (rows * head_bytes))
        if not heads:
            return None
        passes.append(Pass((first + begin, first + end), sum(queries[begin:end]), rows, max(lens[begin:end]), heads))
    padded = (batch.seq_lens + tuning.GATHER_TILE - 1) // tuning.GATHER_TILE * tuning.GATHER_TILE
    return OrderedKeys(padded.cumsum(0, dtype=torch.int32) - padded, tuple(passes), None)


def group(lens: Sequence[int], most: int) -> list[tuple[int, int]]:
    """[begin, end) of consecutive sequences that have at most `most` rows together, or of one sequence that has more."""
    groups, begin, rows = [], 0, 0
    for i, n in enumerate(map(_padded, lens)):
        if i > begin and rows + n > most:
            groups.append((begin, i))
            begin, rows = i, 0
        rows += n
    return [*groups, (begin, len(lens))]


def attend_in_order(
    out: Tensor, qk: Tensor, with_values: Tensor, cache: Cache, keys: OrderedKeys, query_start: Tensor, seq_lens: Tensor, *, scale: float,
    num_kv_heads: int, block_size: int, quantized: bool, fp8: bool,
) -> None:
    """out: [T, H * D]; qk: [T, H + KV or more, D], queries and new keys; with_values: [T, (H + 2 KV) * D], whose values are read."""
    kernel, d = hopper_kernel(qk.device), qk.shape[2]
    assert kernel is not None
    heads = out.shape[1] // d
    for part in keys.passes:
        for head in range(0, num_kv_heads, part.heads):
            count = min(part.heads, num_kv_heads - head)
            if keys.first_token is not None:
                k, v = qk.flatten(1)[keys.first_token :], with_values[keys.first_token :]
                columns = heads * d, (heads + num_kv_heads) * d
            else:
                k, v = torch.empty((2, part.rows, count * d), dtype=qk.dtype, device=qk.device)
                columns = 0, 0
                first, end = part.seqs
                launch(_gather_keys, (triton.cdiv(part.longest, tuning.GATHER_TILE), end - first, count),
                    k, v, cache, seq_lens, keys.start, first, head, cache.block_table.stride(0), count * d, KV_HEADS=num_kv_heads, D=d,
                    BLOCK_SIZE=block_size, TILE=tuning.GATHER_TILE, QUANTIZED=quantized, FP8=fp8, num_warps=tuning.GATHER_WARPS,
                )  # fmt: skip
            kernel.attend(out, qk, k, v, query_start, seq_lens, keys.start, scale=scale, first_head=head, kv_heads=count,
                          heads_per_kv=heads // num_kv_heads, seqs=part.seqs, num_tokens=part.tokens, k_column=columns[0],
                          v_column=columns[1])


def _padded(length: int) -> int:
    return -(-length // tuning.GATHER_TILE) * tuning.GATHER_TILE


@triton.jit(do_not_specialize=["first_seq", "first_head", "table_stride"])
def _gather_keys(
    keys, values, cache, seq_lens, start, first_seq, first_head, table_stride, stride,  # keys, values: [rows, stride]; Cache; [B], [B]
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, QUANTIZED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, sequences, KV heads). Quantized keys and values become those that `_position_and_store` gives new tokens."""
    seq = first_seq + tl.program_id(1)
    length = tl.load(seq_lens + seq)
    key = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if tl.program_id(0) * TILE >= length:
        return
    dims = tl.arange(0, D)
    live = key < length
    block = tl.load(cache.block_table + seq.to(tl.int64) * table_stride + key // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    at = (block * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + first_head + tl.program_id(2)
    source = at[:, None] * D + dims[None, :]
    k = tl.load(cache.k + source, mask=live[:, None], other=0)
    v = tl.load(cache.v + source, mask=live[:, None], other=0)
    DTYPE: tl.constexpr = keys.dtype.element_ty
    if QUANTIZED:
        k_scale = tl.load(cache.scales + 2 * at, mask=live, other=0.0).to(tl.float32)
        v_scale = tl.load(cache.scales + 2 * at + 1, mask=live, other=0.0).to(tl.float32)
        k = (widen(k, tl.float32, FP8) * k_scale[:, None]).to(DTYPE)
        v = (widen(v, tl.float32, FP8) * v_scale[:, None]).to(DTYPE)
    row = (tl.load(start + seq) - tl.load(start + first_seq) + key).to(tl.int64)
    target = row[:, None] * stride + tl.program_id(2) * D + dims[None, :]
    tl.store(keys + target, k)
    tl.store(values + target, v)
