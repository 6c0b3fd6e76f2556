"""Writing to the paged KV cache, and copying whole blocks inside it.

    block 0        block 1        block 2                  slot = block * block_size + offset
    |. . . .|      |k k k k|      |k k . .|                block 0 is the null block: padded rows are written there
     0 1 2 3        4 5 6 7        8 9                     and never read

A cache tensor is [num_blocks, block_size, kv_heads, head_dim]. Viewed as [num_blocks * block_size, kv_heads, head_dim], a slot is a
row number.

A quantized cache has 8 bits per number, fp8 (e4m3: 4 bits of exponent, 3 of mantissa) or int8. Each token and KV head has one scale for
its key and one for its value, chosen from their largest magnitudes. So numbers of any size fit, and no calibration is needed.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivllm.kernels.layout import KVLayer

SCALE_DTYPE = torch.bfloat16  # 2 bytes, and float32's range: numbers of any magnitude have a scale
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # the largest number of a quantized cache
SMALLEST_SCALE = 2.0**-100  # of a token whose numbers are all zero, or nearly


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x: [..., head_dim] -> x / scale rounded to `dtype`: [..., head_dim], and the scales: [...].

    The scale is rounded first and then divided by, so its rounding is no error. It may be 2^-9 too small, and then the largest number
    rounds to LARGEST. The error of a number is at most 1/16 of its magnitude plus scale / 1024 in fp8, and scale / 2 in int8 (for the
    largest number up to 3/4 of the scale).
    """
    x = x.float()
    scale = (x.abs().amax(-1) * (1.0 / LARGEST[dtype])).clamp_min(SMALLEST_SCALE).to(SCALE_DTYPE)
    x = x * (1.0 / scale.float())[..., None]
    return (x.round() if dtype == torch.int8 else x).to(dtype), scale


def dequantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: x * scale, rounded to `dtype`."""
    return (x.float() * scale.float()[..., None]).to(dtype)


def write_kv(k: Tensor, v: Tensor, kv: KVLayer, slots: Tensor) -> None:
    """Store one layer's new keys and values, k, v: [T, kv_heads, head_dim], at slots: [T] int64, in place."""
    for new, cache, scales in ((k, kv.k, kv.k_scale), (v, kv.v, kv.v_scale)):
        if scales is None:
            new = new.to(cache.dtype)
        else:
            new, scale = quantize(new, cache.dtype)
            scales.view(-1, scales.shape[-1]).index_copy_(0, slots, scale)
            new, cache = new.view(torch.int8), cache.view(torch.int8)  # PyTorch indexes no fp8
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)


def copy_blocks(pages: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copy-on-write: block dst[i] becomes a copy of block src[i] in every tensor [num_blocks, n] of raw pages; src, dst: [m] int64.

    All reads happen before all writes, so a block may be the source of one copy and the destination of another.
    """
    for raw in pages:
        raw.index_copy_(0, dst, raw.index_select(0, src))
