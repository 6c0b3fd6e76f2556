"""Self-attention over the paged cache in Triton: the kernels of a step and their shapes.

    rows of the fused projection        | decodes                                   |  prompt chunks                             |
    kernels of a layer                  | (_shared_attention ->) _decode_attention  |  _position_and_store -> _prompt_attention  |
        of long chunks on Hopper        |                                           |  ... -> (_gather_keys ->) _hopper_attention|
    kernels of the last layer, if it    | _position_and_store of all rows -> the kernels above, of the tokens with logits        |
    skips prompt tokens                 |                                                                                        |

Grids depend only on the numbers of sequences and tokens, which the host knows. So nothing waits for the device, and a step can be
captured. (The kernels for Hopper also need bounds of the lengths, and are not captured.) The kernels: decode_attention.py,
prompt_attention.py, gathered_prompts.py, hopper_attention.py. The specification: kernels/reference/attention.py.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minivllm.kernels import tuning
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.triton.attention_tile import Cache, Projection
from minivllm.kernels.triton.decode_attention import DecodeShape, Parts, _decode_attention, _shared_attention
from minivllm.kernels.triton.device import capability, early_start, gluon_kernels, launch, num_sms
from minivllm.kernels.triton.gathered_prompts import OrderedKeys, attend_in_order, order_keys
from minivllm.kernels.triton.prompt_attention import _position_and_store, _prompt_attention
from minivllm.kernels.tuning import AttentionTile, FewDecodesTile


@dataclass(frozen=True, slots=True)
class TritonAttentionMeta:
    """What the layers of a KV group share in one step: see `prepare_attention`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int | None
    num_decodes: int
    query_width: int  # queries of a decode
    num_seqs: int
    num_prompt_tokens: int
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    decode_tile: AttentionTile
    shared_tile: AttentionTile
    splits: int  # programs that share the keys of one decode
    shared_parts: int  # programs that share the keys which all decodes have in common; 0: such keys are not treated separately
    parts: Parts | None  # None: one split and no shared part
    ordered: OrderedKeys | None = None  # None: prompt chunks follow the block table
    few_tile: FewDecodesTile | None = None  # None: the kernel of few decodes does not compute this batch

    @property
    def num_decode_tokens(self) -> int:
        return self.num_decodes * self.query_width


def prepare_attention(
    batch: InputBatch, group: int, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None,
    dtype: torch.dtype, cache_dtype: torch.dtype | None = None,
) -> TritonAttentionMeta:
    """Choose the kernels' shapes for KV group `group` from host counts alone. See the reference."""
    device, decodes, width = batch.tokens.device, batch.num_decodes, batch.query_width
    heads_per_kv, arch, sms = num_heads // num_kv_heads, capability(device), num_sms(device)
    itemsize = (cache_dtype or dtype).itemsize
    wide_tile = tuning.wide_decode_tile(width, head_dim, heads_per_kv, itemsize, arch) if width > 1 else None
    if width > 1 and wide_tile is None:  # computed like prompt chunks, which may have any number of queries
        decodes, width = 0, 1
    longest = max(batch.seq_lens_host[:decodes], default=0)
    keys = min(longest, window + width - 1 if window else longest)
    splits = tuning.num_splits(decodes * num_kv_heads, keys, sms) if decodes else 1
    shared_tile = tuning.shared_tile(head_dim, heads_per_kv, itemsize, arch)
    shared_parts = 0
    if batch.shared is not None and window is None and decodes:
        shared_parts = tuning.num_shared_parts(num_kv_heads * triton.cdiv(decodes * width, shared_tile.block_q), sms)
    # Once the shared keys are read, one tile suits all numbers of decodes.
    programs = 512 if shared_parts else decodes * num_kv_heads
    tile = wide_tile or tuning.decode_tile(programs, keys, head_dim, heads_per_kv, itemsize, arch)
    parts = few_tile = None
    if decodes and width == 1 and window is None and not shared_parts:
        few_tile = tuning.few_decodes_tile(programs, keys, head_dim, heads_per_kv, itemsize, arch)
    most_splits = max(splits, few_tile.splits if few_tile else 1)
    if shared_parts or most_splits > 1:
        mean = torch.empty((shared_parts + most_splits, decodes * width, num_heads, head_dim), dtype=torch.float32, device=device)
        finished = torch.zeros((decodes, num_kv_heads), dtype=torch.int32, device=device)
        parts = Parts(mean, mean.new_empty(mean.shape[:-1]), finished, batch.shared if shared_parts else finished)
    prompt_tokens = sum(batch.query_lens_host) - decodes * width
    ordered = order_keys(batch, decodes, num_kv_heads, head_dim, window, dtype) if prompt_tokens else None
    return TritonAttentionMeta(
        num_heads, num_kv_heads, head_dim, block_size, window, decodes, width, batch.num_seqs, prompt_tokens, batch.query_start,
        batch.seq_lens, batch.block_tables[group], tile, shared_tile, splits, shared_parts, parts, ordered, few_tile,
    )  # fmt: skip


