"""Self-attention over the paged cache in Triton: which kernels run for a step, in which shapes.

    rows of the fused projection   | decodes, one each                         |  prompt chunks ..........................  |
    kernels of a layer             | (_shared_attention ->) _decode_attention  |  _position_and_store -> _prompt_attention  |
    of the last one, with prompts  | _position_and_store of all rows -> _decode_attention of each sequence's last one       |

Grids depend on host counts alone, and on the number of sequences and tokens only, so nothing waits for the device and a step
can be captured. The kernels: decode_attention.py and prompt_attention.py. The specification: kernels/reference/attention.py.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minivllm.kernels.layout import SHARED_RUN, InputBatch, KVLayer
from minivllm.kernels.triton.decode_attention import MAX_SPLITS, _decode_attention, _shared_attention
from minivllm.kernels.triton.device import capability, early_start, launch, num_sms
from minivllm.kernels.triton.prompt_attention import _position_and_store, _prompt_attention

MIN_KEYS = 256  # of a split
LONG = 512  # keys, at least `cuda_graphs.SHORT`: beyond them some sequences of a batch may be so long that the others wait for them


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of one program's work, chosen so that it fits the GPU's shared memory without spilling registers."""

    block_q: int  # queries
    block_m: int  # rows: queries x heads of the KV head, a power of two
    block_n: int  # keys at a time
    num_warps: int
    num_stages: int


