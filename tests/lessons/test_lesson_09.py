"""Lesson 9: its kernel and minivllm's give the same attention, for every way to divide the work."""
from __future__ import annotations

from types import ModuleType

import pytest
import torch

from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference import attention as kernel
from tests.lessons.loading import Mistake

pytest.importorskip("triton", reason="Triton is not installed")

BLOCK = "block = tl.load(tables + sequence * max_blocks + positions // BLOCK, mask=live, other=0)"
HIDE = "        scores = tl.where((positions < length)[None, :], scores, -math.inf)\n"
MISTAKES = [
    Mistake(1, BLOCK, "block = sequence * max_blocks + positions // BLOCK", "the FIRST blocks of the memory"),
    Mistake(1, "(slot * kv_heads + kv_head)[:, None]", "(slot * kv_heads)[:, None]", "key head 0"),
    Mistake(1, "values = tl.load(v + address, mask=live[:, None], other=0.0)", "values = tl.load(v + address)", "0 x NaN is NaN"),
    Mistake(2, HIDE, "", "exp(0) is 1"),
    Mistake(2, "total = total * shrink + tl.sum(weights, 1)", "total = total + tl.sum(weights, 1)", "exp(old best - new best)"),
    Mistake(3, "weights = tl.exp(logs - tl.max(logs, 0))", "weights = tl.exp(logs)", "overflow"),
    Mistake(3, "result = tl.sum(means * weights[:, None], 0) / tl.sum(weights, 0)", "result = tl.sum(means, 0) / PARTS", "plain mean"),
    Mistake(4, "        parts *= 2\n", "        parts *= 3\n", "power of two"),
]


def test_lesson_and_kernel_give_the_same_attention(lesson: ModuleType) -> None:
    heads, kv_heads, dim, lengths = 4, 2, 16, (40, 7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, tables, _ = lesson.example(2, heads, kv_heads, dim, 48, device, torch.float32)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    batch = InputBatch(
        tokens=torch.zeros(2, dtype=torch.int32), positions=torch.tensor(lengths) - 1, query_start=torch.arange(3, dtype=torch.int32),
        seq_lens=lens.cpu(), slots=(torch.zeros(2, dtype=torch.int64),), block_tables=(tables.cpu(),), logit_rows=torch.arange(2),
        num_decodes=2, query_lens_host=(1, 1), seq_lens_host=lengths,
    )
    meta = kernel.prepare_attention(batch, 0, block_size=16, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, window=None,
                                    dtype=q.dtype)
    theirs = kernel.attention(q.cpu(), KVLayer(k.cpu(), v.cpu()), meta, scale=dim**-0.5)
    for launch in (lesson.Launch(1, 16, 1), lesson.Launch(2, 32, 1), lesson.Launch(2, 16, 4)):
        ours = lesson.paged_attention(q, k, v, tables, lens, launch).cpu()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