def self_attention(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: TritonAttentionMeta, *, scale: float, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None, softcap: float | None = None, alibi: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """qkv: [T, (H + 2 KV) * D] -> [T, H * D]; writes the T new keys and values to `slots`: [T]. See the reference."""
    out = torch.empty((qkv.shape[0], meta.num_heads * meta.head_dim), dtype=qkv.dtype, device=qkv.device)
    if meta.num_decodes:
        _attend_decodes(out, qkv, kv, slots, meta, scale, softcap, rope, qk_norm, alibi, sinks)
    if meta.num_prompt_tokens:
        qk = _store(qkv, kv, slots, meta, meta.num_decode_tokens, rope, qk_norm)
        _attend_prompts(out, qk, qkv if kv.scales is None else qk, kv, meta, scale, softcap, alibi, sinks)
    return out


def store_kv(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: TritonAttentionMeta, *, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Writes the T new keys and values -> normalized and rotated queries [T, H, D]. See the reference."""
    return _store(qkv, kv, slots, meta, 0, rope, qk_norm)[:, : meta.num_heads]


def _projection(
    qkv: Tensor, rope: tuple[Tensor, Tensor] | None, qk_norm: tuple[Tensor, float] | None, alibi: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Projection:
    """Unused fields hold `qkv`: a kernel's pointers must not be None."""
    return Projection(qkv, *(qk_norm or (qkv, 0.0)), *(rope or (qkv, qkv)), qkv.stride(0),
                      *(qkv if x is None else x for x in (alibi, sinks)))


def _cache(kv: KVLayer, meta: TritonAttentionMeta) -> Cache:
    """Kernels get numbers of 8 bits as int8. Scales that do not exist are the keys: a kernel's pointers must not be None."""
    if kv.scales is None:
        return Cache(kv.k, kv.v, kv.v, kv.k, kv.k, meta.block_table)
    k, v = kv.k.view(torch.int8), kv.v.view(torch.int8)
    return Cache(k, v, v.view(torch.int16), kv.scales, kv.scales.view(torch.int32), meta.block_table)


def _attend_decodes(
    out: Tensor, qkv: Tensor, kv: KVLayer, slots: Tensor, meta: TritonAttentionMeta, scale: float, softcap: float | None,
    rope: tuple[Tensor, Tensor] | None, qk_norm: tuple[Tensor, float] | None, alibi: Tensor | None,
    sinks: Tensor | None,
) -> None:
    tile, parts, few = meta.decode_tile, meta.parts, meta.few_tile
    projection, cache, early = _projection(qkv, rope, qk_norm, alibi, sinks), _cache(kv, meta), early_start(qkv.device)
    if few and rope is not None and softcap is None and alibi is None and sinks is None and (hopper := gluon_kernels("hopper_decode")):
        hopper.attend_few(out, projection, cache, parts or Parts(out, out, out, out), slots, meta.seq_lens, tile=few, scale=scale,
                          num_seqs=meta.num_decodes, num_heads=meta.num_heads, num_kv_heads=meta.num_kv_heads, head_dim=meta.head_dim,
                          block_size=meta.block_size, norm=qk_norm is not None)
        return
    shape = DecodeShape(
        num_heads=meta.num_heads, heads_per_kv=meta.num_heads // meta.num_kv_heads, head_dim=meta.head_dim,
        padded_dim=_padded(meta.head_dim), block_size=meta.block_size, query_width=meta.query_width, block_q=tile.block_q,
        block_m=tile.block_m, block_n=tile.block_n, split=meta.splits > 1 or meta.shared_parts > 0, min_keys=tuning.MIN_KEYS_PER_SPLIT,
        shared=meta.shared_parts > 0, shared_multiple=tuning.SHARED_KEYS_MULTIPLE, window=meta.window or 0, softcap=softcap is not None,
        norm=qk_norm is not None, rope=rope is not None, quantized=kv.scales is not None, fp8=kv.k.dtype == torch.float8_e4m3fn,
        native=capability(qkv.device) > 0 and qkv.dtype != torch.float32, alibi=alibi is not None, sinks=sinks is not None)
    parts = parts or Parts(out, out, out, out)  # unused
    if meta.shared_parts:
        wide = meta.shared_tile
        launch(_shared_attention, (meta.num_kv_heads, meta.shared_parts, triton.cdiv(meta.num_decode_tokens, wide.block_q)),
            parts, projection, cache, meta.seq_lens, scale, softcap or 0.0, meta.num_decode_tokens, meta.shared_parts,
            SHAPE=shape._replace(block_q=wide.block_q, block_m=wide.block_m, block_n=wide.block_n),
            num_warps=wide.num_warps, num_stages=wide.num_stages, **early,
        )  # fmt: skip
    launch(_decode_attention, (meta.num_kv_heads, meta.num_decodes, meta.splits),
        out, parts, projection, cache, slots, meta.seq_lens, scale, softcap or 0.0, meta.num_decodes, meta.block_table.stride(0),
        meta.splits, meta.shared_parts, SHAPE=shape, num_warps=tile.num_warps, num_stages=tile.num_stages, **early,
    )  # fmt: skip


def _store(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: TritonAttentionMeta, first: int, rope: tuple[Tensor, Tensor] | None,
    qk_norm: tuple[Tensor, float] | None,
) -> Tensor:
    """Write keys and values of the tokens from `first` on -> their normalized and rotated queries and keys: [T, H + KV, D].

    With a quantized cache also their values, [T, H + 2 KV, D], and keys and values as they are in the cache."""
    h, hk, d, quantized = meta.num_heads, meta.num_kv_heads, meta.head_dim, kv.scales is not None
    qk = torch.empty((qkv.shape[0], h + (1 + quantized) * hk, d), dtype=qkv.dtype, device=qkv.device)
    heads = max(1, 512 // _padded(d))  # as many as one warp loads at once
    launch(_position_and_store, (len(qkv) - first, triton.cdiv(h + 2 * hk, heads)),
        qk, _projection(qkv, rope, qk_norm), _cache(kv, meta), slots, first,
        NUM_HEADS=h, KV_HEADS=hk, D=d, PADDED_D=_padded(d), HEADS=heads, NORM=qk_norm is not None, ROPE=rope is not None,
        QUANTIZED=quantized, FP8=kv.k.dtype == torch.float8_e4m3fn, num_warps=1,
    )  # fmt: skip
    return qk


def _attend_prompts(
    out: Tensor, qk: Tensor, with_values: Tensor, kv: KVLayer, meta: TritonAttentionMeta, scale: float, softcap: float | None,
    alibi: Tensor | None, sinks: Tensor | None,
) -> None:
    """Prompt chunks. qk: of `_store`; with_values: [T, H + 2 KV, D], of which only the values are read.

    From Hopper on, the tensor memory accelerator loads the chunk's own keys and values."""
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    if meta.ordered is not None and softcap is None and alibi is None and sinks is None:
        attend_in_order(out, qk, with_values.view(len(qk), -1), _cache(kv, meta), meta.ordered, meta.query_start, meta.seq_lens,
                        scale=scale, num_kv_heads=hk, block_size=meta.block_size, quantized=kv.scales is not None,
                        fp8=kv.k.dtype == torch.float8_e4m3fn)
        return
    arch, size = capability(qk.device), qk.element_size()
    tile = tuning.prompt_tile(d, h // hk, size, arch)
    chunks = meta.num_seqs - meta.num_decodes
    tiles = meta.num_prompt_tokens // tile.block_q + chunks + 1
    k, v = qk.flatten(1), with_values.view(len(qk), -1)
    strides = k.stride(0), v.stride(0)
    descriptors = arch >= 90 and size == 2 and d in (64, 128, 256)
    if descriptors:
        k, v = TensorDescriptor.from_tensor(k, [tile.block_n, d]), TensorDescriptor.from_tensor(v, [tile.block_n, d])
    launch(_prompt_attention, (tiles, hk),
        out, qk, k, v, _cache(kv, meta), meta.query_start, meta.seq_lens, *(qk if x is None else x for x in (alibi, sinks)), scale,
        softcap or 0.0,
        meta.num_decodes, meta.num_seqs, tiles, strides[0], *strides, h * d, (h + hk) * d, meta.block_table.stride(0),
        NUM_HEADS=h, HEADS_PER_KV=h // hk, D=d, PADDED_D=_padded(d), BLOCK_SIZE=meta.block_size,
        BLOCK_Q=tile.block_q, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WINDOW=meta.window or 0, SOFTCAP=softcap is not None,
        DESCRIPTORS=descriptors, QUANTIZED=kv.scales is not None, FP8=kv.k.dtype == torch.float8_e4m3fn, ALIBI=alibi is not None,
        SINKS=sinks is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _padded(head_dim: int) -> int:
    """Tiles have a power of two of dimensions, and at least the 16 that a tensor core multiplies."""
    return max(16, tuning.next_power_of_2(head_dim))
