"""From a config to a running worker: devices, dtypes, budgets, and what is printed or refused."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan, StepResult
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.engine.compose import start_worker
from minivllm.engine.engine import EngineCore
from minivllm.engine.messages import EngineInfo
from minivllm.errors import InvalidInput
from minivllm.families import parse_config
from minivllm.models.hub import find_model
from minivllm.sampling_params import SamplingParams
from minivllm.worker import device as module
from minivllm.worker.device import choose_device, choose_dtype
from minivllm.worker.kv_cache import KVLayout
from minivllm.worker.memory import host_block_count
from minivllm.worker.worker import Worker, token_budget
from tests.worker.plans import Planner, Sequence

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def build(folder: Path, **config: Any) -> Worker:
    engine_config = EngineConfig(**{"model": str(folder), "device": "cpu", "dtype": "float32", **config})
    files = find_model(engine_config)
    spec = parse_config(files.config)
    if engine_config.max_model_len is not None:
        spec = dataclasses.replace(spec, max_model_len=engine_config.max_model_len)
    return start_worker(engine_config, spec, files, eos_token_ids=(1,))


def test_a_worker_built_from_a_config_runs_plans(tiny_llama: Callable[..., Path]):
    worker = build(tiny_llama())
    assert worker.max_model_len == 256 and worker.kv_windows == (None,) and worker.dtype == torch.float32
    assert worker.num_blocks > 256 // 16 and worker.num_host_blocks == 0 and worker.max_num_batched_tokens == 2048
    s = Sequence("a", 0, (5, 6, 7), 4)
    planner = Planner(16, list(range(1, 9)))
    for _ in range(2):
        result = worker.execute(planner.plan([(s, s.left)]))
        assert result.error is None and len(result.token_ids) == 1
    worker.close()


def test_closing_gives_all_memory_back(tiny_llama: Callable[..., Path]):
    worker = build(tiny_llama())
    runner = worker.runner
    held = [weakref.ref(t) for t in (runner.kv.layers[0].k, runner.rows.tokens, runner.model.embedding.table)]
    del runner
    worker.close()
    worker.close()
    gc.collect()
    assert [r() for r in held] == [None] * 3
    with pytest.raises(AssertionError, match="closed"):
        worker.launch(Planner(16, []).plan([]))


def test_the_choices_made_for_the_user_are_printed_once(
    tiny_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    build(tiny_llama(), dtype="auto", num_gpu_blocks_override=9).close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "CPU" in lines[0] and "bfloat16" in lines[0]  # chosen, or named as what this CPU lacks
    assert "KV cache in " in lines[1] and "room for 128 tokens" in lines[1]
    assert "max_model_len lowered from 256 to 128" in lines[2]


def test_an_explicit_length_that_does_not_fit_is_refused_with_one_that_fits(tiny_llama: Callable[..., Path]):
    with pytest.raises(InvalidInput, match="lower max_model_len to 128") as error:
        build(tiny_llama(), max_model_len=200, num_gpu_blocks_override=9)
    assert error.value.param == "max_model_len"


def test_sizes_given_in_blocks_bytes_or_host_memory_are_used(tiny_llama: Callable[..., Path]):
    worker = build(tiny_llama(), kv_cache_memory_bytes=1 << 20, kv_offloading_size=2**-10)
    block = 2 * 2 * 16 * 2 * 8 * 4  # k and v, layers, tokens, heads, head_dim, bytes
    assert worker.num_blocks == (1 << 20) // block and worker.num_host_blocks == (1 << 20) // block
    worker.close()


def test_a_host_pool_too_small_for_a_block_names_the_smallest_size(tiny_llama: Callable[..., Path]):
    layout = KVLayout.of(parse_config(find_model(EngineConfig(model=str(tiny_llama()))).config), 16, torch.float32)
    assert host_block_count(0.0, layout) == 0
    with pytest.raises(InvalidInput, match="set at least") as error:
        host_block_count(1e-6, layout)
    assert error.value.param == "kv_offloading_size"


def test_a_cache_that_the_host_cannot_hold_is_refused(tiny_llama: Callable[..., Path]):
    with pytest.raises(InvalidInput, match="no memory for a KV cache") as error:
        build(tiny_llama(), kv_cache_memory_bytes=1 << 55)
    assert error.value.param == "kv_cache_memory_bytes"


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(InvalidInput, match="use device='cpu'"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "device", "fast_bf16", "chosen"),
    [
        ("auto", "bfloat16", CPU, True, torch.bfloat16),
        ("auto", "bfloat16", CPU, False, torch.float32),
        ("auto", "float16", CPU, True, torch.bfloat16),
        ("float16", "bfloat16", CPU, False, torch.float16),
        ("float32", "bfloat16", CUDA, True, torch.float32),
        ("auto", "bfloat16", CUDA, True, torch.bfloat16),
        ("auto", "bfloat16", CUDA, False, torch.float16),
        ("auto", "float32", CUDA, True, torch.bfloat16),
        ("auto", "float32", CUDA, False, torch.float16),
        ("auto", "float16", CUDA, True, torch.float16),
    ],
)
def test_dtype_auto_follows_the_device_and_an_explicit_one_wins(
    monkeypatch, wanted, checkpoint, device, fast_bf16, chosen
):
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: fast_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: fast_bf16)
    assert choose_dtype(wanted, checkpoint, device) == chosen


def test_without_chunked_prefill_the_default_budget_holds_the_longest_prompt():
    assert [
        token_budget(EngineConfig(**c), 30_000, d)
        for c, d in (
            ({}, CPU),
            ({}, CUDA),
            ({"enable_chunked_prefill": False}, CUDA),
            ({"max_num_batched_tokens": 77}, CPU),
        )
    ] == [2048, 8192, 30_000, 77]


def test_a_second_worker_with_the_same_plans_gives_the_same_tokens(tiny_llama: Callable[..., Path]):
    """Every rank of a parallel engine is a worker that receives every plan: no token is exchanged between them."""
    config = {"num_gpu_blocks_override": 30, "kv_offloading_size": 2**-9, "block_size": 4, "max_num_batched_tokens": 24}
    first, second = build(tiny_llama(), **config), build(tiny_llama(), **config)
    assert first.execute.__self__ is not second.execute.__self__
    seen: list[int] = []

    class Both:
        """An executor of two workers in one process."""

        num_blocks, num_host_blocks = first.num_blocks, first.num_host_blocks

        def launch(self, plan: StepPlan):
            return first.launch(plan), second.launch(plan)

        def sample(self, steps, masks=None):
            return Agreed(first.sample(steps[0], masks), second.sample(steps[1], masks))

        def close(self) -> None:
            first.close(), second.close()

    class Agreed:
        def __init__(self, a, b) -> None:
            self.steps = a, b

        def wait(self) -> StepResult:
            a, b = (step.wait() for step in self.steps)
            assert a == b
            seen.extend(token for tokens in a.token_ids for token in tokens)
            return a

    scheduler = Scheduler(SchedulerConfig(num_blocks=30, block_size=4, max_num_batched_tokens=24, max_model_len=first.max_model_len,
                                          num_host_blocks=first.num_host_blocks))
    info = EngineInfo(model="tiny", model_folder="", tokenizer_folder=None, max_model_len=first.max_model_len, vocab_size=320,
                      eos_token_ids=(1,), device="cpu", dtype="float32", num_blocks=30, block_size=4, generation_config={})
    engine = EngineCore(executor=Both(), scheduler=scheduler, tokenizer=None, info=info)
    for i in range(4):
        params = SamplingParams(temperature=i / 2, max_tokens=30, ignore_eos=True, n=1 + i % 2, seed=i, presence_penalty=i % 3, logprobs=2)
        engine.add_request(str(i), {"prompt_token_ids": list(range(2, 20 + i))}, params)
    while engine.has_unfinished_requests():
        engine.step()
    assert len(seen) == 6 * 30 and engine.scheduler.stats().num_preemptions > 0
    engine.close()


def test_host_memory_that_runs_out_while_weights_load_is_a_user_error(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    from minivllm.worker import worker as module

    def load(*args: Any) -> Any:
        return torch.empty(2**59, dtype=torch.uint8)

    monkeypatch.setattr(module, "load_model", load)
    with pytest.raises(InvalidInput, match=r"no memory for the weights of 0.00 GiB .*for model: use a smaller model"):
        build(tiny_llama())

    def bug(*args: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "load_model", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        build(tiny_llama())
