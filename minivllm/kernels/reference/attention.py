"""Attention of any mix of prompt chunks and decodes over the paged KV cache, in plain PyTorch.

The cache is written before it is read, so a query at position p attends the cached keys at positions
(p - window, p] of its own sequence, its own key included.

    sequence      keys 0 .. seq_len-1             kind of work here
    decode        [x x x x x x x x x x q]         one query: many decodes are gathered, padded, and computed as one batch
    prompt        [q q q q q q]                   no earlier context: causal
    prompt chunk  [x x x x x x q q q q]           context and causal part: a mask, shifted by the context's length

Everything that depends only on lengths and block tables (which slots to gather, which sequences share a padded batch,
masks) is computed once per step and KV group by `prepare_attention`; all layers of the group share the result.
Padding repeats a slot that the sequence owns, never an unused one: unused memory may hold anything, NaN included.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference.kv_cache import write_kv
from minivllm.kernels.reference.norm import rms_norm
from minivllm.kernels.reference.rope import apply_rope

# How decodes are cut into batches. GATHER_BYTES: keys and values that are copied together at once, which bounds memory and
# should fit the caches. FREE_PADDING: padded keys that cost about as much as one batch more.
GATHER_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
FREE_PADDING = {"cpu": 256, "cuda": 16384}
MAX_SCORES = 16 << 20  # elements of a [queries, keys] mask; longer chunks are computed in several pieces


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decodes of similar length, computed as one padded batch."""

    start: int  # first and last + 1 in the order of `AttentionMeta.order`
    end: int
    offset: int  # where its keys begin among those gathered
    keys: int  # L: padded number of keys
    mask: Tensor | None  # [n, 1, 1, L] additive; None: all have exactly L keys


@dataclass(frozen=True, slots=True)
class Gather:
    """Keys and values copied together for some buckets.

        slots   | a a a a a a | b b b b b b | c c c | d d - | e e - |       -: padding, repeats the slot before
        bucket         0, L = 6                  1, L = 3
    """

    slots: Tensor | slice  # [sum of n * L] int64; a slice: one sequence in consecutive slots, which is read in place
    buckets: tuple[DecodeBucket, ...]


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive queries of one sequence."""

    start: int  # rows of q
    end: int
    slots: Tensor | slice  # [S] int64 of the keys that any of them sees; a slice: they lie in consecutive slots
    mask: Tensor | None  # [q, S] additive; None: causal, and S == q


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """What `attention` needs beside the tensors of one layer; made by `prepare_attention`, once per step and KV group."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_rows: int  # rows of q that belong to a sequence; any after them are padding
    num_decodes: int
    order: Tensor | None  # [num_decodes] int64: decode rows sorted by length; None: as they are
    gathers: tuple[Gather, ...]
    workspace: Tensor  # [2, keys of the largest gather, kv_heads, head_dim]: all layers gather into the same, still cached memory
    chunks: tuple[PromptChunk, ...]


