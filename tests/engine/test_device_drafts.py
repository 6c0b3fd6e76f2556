"""Drafts of a proposer on the device, in the whole engine: the host plans ahead of the verification, and no token changes.

The proposer of these tests knows which token followed each token in the plain answers. So it is right often, and wrong often.
"""
from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.sampling.rejection import sample_drafts
from minivllm.sampling_params import SamplingParams
from minivllm.speculative.base import DraftTokens, ProposalInput
from minivllm.speculative.ngram_lookup import NgramLookup
from minivllm.speculative_config import SpeculativeConfig
from minivllm.worker.worker import Components
from tests.engine.test_drafts import Tokens, generate
from tests.engine.test_drafts import build as build_plain
from tests.engine.test_speculation import WANTED, answers, ngram
from tests.engine.test_speculation import folder as folder
from tests.engine.test_speculation import free_drafts as free_drafts

pytestmark = [pytest.mark.usefixtures("one_torch_thread", "free_drafts")]

VOCAB = 320
WAYS: dict[str, dict[str, Any]] = {
    "plain": {}, "ahead": {"async_scheduling": True},
    "small chunks": {"max_num_batched_tokens": 11, "max_num_seqs": 8, "block_size": 4, "async_scheduling": True},
    "preempted": {"num_gpu_blocks_override": 20, "block_size": 8, "async_scheduling": True},
    "swapped": {"num_gpu_blocks_override": 20, "block_size": 8, "kv_offloading_size": 2**-8, "async_scheduling": True},
    "one row": {"max_num_seqs": 1, "async_scheduling": True, "enable_prefix_caching": False},
}


class Followers:
    """Proposes the token that followed each token most often."""

    needs_hidden = stores = False

    def __init__(self, found: Tokens, num_drafts: int, probabilistic: bool = False, vocab_size: int = VOCAB) -> None:
        self.num_drafts, self.probabilistic, self.num_calls = num_drafts, probabilistic, 0
        self.counts = torch.zeros(vocab_size, vocab_size)
        for tokens in found.values():
            for before, after in pairwise(tokens):
                self.counts[before, after] += 1

    def propose(self, x: ProposalInput) -> DraftTokens:
        self.num_calls += 1
        if x.newest.is_cuda:
            self.counts = self.counts.to(x.newest.device)
        else:
            self.check(x)
        token, tokens, probs = x.newest, [], []
        for i in range(self.num_drafts):
            if self.probabilistic:
                token, q = sample_drafts((self.counts[token] + 0.1).log(), x.temperature, x.streams, x.lengths + i)
                probs.append(q)
            else:
                token = self.counts[token].argmax(-1)
            tokens.append(token)
        return DraftTokens(torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None)

    def store(self, x: ProposalInput) -> None:
        raise AssertionError("a proposer without keys and values has nothing to store")

    @staticmethod
    def check(x: ProposalInput) -> None:
        """What the interface promises."""
        batch, last = x.batch, x.last
        assert torch.equal(x.newest, x.next_tokens[last]) and torch.equal(x.lengths, batch.positions[last] + 2)
        assert bool((last < batch.query_start[1:]).all()) and bool((last >= batch.query_start[:-1]).all())
        inner = torch.ones(batch.num_tokens, dtype=torch.bool)
        inner[batch.query_start[1:].long() - 1] = False
        after = torch.zeros(batch.num_tokens, dtype=torch.bool)  # tokens up to the last one that was kept
        for b, at in enumerate(last.tolist()):
            after[int(batch.query_start[b]) : at] = True
        where = (inner & after).nonzero()[:, 0]
        assert torch.equal(x.next_tokens[where], batch.tokens[where + 1].long())


def build(folder: Path, proposer: Followers, **config: Any) -> EngineCore:
    method = {"disable_by_batch_size": config.pop("disable_by_batch_size", None), "method": "draft_model", "model": "none",
              "num_speculative_tokens": proposer.num_drafts,
              "draft_sample_method": "probabilistic" if proposer.probabilistic else "greedy"}
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 200, **config}
    return build_engine(EngineConfig(**settings, speculative_config=method), Components(proposer=lambda model: proposer))


def build_lookup(folder: Path, k: int, **config: Any) -> EngineCore:
    """n-gram lookup as on a GPU."""
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 200, **config}
    return build_engine(EngineConfig(**settings, speculative_config=ngram(k)), Components(
        proposer=lambda model: NgramLookup(SpeculativeConfig(**ngram(k)), model.build.ops)))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Tokens:
    return answers(folder)


@pytest.mark.parametrize(("way", "k"), [
    ("plain", 3), ("ahead", 1), ("ahead", 4), ("ahead", 8), ("small chunks", 2), ("preempted", 5), ("swapped", 6), ("one row", 7)])
def test_no_token_changes(folder: Path, plain: Tokens, way: str, k: int) -> None:
    proposer = Followers(plain, k)
    engine = build(folder, proposer, **WAYS[way])
    for _ in range(2 if way in ("ahead", "small chunks") else 1):  # the second time with cached prefixes
        assert generate(engine, WANTED)[0] == plain
    counts = engine.stats().drafts
    assert counts is not None and 50 < counts.num_accepted < counts.num_drafts - 50
    assert (engine.stats().num_preemptions > 0) == (way in ("preempted", "swapped"))
    engine.close()


