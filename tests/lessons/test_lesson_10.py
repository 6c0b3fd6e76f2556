"""Lesson 10: from seed to token, it chooses as minivllm's sampler does."""
from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from minivllm.kernels.reference import sampling
from minivllm.sampling.noise import row_keys, stream_key
from tests.lessons.loading import Mistake

KEEP = "    z = z.masked_fill(z < threshold_of(z, **filters), -math.inf)\n"
CHOOSE = "return int((z + gumbel(random_words(key, len(z)))).argmax())"
MISTAKES = [
    Mistake(1, "threshold = falling[0] + math.log(min_p)", "threshold = falling[0] * min_p", "PROBABILITIES"),
    Mistake(1, "needed = int((before < top_p * mass.sum()).sum().clamp_min(1))",
            "needed = int((mass.cumsum(0) <= top_p * mass.sum()).sum().clamp_min(1))", "crosses 70% is kept too"),
    Mistake(1, "* (falling >= threshold)", "", "that are LEFT"),
    Mistake(2, KEEP, "", "BEFORE the choice"),
    Mistake(2, CHOOSE, "return int(z.argmax())", "add noise"),
    Mistake(2, CHOOSE, "return int((z + random_words(key, len(z)) / 2**32).argmax())", "Only Gumbel noise"),
    Mistake(3, "return word & MASK32, word >> 32", "return (seed + child + position) & MASK32, 0", "share a key"),
    Mistake(3, "+ GOLDEN * child)", ")", "two children"),
    Mistake(4, "mass = (falling - falling[0]).exp()", "mass = falling.exp() * 0 + 1", "must choose the same token"),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), [
    (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 20, 1.0, 0.0), (1.5, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.1), (2.0, 30, 0.8, 0.02)])
def test_lesson_and_sampler_choose_the_same_tokens(lesson: ModuleType, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    rows = 12
    logits = 3 * torch.randn(rows, 200, generator=torch.Generator().manual_seed(top_k))
    streams = np.array([stream_key(seed, seed % 3) for seed in range(rows)], dtype=np.uint64)
    keys = torch.from_numpy(row_keys(streams, np.arange(rows) + 5).copy())
    ours = [lesson.sample(row, lesson.key_of(seed, seed % 3, seed + 5), temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            for seed, row in enumerate(logits)]
    settings = (torch.full((rows,), value) for value in (top_k, top_p, min_p))
    assert sampling.sample_plain(logits, torch.full((rows,), temperature), keys, *settings).tolist() == ours
