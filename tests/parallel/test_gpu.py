"""Two GPUs: NCCL instead of gloo, with captured graphs that contain the collectives."""
from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.errors import EngineDead
from tests.parallel.test_engine import answers, is_running, pids_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "block_size": 16, "max_num_seqs": 8, "gpu_memory_utilization": 0.2}


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_two_gpus_answer_as_one_until_a_rank_is_killed(tiny_llama: Callable[..., Path], eager: bool) -> None:
    folder = str(tiny_llama(hidden_size=128, intermediate_size=256))
    settings = SETTINGS | {"enforce_eager": eager}
    seeded = SamplingParams(temperature=0.9, seed=4, n=3, max_tokens=8, ignore_eos=True, top_p=0.9)
    with LLM(folder, **settings) as one:
        expected = answers(one), answers(one, seeded)
    with LLM(folder, tensor_parallel_size=2, **settings) as llm:
        assert (answers(llm), answers(llm, seeded)) == expected
        (pid,) = pids_of(llm)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="tensor-parallel rank 1 of 2"):
            answers(llm)
    assert not is_running(pid)


def test_swapped_blocks_and_drafts_of_two_gpus(tiny_llama: Callable[..., Path]) -> None:
    folder = str(tiny_llama(hidden_size=128, intermediate_size=256))
    settings = SETTINGS | {"num_gpu_blocks_override": 9, "kv_offloading_size": 0.01, "speculative_config": {
        "method": "draft_model", "model": folder, "num_speculative_tokens": 2}}
    with LLM(folder, **settings) as one:
        expected = answers(one)
    with LLM(folder, tensor_parallel_size=2, **settings) as llm:
        assert answers(llm) == expected