@pytest.mark.parametrize(("way", "k"), [("ahead", 1), ("ahead", 8), ("small chunks", 3), ("preempted", 4), ("swapped", 5), ("one row", 6)])
def test_ngram_lookup_on_the_device_changes_no_token(folder: Path, plain: Tokens, way: str, k: int) -> None:
    engine = build_lookup(folder, k, **WAYS[way])
    for _ in range(2 if way == "small chunks" else 1):  # the second time with cached prefixes
        assert generate(engine, WANTED)[0] == plain
    counts = engine.stats().drafts
    assert counts is not None and 30 < counts.num_accepted < counts.num_drafts
    assert counts.accepted_per_position == sorted(counts.accepted_per_position, reverse=True)
    assert (engine.stats().num_preemptions > 0) == (way in ("preempted", "swapped"))
    engine.close()


def test_ngram_lookup_on_the_device_verifies_the_drafts_of_the_index_on_the_host(folder: Path, plain: Tokens) -> None:
    """Without asynchronous scheduling the same steps verify the same drafts. A step after which none were found counts no drafts."""
    counts = []
    for engine in (build_lookup(folder, 4), build_plain(folder, speculative_config=ngram(4))):
        assert generate(engine, WANTED)[0] == plain
        counts.append(engine.stats().drafts)
        engine.close()
    assert counts[0] == counts[1] and counts[0] is not None and counts[0].num_accepted > 30


def test_nothing_is_proposed_in_steps_of_many_sequences(folder: Path, plain: Tokens) -> None:
    proposer = Followers(plain, 3)
    engine = build(folder, proposer, async_scheduling=True, disable_by_batch_size=4)
    assert generate(engine, WANTED)[0] == plain
    counts = engine.stats().drafts
    assert counts is not None and counts.num_steps > 0 and proposer.num_calls < 80
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 4])
def test_no_token_changes_on_a_gpu(folder: Path, k: int) -> None:
    """The step and the proposer are captured CUDA graphs, and the host plans ahead. n-gram lookup is a proposer on the device too."""
    on_gpu: dict[str, Any] = {"device": "cuda", "max_num_seqs": 8}  # few graphs
    has_grammars = find_spec("llguidance") is not None
    wanted = {name: some for name, some in WANTED.items() if has_grammars or some[1].structured_outputs is None}
    expected = answers(folder, wanted, **on_gpu)
    engine = build(folder, Followers(expected, k), **on_gpu)
    for _ in range(2):
        assert generate(engine, wanted)[0] == expected
    counts = engine.stats().drafts
    assert counts is not None and 20 < counts.num_accepted < counts.num_drafts - 20
    engine.close()
    assert answers(folder, wanted, speculative_config=ngram(k), **on_gpu) == expected


def test_sampled_drafts_keep_the_distribution(folder: Path, plain: Tokens) -> None:
    """The tokens of many children have the same frequencies with drafts that were sampled from another distribution.

    Their fourth and fifth tokens are verified against drafts. 31 tokens are allowed, and rare ones are counted together.
    """
    children, allowed = 600, list(range(40, 71))
    params = SamplingParams(temperature=0.9, n=children, seed=11, max_tokens=6, ignore_eos=True, allowed_token_ids=allowed, top_k=20)
    frequencies = []
    for proposer in (None, Followers(plain, 2, probabilistic=True)):
        settings = {"num_gpu_blocks_override": 2000, "block_size": 4, "max_num_batched_tokens": 4096, "max_num_seqs": 60}
        engine = build_plain(folder, **settings) if proposer is None else build(folder, proposer, **settings, async_scheduling=True)
        if proposer is not None:
            proposer.counts = torch.full((VOCAB, VOCAB), 0.01)
            proposer.counts[:, 40:60] = 9.0  # right for some tokens, too high for others
        found = generate(engine, {"many": (WANTED["loop"][0], params if proposer is None else replace(params, seed=12))})[0]
        if proposer is not None:
            counts = engine.stats().drafts
            assert counts is not None and counts.num_accepted > 100 and counts.num_drafts - counts.num_accepted > 100, counts
        engine.close()
        assert len(found) == children
        frequencies.append([torch.tensor([tokens[i] for tokens in found.values()]).bincount(minlength=VOCAB) for i in (3, 4)])
    for first, second in zip(*frequencies, strict=True):
        kept = (first + second) >= 10
        pairs = torch.stack([torch.cat((some[kept], some[~kept].sum()[None])) for some in (first, second)]).double()
        pairs = pairs[:, pairs.sum(0) > 0]
        expected = pairs.sum(0, keepdim=True) * pairs.sum(1, keepdim=True) / pairs.sum()
        statistic, freedom = float(((pairs - expected) ** 2 / expected).sum()), pairs.shape[1] - 1
        assert statistic < freedom + 3.5 * (2 * freedom) ** 0.5, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"
