"""Streamed layers on a GPU: the tokens of resident ones, eagerly and in graphs, with copies and layers of any speed, in less memory."""
from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.models import write_config
from minivllm import LLM, SamplingParams
from minivllm.errors import InvalidInput
from minivllm.kernels import tuning
from minivllm.models.loader import load_model
from minivllm.models.streaming import HostWeights, SideStream, StreamedLayer, WeightStream
from tests.models.paged import make_build
from tests.models.tiny import read_spec
from tests.worker.test_cuda_graphs import runner_with_graphs
from tests.worker.test_gpu import no_waiting
from tests.worker.test_model_runner import Tiny, run, sequences_of

pytestmark = pytest.mark.gpu
GIB = 1 << 30
SLOW = 300_000  # cycles, more than a layer of the tiny model takes


class SlowCopies(SideStream):
    """Each copy takes long, and until it ends its buffer holds NaN."""

    def start(self, weights: HostWeights, buffer: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.fill_(255)
            torch.cuda._sleep(SLOW)
        return super().start(weights, buffer)


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MIN_SKIPPED_TOKENS", 6)
        yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(scope="module", params=["slow copies", "slow layers"])
def streamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """All four layers of a model are streamed. A missing wait in either direction changes the tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    made = Tiny(folder, True, "cuda:0")
    copies = SlowCopies(made.device) if request.param == "slow copies" else SideStream(made.device)
    stream = WeightStream(range(4), made.device, copies)
    made.model = load_model(made.model.spec, folder, "auto", made.model.build, stream=stream)
    for layer in made.model.layers if request.param == "slow layers" else ():
        assert isinstance(layer, StreamedLayer)
        layer._layer = late(layer._layer)
    return made


def late(layer: Any) -> Any:
    def compute(*args: Any) -> Tensor:
        torch.cuda._sleep(SLOW)
        return layer(*args)

    return compute


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("depth", [0, 1])
def test_greedy_tokens_equal_transformers_in_any_plan(streamed: Tiny, graphs: bool, depth: int) -> None:
    runner = runner_with_graphs(streamed, 4) if graphs else streamed.runner()
    for seed in range(3):
        sequences = sequences_of(streamed)
        run(runner, streamed.planner(seed=seed), sequences, random.Random(seed), depth)
        assert [s.outputs for s in sequences] == streamed.expected


def test_graphs_and_eager_steps_take_turns(streamed: Tiny) -> None:
    """Prompt logprobs are computed eagerly, all other steps are replayed."""
    runner = runner_with_graphs(streamed, 4)
    for seed in range(3):
        sequences = sequences_of(streamed)
        for s in sequences[::2]:
            s.params, s.owed_from = SamplingParams(temperature=0, prompt_logprobs=1), 0
        run(runner, streamed.planner(seed=seed), sequences, random.Random(seed), 1)
        assert [s.outputs for s in sequences] == streamed.expected


def test_a_step_does_not_wait_for_the_device(streamed: Tiny) -> None:
    for runner in (streamed.runner(), runner_with_graphs(streamed, 4)):
        planner, sequences = streamed.planner(), sequences_of(streamed)
        runner.sample(runner.launch(planner.plan([(s, s.left) for s in sequences]))).wait()
        plan = planner.plan([(s, 1) for s in sequences])
        with no_waiting():
            pending = runner.sample(runner.launch(plan))
        assert [t for (t,) in pending.wait().token_ids] == [tokens[1] for tokens in streamed.expected]


def generate(folder: Path, gib: float, **options: Any) -> tuple[list[list[int]], int]:
    """-> the tokens of 24 requests, and the bytes of GPU memory that the weights take."""
    rng = random.Random(0)
    prompts = [[rng.randrange(150_000) for _ in range(n)] for n in (1, 9, 700, 64, 333, 2, 1500, 40) * 3]
    params = [SamplingParams(temperature=i % 3 * 0.5, seed=i, max_tokens=20 + i, ignore_eos=True, detokenize=False,
                             prompt_logprobs=1 if i % 5 == 0 else None) for i in range(len(prompts))]
    with LLM(model=str(folder), load_format="dummy", skip_tokenizer_init=True, device="cuda", dtype="bfloat16", cpu_offload_gb=gib,
             max_model_len=2048, max_num_seqs=32, max_num_batched_tokens=1024, num_gpu_blocks_override=1500, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        ledger = llm.llm_engine.core.executor.ledger  # type: ignore[union-attr]
        return [list(output.outputs[0].token_ids) for output in outputs], ledger.weights


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"async_scheduling": False}], ids=str)
def test_a_model_of_real_size_gives_the_same_tokens_in_less_memory(options: dict[str, Any], tmp_path: Path,
                                                                  capfd: pytest.CaptureFixture[str]) -> None:
    write_config("qwen3-0.6b", tmp_path)
    tokens, weights = generate(tmp_path, 0, **options)
    capfd.readouterr()
    for gib in (0.1, 0.35, 0.75):
        found, less = generate(tmp_path, gib, **options)
        assert found == tokens
        assert gib - 0.005 < (weights - less) / GIB < gib + 0.07
        assert "layers" in capfd.readouterr().err


def test_more_than_the_layers_is_refused(tmp_path: Path) -> None:
    write_config("qwen3-0.6b", tmp_path)
    with pytest.raises(InvalidInput, match="GiB at most") as error:
        generate(tmp_path, 2.0)
    assert error.value.param == "cpu_offload_gb"


def test_loading_never_holds_more_than_the_result(tmp_path: Path) -> None:
    """Weights leave the device layer by layer."""
    write_config("smollm2-135m", tmp_path)
    peaks, device = [], torch.device("cuda", 0)
    for streamed in ((), range(30)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stream = WeightStream(streamed, device) if streamed else None
        model = load_model(read_spec(tmp_path), tmp_path, "dummy", make_build(torch.bfloat16, "cuda:0"), stream=stream)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[-1] <= torch.cuda.memory_allocated() - before + (1 << 20)
        del model, stream
        gc.collect()
    assert peaks[1] < peaks[0] / 3
