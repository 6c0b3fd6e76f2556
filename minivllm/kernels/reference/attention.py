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

# How decodes are cut into padded batches: bytes of keys and values that one may gather, and how many padded keys cost as
# much as one batch more. On a CPU a gathered copy should still be in the second-level cache when it is read.
GATHER_BYTES = {"cpu": 5 << 18, "cuda": 64 << 20}
FREE_PADDING = {"cpu": 400, "cuda": 16384}
MAX_SCORES = 16 << 20  # elements of a [queries, keys] mask; longer chunks are computed in several pieces


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decodes of similar length, computed as one padded batch."""

    start: int  # first and last + 1 in the order of `AttentionMeta.order`
    end: int
    keys: int  # L: padded number of keys
    slots: Tensor | slice  # [n * L] int64; a slice: one sequence in consecutive slots, which is read in place
    mask: Tensor | None  # [n, 1, 1, L] additive; None: all have exactly L keys


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
    decodes: tuple[DecodeBucket, ...]
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
    order_host, spans = _bucket(lens, limit, FREE_PADDING[kind])
    order = torch.tensor(order_host, device=device) if order_host != sorted(order_host) else None
    decodes = tuple(
        _decode_bucket(table, order_host[a:b], a, [batch.seq_lens_host[i] for i in order_host[a:b]], block_size, window, dtype)
        for a, b in spans
    )
    chunks: list[PromptChunk] = []
    row = batch.num_decodes
    for i in range(batch.num_decodes, batch.num_seqs):
        query_len, seq_len = batch.query_lens_host[i], batch.seq_lens_host[i]
        assert 1 <= query_len <= seq_len
        chunks += _prompt_chunks(table[i], row, query_len, seq_len, block_size, window, dtype)
        row += query_len
    return AttentionMeta(num_heads, num_kv_heads, head_dim, row, batch.num_decodes, order, decodes, tuple(chunks))


def attention(q: Tensor, kv: KVLayer, meta: AttentionMeta, *, scale: float, softcap: float | None = None) -> Tensor:
    """q: [T, num_heads, head_dim] -> the same shape; keys and values come from the cache `kv`."""
    assert kv.k_scale is None and kv.v_scale is None, "this kernel reads unquantized caches only"
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    keys, values = kv.k.view(-1, hk, d), kv.v.view(-1, hk, d)  # [slots, kv_heads, head_dim]
    first = q[: meta.num_decodes] if meta.order is None else q.index_select(0, meta.order)
    parts = [_decode(first[b.start : b.end], keys, values, b, h // hk, scale, softcap) for b in meta.decodes]
    if meta.num_decodes == q.shape[0] and meta.order is None:  # the usual step: nothing to put together
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    out = torch.empty_like(q)
    if meta.num_rows < q.shape[0]:
        out[meta.num_rows :] = 0
    if meta.order is not None:
        out.index_copy_(0, meta.order, torch.cat(parts))
    elif parts:
        torch.cat(parts, out=out[: meta.num_decodes])
    for chunk in meta.chunks:
        t = chunk.end - chunk.start
        qs = q[chunk.start : chunk.end].view(t, hk, h // hk, d).permute(1, 2, 0, 3)  # [kv_heads, group, t, head_dim]
        ks = _take(keys, chunk.slots).permute(1, 0, 2)[:, None].expand(-1, h // hk, -1, -1)
        vs = _take(values, chunk.slots).permute(1, 0, 2)[:, None].expand(-1, h // hk, -1, -1)
        part = _attend(qs, ks, vs, chunk.mask, chunk.mask is None, scale, softcap)
        out[chunk.start : chunk.end].view(t, hk, h // hk, d).copy_(part.permute(2, 0, 1, 3))
    return out


def _decode(q: Tensor, keys: Tensor, values: Tensor, bucket: DecodeBucket, group: int, scale: float, softcap: float | None) -> Tensor:
    """One padded batch, q: [n, heads, head_dim] -> the same shape."""
    n, h, d = q.shape
    # The query heads of one KV head stand where a sequence's queries usually stand: its keys are read once for all of them.
    qs = q.view(n, h // group, group, d)
    ks = _take(keys, bucket.slots).view(n, bucket.keys, h // group, d).transpose(1, 2)  # [n, kv_heads, L, head_dim]
    vs = _take(values, bucket.slots).view(n, bucket.keys, h // group, d).transpose(1, 2)
    return _attend(qs, ks, vs, bucket.mask, False, scale, softcap).reshape(n, h, d)


def _take(cache: Tensor, slots: Tensor | slice) -> Tensor:
    """cache: [slots, kv_heads, head_dim] -> the rows `slots`, copied together unless they already lie together."""
    return cache[slots] if isinstance(slots, slice) else cache.index_select(0, slots)


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


def _bucket(lens: list[int], limit: int, free_padding: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Cut decodes into spans that are padded to a common length -> (order, [(start, end)] in that order).

    A span holds at most `limit` keys (or one sequence) and about `free_padding` keys of padding. Unless one span in the
    given order does, sequences are sorted by length (the packer's order already), so that neighbours need little padding.
    """
    if not lens:
        return [], []
    if len(lens) * max(lens) <= min(limit, sum(lens) + free_padding):
        return list(range(len(lens))), [(0, len(lens))]
    order = sorted(range(len(lens)), key=lambda i: -lens[i])
    spans: list[tuple[int, int]] = []
    start, longest, padding = 0, lens[order[0]], 0
    for i in range(1, len(order)):
        padding += longest - lens[order[i]]
        if padding > free_padding or longest * (i + 1 - start) > limit:
            spans.append((start, i))
            start, longest, padding = i, lens[order[i]], 0
    return order, [*spans, (start, len(order))]


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


def _decode_bucket(
    table: Tensor, rows: list[int], start: int, seq_lens: list[int], block_size: int, window: int | None, dtype: torch.dtype
) -> DecodeBucket:
    device = table.device
    ends = torch.tensor(seq_lens, device=device)[:, None]  # [n, 1]
    counts = ends if window is None else ends.clamp(max=window)
    keys = max(seq_lens) if window is None else min(max(seq_lens), window)
    offsets = torch.arange(keys, device=device)[None]  # [1, L]
    # Padding repeats the sequence's last key, which exists and is finite, and the mask removes it.
    positions = torch.minimum(ends - counts + offsets, ends - 1)
    slots = _slots(table.index_select(0, torch.tensor(rows, device=device)), positions, block_size)
    mask = None
    if min(seq_lens) < keys:
        mask = torch.zeros(len(rows), keys, dtype=dtype, device=device).masked_fill_(offsets >= counts, -math.inf)[:, None, None]
    return DecodeBucket(start, start + len(rows), keys, _in_place(slots[0]) if len(rows) == 1 else slots.flatten(), mask)


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
