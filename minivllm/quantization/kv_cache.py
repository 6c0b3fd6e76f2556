"""How one layer's keys and values are stored. Only this code depends on the bytes, the dtype and the tensors of a page.

A *page* is one KV block of one layer. It consists of pieces (keys, values, perhaps their scales), and each piece of all pages is
one tensor, so that kernels index keys with a single multiplication:

    piece 0, keys     | block 0 | block 1 | block 2 | ...      [num_blocks, bytes]
    piece 1, values   | block 0 | block 1 | block 2 | ...
    piece 2, scales      | ...                                  if they are quantized

Copies and moves of blocks work on these raw bytes. Memory planning, CUDA graphs and CPU KV offload get all sizes from here.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from minivllm.errors import InvalidInput
from minivllm.families import KVGroup
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference.kv_cache import SCALE_DTYPE


class KVCacheSpec(Protocol):
    """The storage of one layer's keys and values."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""

    def piece_bytes(self, block_size: int) -> tuple[int, ...]:
        """Bytes of each piece of a page of `block_size` tokens."""

    def view(self, pieces: Sequence[Tensor], block_size: int) -> KVLayer:
        """What kernels read and write, sharing the memory of `pieces`: [num_blocks, bytes of the piece] uint8 each."""


@dataclass(frozen=True, slots=True)
class DenseKV:
    """Unquantized keys and values in the model's dtype: [num_blocks, block_size, kv_heads, head_dim] each."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, group: KVGroup, dtype: torch.dtype) -> DenseKV:
        """For the layers of a KV group, in a model of this dtype."""
        return cls(group.kv_heads, group.head_dim, dtype)

    def piece_bytes(self, block_size: int) -> tuple[int, int]:
        """See `KVCacheSpec`."""
        piece = block_size * self.kv_heads * self.head_dim * self.dtype.itemsize
        return piece, piece

    def view(self, pieces: Sequence[Tensor], block_size: int) -> KVLayer:
        """See `KVCacheSpec`."""
        shape = (len(pieces[0]), block_size, self.kv_heads, self.head_dim)
        k, v = (piece.view(self.dtype).view(shape) for piece in pieces)
        return KVLayer(k, v)


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """Keys and values of 8 bits, as `DenseKV`, and their scales: [num_blocks, block_size, kv_heads, 2]."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # float8_e4m3fn or int8

    def piece_bytes(self, block_size: int) -> tuple[int, int, int]:
        """See `KVCacheSpec`."""
        heads = block_size * self.kv_heads
        return heads * self.head_dim, heads * self.head_dim, heads * 2 * SCALE_DTYPE.itemsize

    def view(self, pieces: Sequence[Tensor], block_size: int) -> KVLayer:
        """See `KVCacheSpec`."""
        shape = (len(pieces[0]), block_size, self.kv_heads)
        k, v = (piece.view(self.dtype).view(*shape, self.head_dim) for piece in pieces[:2])
        return KVLayer(k, v, pieces[2].view(SCALE_DTYPE).view(*shape, 2))


@dataclass(frozen=True, slots=True)
class LatentKV:
    """Latent attention: one vector per token, which is the key and the value of its one head. [num_blocks, block_size, 1, head_dim]"""

    head_dim: int
    dtype: torch.dtype

    def piece_bytes(self, block_size: int) -> tuple[int, ...]:
        """See `KVCacheSpec`."""
        return (block_size * self.head_dim * self.dtype.itemsize,)

    def view(self, pieces: Sequence[Tensor], block_size: int) -> KVLayer:
        """See `KVCacheSpec`. Keys and values share their memory: both are written, with equal numbers."""
        vectors = pieces[0].view(self.dtype).view(len(pieces[0]), block_size, 1, self.head_dim)
        return KVLayer(vectors, vectors)


def unquantized(group: KVGroup, dtype: torch.dtype) -> KVCacheSpec:
    """Keys and values in the model's dtype."""
    return LatentKV(group.head_dim, dtype) if group.latent else DenseKV.of(group, dtype)


def _quantized(group: KVGroup, dtype: torch.dtype) -> KVCacheSpec:
    if group.latent:
        raise InvalidInput("a quantized KV cache is not supported for latent attention, whose vectors are small already: leave "
                           "kv_cache_dtype out", "kv_cache_dtype")
    return QuantizedKV(group.kv_heads, group.head_dim, dtype)


KVFormat: TypeAlias = Callable[[KVGroup, torch.dtype], KVCacheSpec]  # (KV group, the model's dtype) -> storage of its layers

# kv_cache_dtype -> dtype of a quantized cache
QUANTIZED: Mapping[str, torch.dtype] = MappingProxyType({"fp8": torch.float8_e4m3fn, "int8": torch.int8})


def kv_format(kv_cache_dtype: str) -> KVFormat:
    """The storage that a value of `kv_cache_dtype` names. A value that is not in `QUANTIZED` is the model's own dtype."""
    if kv_cache_dtype not in QUANTIZED:
        return unquantized
    return lambda group, _: _quantized(group, QUANTIZED[kv_cache_dtype])
