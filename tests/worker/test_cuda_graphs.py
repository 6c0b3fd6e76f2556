"""Decode steps replayed from CUDA graphs: they give the tokens of eager steps, in any sequence of batch sizes."""
from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from minivllm.kernels import tuning
from minivllm.sampling_params import SamplingParams
from minivllm.worker.cuda_graphs import Graph
from minivllm.worker.kv_cache import KVCache, KVLayout
from minivllm.worker.model_runner import ModelRunner
from tests.worker.plans import GREEDY
from tests.worker.test_drafts import decode, run_with_drafts
from tests.worker.test_model_runner import LENGTH, NUM_BLOCKS, ROWS, Tiny, run, run_from_one_prefix, sequences_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(scope="module", params=[False, True], ids=["full attention", "two KV groups"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"), request.param, "cuda:0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("plain"), False, "cuda:0")


def runner_with_graphs(tiny: Tiny, block_size: int, query_widths: tuple[int, ...] = (1,)) -> ModelRunner:
    shape = KVLayout.of(tiny.model.spec, block_size, torch.float32)
    kv = KVCache(shape, NUM_BLOCKS, 0, tiny.device, tiny.model.build.ops)
    for layer in kv.layers:  # reading a slot that was never written gives NaN
        layer.k.fill_(torch.nan), layer.v.fill_(torch.nan)
    return ModelRunner(tiny.model, kv, max_num_seqs=ROWS, max_model_len=LENGTH, eos_token_ids=(3,), graph_tokens=1024,
                       query_widths=query_widths)


@pytest.mark.parametrize("block_size", [3, 16])
@pytest.mark.parametrize("depth", [0, 1])
def test_greedy_tokens_equal_transformers_in_batches_of_changing_size(tiny: Tiny, block_size: int, depth: int) -> None:
    runner = runner_with_graphs(tiny, block_size)
    for seed in range(4):
        sequences = sequences_of(tiny)
        run(runner, tiny.planner(block_size, seed), sequences, random.Random(seed), depth)
        assert [s.outputs for s in sequences] == tiny.expected


def test_decodes_and_small_mixed_steps_are_replayed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[tuple[int, int]] = []
    replay = Graph.replay
    monkeypatch.setattr(
        Graph, "replay", lambda self, c, *args: (replayed.append((len(c.token_index), len(c.rows))), replay(self, c, *args))[1])
    runner, planner = runner_with_graphs(tiny, 4), tiny.planner()
    sequences = sequences_of(tiny)
    runner.sample(runner.launch(planner.plan([(s, len(s.prompt)) for s in sequences]))).wait()
    runner.sample(runner.launch(planner.plan([(s, 1) for s in sequences]))).wait()
    assert replayed == [(sum(len(p) for p in tiny.prompts), len(sequences)), (len(sequences), len(sequences))]


def test_sequences_with_the_same_leading_blocks_read_them_once_and_tokens_do_not_change(
    plain: Tiny, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "MIN_SHARING_DECODES", 2)
    monkeypatch.setattr(tuning, "SHARED_KEYS_MULTIPLE", 8)
    monkeypatch.setattr(tuning, "SHARING_GRAPHS", (2,))
    monkeypatch.setattr(tuning, "MIN_SHARED_BYTES", 1)
    replayed: set[int] = set()
    replay = Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self, *args: (replayed.add(self.shape.sharing * self.shape.seqs), replay(self, *args))[1])
    sequences = run_from_one_prefix(runner_with_graphs(plain, 4), plain)
    assert [s.outputs for s in sequences] == [plain._generate(list(s.prompt)) for s in sequences]
    assert replayed >= {2, ROWS}


PENALIZED = SamplingParams(temperature=1.1, presence_penalty=0.7, ignore_eos=True)


@pytest.mark.parametrize("params", [GREEDY, PENALIZED], ids=["plain", "penalized"])
@pytest.mark.parametrize("right", ["all", "none", "half"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_decodes_with_drafts_are_replayed_and_give_the_tokens_of_plain_decoding(
    tiny: Tiny, k: int, right: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch,
) -> None:
    replayed: set[int] = set()
    replay = Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self, *args: (replayed.add(self.shape.query_width), replay(self, *args))[1])
    expected, got = decode(sequences_of(tiny), [params]), decode(sequences_of(tiny), [params])
    run(tiny.runner(), tiny.planner(), expected, random.Random(1))
    answers = [s.outputs for s in expected]
    accepted = {"all": lambda n: n, "none": lambda n: 0, "half": lambda n: n // 2}[right]
    run_with_drafts(runner_with_graphs(tiny, 4, (1, 1 + k)), tiny.planner(), got, answers, accepted, random.Random(2), lambda: k)
    assert [s.outputs for s in got] == answers
    assert 1 + k in replayed
