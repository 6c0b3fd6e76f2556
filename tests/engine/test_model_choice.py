"""Advice about models from the machine's memory: too large ones are refused before their download, better ones are named."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine import compose, model_choice
from minivllm.engine.model_choice import BetterModels
from minivllm.errors import InvalidInput, ModelError, NotEnoughMemory
from minivllm.models.loader import parameter_bytes
from minivllm.planning.suggested_models import GIB, MODELS, bytes_needed, models_that_fit, num_parameters
from minivllm.quantization.methods import METHODS, parameters
from minivllm.worker import weight_offload

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A GPU with this many GiB, of which the driver uses 0.4. Nothing can be computed on it."""
    def install(gib: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stubbed card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int((gib - 0.4) * GIB), int(gib * GIB)))

    return install


@pytest.mark.parametrize(("repository", "count"), [  # of the model cards
    ("Qwen/Qwen3-32B", 32.8), ("Qwen/Qwen3-14B", 14.8), ("Qwen/Qwen3-8B", 8.2), ("Qwen/Qwen2.5-7B-Instruct", 7.6),
    ("Qwen/Qwen3-4B-Instruct-2507", 4.0), ("Qwen/Qwen3-1.7B", 1.7), ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1.7),
    ("Qwen/Qwen2.5-1.5B-Instruct", 1.5), ("Qwen/Qwen3-0.6B", 0.6), ("HuggingFaceTB/SmolLM2-360M-Instruct", 0.36),
])
def test_every_suggested_model_has_its_published_size_and_runs_here(repository: str, count: float) -> None:
    model = next(m for m in MODELS if m.repository == repository)
    assert num_parameters(model.spec) == pytest.approx(count * 1e9, rel=0.04)
    assert num_parameters(model.spec) * 2 == parameter_bytes(parameters(model.spec), torch.bfloat16)


def test_the_test_above_names_every_suggested_model() -> None:
    assert len(MODELS) == 10 and [m.repository for m in MODELS] == list(dict.fromkeys(m.repository for m in MODELS))


@pytest.mark.parametrize("gib", [1, 2, 3, 4, 6, 7.6, 8, 11, 12, 16, 24, 32, 48, 80, 141])
def test_suggested_models_fit_and_are_the_best_that_do(gib: float) -> None:
    found = models_that_fit(int(gib * GIB))
    assert all(bytes_needed(m.spec) <= 0.9 * gib * GIB for m in found) and len(found) <= 3
    assert found == [m for m in MODELS if bytes_needed(m.spec) <= 0.9 * gib * GIB][:3]
    assert bool(found) == (gib >= 4)


def test_the_line_on_an_8_gb_card_names_models_for_it(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card(7.6)
    monkeypatch.setattr(model_choice, "hub_in_reach", lambda: True)
    better = BetterModels(EngineConfig())
    better.probe.join()
    assert better.line(CUDA) == (
        "better models for the 7.6 GiB of this GPU: Qwen/Qwen3-1.7B (1.7B parameters, 3.2 GiB), HuggingFaceTB/SmolLM2-1.7B-Instruct "
        "(1.7B parameters, 3.2 GiB), Qwen/Qwen2.5-1.5B-Instruct (1.5B parameters, 2.9 GiB); for example `minivllm serve Qwen/Qwen3-1.7B`")


@pytest.mark.parametrize(("gib", "reached", "settings"), [
    (7.6, False, {}), (7.6, True, {"model": "a/b"}), (7.6, True, {"device": "cpu"}), (1.0, True, {}), (None, True, {}),
])
def test_there_is_no_line_without_a_gpu_a_hub_or_a_choice(card: Any, monkeypatch: pytest.MonkeyPatch, gib: float | None, reached: bool,
                                                         settings: dict[str, Any]) -> None:
    if gib is not None:
        card(gib)
    monkeypatch.setattr(model_choice, "hub_in_reach", lambda: reached)
    better = BetterModels(EngineConfig(**settings))
    if better.probe.is_alive():
        better.probe.join()
    assert better.line(CUDA if gib is not None else torch.device("cpu")) is None


def test_without_a_network_the_hub_is_not_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from minivllm.models.hub_repository import hub_in_reach

    assert not hub_in_reach()  # HF_HUB_OFFLINE is set in tests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub_in_reach()


def large(tmp_path: Path, repository: str = "Qwen/Qwen3-8B") -> str:
    """A folder with the configuration of a large model and no weights."""
    model = next(m for m in MODELS if m.repository == repository)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    return str(tmp_path)


def test_a_model_that_the_card_cannot_hold_is_refused_before_its_weights_are_looked_for(card: Any, tmp_path: Path) -> None:
    card(7.6)
    with pytest.raises(ModelError, match=r"the weights need 15.3 GiB in bfloat16, and 6.8 GiB of the 7.6 GiB of a stubbed card are usable: "
                                         r"use a smaller model, such as Qwen/Qwen3-1.7B \(1.7B parameters, 3.2 GiB\).*"
                                         r"`minivllm plan`: does not fit: .* GiB are missing for one sequence of 2,000 tokens.*: .*Q4_K_M"):
        compose.build_engine(EngineConfig(model=large(tmp_path)))
    with pytest.raises(ModelError, match="no weights"):  # a card that can hold it
        card(24)
        compose.build_engine(EngineConfig(model=large(tmp_path)))


def test_weights_in_host_memory_are_not_counted(card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_offload, "available_host_memory", lambda: 16 * GIB)
    card(7.6)
    with pytest.raises(ModelError, match=r"the weights need 7\.0 GiB"):
        compose.build_engine(EngineConfig(model=large(tmp_path), cpu_offload_gb=8))
    with pytest.raises(ModelError, match="no weights"):
        compose.build_engine(EngineConfig(model=large(tmp_path), cpu_offload_gb=9))
    with pytest.raises(InvalidInput, match="the device is a CPU"):
        compose.build_engine(EngineConfig(model=large(tmp_path), device="cpu", cpu_offload_gb=1))
    with pytest.raises(InvalidInput, match=r"can save 12\.21 GiB at most"):
        compose.build_engine(EngineConfig(model=large(tmp_path), cpu_offload_gb=13))


def test_a_model_larger_than_the_hosts_memory_is_refused_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_choice, "host_memory", lambda: 4 * GIB)
    with pytest.raises(ModelError, match=r"the weights need 30.5 GiB in float32, and this machine has 4.0 GiB of memory"):
        compose.build_engine(EngineConfig(model=large(tmp_path), device="cpu", dtype="float32", load_format="dummy"))


def test_an_error_of_too_little_memory_has_the_plan_in_its_line() -> None:
    model_config = next(m for m in MODELS if m.repository == "Qwen/Qwen3-0.6B").config
    config = EngineConfig(device="cpu", dtype="bfloat16", max_model_len=8192, kv_cache_memory_bytes=8 << 20)
    with pytest.raises(InvalidInput, match=r"too small\. `minivllm plan`: does not fit: .* for one sequence of 8,192 tokens") as error, \
            model_choice.with_plan(config, model_config, METHODS):
        raise NotEnoughMemory("the cache is too small", "max_model_len")
    assert error.value.param == "max_model_len" and "\n" not in str(error.value)
    with pytest.raises(ModelError, match=r"wrong$"), model_choice.with_plan(config, model_config, METHODS):
        raise ModelError("another thing is wrong")