def prepare_attention(
    batch: InputBatch,
    group: int,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> AttentionMeta:
    """Gather indices, grouping and masks for the layers of KV group `group`. Reads no device value on the host."""
    table = batch.block_tables[group]  # [B, M]
    lens = [n if window is None else min(n, window) for n in batch.seq_lens_host[: batch.num_decodes]]
    device = table.device
    kind = "cpu" if device.type == "cpu" else "cuda"
    limit = GATHER_BYTES[kind] // (2 * num_kv_heads * head_dim * dtype.itemsize)
    order_host, cuts = _cut(lens, limit, FREE_PADDING[kind])
    order = torch.tensor(order_host, device=device) if order_host != sorted(order_host) else None
    seq_lens = [batch.seq_lens_host[i] for i in order_host]
    tables = table if order is None else table.index_select(0, order)
    gathers = tuple(_gather(tables, seq_lens, spans, block_size, window, dtype) for spans in cuts)
    largest = max((len(g.slots) for g in gathers if isinstance(g.slots, Tensor)), default=0)
    workspace = torch.empty((2, largest, num_kv_heads, head_dim), dtype=dtype, device=device)
    chunks: list[PromptChunk] = []
    row = batch.num_decodes
    for i in range(batch.num_decodes, batch.num_seqs):
        query_len, seq_len = batch.query_lens_host[i], batch.seq_lens_host[i]
        assert 1 <= query_len <= seq_len
        chunks += _prompt_chunks(table[i], row, query_len, seq_len, block_size, window, dtype)
        row += query_len
    return AttentionMeta(num_heads, num_kv_heads, head_dim, row, batch.num_decodes, order, gathers, workspace, tuple(chunks))


def self_attention(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: AttentionMeta, *, scale: float, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None, softcap: float | None = None,
) -> Tensor:
    """All that happens between a layer's two projections: qkv: [T, (H + 2 KV) * D] -> the heads' outputs [T, H * D].

    The T new keys and values are written to `slots`: [T]. rope: (cos, signed sin) of `rope_angles`. qk_norm: weights
    [H + KV, D] and epsilon of the norm that some families give each head's queries and keys before they are rotated.
    """
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    heads = qkv.view(-1, h + 2 * hk, d)
    qk, v = heads[:, : h + hk], heads[:, h + hk :]  # [T, H + KV, D], [T, KV, D]: norm and rotation act per head, one call for q and k
    if qk_norm is not None:
        qk = rms_norm(qk, *qk_norm)
    if rope is not None:
        qk = apply_rope(qk, *rope)
    write_kv(qk[:, h:], v, kv, slots)
    return attention(qk[:, :h], kv, meta, scale=scale, softcap=softcap).view(-1, h * d)


def attention(q: Tensor, kv: KVLayer, meta: AttentionMeta, *, scale: float, softcap: float | None = None) -> Tensor:
    """q: [T, num_heads, head_dim] -> the same shape; keys and values come from the cache `kv`."""
    assert kv.k_scale is None and kv.v_scale is None, "this kernel reads unquantized caches only"
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    keys, values = kv.k.view(-1, hk, d), kv.v.view(-1, hk, d)  # [slots, kv_heads, head_dim]
    out = torch.empty_like(q)
    if meta.num_rows < q.shape[0]:
        out[meta.num_rows :] = 0
    if meta.gathers:
        first = q[: meta.num_decodes] if meta.order is None else q.index_select(0, meta.order)
        result = out[: meta.num_decodes] if meta.order is None else torch.empty_like(first)
        for gather in meta.gathers:
            ks, vs = _take(keys, gather.slots, meta.workspace[0]), _take(values, gather.slots, meta.workspace[1])
            for bucket in gather.buckets:
                _decode(first, ks, vs, result, bucket, scale, softcap)
        if meta.order is not None:
            out.index_copy_(0, meta.order, result)
    for chunk in meta.chunks:
        t = chunk.end - chunk.start
        qs = q[chunk.start : chunk.end].view(t, hk, h // hk, d).permute(1, 2, 0, 3)  # [kv_heads, group, t, head_dim]
        ks = _take(keys, chunk.slots).permute(1, 0, 2)[:, None].expand(-1, h // hk, -1, -1)
        vs = _take(values, chunk.slots).permute(1, 0, 2)[:, None].expand(-1, h // hk, -1, -1)
        part = _attend(qs, ks, vs, chunk.mask, chunk.mask is None, scale, softcap)
        out[chunk.start : chunk.end].view(t, hk, h // hk, d).copy_(part.permute(2, 0, 1, 3))
    return out


def _decode(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, bucket: DecodeBucket, scale: float, softcap: float | None) -> None:
    """One padded batch. q, out: [decodes, heads, head_dim], of which the bucket's rows; keys, values: as gathered."""
    rows, (_, hk, d), n = slice(bucket.start, bucket.end), keys.shape, bucket.end - bucket.start
    part = slice(bucket.offset, bucket.offset + n * bucket.keys)
    # The query heads of one KV head stand where a sequence's queries usually stand: its keys are read once for all of them.
    qs = q[rows].view(n, hk, -1, d)  # [n, kv_heads, group, head_dim]
    ks = keys[part].view(n, bucket.keys, hk, d).transpose(1, 2)  # [n, kv_heads, L, head_dim]
    vs = values[part].view(n, bucket.keys, hk, d).transpose(1, 2)
    out[rows].view(n, hk, -1, d).copy_(_attend(qs, ks, vs, bucket.mask, False, scale, softcap))


def _take(cache: Tensor, slots: Tensor | slice, workspace: Tensor | None = None) -> Tensor:
    """cache: [slots, kv_heads, head_dim] -> the rows `slots`, copied together unless they already lie together."""
    if isinstance(slots, slice):
        return cache[slots]
    if workspace is None:
        return cache.index_select(0, slots)
    return torch.index_select(cache, 0, slots, out=workspace[: len(slots)])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float | None) -> Tensor:
    """softmax(cap(q k^T * scale) + mask) v over [batch, heads, queries or keys, head_dim]."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    elif causal:
        t = q.shape[-2]
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return torch.softmax(scores, -1).to(v.dtype) @ v


def _cut(lens: list[int], limit: int, free_padding: int) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Cut decodes into spans that are padded to a common length -> (order, spans [start, end) in that order, by gather).

    A span holds at most `free_padding` keys of padding and a gather at most `limit` keys (or one sequence). Unless one span
    in the given order does, sequences are sorted by length (the packer's order already), so that neighbours need little padding.
    """
    if not lens:
        return [], []
    if len(lens) * max(lens) <= min(limit, sum(lens) + free_padding):
        return list(range(len(lens))), [[(0, len(lens))]]
    order = sorted(range(len(lens)), key=lambda i: -lens[i])
    gathers: list[list[tuple[int, int]]] = [[]]
    start, longest, padding, held = 0, lens[order[0]], 0, 0  # held: keys in the gather's finished spans
    for i in range(1, len(order)):
        padding += longest - lens[order[i]]
        full = held + longest * (i + 1 - start) > limit
        if full or padding > free_padding:
            gathers[-1].append((start, i))
            held += longest * (i - start)
            start, longest, padding = i, lens[order[i]], 0
            if full:
                gathers.append([])
                held = 0
    gathers[-1].append((start, len(order)))
    return order, gathers


def _slots(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Where the tokens at positions: [n, L] of sequences with block tables table: [n, M] lie -> [n, L] int64."""
    blocks = table.gather(1, positions // block_size).long()
    return blocks * block_size + positions % block_size


def _in_place(slots: Tensor) -> Tensor | slice:
    """slots: [S] of one sequence, as a slice if they are consecutive. Asked on a CPU only: a GPU would have to be waited for."""
    if slots.device.type == "cpu":
        first, last = int(slots[0]), int(slots[-1])
        if last - first + 1 == len(slots) and bool((slots.diff() == 1).all()):
            return slice(first, last + 1)
    return slots


def _gather(
    tables: Tensor, seq_lens: list[int], spans: list[tuple[int, int]], block_size: int, window: int | None, dtype: torch.dtype
) -> Gather:
    """Slots and masks of the decodes [start, end) of each span; tables: [decodes, M], seq_lens: [decodes]."""
    device = tables.device
    slots, buckets, offset = [], [], 0
    for start, end in spans:
        ends = torch.tensor(seq_lens[start:end], device=device)[:, None]  # [n, 1]
        counts = ends if window is None else ends.clamp(max=window)
        keys = max(seq_lens[start:end]) if window is None else min(max(seq_lens[start:end]), window)
        index = torch.arange(keys, device=device)[None]  # [1, L]
        # Padding repeats the sequence's last key, which exists and is finite, and the mask removes it.
        positions = torch.minimum(ends - counts + index, ends - 1)
        slots.append(_slots(tables[start:end], positions, block_size).flatten())
        mask = None
        if min(seq_lens[start:end]) < keys:
            mask = torch.zeros(end - start, keys, dtype=dtype, device=device).masked_fill_(index >= counts, -math.inf)[:, None, None]
        buckets.append(DecodeBucket(start, end, offset, keys, mask))
        offset += (end - start) * keys
    together = slots[0] if len(slots) == 1 else torch.cat(slots)
    return Gather(_in_place(together) if spans[-1][1] - spans[0][0] == 1 else together, tuple(buckets))


def _prompt_chunks(
    table: Tensor, row: int, query_len: int, seq_len: int, block_size: int, window: int | None, dtype: torch.dtype
) -> list[PromptChunk]:
    """One sequence's queries, in pieces small enough for their mask."""
    device = table.device
    first = seq_len - query_len  # position of the first query
    plain = first == 0 and (window is None or window >= seq_len)
    piece = query_len if plain else max(1, MAX_SCORES // seq_len)
    chunks = []
    for begin in range(first, seq_len, piece):
        end = min(begin + piece, seq_len)
        low = 0 if window is None else max(0, begin - window + 1)
        positions = torch.arange(low, end, device=device)[None]  # [1, S]
        slots = _slots(table[None], positions, block_size)[0]
        mask = None
        if not plain:
            queries = torch.arange(begin, end, device=device)[:, None]
            hidden = positions > queries
            if window is not None:
                hidden |= positions <= queries - window
            mask = torch.zeros(end - begin, end - low, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
        chunks.append(PromptChunk(row + begin - first, row + end - first, _in_place(slots), mask))
    return chunks
