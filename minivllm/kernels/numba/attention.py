"""Self-attention over the paged cache on a CPU: decodes in one compiled call per layer, prompt chunks in PyTorch.

    rows of the fused projection   | decodes                |  prompt chunks, padding ..................  |
    computed by                    | decode_attention.py    |  kernels/reference/attention.py             |

The tasks depend only on lengths and block tables. So `prepare_attention` computes them once per step and KV group, together with an array
of the kernel's arguments, in which each layer replaces a few addresses. The reference also computes dtypes and shapes for which there is no
kernel: float16, and heads whose dimension is not a multiple of 8.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.numba import decode_attention as code
from minivllm.kernels.numba.threads import Arguments, Kernel
from minivllm.kernels.numba.vectors import BFLOAT16, FLOAT32, FP8, INT8
from minivllm.kernels.reference import attention as reference
from minivllm.kernels.reference.kv_cache import SCALE_DTYPE
from minivllm.kernels.tuning import CPU_MAX_QUERIES

Array = np.ndarray[Any, Any]
NO_WINDOW = 1 << 40
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8, torch.float8_e4m3fn: FP8}


@dataclass(frozen=True, slots=True)
class NumbaAttentionMeta:
    """What the layers of a KV group share in one step: see `prepare_attention`."""

    kernel: Kernel
    args: Arguments
    num_tasks: int
    num_tokens: int  # of all decodes
    dtype: torch.dtype
    cache_dtype: torch.dtype
    num_heads: int
    block: tuple[int, int, int]  # block size, KV heads, D
    finished: Array  # [decodes, KV] int32: splits that have finished; zero between layers
    memory: tuple[Any, ...]  # the other arrays that args point to
    rest: reference.ReferenceAttentionMeta | None  # for the rows after the decodes; None: there are none

    @property
    def num_kv_heads(self) -> int:
        return self.block[1]

    @property
    def head_dim(self) -> int:
        return self.block[2]


def covers(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether there is a compiled kernel for this shape."""
    return head_dim % 8 == 0 and dtype in (torch.float32, torch.bfloat16)


