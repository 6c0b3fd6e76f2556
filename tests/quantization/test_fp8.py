"""FP8 checkpoints of AutoFP8, DeepSeek, Qwen, Mistral and Transformers give the logits of their dequantized weights."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.errors import ModelError, NotSupportedYet
from minivllm.quantization.fp8 import method_of
from minivllm.quantization.grouped import GroupedMatmul
from tests.models.test_loader import rewrite
from tests.quantization.checkpoints import Quantized, check, load, logits, write

CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = CONFIG | {"activation_scheme": "static"}
BLOCKS = CONFIG | {"weight_block_size": [32, 32], "fmt": "e4m3"}


def blocks(weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight: [N, K] -> float8 [N, K], scales [ceil(N / height), ceil(K / width)], and the dequantized weight."""
    n, k = weight.shape
    scales = torch.empty(-(-n // height), -(-k // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            scales[i, j] = weight[i * height : (i + 1) * height, j * width : (j + 1) * width].abs().max() / 448
    full = scales.repeat_interleave(height, 0)[:n].repeat_interleave(width, 1)[:, :k]
    codes = (weight / full).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * full


def quantizer(block: tuple[int, int] | None = None, scale: str = "weight_scale", shape: tuple[int, ...] = (),
              inputs: str | None = None, dense: tuple[str, ...] = ("head",)) -> Any:
    """scale, inputs: names of the scales; shape: of one scale for a layer. inputs None: no input scale."""
    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if any(part in name for part in dense):
            return None
        codes, scales, values = blocks(weight, *(block or weight.shape))
        tensors = {"weight": codes, scale: scales if block else scales.view(shape)}
        if inputs is not None:
            tensors[inputs] = torch.tensor(0.01 * len(name)).view(shape)
        return tensors, values
    return quantize


@pytest.mark.parametrize(("config", "quantize", "model"), [
    (CONFIG, quantizer(), {}), (CONFIG, quantizer(shape=(1,)), {"family": "Qwen2"}),
    (STATIC, quantizer(inputs="input_scale"), {"tie_word_embeddings": True}),
    (STATIC | {"weight_block_size": None}, quantizer(scale="weight_scale_inv", inputs="activation_scale"), {"family": "Mistral"}),
    (CONFIG, quantizer((1, 64)), {"intermediate_size": 64}), (BLOCKS, quantizer((32, 32), "weight_scale_inv"), {}),
    (BLOCKS | {"weight_block_size": [128, 128]}, quantizer((128, 128), "weight_scale_inv"), {"hidden_size": 128, "intermediate_size": 256}),
    # Layers that end within a block: 96 outputs and 96 inputs, and keys with 16 outputs.
    (BLOCKS | {"weight_block_size": [64, 64]}, quantizer((64, 64), "weight_scale_inv"), {"num_key_value_heads": 1}),
    (CONFIG, quantizer(dense=("head", "project")), {"family": "OPT", "num_key_value_heads": None, "ffn_dim": 96}),
])
def test_logits_equal_those_of_the_dequantized_weights(config: Any, quantize: Any, model: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, config, quantize, **model))


def test_transformers_dequantizes_the_blocks_to_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    write(tmp_path, BLOCKS, quantizer((32, 32), "weight_scale_inv"))
    settings = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    check(tmp_path, AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map="cpu", quantization_config=settings))


def test_products_know_how_their_inputs_are_quantized(tmp_path: Path) -> None:
    write(tmp_path, STATIC, quantizer(inputs="input_scale"))
    matmul = load(tmp_path).layers[0].attention.qkv._matmul
    assert isinstance(matmul, GroupedMatmul)
    weight = matmul.packed.rest
    assert weight.quantize_input and weight.input_scale.item() == pytest.approx(0.01 * len("model.layers.0.self_attn.q_proj"))


