"""Lesson 12: its guesses are those of minivllm's n-gram proposer, and its rejection sampling chooses the same tokens."""
from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch

from minivllm.sampling import rejection
from minivllm.sampling.noise import Purpose
from minivllm.speculative.ngram import NgramIndex
from tests.lessons.loading import Mistake

MISTAKES = [
    Mistake(1, "return list(islice(cycle(tokens[end:end + count]), count))", "return tokens[end - length:end]", "what came AFTER"),
    Mistake(1, "for length in range(longest, shortest - 1, -1):", "for length in range(shortest, longest + 1):", "A longer match"),
    Mistake(1, "return list(islice(cycle(tokens[end:end + count]), count))", "return tokens[end:end + count]", "continue in the same way"),
    Mistake(2, "return chosen[:count + 1]", "return chosen[:count]", "at least one token"),
    Mistake(2, "return chosen[:count + 1]", "return chosen", "WRONG draft"),
    Mistake(3, "    if uniform * q[draft] < p[draft]:\n        return draft\n", "    return draft\n", "distribution of the DRAFTS"),
    Mistake(3, "rest = (p - q).clamp_min(0.0)", "rest = p", "not of p again"),
    Mistake(4, "    return 4\n", "    return 4.0 * rate\n", "whole number"),
]


def test_lesson_and_proposer_guess_the_same(lesson: ModuleType) -> None:
    dice, guesses = random.Random(0), 0
    for _ in range(40):
        tokens = [dice.randrange(3) for _ in range(dice.randint(3, 14))]  # short: the proposer looks at 8 earlier occurrences at most
        index = NgramIndex(2, 4)
        index.extend(tokens)
        assert list(index.propose(5)) == lesson.propose(tokens, 5)
        guesses += bool(index.propose(5))
    assert guesses > 10


def test_lesson_and_package_accept_and_recover_alike(lesson: ModuleType) -> None:
    rows, size = 200, 6
    dice = torch.Generator().manual_seed(0)
    p, q = (torch.randn(rows, size, generator=dice).mul(2).softmax(-1) for _ in range(2))
    streams, positions = torch.arange(rows) * 977, torch.arange(rows) % 50
    drafts = torch.multinomial(q, 1, generator=dice)[:, 0]
    theirs = rejection.choose_or_recover(p, q, drafts, streams, positions).tolist()
    uniforms = rejection._uniform(streams, positions).tolist()
    noise = rejection._gumbel_noise(streams, positions, Purpose.RECOVERY, size)
    ours = [lesson.choose_or_recover(p[i], q[i], int(drafts[i]), uniforms[i], noise[i]) for i in range(rows)]
    assert ours == theirs
    assert sum(a == b for a, b in zip(ours, drafts.tolist(), strict=True)) / rows == pytest.approx(
        sum(lesson.acceptance(p[i], q[i]) for i in range(rows)) / rows, abs=0.1)
