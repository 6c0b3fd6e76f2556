"""bitsandbytes checkpoints: nf4 and fp4 with and without double quantization, and LLM.int8."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.errors import ModelError, NotSupportedYet
from minivllm.quantization import bitsandbytes
from minivllm.quantization.bitsandbytes import Bnb4Matmul, method_of
from tests.models.test_loader import rewrite
from tests.models.tiny import hf_logits
from tests.quantization.checkpoints import TOKENS, Quantized, check, load, logits, resident, write
from tests.quantization.test_online import load as load_online
from tests.quantization.test_online import unquantized

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
       "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None}
INT8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "_on_gpu", lambda: False)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest number of a table."""
    return (values[..., None] - table).abs().argmin(-1)


def quantizer(kind: str = "nf4", nested: bool = False, block: int = 64, dense: tuple[str, ...] = ("lm_head",)) -> Any:
    """Stores layers as the package does."""
    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if any(part in name for part in dense):
            return None
        table = torch.linspace(-1, 1, 16) ** 3  # the values come from the file
        flat = weight.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
        absmax = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
        tensors: dict[str, Tensor] = {"weight.quant_map": table}
        if nested:
            offset, nested_table = float(absmax.mean()), torch.linspace(-1, 1, 256)
            parts = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
            scale = parts.abs().amax(1)
            codes = nearest(parts / scale[:, None], nested_table).flatten()[: len(absmax)]
            absmax = (nested_table[codes].view(-1) * scale.repeat_interleave(256)[: len(codes)]) + offset
            tensors |= {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": scale, "weight.nested_quant_map": nested_table}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            tensors["weight.absmax"] = absmax
        codes = nearest(blocks / absmax[:, None], table).flatten()[: len(flat)]
        tensors["weight"] = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors, (table[codes] * absmax.repeat_interleave(block)[: len(flat)]).view_as(weight)
    return quantize


@pytest.mark.parametrize(("quantize", "model"), [
    (quantizer(), {}), (quantizer(nested=True), {"family": "Qwen2", "tie_word_embeddings": True}), (quantizer(block=128, nested=True), {}),
    (quantizer(), {"hidden_size": 72, "intermediate_size": 100, "head_dim": 16}),  # blocks that span rows, and a last one that is smaller
])
def test_4_bit_weights_are_dequantized_with_a_line(
    quantize: Any, model: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    check(tmp_path, write(tmp_path, NF4, quantize, **model))
    assert capsys.readouterr().err.count("the nf4 weights of this checkpoint are dequantized while they are loaded") == 1


def int8_quantizer(name: str, weight: Tensor) -> Quantized | None:
    if "head" in name:
        return None
    scb = weight.abs().amax(1)
    codes = (weight / scb[:, None] * 127).round().to(torch.int8)
    return {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}, codes * scb[:, None] / 127


def test_int8_weights_stay_packed(tmp_path: Path) -> None:
    model = check(tmp_path, write(tmp_path, INT8, int8_quantizer))
    assert model.layers[0].mlp.down._matmul.packed.rest.bits == 8
    rewrite(tmp_path, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_format"].fill_(2))
    with pytest.raises(ModelError, match=r"unexpected: \S+up_proj.weight_format"):
        load(tmp_path)


def test_skipped_modules_are_unquantized(tmp_path: Path) -> None:
    skipped = ["model.layers.1.mlp", "o_proj", "lm_head"]
    hf = write(tmp_path, NF4 | {"llm_int8_skip_modules": skipped}, quantizer(dense=("layers.1.mlp", "o_proj", "lm_head")))
    check(tmp_path, hf)


@pytest.mark.parametrize(("change", "says"), [
    ({"shape": "x"}, "shape must be 2 sizes of at least 1, got 'x'"), ({"blocksize": 0}, "blocksize must be 1 size of at least 1, got 0"),
    ({"blocksize": 128}, "weight.absmax has 48 numbers, not 96"), ({"nested_offset": None}, "nested_offset must be a number"),
    (None, "blocksize"),
])
def test_a_state_that_does_not_describe_its_weight_is_an_error(change: dict[str, Any] | None, says: str, tmp_path: Path) -> None:
    write(tmp_path, NF4, quantizer(nested=True))
    name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"

    def damage(tensors: dict[str, Tensor]) -> None:
        state = b"{" if change is None else json.dumps(json.loads(bytes(tensors[name].tolist())) | change).encode()
        tensors[name] = torch.tensor(list(state), dtype=torch.uint8)
    rewrite(tmp_path, damage)
    with pytest.raises(ModelError, match=f"{name} in model.safetensors .*{says}"):
        load(tmp_path)


def test_weights_of_the_other_type_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, NF4 | {"bnb_4bit_quant_type": "fp4"}, quantizer("nf4"))
    with pytest.raises(ModelError, match=r"unexpected: \S+.weight.quant_state.bitsandbytes__nf4"):
        load(tmp_path)


@pytest.mark.parametrize("missing", ["weight.absmax", "weight.quant_state.bitsandbytes__nf4"])
def test_a_missing_part_is_an_error(missing: str, tmp_path: Path) -> None:
    write(tmp_path, NF4, quantizer())
    rewrite(tmp_path, lambda tensors: tensors.pop(f"model.layers.0.mlp.up_proj.{missing}"))
    with pytest.raises(ModelError, match=r"(wrong shape|unexpected): \S+up_proj.weight"):
        load(tmp_path)


@pytest.mark.parametrize(("change", "says"), [
    ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4'.*nf4 or fp4"), ({"load_in_4bit": False}, "load_in_4bit False"),
    ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"), ({"load_in_8bit": True}, "load_in_4bit True"),
    ({"_load_in_8bit": True}, "_load_in_8bit True"), ({"bnb_4bit_compute_dtype": "float64"}, "bnb_4bit_compute_dtype 'float64'"),
    ({"load_in_4bit": False, "load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight True"),
    ({"target_parameters": ["x"]}, "target_parameters .* is not known in bitsandbytes"),
])
def test_other_variants_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(NotSupportedYet, match=says):
        method_of(NF4 | change)


# ---- with the package


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_the_package_have_its_values(
    kind: str, nested: bool, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    monkeypatch.setattr(bitsandbytes, "_on_gpu", lambda: packed)

    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if "head" in name:
            return None
        codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        stored = {f"weight.{suffix}": t for suffix, t in state.as_dict(packed=True).items()}
        return {"weight": codes, **stored}, functional.dequantize_4bit(codes, state)

    hf = write(tmp_path, NF4 | {"bnb_4bit_quant_type": kind}, quantize, intermediate_size=128)
    assert isinstance(check(tmp_path, hf, atol=1e-3).layers[0].mlp.down._matmul, Bnb4Matmul) == packed


def test_a_checkpoint_that_transformers_wrote_has_its_logits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes"), pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    unquantized(tmp_path / "whole", hidden_size=128, intermediate_size=128)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    settings.bnb_4bit_compute_dtype = torch.float32
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", dtype=torch.float32, device_map="cpu", quantization_config=settings)
    hf.save_pretrained(tmp_path / "packed")
    check(tmp_path / "packed", hf)


def test_int8_weights_of_the_package_have_its_values(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional

    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if "head" in name:
            return None
        codes, scb, _ = functional.int8_vectorwise_quant(weight.half())
        return {"weight": codes, "SCB": scb}, functional.int8_vectorwise_dequant(codes, scb)

    check(tmp_path, write(tmp_path, INT8, quantize), atol=1e-3)


def test_the_package_quantizes_while_loading(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    hf = unquantized(tmp_path, intermediate_size=128)
    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear) and "head" not in name:
            module.weight.data = functional.dequantize_4bit(*functional.quantize_4bit(module.weight.data, quant_type="nf4"))
    model = load_online(tmp_path, "bitsandbytes")
    torch.testing.assert_close(logits(model), hf_logits(hf, TOKENS), atol=1e-3, rtol=0.0)
    assert (resident(model) == model.spec and False) or resident(model) > 0
