"""An engine with several ranks, each a process: the same tokens as with one, and a clear end if a rank fails.

Starting ranks takes seconds, so a test checks many things with one engine.
"""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from minivllm import LLM, InvalidInput, LoRARequest, PoolingParams, SamplingParams
from minivllm.config import EngineConfig
from minivllm.engine.compose import build_engine
from minivllm.errors import EngineDead
from minivllm.kernels import Ops, select
from minivllm.quantization.methods import METHODS
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.worker.device import check_ranks
from minivllm.worker.model_runner import ModelRunner
from minivllm.worker.ranks import LeadingWorker, Ranks
from minivllm.worker.worker import Components
from tests.lora.adapters import write_adapter
from tests.quantization.checkpoints import write
from tests.quantization.test_awq import quantizer

pytestmark = pytest.mark.usefixtures("one_torch_thread")
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = [list(range(3, 40)), [5, 6, 7], list(range(3, 40)), list(range(60, 10, -1))]
SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "block_size": 4}
Tokens = list[tuple[int, ...]]


def answers(llm: LLM, params: SamplingParams = GREEDY, lora: LoRARequest | None = None, prompts: list[list[int]] = PROMPTS) -> Tokens:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False, lora_request=lora)
    llm.llm_engine.core.scheduler.check()
    return [tuple(child.token_ids) for output in outputs for child in output.outputs]


def embeddings(llm: LLM) -> list[list[float]]:
    params = [PoolingParams(pooling_type=kind) for kind in ("MEAN", "LAST", "LAST", "MEAN")]
    return [output.outputs.embedding for output in llm.embed(PROMPTS, pooling_params=params, use_tqdm=False)]  # type: ignore[arg-type]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids_of(llm: LLM) -> tuple[int, ...]:
    worker = llm.llm_engine.core.executor
    assert isinstance(worker, LeadingWorker)
    return worker.ranks.pids


def test_two_ranks_answer_as_one_until_a_rank_is_killed(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama()
    adapter = LoRARequest("a", 1, str(write_adapter(tmp_path / "a", folder, rank=3)))
    # 30 blocks hold two of the sequences: others are swapped to host memory. 11 tokens a step cut prompts into chunks.
    settings = SETTINGS | {"enable_lora": True, "num_gpu_blocks_override": 30, "kv_offloading_size": 0.001, "max_num_batched_tokens": 11}
    children, seeded = (SamplingParams(temperature=t, seed=4, n=3, max_tokens=8, ignore_eos=True, logprobs=2) for t in (0, 0.9))
    digits = SamplingParams(temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[0-9]{4}"))

    def everything(llm: LLM) -> list[Tokens]:
        return [answers(llm), answers(llm), answers(llm, lora=adapter), answers(llm, children), answers(llm, seeded), answers(llm, digits)]

    with LLM(str(folder), **settings) as one:
        expected, vectors = everything(one), embeddings(one)
    assert expected[0] != expected[2], "the adapter changes nothing"
    with LLM(str(folder), tensor_parallel_size=2, **settings) as llm:
        assert everything(llm) == expected
        for vector, wanted in zip(embeddings(llm), vectors, strict=True):
            assert vector == pytest.approx(wanted, abs=1e-5)
        stats, (pid,) = llm.llm_engine.stats(), pids_of(llm)
        assert stats.prefix_cache_hits > 0
        assert stats.num_preemptions > 0
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match=rf"rank 1 of 2 \(process {pid}\) ended unexpectedly \(exit code -9, killed by SIGKILL\)"):
            answers(llm)
    assert not is_running(pid)


def test_four_ranks_with_a_draft_and_quantized_weights_until_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 ranks share 2 KV heads, so two ranks hold each of them. Every rank has a whole draft: the model itself, whose drafts are right.

    Ctrl-C in a step leaves the other ranks in the middle of it, so the engine ends."""
    folder = tmp_path / "target"
    write(folder, {"quant_method": "awq", "bits": 4, "group_size": 16}, quantizer(16), hidden_size=64, intermediate_size=128)
    settings = SETTINGS | {"skip_tokenizer_init": True, "speculative_config": {
        "method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}}
    with LLM(str(folder), **settings) as one:
        expected = answers(one)
    with LLM(str(folder), tensor_parallel_size=4, **settings) as llm:
        assert answers(llm) == expected
        assert answers(llm, prompts=PROMPTS[:1]) == expected[:1]  # drafts pay off in small steps
        pids = pids_of(llm)
        assert len(pids) == 3
        counts = llm.llm_engine.stats().drafts
        assert counts is not None and sum(counts.accepted_per_position) > 0
        monkeypatch.setattr(ModelRunner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answers(llm)
        monkeypatch.undo()
        with pytest.raises(EngineDead, match="rank 0 of 4 was interrupted by KeyboardInterrupt"):
            answers(llm)
    assert not any(map(is_running, pids))


def interrupted(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def broken_elsewhere(process: int, device: torch.device) -> Ops:
    """The kernels of rank 0, which is this process. Other ranks have none."""
    if os.getpid() != process:
        raise RuntimeError("no kernels here")
    return select(device)


def test_a_rank_that_fails_while_it_loads_is_named(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Ranks] = []
    monkeypatch.setattr("minivllm.engine.compose.Ranks", lambda size: started.append(Ranks(size)) or started[0])
    with pytest.raises(EngineDead, match=r"^tensor-parallel rank 1 of 2 failed: RuntimeError: no kernels here$"):
        build_engine(EngineConfig(model=str(tiny_llama()), tensor_parallel_size=2, **SETTINGS),
                     Components(methods=dict(METHODS), ops=partial(broken_elsewhere, os.getpid())))
    assert not any(map(is_running, started[0].pids))
    assert "minivllm-ranks" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("settings", "message"), [
    ({"tensor_parallel_size": 3}, "tensor_parallel_size 3 does not fit this model: it has 4 attention heads"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
])
def test_a_wrong_number_of_ranks_is_refused_before_any_starts(tiny_llama: Callable[..., Path], settings: dict[str, Any], message: str,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.engine.compose.Ranks", lambda size: pytest.fail("ranks were started"))
    with pytest.raises(InvalidInput, match=message) as error:
        build_engine(EngineConfig(model=str(tiny_llama()), **{**SETTINGS, **settings}))
    assert error.value.param == "tensor_parallel_size"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_ranks(2, torch.device("cuda", 0))
    with pytest.raises(InvalidInput, match="tensor_parallel_size is 4, and PyTorch sees 2 GPUs: lower it, or check CUDA_VISIBLE_DEVICES"):
        check_ranks(4, torch.device("cuda", 0))
    with pytest.raises(InvalidInput, match="tensor_parallel_size is 2, and PyTorch sees 2 GPUs from number 1 on"):
        check_ranks(2, torch.device("cuda", 1))
