"""Decode steps replayed from CUDA graphs: the tokens of eager steps, whatever sizes follow each other."""
from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from minivllm.families import kv_groups
from minivllm.worker.cuda_graphs import DecodeGraphs
from minivllm.worker.kv_cache import BlockShape, KVCache
from minivllm.worker.model_runner import ModelRunner
from tests.worker.test_model_runner import LENGTH, NUM_BLOCKS, ROWS, Tiny, run, sequences_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[False, True], ids=["full attention", "two KV groups"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield Tiny(tmp_path_factory.mktemp("tiny"), request.param, "cuda:0")
    torch.backends.cuda.matmul.allow_tf32 = allowed


def runner_with_graphs(tiny: Tiny, block_size: int) -> ModelRunner:
    shape = BlockShape(kv_groups(tiny.model.spec), block_size, torch.float32)
    kv = KVCache(shape, NUM_BLOCKS, 0, tiny.device, tiny.model.build.ops)
    for layer in kv.layers:  # whoever reads what was never written gets NaN
        layer.k.fill_(torch.nan), layer.v.fill_(torch.nan)
    return ModelRunner(tiny.model, kv, max_num_seqs=ROWS, max_model_len=LENGTH, eos_token_ids=(3,), cuda_graphs=True)


@pytest.mark.parametrize("block_size", [3, 16])
@pytest.mark.parametrize("depth", [0, 1])
def test_greedy_tokens_equal_transformers_in_batches_of_changing_size(tiny: Tiny, block_size: int, depth: int) -> None:
    runner = runner_with_graphs(tiny, block_size)
    for seed in range(4):
        sequences = sequences_of(tiny)
        run(runner, tiny.planner(block_size, seed), sequences, random.Random(seed), depth)
        assert [s.outputs for s in sequences] == tiny.expected


def test_decodes_are_covered_up_to_the_largest_size_and_prompt_chunks_are_not(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[int] = []
    forward = DecodeGraphs.forward
    monkeypatch.setattr(DecodeGraphs, "forward", lambda self, batch: (replayed.append(batch.num_seqs), forward(self, batch))[1])
    runner, planner = runner_with_graphs(tiny, 4), tiny.planner()
    sequences = sequences_of(tiny)
    plan = planner.plan([(s, len(s.prompt)) for s in sequences if len(s.prompt) > 1])
    runner.sample(runner.launch(plan)).wait()
    assert replayed == []
    plan = planner.plan([(s, 1) for s in sequences])
    runner.sample(runner.launch(plan)).wait()
    assert replayed == [len(sequences)]
