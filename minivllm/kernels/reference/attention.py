"""Attention of any mix of prompt chunks and decodes over the paged KV cache, in plain PyTorch.

The cache is written before it is read, so a query at position p attends the cached keys at positions
(p - window, p] of its own sequence, its own key included.

    sequence      keys 0 .. seq_len-1             kind of work here
    decode        [x x x x x x x x x x q]         one query: many decodes are gathered, padded, and computed as one batch
    prompt        [q q q q q q]                   no earlier context: causal
    prompt chunk  [x x x x x x q q q q]           context and causal part: a mask, shifted by the context's length

Everything that depends only on lengths and block tables (what to gather, which sequences share a padded batch, masks, views
of the memory gathered into) is computed once per step and KV group by `prepare_attention`; all layers of the group share it.
Memory that a query may not see may hold anything, NaN included: it is overwritten with zeros once it is gathered. Padding
repeats a page that the sequence owns, so that no other sequence's keys get near it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
PAGE = 16  # decodes gather runs of so many slots: whole blocks, or an equal part of each
MAX_SCORES = 16 << 20  # elements of a [queries, keys] mask; longer chunks are computed in several pieces


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decodes of similar length, computed as one padded batch of L keys each."""

    keys: Tensor  # [n, KV, L, D]: where they will have been gathered
    values: Tensor
    mask: Tensor | None  # [n, 1, 1, L] additive; None: all have exactly L keys


@dataclass(frozen=True, slots=True)
class Gather:
    """Keys and values copied together for some buckets, in pages of consecutive slots.

        pages     | a0 a1 a2 | b0 b1 b2 | c0 c1 c0 | d0 | e0 |      c is a page shorter than its bucket and repeats one
        bucket              0, three pages each          1           rows of a last page after the sequence's end are cleared
    """

    pages: Tensor  # [P] int64
    keys: Tensor  # [P, page]: where they go
    values: Tensor
    hidden: Tensor | None  # [C] int64: rows gathered, but not for their sequence to see; None: there are none
    rows: Tensor  # [2, P * slots of a page, ...]: keys and values, in elements as wide as possible
    buckets: tuple[DecodeBucket, ...]


@dataclass(frozen=True, slots=True)
class InPlace:
    """One sequence in consecutive slots, which are read where they are."""

    slots: slice


class _View(NamedTuple):
    """What a decode sees of its sequence: rows [low, high) of the sequence's pages [first, first + pages)."""

    first: int
    pages: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive queries of one sequence."""

    start: int  # rows of q
    end: int
    slots: Tensor | slice  # [S] int64 of the keys that any of them sees; a slice: they lie in consecutive slots
    mask: Tensor | None  # [q, S] additive; None: causal, and S == q


class HeadCounts(Protocol):
    """What every device's meta tells."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """What `attention` needs beside the tensors of one layer; made by `prepare_attention`, once per step and KV group."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_rows: int  # rows of q that belong to a sequence; any after them are padding
    num_decodes: int
    order: Tensor | None  # [num_decodes] int64: decode rows sorted by length; None: as they are
    gathers: tuple[Gather | InPlace, ...]
    sizes: tuple[int, ...]  # decodes of each bucket, all gathers' buckets in a row
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
    device = table.device
    kind = "cpu" if device.type == "cpu" else "cuda"
    width, page = batch.query_width, math.gcd(block_size, PAGE)
    # The new keys are in the cache already, so a decode of several queries is as many decodes of the same blocks, each one key longer.
    n = batch.num_decode_tokens
    views = [_view(seq_len - i, window, page) for seq_len in batch.seq_lens_host[: batch.num_decodes] for i in reversed(range(width))]
    limit = GATHER_BYTES[kind] // (2 * num_kv_heads * head_dim * dtype.itemsize)
    order_host, cuts = _cut([view.pages * page for view in views], limit, FREE_PADDING[kind])
    views = [views[i] for i in order_host]
    order = torch.tensor(order_host, device=device) if order_host != sorted(order_host) else None
    gathers: list[Gather | InPlace] = []
    if n:
        tables = table[: batch.num_decodes].repeat_interleave(width, 0) if width > 1 else table[:n]
        pages, mask = _pages_and_mask(tables if order is None else tables.index_select(0, order), views, block_size, dtype)
        largest = max(sum((b - a) * max(view.pages for view in views[a:b]) for a, b in spans) for spans in cuts)
        memory = torch.empty((2, largest * page, num_kv_heads, head_dim), dtype=dtype, device=device)  # for all layers: still cached
        gathers = [_gather(pages, mask, views, spans, page, memory) for spans in cuts]
    sizes = tuple(b - a for spans in cuts for a, b in spans)
    chunks: list[PromptChunk] = []
    row = n
    for i in range(batch.num_decodes, batch.num_seqs):
        query_len, seq_len = batch.query_lens_host[i], batch.seq_lens_host[i]
        assert 1 <= query_len <= seq_len
        chunks += _prompt_chunks(table[i], row, query_len, seq_len, block_size, window, dtype)
        row += query_len
    return AttentionMeta(num_heads, num_kv_heads, head_dim, row, n, order, tuple(gathers), sizes, tuple(chunks))


