"""Attention of any mix of prompt chunks and decodes over the paged KV cache, in plain PyTorch.

New keys and values are written to the cache first. So a query at position p attends to the cached keys at positions (p - window, p]
of its sequence, so to its key too.

    sequence      keys 0 .. seq_len-1             how it is computed
    decode        [x x x x x x x x x x q]         one query: many decodes are gathered, padded, and computed as one batch
    prompt        [q q q q q q]                   no earlier context: causal
    prompt chunk  [x x x x x x q q q q]           context and causal part: a mask, shifted by the context's length

Some things depend only on lengths and block tables: which slots to gather, which decodes form a batch, masks, buffers. They are computed
once per step and KV group by `prepare_attention`, and all layers of the group share them.

Slots that no query may see can hold anything, NaN included. If such slots are gathered, they are overwritten with zeros. Padding repeats
a page of the same sequence, so that keys of other sequences never influence a result.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference.kv_cache import dequantize, write_kv
from minivllm.kernels.reference.norm import rms_norm
from minivllm.kernels.reference.rope import apply_rope


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decodes of similar length, computed as one batch of L keys each, padding included."""

    keys: Tensor  # [n, KV, L, D]: a view of the buffer that keys are gathered into
    values: Tensor
    mask: Tensor | None  # [n, 1, 1, L] additive; None: all have exactly L keys


@dataclass(frozen=True, slots=True)
class Gather:
    """Keys and values that are copied together for some buckets, in pages of consecutive slots.

        pages     | a0 a1 a2 | b0 b1 b2 | c0 c1 c0 | d0 | e0 |      c has one page less than its bucket and repeats a page
        bucket              0, three pages each          1           rows after a sequence's end are overwritten with zeros
    """

    pages: Tensor  # [P] int64
    keys: Tensor  # [P, elements of a page]: the buffer for keys
    values: Tensor
    hidden: Tensor | None  # [C] int64: gathered rows that their sequence may not see; None: there are none
    rows: Tensor  # [2, P * slots of a page, ...]: the same buffers, viewed in the widest dtype possible
    buckets: tuple[DecodeBucket, ...]


@dataclass(frozen=True, slots=True)
class InPlace:
    """A decode whose keys are in consecutive slots: they are read without a copy."""

    slots: slice


class _View(NamedTuple):
    """The keys that a decode sees: rows [low, high) of the sequence's pages [first, first + pages)."""

    first: int
    pages: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive queries of one sequence."""

    start: int  # of the rows of q
    end: int
    slots: Tensor | slice  # [S] int64 of the keys that any of the queries sees; a slice if the slots are consecutive
    mask: Tensor | None  # [q, S] additive; None: causal, and S == q


class HeadCounts(Protocol):
    """What `store_kv` reads of the meta of every backend."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ReferenceAttentionMeta:
    """What the layers of a KV group share in one step: made by `prepare_attention`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_rows: int  # rows of q that belong to a sequence; rows after them are padding
    num_decode_tokens: int  # rows of q that belong to decodes
    order: Tensor | None  # [num_decode_tokens] int64: these rows sorted by length; None: they are in order
    gathers: tuple[Gather | InPlace, ...]
    sizes: tuple[int, ...]  # rows of q in each bucket of all gathers
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
    cache_dtype: torch.dtype | None = None,
) -> ReferenceAttentionMeta:
    """Gather indices, grouping and masks for the layers of KV group `group`. Reads no device value on the host.

    cache_dtype: of the cached keys and values; None: `dtype`, the model's. (The reference needs only the latter.)"""
    table = batch.block_tables[group]  # [B, M]
    device = table.device
    kind = "cpu" if device.type == "cpu" else "cuda"
    width, page = batch.query_width, math.gcd(block_size, tuning.PAGE_SLOTS)
    # New keys are in the cache already. So each query counts as a separate decode, which sees one key more than the one before it.
    n = batch.num_decode_tokens
    views = [_view(seq_len - i, window, page) for seq_len in batch.seq_lens_host[: batch.num_decodes] for i in reversed(range(width))]
    limit = tuning.GATHER_BYTES[kind] // (2 * num_kv_heads * head_dim * dtype.itemsize)
    order_host, cuts = _cut([view.pages * page for view in views], limit, tuning.FREE_PADDING[kind])
    views = [views[i] for i in order_host]
    order = torch.tensor(order_host, device=device) if order_host != sorted(order_host) else None
    gathers: list[Gather | InPlace] = []
    if n:
        tables = table[: batch.num_decodes].repeat_interleave(width, 0) if width > 1 else table[:n]
        pages, mask = _pages_and_mask(tables if order is None else tables.index_select(0, order), views, block_size, dtype)
        largest = max(sum((b - a) * max(view.pages for view in views[a:b]) for a, b in spans) for spans in cuts)
        memory = torch.empty((2, largest * page, num_kv_heads, head_dim), dtype=dtype, device=device)  # all layers use it
        gathers = [_gather(pages, mask, views, spans, page, memory) for spans in cuts]
    sizes = tuple(b - a for spans in cuts for a, b in spans)
    chunks: list[PromptChunk] = []
    row = n
    for i in range(batch.num_decodes, batch.num_seqs):
        query_len, seq_len = batch.query_lens_host[i], batch.seq_lens_host[i]
        assert 1 <= query_len <= seq_len
        chunks += _prompt_chunks(table[i], row, query_len, seq_len, block_size, window, dtype)
        row += query_len
    return ReferenceAttentionMeta(num_heads, num_kv_heads, head_dim, row, n, order, tuple(gathers), sizes, tuple(chunks))


