"""Writing to the paged KV cache, and copying whole blocks inside it.

    block 0        block 1        block 2                  slot = block * block_size + offset
    |. . . .|      |k k k k|      |k k . .|                block 0 is the null block: padded rows write there,
     0 1 2 3        4 5 6 7        8 9                     nobody reads it

A cache tensor is [num_blocks, block_size, kv_heads, head_dim]; seen as [num_blocks * block_size, kv_heads, head_dim]
a slot is simply a row number.
"""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minivllm.kernels.layout import KVLayer


def write_kv(k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None:
    """Store one layer's new keys and values, k, v: [T, kv_heads, head_dim], at slots: [T] int64, in place."""
    assert kv.k_scale is None and kv.v_scale is None, "this kernel writes unquantized caches only"
    kv.k.view(-1, *kv.k.shape[2:]).index_copy_(0, slots, k.to(kv.k.dtype))
    kv.v.view(-1, *kv.v.shape[2:]).index_copy_(0, slots, v.to(kv.v.dtype))


def copy_blocks(pages: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copy-on-write: block dst[i] becomes a copy of block src[i] in every tensor [num_blocks, n] of raw pages; src, dst: [m] int64.

    All reads happen before all writes, so a block may be the source of one copy and the destination of another.
    """
    for raw in pages:
        raw.index_copy_(0, dst, raw.index_select(0, src))