def self_attention(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: AttentionMeta, *, scale: float, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None, softcap: float | None = None,
) -> Tensor:
    """All that happens between a layer's two projections: qkv: [T, (H + 2 KV) * D] -> the heads' outputs [T, H * D].

    The T new keys and values are written to `slots`: [T]. rope: (cos, signed sin) of `rope_angles`. qk_norm: weights
    [H + KV, D] and epsilon of the norm that some families give each head's queries and keys before they are rotated.
    """
    q = store_kv(qkv, kv, slots, meta, rope=rope, qk_norm=qk_norm)
    return attention(q, kv, meta, scale=scale, softcap=softcap).reshape(len(qkv), -1)


def store_kv(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: HeadCounts, *, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """The first half of `self_attention`: writes the new keys and values -> normalised and rotated queries [T, H, D]."""
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    heads = qkv.view(-1, h + 2 * hk, d)
    qk, v = heads[:, : h + hk], heads[:, h + hk :]  # [T, H + KV, D], [T, KV, D]: norm and rotation act per head, one call for q and k
    if qk_norm is not None:
        qk = rms_norm(qk, *qk_norm)
    if rope is not None:
        qk = apply_rope(qk, *rope)
    write_kv(qk[:, h:], v, kv, slots)
    return qk[:, :h]


def attention(q: Tensor, kv: KVLayer, meta: AttentionMeta, *, scale: float, softcap: float | None = None) -> Tensor:
    """q: [T, num_heads, head_dim] -> the same shape; keys and values come from the cache `kv`."""
    assert kv.k_scale is None and kv.v_scale is None, "this kernel reads unquantized caches only"
    h, hk, d, n = meta.num_heads, meta.num_kv_heads, meta.head_dim, meta.num_decodes
    if 0 < n == q.shape[0] and meta.order is None:
        return _decode(q, kv, meta, scale, softcap).reshape(n, h, d)
    out = torch.empty_like(q)
    if meta.num_rows < q.shape[0]:
        out[meta.num_rows :] = 0
    if n:
        grouped = out.view(-1, hk, h // hk, d)
        if meta.order is None:
            grouped[:n].copy_(_decode(q[:n], kv, meta, scale, softcap))
        else:
            grouped.index_copy_(0, meta.order, _decode(q.index_select(0, meta.order), kv, meta, scale, softcap))
    keys, values = kv.k.view(-1, hk, d), kv.v.view(-1, hk, d)  # [slots, kv_heads, head_dim]
    for chunk in meta.chunks:
        t = chunk.end - chunk.start
        qs = q[chunk.start : chunk.end].view(t, hk, h // hk, d).permute(1, 2, 0, 3)  # [kv_heads, group, t, head_dim]
        ks = _take(keys, chunk.slots).permute(1, 0, 2)[:, None].expand(-1, h // hk, -1, -1)
        vs = _take(values, chunk.slots).permute(1, 0, 2)[:, None].expand(-1, h // hk, -1, -1)
        part = _attend(qs, ks, vs, chunk.mask, chunk.mask is None, scale, softcap)
        out[chunk.start : chunk.end].view(t, hk, h // hk, d).copy_(part.permute(2, 0, 1, 3))
    return out


def _decode(q: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, softcap: float | None) -> Tensor:
    """q: [decodes, heads, head_dim] in the order of `AttentionMeta.order` -> [decodes, kv_heads, group, head_dim]."""
    hk, d = meta.num_kv_heads, meta.head_dim
    # The query heads of one KV head stand where a sequence's queries usually stand: its keys are read once for all of them.
    queries = q.view(len(q), hk, -1, d)
    parts, rest = [], iter(queries.split(meta.sizes))
    for gather in meta.gathers:
        if isinstance(gather, InPlace):
            ks, vs = (x.view(-1, hk, d)[None, gather.slots].transpose(1, 2) for x in (kv.k, kv.v))
            parts.append(_attend(next(rest), ks, vs, None, False, scale, softcap))
            continue
        for source, target in ((kv.k, gather.keys), (kv.v, gather.values)):
            torch.index_select(source.view(-1, target.shape[1]), 0, gather.pages, out=target)
        if gather.hidden is not None:
            gather.rows.index_fill_(1, gather.hidden, 0)
        parts += [_attend(next(rest), b.keys, b.values, b.mask, False, scale, softcap) for b in gather.buckets]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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


def _in_place(places: Tensor) -> bool:
    """Whether places: [S] of one sequence are consecutive. Asked on a CPU only: a GPU would have to be waited for."""
    return places.device.type == "cpu" and int(places[-1]) - int(places[0]) + 1 == len(places) and bool((places.diff() == 1).all())


def _view(seq_len: int, window: int | None, page: int) -> _View:
    begin = 0 if window is None else max(0, seq_len - window)
    first = begin // page
    return _View(first, -(-seq_len // page) - first, begin - first * page, seq_len - first * page)


def _pages_and_mask(tables: Tensor, views: list[_View], block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """tables: [n, M] -> the pages of each decode, [n, P] int64, and the additive mask of their rows, [n, 1, 1, P * page].

        pages of a row     | 7 | 3 | 4 | 7 | 7 |     P = 5: shorter ones repeat their first page, but see its keys once only
    """
    page, device = math.gcd(block_size, PAGE), tables.device
    if len(set(views)) == 1:
        index = torch.arange(views[0].first, views[0].first + views[0].pages, device=device)
        return _locate(tables, index.expand(len(views), -1), block_size // page), None
    first, count, low, high = torch.tensor([(v.first, v.pages, v.low, v.high) for v in views], device=device)[:, :, None].unbind(1)
    index = torch.arange(max(v.pages for v in views), device=device)
    pages = _locate(tables, torch.where(index < count, index, 0).add_(first), block_size // page)
    row = torch.arange(len(index) * page, device=device)
    hidden = row >= high if not any(v.low for v in views) else (row >= high) | (row < low)
    return pages, torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)[:, None, None]


def _locate(tables: Tensor, pages: Tensor, each: int) -> Tensor:
    """Pages [n, P], counted within each sequence, of blocks of `each` pages -> counted in the cache."""
    if each == 1:
        return tables.gather(1, pages).long()
    return tables.gather(1, pages // each).long() * each + pages % each


def _gather(
    pages: Tensor, mask: Tensor | None, views: list[_View], spans: list[tuple[int, int]], page: int, memory: Tensor
) -> Gather | InPlace:
    """What to copy for the decodes [start, end) of each span; memory: [2, rows, KV, D] to gather into, the rest as above."""
    hidden: list[int] = []
    parts, buckets, row = [], [], 0
    for start, end in spans:
        some = views[start:end]
        low, high, width = min(v.low for v in some), max(v.high for v in some), max(v.pages for v in some)
        parts.append(pages[start:end, :width].reshape(-1))
        if len(some) == 1 and len(spans) == 1 and _in_place(parts[0]):
            at = int(parts[0][0]) * page
            return InPlace(slice(at + low, at + high))
        ragged = False
        for i, v in enumerate(some):
            at = row + i * width * page
            if v.low > low or v.high < high:
                whole = v.low == 0 and v.high >= page  # the first page is, so repetitions of it hold nothing strange
                hidden += range(at + low, at + v.low)
                hidden += range(at + v.high, at + (min(v.pages * page, high) if whole else high))
                ragged = True
        rows = len(some) * width * page
        keys, values = memory[:, row : row + rows].unflatten(1, (len(some), -1))[:, :, low:high].transpose(2, 3)
        buckets.append(DecodeBucket(keys, values, mask[start:end, ..., low:high] if mask is not None and ragged else None))
        row += rows
    keys, values = memory[:, :row].view(2, row // page, -1)
    clear = torch.tensor(hidden, device=pages.device) if hidden else None
    return Gather(parts[0] if len(parts) == 1 else torch.cat(parts), keys, values, clear, _widest(memory.flatten(2)), tuple(buckets))


def _widest(x: Tensor) -> Tensor:
    """x seen in the largest elements its rows consist of: filling rows costs a moment per element."""
    size = x.shape[-1] * x.dtype.itemsize
    return next((x.view(t) for t in (torch.complex128, torch.int64, torch.int32) if size % t.itemsize == 0), x)


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
        where = slice(int(slots[0]), int(slots[-1]) + 1) if _in_place(slots) else slots
        chunks.append(PromptChunk(row + begin - first, row + end - first, where, mask))
    return chunks