def self_attention(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: ReferenceAttentionMeta, *, scale: float, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None, softcap: float | None = None, alibi: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """From a layer's fused projection to its output projection: qkv: [T, (H + 2 KV) * D] -> the heads' outputs [T, H * D].

    Writes the T new keys and values to `slots`: [T]. rope: (cos, signed sin) of `rope_angles`. qk_norm: weights [H + KV, D] and epsilon
    of an RMSNorm of each head's queries and keys, before the rotation. alibi: [H] float32, each head's slope: a key d positions before the
    query has a score that is lower by slope * d (Press et al. 2021). sinks: [H] float32, one more score of each head's softmax, without a
    value: the weights of the keys sum to less than 1.
    """
    q = store_kv(qkv, kv, slots, meta, rope=rope, qk_norm=qk_norm)
    return attention(q, kv, meta, scale=scale, softcap=softcap, alibi=alibi, sinks=sinks).reshape(len(qkv), -1)


def store_kv(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: HeadCounts, *, rope: tuple[Tensor, Tensor] | None = None,
    qk_norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """The first half of `self_attention`: writes the new keys and values -> normalized and rotated queries [T, H, D]."""
    h, hk, d = meta.num_heads, meta.num_kv_heads, meta.head_dim
    heads = qkv.view(-1, h + 2 * hk, d)
    qk, v = heads[:, : h + hk], heads[:, h + hk :]  # [T, H + KV, D], [T, KV, D]: norm and rotation act per head, one call for q and k
    if qk_norm is not None:
        qk = rms_norm(qk, *qk_norm)
    if rope is not None:
        qk = apply_rope(qk, *rope)
    write_kv(qk[:, h:], v, kv, slots)
    return qk[:, :h]


def attention(
    q: Tensor, kv: KVLayer, meta: ReferenceAttentionMeta, *, scale: float, softcap: float | None = None, alibi: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q: [T, num_heads, head_dim] -> the same shape; keys and values come from the cache `kv`."""
    h, hk, d, n = meta.num_heads, meta.num_kv_heads, meta.head_dim, meta.num_decode_tokens
    slopes, sinks = (None if x is None else x.view(hk, -1, 1) for x in (alibi, sinks))
    if 0 < n == q.shape[0] and meta.order is None:
        return _decode(q, kv, meta, scale, softcap, slopes, sinks).reshape(n, h, d)
    out = torch.empty_like(q)
    if meta.num_rows < q.shape[0]:
        out[meta.num_rows :] = 0
    if n:
        grouped = out.view(-1, hk, h // hk, d)
        if meta.order is None:
            grouped[:n].copy_(_decode(q[:n], kv, meta, scale, softcap, slopes, sinks))
        else:
            grouped.index_copy_(0, meta.order, _decode(q.index_select(0, meta.order), kv, meta, scale, softcap, slopes, sinks))
    for chunk in meta.chunks:
        t = chunk.end - chunk.start
        qs = q[chunk.start : chunk.end].view(t, hk, h // hk, d).permute(1, 2, 0, 3)  # [kv_heads, group, t, head_dim]
        ks, vs = (_take(x, scale, chunk.slots, q.dtype).permute(1, 0, 2)[:, None].expand(-1, h // hk, -1, -1)
                  for x, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)))
        # All scores of a head exist at once, unless PyTorch's kernel computes them.
        step = hk if softcap is None and slopes is None and sinks is None else 1
        part = torch.cat([_attend(qs[i : i + step], ks[i : i + step], vs[i : i + step], chunk.mask, chunk.mask is None, scale, softcap,
                                  *(None if x is None else x[i : i + step, :, None] for x in (slopes, sinks))) for i in range(0, hk, step)])
        out[chunk.start : chunk.end].view(t, hk, h // hk, d).copy_(part.permute(2, 0, 1, 3))
    return out


def _decode(
    q: Tensor, kv: KVLayer, meta: ReferenceAttentionMeta, scale: float, softcap: float | None, slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """q: [decodes, heads, head_dim] in the order of `ReferenceAttentionMeta.order` -> [decodes, kv_heads, group, head_dim]."""
    hk, d = meta.num_kv_heads, meta.head_dim
    # The query heads of a KV head take the dimension of a sequence's queries, so that its keys are read once for all of them.
    queries = q.view(len(q), hk, -1, d)
    parts, rest = [], iter(queries.split(meta.sizes))
    for gather in meta.gathers:
        if isinstance(gather, InPlace):
            ks, vs = (_take(x, s, gather.slots, q.dtype)[None].transpose(1, 2) for x, s in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)))
            parts.append(_attend(next(rest), ks, vs, None, False, scale, softcap, slopes, sinks))
            continue
        for source, scales, target in ((kv.k, kv.k_scale, gather.keys), (kv.v, kv.v_scale, gather.values)):
            pages = source.view(-1, target.shape[1])
            if scales is None:
                torch.index_select(pages, 0, gather.pages, out=target)
            else:
                some = scales.view(len(pages), -1)[gather.pages]  # [P, scales of a page]
                target.view(*some.shape, d).copy_(dequantize(pages[gather.pages].view(*some.shape, d), some, target.dtype))
        if gather.hidden is not None:
            gather.rows.index_fill_(1, gather.hidden, 0)
        parts += [_attend(next(rest), b.keys, b.values, b.mask, False, scale, softcap, slopes, sinks) for b in gather.buckets]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _take(cache: Tensor, scales: Tensor | None, slots: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """Keys or values of `slots`: [slots, kv_heads, head_dim], dequantized to `dtype` if they have scales."""
    def take(x: Tensor) -> Tensor:  # a view if they are consecutive, else a copy
        return x[slots] if isinstance(slots, slice) else x.index_select(0, slots)

    rows = take(cache.view(-1, *cache.shape[2:]))
    return rows if scales is None else dequantize(rows, take(scales.view(-1, scales.shape[-1])), dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float | None,
            slopes: Tensor | None, sinks: Tensor | None) -> Tensor:
    """softmax(cap(q k^T * scale) + slopes * position of the key + mask) v over [batch, heads, queries or keys, head_dim].

    slopes: of ALiBi, broadcast over the scores. Positions may be counted from any key: softmax does not depend on it. sinks: as
    slopes, one more score of each softmax."""
    if softcap is None and slopes is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = (q @ k.transpose(-1, -2)).float().mul_(scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        scores += slopes * torch.arange(1 - k.shape[-2], 1, device=k.device)
    if mask is not None:
        scores = scores + mask
    elif causal:
        t = q.shape[-2]
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    if sinks is not None:
        return torch.softmax(torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1), -1)[..., :-1].to(v.dtype) @ v
    return torch.softmax(scores, -1).to(v.dtype) @ v


def _cut(lens: list[int], limit: int, free_padding: int) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Divide decodes into spans that are padded to a common length -> (order, per gather its spans [start, end) in that order).

    A span holds at most `free_padding` keys of padding, and a gather at most `limit` keys or one sequence. If one span can hold all
    decodes, they keep their order. Otherwise they are sorted by length (as the packer does already), so that neighbors need little padding.
    """
    if not lens:
        return [], []
    if len(lens) * max(lens) <= min(limit, sum(lens) + free_padding):
        return list(range(len(lens))), [[(0, len(lens))]]
    order = sorted(range(len(lens)), key=lambda i: -lens[i])
    gathers: list[list[tuple[int, int]]] = [[]]
    start, longest, padding, gathered = 0, lens[order[0]], 0, 0  # gathered: keys in the gather's finished spans
    for i in range(1, len(order)):
        padding += longest - lens[order[i]]
        full = gathered + longest * (i + 1 - start) > limit
        if full or padding > free_padding:
            gathers[-1].append((start, i))
            gathered += longest * (i - start)
            start, longest, padding = i, lens[order[i]], 0
            if full:
                gathers.append([])
                gathered = 0
    gathers[-1].append((start, len(order)))
    return order, gathers


def _slots(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The slots of the tokens at positions: [n, L] of sequences with block tables table: [n, M] -> [n, L] int64."""
    blocks = table.gather(1, positions // block_size).long()
    return blocks * block_size + positions % block_size


def _consecutive(index: Tensor) -> bool:
    """Whether index: [S] counts up by one. Always false on a GPU, because reading the values would wait for it."""
    return index.device.type == "cpu" and int(index[-1]) - int(index[0]) + 1 == len(index) and bool((index.diff() == 1).all())


def _view(seq_len: int, window: int | None, page: int) -> _View:
    begin = 0 if window is None else max(0, seq_len - window)
    first = begin // page
    return _View(first, -(-seq_len // page) - first, begin - first * page, seq_len - first * page)


def _pages_and_mask(tables: Tensor, views: list[_View], block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """tables: [n, M] -> the pages of each decode, [n, P] int64, and the additive mask of their rows, [n, 1, 1, P * page].

        pages of a decode  | 7 | 3 | 4 | 7 | 7 |     P = 5: a shorter decode repeats its first page, and the mask hides the repetitions
    """
    page, device = math.gcd(block_size, tuning.PAGE_SLOTS), tables.device
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
    """Page numbers within each sequence [n, P] -> page numbers within the cache; `each`: pages of a block."""
    if each == 1:
        return tables.gather(1, pages).long()
    return tables.gather(1, pages // each).long() * each + pages % each


def _gather(
    pages: Tensor, mask: Tensor | None, views: list[_View], spans: list[tuple[int, int]], page: int, memory: Tensor
) -> Gather | InPlace:
    """The copies for the decodes [start, end) of each span; pages, mask: of `_pages_and_mask`; memory: [2, rows, KV, D] to gather into."""
    hidden: list[int] = []
    parts, buckets, row = [], [], 0
    for start, end in spans:
        some = views[start:end]
        low, high, width = min(v.low for v in some), max(v.high for v in some), max(v.pages for v in some)
        parts.append(pages[start:end, :width].reshape(-1))
        if len(some) == 1 and len(spans) == 1 and _consecutive(parts[0]):
            at = int(parts[0][0]) * page
            return InPlace(slice(at + low, at + high))
        ragged = False
        for i, v in enumerate(some):
            at = row + i * width * page
            if v.low > low or v.high < high:
                whole = v.low == 0 and v.high >= page  # of the first page all rows are visible, so repetitions of it need no zeros
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
    """A view of x in the widest dtype that divides a row, since the cost of filling rows grows with the number of elements."""
    size = x.shape[-1] * x.dtype.itemsize
    return next((x.view(t) for t in (torch.complex128, torch.int64, torch.int32) if size % t.itemsize == 0), x)


def _prompt_chunks(
    table: Tensor, row: int, query_len: int, seq_len: int, block_size: int, window: int | None, dtype: torch.dtype
) -> list[PromptChunk]:
    """One sequence's queries, in pieces whose masks have at most MAX_SCORES elements."""
    device = table.device
    first = seq_len - query_len  # position of the first query
    plain = first == 0 and (window is None or window >= seq_len)
    piece = query_len if plain else max(1, tuning.MAX_SCORES // seq_len)
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
        where = slice(int(slots[0]), int(slots[-1]) + 1) if _consecutive(slots) else slots
        chunks.append(PromptChunk(row + begin - first, row + end - first, where, mask))
    return chunks
