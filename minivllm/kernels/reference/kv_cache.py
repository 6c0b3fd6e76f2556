"""Writing to the paged KV cache, and copying whole blocks inside it or to and from host memory.

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


def copy_blocks(layers: Sequence[KVLayer], src: Tensor, dst: Tensor) -> None:
    """Copy-on-write: block dst[i] becomes a copy of block src[i] in every tensor of every layer; src, dst: [n] int64.

    All reads happen before all writes, so a block may be the source of one copy and the destination of another.
    """
    move_blocks(layers, layers, src, dst)


def move_blocks(src_layers: Sequence[KVLayer], dst_layers: Sequence[KVLayer], src: Tensor, dst: Tensor) -> None:
    """Copy blocks src: [n] of one pool to blocks dst: [n] of another that may live on another device (host swapping).

    `src` lies on the source pool's device and `dst` on the destination's. Blocks are gathered into one contiguous piece
    per tensor, so that a transfer between devices is one large copy instead of one per block.
    """
    for source, target in zip(src_layers, dst_layers, strict=True):
        pairs = ((source.k, target.k), (source.v, target.v), (source.k_scale, target.k_scale), (source.v_scale, target.v_scale))
        for a, b in pairs:
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                b.index_copy_(0, dst, a.index_select(0, src).to(b.device))
