"""Rejection sampling gives samples of the target's distribution: chi-square tests on a small vocabulary, with many real rejections."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from minivllm.kernels.reference.sampling import probabilities
from minivllm.sampling import rejection
from minivllm.sampling.noise import Purpose, device_keys, row_keys, stream_key
from minivllm.sampling.rejection import DraftProbabilities, choose_or_recover, sample_drafts

VOCAB, SAMPLES = 12, 20_000
CRITICAL = 31.26  # chi-square with 11 degrees of freedom exceeds it with probability 0.001


def setting() -> tuple[Tensor, Tensor, Tensor]:
    """(target's logits [V], draft's logits [V], one stream per sample)"""
    generator = torch.Generator().manual_seed(3)
    target, draft = (1.5 * torch.randn(VOCAB, generator=generator) for _ in range(2))
    streams = torch.randint(-(2**63), 2**63 - 1, (SAMPLES,), generator=generator)
    return target, draft, streams


def chi_square(tokens: Tensor, p: Tensor) -> float:
    expected = p.double() * len(tokens)
    kept = expected > 0
    assert bool((tokens.bincount(minlength=VOCAB)[~kept] == 0).all()), "a token that p excludes"
    return float((((tokens.bincount(minlength=VOCAB) - expected) ** 2)[kept] / expected[kept]).sum())


def run() -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, p, drafts): the target has a temperature and filters, the draft only the temperature."""
    target, draft, streams = setting()
    positions = torch.full((SAMPLES,), 100)
    temperature = torch.full((SAMPLES,), 0.8)
    drafts, q = sample_drafts(draft.expand(SAMPLES, -1), temperature, streams, positions)
    filters = torch.tensor([9], dtype=torch.int32), torch.tensor([0.97]), torch.tensor([0.01])
    p = probabilities(target[None], temperature[:1], *filters)
    return choose_or_recover(p.expand(SAMPLES, -1), q, drafts, streams, positions), p[0], drafts


def test_the_tokens_have_the_targets_distribution() -> None:
    tokens, p, drafts = run()
    accepted = (tokens == drafts).float().mean()
    assert 0.2 < float(accepted) < 0.9 and int((p == 0).sum()) > 0, "else the test would show little"
    assert chi_square(tokens, p) < CRITICAL
    q = (setting()[1] / 0.8).softmax(-1)
    assert float(accepted) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.015), "the acceptance of the theory"


@pytest.mark.parametrize("wrong", [lambda p, q: p, lambda p, q: (q - p).clamp_min(0) + 1e-9, lambda p, q: torch.ones_like(p)],
                         ids=["the target's own", "the other difference", "uniform"])
def test_a_wrong_recovery_distribution_is_noticed(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The planted bug: rejected drafts are replaced by samples of another distribution."""
    right, p, drafts = run()
    _, draft, streams = setting()
    planted = wrong(p, (draft / 0.8).softmax(-1)).log()
    score = planted + rejection._gumbel_noise(streams, torch.full((SAMPLES,), 100), Purpose.RECOVERY, VOCAB)
    assert chi_square(torch.where(right == drafts, right, score.argmax(-1)), p * 0.999 + 0.001 / VOCAB) > 10 * CRITICAL


def test_drafts_have_the_drafts_distribution_and_greedy_ones_are_certain() -> None:
    _, draft, streams = setting()
    positions, temperature = torch.full((SAMPLES,), 3), torch.full((SAMPLES,), 0.8)
    temperature[0] = 0.0
    drafts, q = sample_drafts(draft.expand(SAMPLES, -1), temperature, streams, positions)
    assert chi_square(drafts[1:], (draft / 0.8).softmax(-1)) < CRITICAL
    assert drafts[0] == draft.argmax() and q[0, drafts[0]] == 1 and q[0].sum() == 1


def test_keys_on_the_device_equal_those_of_the_host() -> None:
    streams = np.array([0, 1, 2**63, 2**64 - 1, stream_key(-5, 3)], np.uint64)
    positions = np.array([0, 1, 77, 2**20, 131071])
    host = row_keys(streams, positions)
    assert device_keys(torch.from_numpy(streams.view(np.int64)), torch.from_numpy(positions)).tolist() == host.tolist()
    others = [device_keys(torch.from_numpy(streams.view(np.int64)), torch.from_numpy(positions), purpose) for purpose in Purpose]
    assert len({tuple(map(tuple, keys.tolist())) for keys in others}) == 4


def test_distributions_are_found_by_row_and_position_only() -> None:
    kept = DraftProbabilities(2, 3, VOCAB, torch.device("cpu"))
    probs = torch.rand(3, 3, VOCAB)
    kept.store(torch.tensor([1, 0, 5]), torch.tensor([10, 20, 30]), probs)
    rows, positions = torch.tensor([1, 1, 1, 0, 5, 1]), torch.tensor([10, 12, 13, 21, 30, 9])
    q, valid = kept.find(rows, positions)
    assert valid.tolist() == [True, True, False, True, False, False]
    assert torch.equal(q[:2], probs[0, [0, 2]]) and torch.equal(q[3], probs[1, 1])
    kept.forget(1)
    assert kept.find(rows, positions)[1].tolist() == [False, False, False, True, False, False]