@pytest.mark.parametrize(("key", "dense"), [
    ("modules_to_not_convert", ["model.layers.0.mlp.gate", "lm_head", "model.layers.1.self_attn", "down_proj"]),  # gate is no gate_proj
    ("ignored_layers", ["re:.*layers.1.self_attn", "re:.*lm_head", "re:.*down_proj"]),
])
def test_lists_of_unquantized_modules_follow_their_writers_rules(key: str, dense: list[str], tmp_path: Path) -> None:
    hf = write(tmp_path, CONFIG | {key: dense}, quantizer(dense=("head", "layers.1.self_attn", "down_proj")))
    check(tmp_path, hf)


def test_scales_of_a_quantized_kv_cache_are_skipped_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("k_scale", "v_scale", "k_proj.output_scale")]
    check(tmp_path, write(tmp_path, CONFIG, quantizer(), extra={name: torch.ones(1) for name in names}))
    assert "6 scales for a quantized KV cache in the checkpoint are not used" in capsys.readouterr().err


def test_scales_that_are_powers_of_two_take_one_byte(tmp_path: Path) -> None:
    def quantize(name: str, weight: Tensor) -> Quantized | None:
        found = quantizer((32, 32), "weight_scale_inv")(name, weight)
        if found is None:
            return None
        scale = found[0]["weight_scale_inv"].log2().ceil().exp2()
        full = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        codes = (weight / full).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale.to(torch.float8_e8m0fnu)}, codes.float() * full

    check(tmp_path, write(tmp_path, BLOCKS | {"scale_fmt": "ue8m0"}, quantize))


@pytest.mark.parametrize("extra", [
    {"weight_scale_inv": torch.tensor(5.0)}, {"activation_scale": torch.tensor(5.0)}, {"weight_zero_point": torch.tensor(5.0)},
    {"k_scale": torch.tensor(5.0)},  # of a layer that has no keys
])
def test_a_second_scale_or_a_zero_is_an_error(extra: dict[str, Tensor], tmp_path: Path) -> None:
    write(tmp_path, STATIC, quantizer(inputs="input_scale"), extra={f"model.layers.0.mlp.up_proj.{name}": t for name, t in extra.items()})
    with pytest.raises(ModelError, match=rf"unexpected: \S+up_proj.{next(iter(extra))}"):
        load(tmp_path)


def test_a_missing_scale_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, STATIC, quantizer(inputs="input_scale"))
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.input_scale"))
    with pytest.raises(ModelError, match=r"missing: \S+up_proj.input_scale"):
        load(tmp_path)


@pytest.mark.parametrize("config", [CONFIG, STATIC, BLOCKS])
def test_random_weights_run(config: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, config, quantizer())
    assert bool(logits(load(tmp_path, "dummy")).isfinite().all())


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"activation_scheme": "token"}, NotSupportedYet, "activation_scheme 'token'"), ({"fmt": "e5m2"}, NotSupportedYet, "fmt 'e5m2'"),
    ({"modules_to_convert": ["embed_tokens"]}, NotSupportedYet, "modules_to_convert"),
    ({"scale_fmt": "int"}, NotSupportedYet, "scale_fmt 'int'.* float or ue8m0"), ({"expert_dtype": "fp4"}, NotSupportedYet, "expert_dtype"),
    ({"exclude_modules": ["x"]}, NotSupportedYet, "exclude_modules .* is not known in fp8"), ({"bits": 4}, NotSupportedYet, "bits 4"),
    ({"activation_scale_ub": 1200.0}, NotSupportedYet, "activation_scale_ub 1200.0 is not known"),
    ({"weight_block_size": [128]}, ModelError, "weight_block_size must be a list of two sizes"),
    ({"weight_block_size": [0, 128]}, ModelError, "weight_block_size must be"), ({"ignored_layers": "x"}, ModelError, "'ignored_layers'"),
])
def test_other_variants_are_refused_by_name(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        method_of(CONFIG | change)


def test_the_quantizer_of_these_tests_loses_little() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    codes, scales, values = blocks(weight, 32, 32)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (2, 2)
    assert math.sqrt(((values - weight) ** 2).mean()) < 0.04