def decode_tile(programs: int, keys: int, head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> Tile:
    """From a table by shape and architecture: no tuning at run time. programs: sequences x KV heads; keys: of the longest sequence;
    itemsize: bytes of an element.

    While there are fewer programs than multiprocessors, a large tile takes the least time from beginning to end. With more,
    small ones leave room for several programs side by side, which hide each other's waits.
    """
    block_m = max(16, triton.next_power_of_2(heads_per_kv + 1))
    row = head_dim * itemsize  # bytes of a key
    if arch >= 90:
        if row == 256:
            if programs <= 128:
                return Tile(1, block_m, 64 if programs <= 16 else 128, 4, 2)
            return Tile(1, block_m, 32, 4, 3) if programs <= (1024 if keys > LONG else 256) else Tile(1, block_m, 16, 1, 3)
        return Tile(1, block_m, 128 if row <= 256 else 64 if row <= 512 else 32, 4, 2)
    if row == 256:
        return Tile(1, block_m, 32, 4, 3)  # larger ones spill registers
    return Tile(1, block_m, 64 if row < 256 else 32 if row <= 512 else 16, 4, 3 if row < 256 else 2)


def wide_decode_tile(query_width: int, head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> Tile | None:
    """Likewise, for decodes of several queries. None: no tile holds their rows in registers, and they are computed as prompt chunks."""
    block_m = max(16, triton.next_power_of_2(query_width * (heads_per_kv + 1)))
    row = triton.next_power_of_2(head_dim) * itemsize
    size = block_m * row  # bytes of the queries; their running averages take twice as much in registers
    if block_m > 128 or size > (32768 if row <= 256 else 16384):
        return None
    if arch >= 90:
        block_n = 128 if row <= 128 else 64 if row <= 256 else 32
    else:
        block_n = 32 if row <= 256 else 16
    return Tile(query_width, block_m, block_n, 4 if size <= 8192 else 8, 3 if arch < 90 and row <= 128 else 2)


def shared_tile(head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> Tile:
    """Likewise, for a prefix that many decodes share: the heads of several sequences are the rows of one tile."""
    block_m = max(64, triton.next_power_of_2(heads_per_kv))
    row = head_dim * itemsize
    if arch >= 90:
        return Tile(block_m // heads_per_kv, block_m, 64 if row <= 256 else 32, 4, 2)
    return Tile(block_m // heads_per_kv, block_m, 64 if row <= 128 else 32 if row <= 256 else 16, 8, 2)  # larger ones spill registers


def prompt_tile(head_dim: int, heads_per_kv: int, itemsize: int, arch: int) -> Tile:
    """Likewise. 99 KB of shared memory before Hopper, 227 KB from it on."""
    row = head_dim * itemsize
    if arch >= 90:
        block_m = max(64, triton.next_power_of_2(heads_per_kv))
        return Tile(block_m // heads_per_kv, block_m, 64 if row <= 256 else 32, 4, 3 if row <= 256 else 2)
    block_m = max(128 if row <= 256 else 64, triton.next_power_of_2(heads_per_kv))
    return Tile(block_m // heads_per_kv, block_m, 64 if row <= 128 else 32 if row <= 256 else 16, 8, 2)


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """What every layer of a KV group shares in one step: see `prepare_attention`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int | None
    num_decodes: int
    query_width: int  # queries of a decode
    keys: int  # of the longest decode, at most
    num_seqs: int
    num_prompt_tokens: int
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    splits: int  # programs that share the keys of one decode
    shared_parts: int  # programs before them that share the keys which all decodes have in common; 0: nobody looks for such
    partial: Tensor | None  # [shared parts + splits, decodes * query width, H, D] float32; None: one split and no shared part
    log_weight: Tensor | None  # [shared parts + splits, decodes * query width, H] float32
    tickets: Tensor | None  # [decodes, KV] int32: zero between kernels
    shared: Tensor | None  # [1] int32: how many keys they have in common


def prepare_attention(
    batch: InputBatch, group: int, *, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None,
    dtype: torch.dtype,
) -> AttentionMeta:
    """Choose the kernels' shapes for KV group `group` from host counts alone."""
    device, decodes, width = batch.tokens.device, batch.num_decodes, batch.query_width
    heads_per_kv, size = num_heads // num_kv_heads, dtype.itemsize
    if width > 1 and wide_decode_tile(width, head_dim, heads_per_kv, size, capability(device)) is None:
        decodes, width = 0, 1
    decode_tokens = decodes * width
    partial = log_weight = tickets = shared = None
    longest = max(batch.seq_lens_host[:decodes], default=0)
    keys = min(longest, window + width - 1 if window else longest)
    splits = _splits(device, decodes * num_kv_heads, keys) if decodes else 1
    shared_parts = 0
    if batch.shared is not None and window is None and decodes:
        tile = shared_tile(head_dim, heads_per_kv, size, capability(device))
        shared_parts = _shared_parts(device, num_kv_heads * triton.cdiv(decode_tokens, tile.block_q))
    if shared_parts or splits > 1:
        partial = torch.empty((shared_parts + splits, decode_tokens, num_heads, head_dim), dtype=torch.float32, device=device)
        log_weight = torch.empty(partial.shape[:-1], dtype=torch.float32, device=device)
        tickets = torch.zeros((decodes, num_kv_heads), dtype=torch.int32, device=device)
        shared = batch.shared if shared_parts else tickets
    return AttentionMeta(
        num_heads, num_kv_heads, head_dim, block_size, window, decodes, width, keys, batch.num_seqs,
        sum(batch.query_lens_host) - decode_tokens, batch.query_start, batch.seq_lens, batch.block_tables[group], splits, shared_parts,
        partial, log_weight, tickets, shared,
    )  # fmt: skip


def _splits(device: torch.device, programs: int, keys: int) -> int:
    """As many as fill the GPU, as long as each may have MIN_KEYS. Long sequences (see LONG) are shared out further: four times
    as far while there are fewer programs than multiprocessors, and by two up to four times as many (measured on an H200)."""
    sms, long = num_sms(device), keys > LONG
    if programs > sms:
        return 2 if long and programs < 4 * sms else 1
    splits = 1
    while splits < MAX_SPLITS and programs * splits < (4 * sms if long else sms) and keys > MIN_KEYS * splits:
        splits *= 2
    return splits


def _shared_parts(device: torch.device, programs: int) -> int:
    """As many parts of a shared prefix as fill the GPU once."""
    parts = 1
    while parts < MAX_SPLITS and 2 * parts * programs <= num_sms(device):
        parts *= 2
    return parts


def self_attention(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: AttentionMeta, *, scale: float, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None, softcap: float | None = None,
) -> Tensor:
    """qkv: [T, (H + 2 KV) * D] -> [T, H * D]; writes the T new keys and values to `slots`: [T]. See the reference."""
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    out = torch.empty((qkv.shape[0], h * d), dtype=qkv.dtype, device=qkv.device)
    norm_weight, eps = qk_norm or (qkv, 0.0)
    cos, sin = rope or (qkv, qkv)
    shared: dict[str, Any] = dict(NUM_HEADS=h, D=d, PADDED_D=triton.next_power_of_2(max(d, 16)))
    flags = dict(NORM=qk_norm is not None, ROPE=rope is not None)
    arch, size = capability(qkv.device), qkv.element_size()
    if meta.num_decodes:
        split, decode_tokens = meta.partial is not None, meta.num_decodes * meta.query_width
        partial, log_weight, tickets, common = (meta.partial, meta.log_weight, meta.tickets, meta.shared) if split else (out,) * 4
        if meta.shared_parts:
            tile = shared_tile(d, h // hk, size, arch)
            launch(_shared_attention, (hk, meta.shared_parts, triton.cdiv(decode_tokens, tile.block_q)),
                partial, log_weight, qkv, kv.k, kv.v, norm_weight, eps, cos, sin, meta.block_table, common, scale, softcap or 0.0,
                decode_tokens, qkv.stride(0), meta.shared_parts,
                HEADS_PER_KV=h // hk, BLOCK_SIZE=meta.block_size, BLOCK_Q=tile.block_q, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                RUN=SHARED_RUN, SOFTCAP=softcap is not None, **shared, **flags,
                num_warps=tile.num_warps, num_stages=tile.num_stages, **early_start(qkv.device),
            )  # fmt: skip
        if meta.query_width == 1:
            programs = 512 if meta.shared_parts else meta.num_decodes * hk  # with what is shared read, one tile suits all numbers
            tile = decode_tile(programs, meta.keys, d, h // hk, size, arch)
        else:
            tile = cast(Tile, wide_decode_tile(meta.query_width, d, h // hk, size, arch))
        launch(_decode_attention, (hk, meta.num_decodes, meta.splits),
            out, partial, log_weight, tickets, qkv, kv.k, kv.v, norm_weight, eps, cos, sin, slots, meta.seq_lens, meta.block_table,
            scale, softcap or 0.0, meta.num_decodes, qkv.stride(0), meta.block_table.stride(0), meta.splits, common,
            meta.shared_parts,
            HEADS_PER_KV=h // hk, BLOCK_SIZE=meta.block_size, QUERY_WIDTH=meta.query_width, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            SPLIT=split, MIN_KEYS=MIN_KEYS, WINDOW=meta.window or 0, SHARED=meta.shared_parts > 0, RUN=SHARED_RUN,
            SOFTCAP=softcap is not None, **shared, **flags,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **early_start(qkv.device),
        )  # fmt: skip
    if meta.num_prompt_tokens:
        qk = torch.empty((qkv.shape[0], h + hk, d), dtype=qkv.dtype, device=qkv.device)
        _store(qk, qkv, kv, slots, meta.num_decodes * meta.query_width, (norm_weight, eps), (cos, sin), {**shared, **flags})
        _attend_prompts(out, qk, qkv, kv, meta, scale, softcap, prompt_tile(d, h // hk, size, arch),
                        arch >= 90 and size == 2 and d in (64, 128, 256), shared)
    return out


def store_kv(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: AttentionMeta, *, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Writes the T new keys and values -> normalised and rotated queries [T, H, D]. See the reference."""
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    qk = torch.empty((qkv.shape[0], h + hk, d), dtype=qkv.dtype, device=qkv.device)
    constants = dict(NUM_HEADS=h, D=d, PADDED_D=triton.next_power_of_2(max(d, 16)), NORM=qk_norm is not None, ROPE=rope is not None)
    _store(qk, qkv, kv, slots, 0, qk_norm or (qkv, 0.0), rope or (qkv, qkv), constants)
    return qk[:, :h]


def _store(
    qk: Tensor, qkv: Tensor, kv: KVLayer, slots: Tensor, first: int, norm: tuple[Tensor, float], rope: tuple[Tensor, Tensor],
    constants: dict[str, Any],
) -> None:
    """Tokens from `first` on: queries and keys to qk: [T, H + KV, D], keys and values to the cache."""
    heads = max(1, 512 // constants["PADDED_D"])  # as many as one warp takes at once
    hk = kv.k.shape[2]
    launch(_position_and_store, (len(qkv) - first, triton.cdiv(qk.shape[1] + hk, heads)),
        qk, qkv, kv.k, kv.v, *norm, *rope, slots, first, qkv.stride(0), KV_HEADS=hk, HEADS=heads, **constants, num_warps=1,
    )  # fmt: skip


def _attend_prompts(
    out: Tensor, qk: Tensor, qkv: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, softcap: float | None, tile: Tile,
    descriptors: bool, shared: dict[str, Any],
) -> None:
    """Prompt chunks. With `descriptors` their own keys and values come through the tensor memory accelerator."""
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    chunks = meta.num_seqs - meta.num_decodes
    tiles = meta.num_prompt_tokens // tile.block_q + chunks + 1
    k, v = qk.view(-1, (h + hk) * d), qkv.view(-1, (h + 2 * hk) * d)
    strides = k.stride(0), v.stride(0)
    if descriptors:
        k, v = TensorDescriptor.from_tensor(k, [tile.block_n, d]), TensorDescriptor.from_tensor(v, [tile.block_n, d])
    launch(_prompt_attention, (tiles, hk),
        out, qk, k, v, kv.k, kv.v, meta.query_start, meta.seq_lens, meta.block_table, scale, softcap or 0.0, meta.num_decodes,
        meta.num_seqs, tiles, (h + hk) * d, *strides, h * d, (h + hk) * d, meta.block_table.stride(0),
        HEADS_PER_KV=h // hk, BLOCK_SIZE=meta.block_size, BLOCK_Q=tile.block_q, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        WINDOW=meta.window or 0, SOFTCAP=softcap is not None, DESCRIPTORS=descriptors, **shared,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
