"""Random paged batches for kernel tests, and a dense computation of attention: one query at a time, in float64."""
from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference.kv_cache import dequantize, quantize


@dataclass(frozen=True)
class Case:
    """A batch over scattered blocks, and the dense keys and values that are in them."""

    batch: InputBatch
    kv: KVLayer
    q: Tensor  # [T, heads, head_dim]
    keys: list[Tensor]  # per sequence [seq_len, kv_heads, head_dim]
    values: list[Tensor]
    block_size: int


def make_case(
    shape: Sequence[tuple[int, int]],  # (query_len, seq_len) per sequence
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    window: int | None = None,
    poison: bool = True,
    shared_keys: int = 0,
    query_width: int = 1,
    seed: int = 0,
) -> Case:
    """Sequences in scattered blocks. Every slot that no query may see holds NaN: other blocks, ends of last blocks, and keys before the
    window. Block-table entries of blocks that are entirely before the window are the null block. The blocks of the first `shared_keys`
    keys are the same in all sequences. Sequences with `query_width` queries are decodes."""
    rng = random.Random(seed)
    gen = torch.Generator().manual_seed(seed)
    shape = sorted(shape, key=lambda s: s[0] != query_width)  # decodes first, as the packer does
    counts = [-(-s // block_size) for _, s in shape]
    num_blocks = 1 + sum(counts) + 3
    ids = rng.sample(range(1, num_blocks), num_blocks - 1)
    width = max(counts) + rng.randint(0, 2)
    table = torch.zeros(len(shape), width, dtype=torch.int32)
    fill = math.nan if poison else 0.0
    kv = KVLayer(*(torch.full((num_blocks, block_size, kv_heads, head_dim), fill, dtype=dtype) for _ in range(2)))
    keys, values, slots = [], [], []
    for i, (query_len, seq_len) in enumerate(shape):
        k, v = (torch.randn(seq_len, kv_heads, head_dim, generator=gen).to(dtype) for _ in range(2))
        if i and shared_keys:
            k[:shared_keys], v[:shared_keys] = keys[0][:shared_keys], values[0][:shared_keys]
        seen_from = 0 if window is None else max(0, seq_len - query_len - window + 1)
        for logical in range(counts[i]):
            block = int(table[0, logical]) if i and logical < shared_keys // block_size else ids.pop()
            if (logical + 1) * block_size > seen_from:
                table[i, logical] = block
            for offset in range(block_size):
                p = logical * block_size + offset
                if seen_from <= p < seq_len:
                    kv.k[block, offset], kv.v[block, offset] = k[p], v[p]
                if seq_len - query_len <= p < seq_len:
                    slots.append(block * block_size + offset)
        keys.append(k)
        values.append(v)
    query_lens = [a for a, _ in shape]
    total = sum(query_lens)
    positions = torch.cat([torch.arange(s - a, s) for a, s in shape])
    batch = InputBatch(
        tokens=torch.zeros(total, dtype=torch.int32, device=device),
        positions=positions.to(device),
        query_start=torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
        seq_lens=torch.tensor([s for _, s in shape], dtype=torch.int32, device=device),
        slots=(torch.tensor(slots, device=device),),
        block_tables=(table.to(device),),
        logit_rows=torch.zeros(0, dtype=torch.int64, device=device),
        num_decodes=sum(a == query_width for a in query_lens),
        query_lens_host=tuple(query_lens),
        seq_lens_host=tuple(s for _, s in shape),
        shared=torch.tensor([shared_keys], dtype=torch.int32, device=device) if shared_keys else None,
        query_width=query_width,
    )
    q = torch.randn(total, heads, head_dim, generator=gen).to(dtype)
    return Case(batch, KVLayer(kv.k.to(device), kv.v.to(device)), q.to(device), keys, values, block_size)


def naive_attention(case: Case, *, scale: float, window: int | None = None, softcap: float | None = None,
                    alibi: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """The definition, for each query and head, with the keys at positions (p - window, p] -> [T, heads, head_dim] float64."""
    out = []
    row = 0
    group = case.q.shape[1] // case.keys[0].shape[1]
    for i, (query_len, seq_len) in enumerate(zip(case.batch.query_lens_host, case.batch.seq_lens_host, strict=True)):
        for p in range(seq_len - query_len, seq_len):
            low = 0 if window is None else max(0, p - window + 1)
            heads = []
            for h in range(case.q.shape[1]):
                k = case.keys[i][low : p + 1, h // group].double()
                v = case.values[i][low : p + 1, h // group].double()
                scores = k @ case.q[row, h].double().cpu() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi is not None:
                    scores = scores - alibi[h].item() * torch.arange(p - low, -1, -1)
                weights = torch.exp(scores - scores.max())
                sink = 0.0 if sinks is None else torch.exp(sinks[h].double().cpu() - scores.max())
                heads.append(weights @ v / (weights.sum() + sink))
            out.append(torch.stack(heads))
            row += 1
    return torch.stack(out)


def fused(case: Case) -> Tensor:
    """The fused projection of a case's new tokens: [T, (H + 2 KV) * D], on the device and in the type of the queries."""
    new = [torch.cat([t[i][-n:] for i, n in enumerate(case.batch.query_lens_host)]).to(case.q) for t in (case.keys, case.values)]
    return torch.cat((case.q, *new), 1).flatten(1)


def forget_new(case: Case) -> KVLayer:
    """A copy of the case's cache, with NaN in the slots of the new tokens. (The largest number in int8, whose scale is NaN.)"""
    kv = KVLayer(*(None if t is None else t.clone() for t in (case.kv.k, case.kv.v, case.kv.scales)))
    for t in (kv.k, kv.v, kv.scales):
        if t is not None:
            bits = t.view(torch.int8) if t.itemsize == 1 else t
            bits.view(-1, *t.shape[2:])[case.batch.slots[0]] = 127 if t.itemsize == 1 else torch.nan
    return kv


def quantized(case: Case, dtype: torch.dtype) -> Case:
    """The same case with a quantized cache; `keys` and `values` are what is stored there."""
    (k, k_scale), (v, v_scale) = (quantize(t, dtype) for t in (case.kv.k, case.kv.v))
    stored = ([dequantize(*quantize(t, dtype), torch.float32) for t in some] for some in (case.keys, case.values))
    return Case(case.batch, KVLayer(k, v, torch.stack((k_scale, v_scale), -1)), case.q, *stored, case.block_size)
