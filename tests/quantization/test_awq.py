"""AWQ checkpoints give the logits of their dequantized weights."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.cli.main import main
from minivllm.errors import ModelError, NotSupportedYet
from minivllm.families import LinearSpec
from minivllm.quantization.awq import AWQMethod, method_of
from minivllm.quantization.packing import pack_awq
from tests.models.tiny import hf_logits
from tests.quantization.checkpoints import TOKENS, Quantized, check, grouped, in_groups, load, logits, ungrouped, write

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}


def quantizer(group: int, *dense: str) -> Any:
    """Stores layers as AutoAWQ does. dense: parts of the names that stay unquantized."""
    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if "head" in name or any(part in name for part in dense):
            return None
        codes, scales, zeros = grouped(weight, 4, group)
        tensors = {"qweight": pack_awq(codes.t()), "qzeros": pack_awq(zeros.t()), "scales": scales.t()}
        return tensors, ungrouped(codes, scales, zeros, in_groups(weight.shape[1], group))
    return quantize


@pytest.mark.parametrize(("group", "model"), [
    (32, {}), (64, {"intermediate_size": 128}), (-1, {}), (128, {"hidden_size": 128, "intermediate_size": 256}),
    (32, {"family": "Qwen3", "head_dim": 16}), (32, {"family": "Glm", "head_dim": 16, "pad_token_id": 0}),  # norms of heads; other order
    (32, {"family": "Qwen2", "tie_word_embeddings": True}), (32, {"family": "OPT", "num_key_value_heads": None, "ffn_dim": 96}),
])
def test_logits_equal_those_of_the_dequantized_weights(group: int, model: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, {**CONFIG, "group_size": group}, quantizer(group), **model))


def test_modules_to_not_convert_are_parts_of_names(tmp_path: Path) -> None:
    dense = ["k_proj", "layers.1.mlp", "model.layers.0.self_attn.o"]
    hf = write(tmp_path, {**CONFIG, "modules_to_not_convert": [*dense, "lm_head", "visual"]}, quantizer(32, *dense))
    check(tmp_path, hf)


def test_dynamic_and_lm_head_of_gptqmodel_are_used(tmp_path: Path) -> None:
    config = {**CONFIG, "lm_head": True, "desc_act": True, "dynamic": {".*down_proj": {"group_size": 48}, "-:.*layers.1.mlp": {}}}
    assert isinstance(method_of(config)(LinearSpec("head", (96,), 64, ("lm_head",), False, "column")), AWQMethod)

    def quantize(name: str, weight: Tensor) -> Quantized | None:
        return None if "layers.1.mlp" in name else quantizer(48 if "down" in name else 32)(name, weight)

    check(tmp_path, write(tmp_path, config | {"lm_head": False}, quantize))


def test_outputs_that_do_not_fill_words_are_an_error() -> None:
    with pytest.raises(NotSupportedYet, match=r"AWQ stores 8 outputs in a word, and a layer has \[64, 12\]"):
        AWQMethod(32).parameters((64, 12), 64)


@pytest.mark.parametrize("file", ["quant_config.json", "quantize_config.json"])
def test_the_separate_file_of_old_checkpoints_is_read(file: str, tmp_path: Path) -> None:
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    check(tmp_path, write(tmp_path, old, quantizer(32), separate_file=file))


def test_scales_of_16_bits_keep_their_values_and_their_size(tmp_path: Path) -> None:
    def quantize(name: str, weight: Tensor) -> Quantized | None:
        found = quantizer(32)(name, weight)
        if found is None:
            return None
        scales = (found[0]["scales"].float() * 2.0**-17).bfloat16()  # below the range of float16
        dense = found[1].view(len(weight), -1, 32) / found[0]["scales"].float().t()[..., None] * scales.float().t()[..., None]
        return {**found[0], "scales": scales}, dense.view_as(weight)

    hf = write(tmp_path, CONFIG, quantize)
    packed = check(tmp_path, hf).layers[0].mlp.down._matmul.packed
    assert packed.rest.scales.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float16_checkpoint_runs_in_both_16_bit_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    hf = write(tmp_path, CONFIG, quantizer(32), dtype="float16")
    model = load(tmp_path, dtype=dtype)
    assert model.spec.dtype == "float16" and model.layers[0].mlp.down._matmul.packed.rest.scales.dtype == torch.float16
    want = hf_logits(hf.float(), TOKENS)
    error = (logits(model).float() - want).abs().mean()
    assert error < 1.5 * (hf_logits(hf.to(dtype), TOKENS).float() - want).abs().mean()


def test_random_weights_run(tmp_path: Path) -> None:
    write(tmp_path, CONFIG, quantizer(32))
    assert bool(logits(load(tmp_path, "dummy")).isfinite().all())


@pytest.mark.parametrize(("change", "says"), [
    ({"bits": 8}, r"awq with bits 8\) .* bits 4"), ({"bits": None, "w_bit": 3}, "awq with bits 3"),
    ({"version": "gemv"}, "version 'gemv'.*version gemm"),
    ({"version": "GEMV_FAST"}, "version 'gemv_fast'"), ({"version": None, "format": "llm-awq"}, "format 'llm-awq'"),
    ({"version": "exllama"}, "version 'exllama'"), ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    ({"checkpoint_format": "gemv"}, "checkpoint_format 'gemv'"), ({"act_bits": 8}, "act_bits 8"),
    ({"group_sise": 64}, r"group_sise 64 is not known in awq checkpoints; did you mean 'group_size'\? Set it to null"),
    ({"dynamic": {"x": {"bits": 8}}}, "awq with bits 8"), ({"block_name_to_quantize": "visual"}, "block_name_to_quantize 'visual'"),
])
def test_another_layout_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(NotSupportedYet, match=says):
        method_of({**CONFIG, **change})


def test_another_layout_is_refused_before_anything_is_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {**CONFIG, "version": "gemv"}, quantizer(32))
    assert main(["pull", str(tmp_path)]) == 1
    assert "quantized weights (awq with version 'gemv') are not supported yet: use a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "says"), [
    ({"group_size": 0}, "group_size must be at least 1, or -1"), ({"group_size": "32"}, "'group_size' must be of type int"),
    ({"group_size": None}, "got null"), ({"modules_to_not_convert": [1]}, "modules_to_not_convert must be a list of names"),
    ({"w_bit": 8}, "bits 4 and w_bit 8 contradict each other"), ({"q_group_size": 64}, "group_size 32 and q_group_size 64 contradict"),
    ({"version": 1}, "'version' must be of type str"), ({"zero_point": "yes"}, "'zero_point' must be of type bool"),
])
def test_a_damaged_configuration_is_an_error(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        method_of({**CONFIG, **change})


def test_a_layer_that_is_quantized_against_the_configuration_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {**CONFIG, "modules_to_not_convert": ["down_proj"]}, quantizer(32))
    with pytest.raises(ModelError, match=r"missing: (\S+).weight .*unexpected: \1.qweight"):
        load(tmp_path)
