"""Lesson 3: its three ways and minivllm's attention kernels give the same numbers over the same blocks."""
from __future__ import annotations

from types import ModuleType

import pytest
import torch

from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference import attention as kernel
from tests.lessons.loading import Mistake

MISTAKES = [
    Mistake(1, "used = min(cache.block_size, length - index * cache.block_size)", "used = cache.block_size", "NaN, on a GPU old keys"),
    Mistake(1, "return cache.k[table[index], :used], cache.v[table[index], :used]", "return cache.k[index, :used], cache.v[index, :used]",
            "a block that is not in the table"),
    Mistake(1, "return cache.k[table[index], :used]", "return cache.k[table[index], :used].clone()", "a view"),
    Mistake(2, "total = part.total * shrink + weights.sum(-1)", "total = part.total + weights.sum(-1)", "OLD best"),
    Mistake(2, "total = part.total * shrink + weights.sum(-1)", "total = part.total * shrink + weights.sum()", "over the tokens only"),
    Mistake(2, "weighted = part.weighted * shrink[:, None] +", "weighted = part.weighted +", "multiply both old sums"),
    Mistake(2, "best = torch.maximum(part.best, scores.amax(-1))", "best = scores.amax(-1)", "largest score"),
    Mistake(3, "total = a.total * shrink_a + b.total * shrink_b", "total = a.total + b.total", "relative to its own best score"),
    Mistake(3, "    weighted = a.weighted * shrink_a[:, None] + b.weighted * shrink_b[:, None]",
            "    total = torch.ones_like(a.total)\n    weighted = (a.output() + b.output()) / 2", "differs from attention over all keys"),
    Mistake(4, "attend_blocks(q, cache, table, length).output() for", "attend_gathered(q, cache, table, len(table) * 16) for",
            "0 x NaN is NaN"),
]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_lesson_and_kernel_give_the_same_attention_over_the_same_blocks(lesson: ModuleType, size: int) -> None:
    heads, kv_heads, dim, lengths = 4, 2, 8, (13, 1, 8)
    dice = torch.Generator().manual_seed(size)
    cache, free = lesson.PagedCache(40, size, kv_heads, dim), torch.randperm(39, generator=dice).add(1).tolist()  # 0 is the null block
    tables = []
    for length in lengths:
        tables.append([free.pop() for _ in range(-(-length // size))])
        cache.write(tables[-1], *torch.randn(2, length, kv_heads, dim, generator=dice))
    q = torch.randn(len(lengths), heads, dim, generator=dice)
    most = max(map(len, tables))
    batch = InputBatch(
        tokens=torch.zeros(3, dtype=torch.int32), positions=torch.tensor(lengths) - 1, query_start=torch.arange(4, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32), slots=(torch.zeros(3, dtype=torch.int64),),
        block_tables=(torch.tensor([table + [0] * (most - len(table)) for table in tables], dtype=torch.int32),),
        logit_rows=torch.arange(3), num_decodes=3, query_lens_host=(1, 1, 1), seq_lens_host=lengths,
    )
    shape = {"block_size": size, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    meta = kernel.prepare_attention(batch, 0, **shape, window=None, dtype=q.dtype)
    theirs = kernel.attention(q, KVLayer(cache.k.nan_to_num(), cache.v.nan_to_num()), meta, scale=dim**-0.5)
    torch.testing.assert_close(lesson.attend_batch(q, cache, tables, list(lengths)), theirs, rtol=0, atol=1e-5)
    for i, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        torch.testing.assert_close(lesson.attend_gathered(q[i], cache, table, length), theirs[i], rtol=0, atol=1e-5)
        for workers in (2, 3):
            torch.testing.assert_close(lesson.attend_split(q[i], cache, table, length, workers), theirs[i], rtol=0, atol=1e-5)
