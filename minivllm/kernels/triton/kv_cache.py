"""Writing new keys and values to their slots, in Triton: both in one launch. The layout: kernels/reference/kv_cache.py."""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.layout import KVLayer


@triton.jit
def _write_kv(cache_k, cache_v, k, v, slots, k_stride, v_stride, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One program per token: its keys and values of all heads lie together in k, v and in the cache alike."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    i = tl.arange(0, PADDED)
    live = i < SIZE
    tl.store(cache_k + slot * SIZE + i, tl.load(k + token * k_stride + i, mask=live, other=0.0).to(cache_k.dtype.element_ty), mask=live)
    tl.store(cache_v + slot * SIZE + i, tl.load(v + token * v_stride + i, mask=live, other=0.0).to(cache_v.dtype.element_ty), mask=live)


def write_kv(k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None:
    """Store k, v: [T, kv_heads, head_dim] (heads contiguous) at slots: [T] int64, in place."""
    size = k.shape[1] * k.shape[2]
    assert kv.k.is_contiguous() and k.stride(1) == k.shape[2] == v.stride(1), "heads of one token lie together"
    _write_kv[(k.shape[0],)](kv.k, kv.v, k, v, slots, k.stride(0), v.stride(0), SIZE=size, PADDED=triton.next_power_of_2(size), num_warps=4)
