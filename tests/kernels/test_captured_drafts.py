"""Captured steps that verify drafts and propose new ones, in the whole engine: no token changes. See `test_captured_steps.py`."""
from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.engine.engine import EngineCore
from minivllm.engine.messages import EngineInfo
from minivllm.engine.speculation import Speculation
from minivllm.families import ModelSpec
from minivllm.kernels import tuning
from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.sampling_params import SamplingParams
from minivllm.speculative_config import SpeculativeConfig
from minivllm.worker.kv_cache import KVCache, KVLayout
from minivllm.worker.model_runner import LaunchedStep, ModelRunner, SampledStep
from tests.engine.test_device_drafts import Followers
from tests.engine.test_drafts import Tokens
from tests.kernels.test_captured_steps import CPU, LENGTH, NUM_BLOCKS, ROWS, Repeated, Tiny
from tests.kernels.test_captured_steps import emulated as emulated
from tests.kernels.test_captured_steps import plain as plain
from tests.kernels.test_captured_steps import pytestmark as pytestmark

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PARAMS = (GREEDY, replace(GREEDY, temperature=0.9, seed=5), replace(GREEDY, temperature=1.0, seed=6, top_k=5, logprobs=1),
          replace(GREEDY, repetition_penalty=1.4))
BLOCK_SIZE = 4


class RunnerExecutor:
    """A model runner as an executor."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.num_blocks, self.num_host_blocks = runner, NUM_BLOCKS, 0

    def launch(self, plan: Any) -> LaunchedStep:
        return self.runner.launch(plan)

    def sample(self, step: LaunchedStep, masks: Any = None) -> SampledStep:
        return self.runner.sample(step, masks)

    def close(self) -> None:
        pass


def generate(tiny: Tiny, proposer: Any, widths: tuple[int, ...], depth: int = 1,
             draft: ModelSpec | None = None) -> tuple[Tokens, EngineCore]:
    model = tiny.with_triton
    kv = KVCache(KVLayout.of(model.spec, BLOCK_SIZE, torch.float32, draft=draft), NUM_BLOCKS, 0, CPU, model.build.ops)
    runner = ModelRunner(model, kv, max_num_seqs=ROWS, max_model_len=LENGTH, graph_tokens=32 if widths else 0, query_widths=widths,
                         proposer=proposer, keep_probs=getattr(proposer, "probabilistic", False))
    k = 0 if proposer is None else proposer.num_drafts
    scheduler = Scheduler(SchedulerConfig(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=ROWS, max_num_batched_tokens=64, max_model_len=LENGTH,
        planning_depth=depth, num_device_drafts=k))
    info = EngineInfo(model="tiny", model_folder="", tokenizer_folder=None, max_model_len=LENGTH, vocab_size=model.spec.vocab_size,
                      eos_token_ids=(), device="cpu", dtype="float32", num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, generation_config={})
    settings = SpeculativeConfig(method="draft_model", model="none", num_speculative_tokens=k or 1)
    speculation = None if proposer is None else Speculation(settings, "cpu", depth > 0, on_host=False)
    core = EngineCore(executor=RunnerExecutor(runner), scheduler=scheduler, tokenizer=None, info=info, speculation=speculation)
    rng, tokens = random.Random(1), dict[str, list[int]]()
    for i, params in enumerate(PARAMS):
        core.add_request(str(i), {"prompt_token_ids": [rng.randrange(2, 60) for _ in range(3 + i)]}, params)
    while core.has_unfinished_requests():
        for delta in core.step():
            assert delta.error is None
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        scheduler.check()
    return tokens, core


@pytest.fixture(scope="module")
def expected(plain: Tiny) -> Tokens:
    return generate(plain, None, ())[0]


def test_no_token_changes(plain: Tiny, expected: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPECULATION, "cpu", SpeculationCost(1e9, 0.0, 1000))
    Repeated.replayed.clear()
    proposer = Followers(expected, 3, vocab_size=plain.with_triton.spec.vocab_size)
    found, core = generate(plain, proposer, (1, 3, 4))
    assert found == expected
    counts = core.stats().drafts
    assert counts is not None and 0 < counts.num_accepted < counts.num_drafts
    wide = [shape for shape in Repeated.replayed if shape.query_width > 1]
    assert len(wide) >= 2 and len(wide) + len([s for s in Repeated.replayed if not s.decodes]) >= proposer.num_calls // 2


def test_drafts_with_distributions_are_verified_after_a_replay(plain: Tiny, expected: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens stay the same, and the others are some sample."""
    monkeypatch.setitem(SPECULATION, "cpu", SpeculationCost(1e9, 0.0, 1000))
    found, _ = generate(plain, Followers(expected, 2, True, plain.with_triton.spec.vocab_size), (1, 3))
    assert (found["0"], found["3"]) == (expected["0"], expected["3"]) and all(len(tokens) == 6 for tokens in found.values())


def test_every_shape_can_be_captured(plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph first runs its step and the proposer on padding alone. That leaves the length of the null row as it was."""
    monkeypatch.setattr(Repeated, "runs_first", True)
    monkeypatch.setattr(tuning, "DECODE_GRAPHS", (1, 2))
    monkeypatch.setattr(tuning, "MIXED_GRAPHS", ((16, 3),))
    model = plain.with_triton
    proposer = Followers({}, 2, vocab_size=model.spec.vocab_size)
    monkeypatch.setattr(proposer, "check", lambda x: None)  # padding has no tokens to check
    kv = KVCache(KVLayout.of(model.spec, BLOCK_SIZE, torch.float32), NUM_BLOCKS, 0, CPU, model.build.ops)
    runner = ModelRunner(model, kv, max_num_seqs=2, max_model_len=LENGTH, graph_tokens=32, query_widths=(1, 3), proposer=proposer)
    assert proposer.num_calls >= 5 and int(runner.rows.lengths[-1]) == 1