def kernel_for(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> Kernel:
    """The kernel of a shape, compiled at the first call."""
    return code.kernel(head_dim, num_heads // num_kv_heads, KINDS[dtype], KINDS[cache_dtype])


def prepare_attention(
    batch: InputBatch, group: int, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None,
    dtype: torch.dtype, cache_dtype: torch.dtype | None = None,
) -> NumbaAttentionMeta | reference.ReferenceAttentionMeta:
    """Divide the decodes of KV group `group` into tasks. The reference prepares prompt chunks, and all sequences if there is no kernel."""
    shape: dict[str, Any] = dict(block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window,
                                 dtype=dtype, cache_dtype=cache_dtype)
    cache_dtype = cache_dtype or dtype
    n, width, tokens = batch.num_decodes, batch.query_width, batch.num_decode_tokens
    if n == 0 or width > CPU_MAX_QUERIES or not covers(head_dim, dtype):
        return reference.prepare_attention(batch, group, **shape)
    rest = None
    if tokens < batch.num_tokens:
        rest = reference.prepare_attention(_without_decodes(batch), group, **shape)
    kernel = kernel_for(num_heads, num_kv_heads, head_dim, dtype, cache_dtype)
    window = NO_WINDOW if window is None else window
    first_splits = np.array(code.first_splits(batch.seq_lens_host[:n], window, width), np.int32)
    splits = int(first_splits[-1])
    at_once = code.heads_at_once(head_dim, width * num_heads // num_kv_heads, num_kv_heads)
    tasks = splits * -(-num_kv_heads // at_once)
    table, seq_lens = batch.block_tables[group], batch.seq_lens
    # The kernel reads memory by address, so its assumptions are asserted here and in `self_attention`.
    assert min(batch.seq_lens_host[:n]) >= width and table.shape[1] * block_size >= max(batch.seq_lens_host[:n])
    assert table.dtype == seq_lens.dtype == torch.int32 and table.stride(1) == seq_lens.stride(0) == 1
    partial = finished = np.empty(0, np.int32)
    if splits > n:
        partial = np.empty((splits, num_heads * width, head_dim + 2), np.float32)
        finished = np.zeros((n, num_kv_heads), np.int32)
    args, block = Arguments(code.NUM_ARGS), (block_size, num_kv_heads, head_dim)
    code.STEP_ARGS.pack_into(
        args.memory, 8 * code.TABLE, table.data_ptr(), 4 * table.stride(0), seq_lens.data_ptr(), first_splits.ctypes.data, tasks,
        partial.ctypes.data, finished.ctypes.data, window, num_heads, num_kv_heads, block_size, width,
        at_once)
    memory = first_splits, table, seq_lens, partial
    return NumbaAttentionMeta(kernel, args, tasks, tokens, dtype, cache_dtype, num_heads, block, finished, memory, rest)


def self_attention(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: NumbaAttentionMeta | reference.ReferenceAttentionMeta, *, scale: float,
    rope: tuple[Tensor, Tensor] | None = None, qk_norm: tuple[Tensor, float] | None = None, softcap: float | None = None,
    alibi: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """qkv: [T, (H + 2 KV) * D] -> [T, H * D]; writes the T new keys and values to `slots`: [T]. See the reference."""
    if isinstance(meta, reference.ReferenceAttentionMeta):
        return reference.self_attention(qkv, kv, slots, meta, scale=scale, rope=rope, qk_norm=qk_norm, softcap=softcap, alibi=alibi,
                                        sinks=sinks)
    n, args = meta.num_tokens, meta.args
    if not args.checked:  # once per step: all layers have the same shapes
        _check(qkv, kv, slots, meta, *(rope or ()), *(qk_norm or ())[:1])
        for t in (alibi, sinks):
            assert t is None or (t.shape == (meta.num_heads,) and t.dtype == torch.float32 and t.is_contiguous())
        args.checked = True
    out = qkv.new_empty((len(qkv), meta.num_heads * meta.block[2]))
    cos, sin = (0, 0) if rope is None else (rope[0].data_ptr(), rope[1].data_ptr())
    norm, eps = (0, 0.0) if qk_norm is None else (qk_norm[0].data_ptr(), qk_norm[1])
    scales = (0, 0) if kv.scales is None else (kv.scales.data_ptr(), kv.scales.data_ptr() + SCALE_DTYPE.itemsize)
    code.LAYER_ARGS.pack_into(
        args.memory, 0, 0, out.data_ptr(), qkv.data_ptr(), qkv.stride(0) * qkv.itemsize, kv.k.data_ptr(), kv.v.data_ptr(), *scales, norm,
        cos, sin, slots.data_ptr(), *(0 if x is None else x.data_ptr() for x in (alibi, sinks)), eps, scale, softcap or 0.0)
    meta.kernel.run(args.address, meta.num_tasks)
    if meta.rest is not None:
        some = None if rope is None else (rope[0][n:], rope[1][n:])
        out[n:] = reference.self_attention(qkv[n:], kv, slots[n:], meta.rest, scale=scale, rope=some, qk_norm=qk_norm, softcap=softcap,
                                           alibi=alibi, sinks=sinks)
    return out


def _check(qkv: Tensor, kv: KVLayer, slots: Tensor, meta: NumbaAttentionMeta, *others: Tensor) -> None:
    """Assert what the kernel assumes, because it reads memory by address. others: cos, sin and norm weights, as far as they are used."""
    _, kv_heads, head_dim = meta.block
    assert qkv.stride(1) == 1 and qkv.shape == (len(slots), (meta.num_heads + 2 * kv_heads) * head_dim) and len(slots) >= meta.num_tokens
    assert slots.dtype == torch.int64 and slots.is_contiguous() and kv.k.shape[1:] == kv.v.shape[1:] == meta.block
    for t in (qkv, *others):
        assert t.dtype == meta.dtype and t.device.type == "cpu" and (t is qkv or t.is_contiguous())
    for t in (kv.k, kv.v):
        assert t.dtype == meta.cache_dtype and t.is_contiguous() and (kv.scales is not None) == (KINDS[t.dtype] >= INT8)
    scales = kv.scales
    assert scales is None or (scales.shape == (*kv.k.shape[:3], 2) and scales.dtype == SCALE_DTYPE and scales.is_contiguous())
    for t in others:
        assert t.shape[0] in (len(slots), meta.num_heads + kv_heads) and t.shape[-1] == head_dim


def _without_decodes(batch: InputBatch) -> InputBatch:
    """The same batch from the first prompt chunk on."""
    n, first = batch.num_decodes, batch.num_decode_tokens
    return dataclasses.replace(
        batch, tokens=batch.tokens[first:], positions=batch.positions[first:], query_start=batch.query_start[n:] - first,
        seq_lens=batch.seq_lens[n:], slots=tuple(slots[first:] for slots in batch.slots), num_decodes=0, query_width=1,
        block_tables=tuple(table[n:] for table in batch.block_tables), query_lens_host=batch.query_lens_host[n:],
        seq_lens_host=batch.seq_lens_host[n:])
