"""`quantization=`: quantize while loading, or confirm what the checkpoint is stored as."""
from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine.compose import build_engine
from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.families import parse_config
from minivllm.kernels.grouped import dequantize
from minivllm.layers.build import BuildContext
from minivllm.models.loader import load_model, weight_bytes
from minivllm.quantization import bitsandbytes
from minivllm.quantization.methods import method_of
from minivllm.quantization.online import quantize
from tests.models.paged import make_build
from tests.models.tiny import hf_logits
from tests.quantization.checkpoints import CPU, OPS, TOKENS, logits, resident, write
from tests.quantization.test_awq import CONFIG as AWQ
from tests.quantization.test_awq import quantizer as awq_quantizer
from tests.quantization.test_fp8 import CONFIG as FP8
from tests.quantization.test_fp8 import quantizer as fp8_quantizer


def unquantized(folder: Path, **config: Any) -> Any:
    return write(folder, None, lambda name, weight: None, **config)


def load(folder: Path, wanted: str, ops: Any = OPS) -> Any:
    described = json.loads((folder / "config.json").read_text())
    build = BuildContext(CPU, torch.float32, ops, method_of(described, wanted=wanted))
    return load_model(parse_config(described), folder, "auto", build)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_rows_are_scaled_to_the_largest_code(kind: Any) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 40)[:, None]
    weight[7] = 0
    found = quantize(weight, kind)
    largest = weight.abs().amax(1, keepdim=True)
    error = (dequantize(found) - weight).abs() / largest.clamp_min(1e-9)
    assert found.codes.element_size() == 1 and error.max() <= (1 / 28 if kind == "fp8" else 1 / 254) + 1e-6
    assert dequantize(found)[7].abs().max() == 0


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("model", [{"attention_bias": True}, {"family": "Qwen2", "tie_word_embeddings": True}])
def test_logits_equal_those_of_the_rounded_weights(kind: Any, model: dict[str, Any], tmp_path: Path) -> None:
    hf = unquantized(tmp_path, **model)
    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear) and "head" not in name:
            module.weight.data = dequantize(quantize(module.weight.data, kind))
    found = load(tmp_path, kind)
    torch.testing.assert_close(logits(found), hf_logits(hf, TOKENS), atol=1e-4, rtol=0.0)
    assert resident(found) == weight_bytes(found.spec, found.build)


def test_at_most_one_layer_is_in_memory_unquantized(tmp_path: Path) -> None:
    unquantized(tmp_path)
    alive: list[int] = []
    packed: list[weakref.ref[Any]] = []

    def pack_groups(weight: Any) -> Any:
        alive.append(sum(ref() is not None for ref in packed))
        packed.append(weakref.ref(weight.codes))
        return weight.shape  # forgets the codes, so that only other references could keep them

    load(tmp_path, "int8", dataclasses.replace(OPS, pack_groups=pack_groups))
    assert len(alive) == 8 and max(alive) == 0


def settings(folder: Path, **more: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, num_gpu_blocks_override=20, **more)


def test_an_engine_quantizes_and_says_how_large_its_weights_are(tmp_path: Path) -> None:
    unquantized(tmp_path)
    core = build_engine(settings(tmp_path, quantization="int8"))
    model = load(tmp_path, "int8")
    assert core.info().weight_bytes == weight_bytes(model.spec, model.build) < 0.6 * weight_bytes(model.spec, make_build())
    core.close()


def test_the_name_of_the_checkpoints_own_format_changes_nothing_and_another_one_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, AWQ, awq_quantizer(32))
    build_engine(settings(tmp_path, quantization="awq")).close()
    with pytest.raises(InvalidInput, match="quantization is 'fp8', but the checkpoint is stored as 'awq': leave quantization out"):
        build_engine(settings(tmp_path, quantization="fp8"))


@pytest.mark.parametrize(("kv_cache_dtype", "lines"), [("auto", 1), ("int8", 0)])
def test_a_description_of_a_quantized_kv_cache_that_is_not_followed_is_said(
    kv_cache_dtype: str, lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, FP8 | {"kv_cache_scheme": "static"}, fp8_quantizer(), num_hidden_layers=1)
    build_engine(settings(tmp_path, kv_cache_dtype=kv_cache_dtype)).close()
    assert capsys.readouterr().err.count("although the checkpoint describes a quantized one (kv_cache_scheme)") == lines


@pytest.mark.parametrize(("given", "here"), [("awq_marlin", "awq"), ("gptq_marlin", "gptq"), ("ptpc_fp8", "fp8"), (None, None)])
def test_vllms_names_are_known(given: str | None, here: str | None) -> None:
    assert EngineConfig.from_kwargs(quantization=given).quantization == here


def test_a_format_that_the_checkpoint_is_not_in_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unquantized(tmp_path)
    with pytest.raises(InvalidInput, match="quantization is 'gptq', but the checkpoint is not quantized: leave quantization out, or name"):
        build_engine(settings(tmp_path, quantization="gptq"))
    monkeypatch.setattr(bitsandbytes, "is_installed", lambda: False)
    with pytest.raises(NotSupportedYet, match="needs the package bitsandbytes: run `pip install"):
        build_engine(settings(tmp_path, quantization="bitsandbytes"))
    with pytest.raises(InvalidInput, match=r"quantization must be one of awq, .*got 'modelopt'"):
        settings(tmp_path, quantization="modelopt")
