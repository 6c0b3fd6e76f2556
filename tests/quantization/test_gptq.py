"""GPTQ checkpoints give the logits of their dequantized weights, with every variant of the layout."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.errors import ModelError, NotSupportedYet
from minivllm.families import LinearSpec
from minivllm.models.loader import weight_bytes
from minivllm.quantization.gptq import method_of
from minivllm.quantization.packing import pack_bits, pack_gptq, pack_gptq_zeros
from minivllm.quantization.parts import PartsMatmul
from tests.models.test_loader import rewrite
from tests.quantization.checkpoints import Quantized, check, grouped, in_groups, load, logits, resident, ungrouped, write

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def padded(codes: Tensor, count: int, dim: int) -> Tensor:
    """Zeros up to a multiple of `count`, as GPTQModel packs a vocabulary that does not fill its last words."""
    shape = list(codes.shape)
    shape[dim] = -shape[dim] % count
    return torch.cat([codes, codes.new_zeros(shape)], dim)


def quantizer(bits: int = 4, group: int = 32, sym: bool = True, desc_act: bool = False, v2: bool = False, head: bool = False,
              order_of: Any = lambda name: name.rsplit(".", 1)[0], g_idx: bool = True) -> Any:
    """Stores layers as AutoGPTQ does. order_of: name -> what the order of inputs depends on. g_idx: write it."""
    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if "head" in name and not head:
            return None
        cols = weight.shape[1]
        seed = sum(map(ord, order_of(name)))
        order = torch.randperm(cols, generator=torch.Generator().manual_seed(seed)) if desc_act else torch.arange(cols)
        codes, scales, zeros = grouped(weight[:, order], bits, group, sym)
        group_of = torch.empty(cols, dtype=torch.long).scatter_(0, order, in_groups(cols, group))
        codes = codes[:, order.argsort()]
        rows = padded(zeros.t(), 32, 1)
        tensors = {"qweight": pack_gptq(codes.t(), bits), "scales": scales.t(), "g_idx": group_of.int(),
                   "qzeros": (pack_bits(rows, bits, 1) if v2 else pack_gptq_zeros(rows, bits))[:, : -(-len(weight) * bits // 32)]}
        if not g_idx:
            del tensors["g_idx"]
        return tensors, ungrouped(codes, scales, zeros, group_of)
    return quantize


@pytest.mark.parametrize(("settings", "model"), [
    ({}, {}), ({"sym": False}, {}), ({"group_size": -1, "sym": False}, {}), ({"group_size": 128}, {"intermediate_size": 192}),
    ({"bits": 8}, {}), ({"bits": 8, "sym": False}, {}), ({"bits": 2, "sym": False}, {}), ({"bits": 3, "sym": False}, {}), ({"bits": 3}, {}),
    ({"desc_act": True}, {}), ({"desc_act": True, "static_groups": True}, {}),
    ({"desc_act": True, "sym": False, "bits": 8}, {"family": "Qwen2"}),
    ({"desc_act": True, "group_size": 64}, {}), ({"desc_act": True, "group_size": -1}, {}),  # 96 inputs: groups of 64 and 32
    ({"checkpoint_format": "gptq_v2", "sym": False}, {}), ({"format": "gptq_v2", "sym": False, "bits": 3}, {}),
    *(({"sym": False, "group_size": 16, "bits": bits}, {"num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 20})
      for bits in (2, 3, 4)),  # 20 outputs
    ({"lm_head": True, "sym": False}, {}), ({"lm_head": True, "bits": 3}, {"vocab_size": 99}),
    ({}, {"family": "OPT", "num_key_value_heads": None, "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
])
def test_logits_equal_those_of_the_dequantized_weights(settings: dict[str, Any], model: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIG | settings
    v2 = "gptq_v2" in (config.get("format"), config.get("checkpoint_format"))
    ordered = config["desc_act"] and not config.get("static_groups", False)
    quantize = quantizer(config["bits"], config["group_size"], config["sym"], ordered, v2, config.get("lm_head", False))

    def blocks_only(name: str, weight: Tensor) -> Quantized | None:
        return None if "project" in name else quantize(name, weight)

    check(tmp_path, write(tmp_path, config, blocks_only, **model))


def test_parts_with_different_orders_are_separate_products(tmp_path: Path) -> None:
    hf = write(tmp_path, CONFIG | {"desc_act": True, "sym": False}, quantizer(sym=False, desc_act=True, order_of=lambda name: name))
    layer = check_logits(tmp_path, hf).layers[0]
    assert isinstance(layer.attention.qkv._matmul, PartsMatmul) and isinstance(layer.mlp.up._matmul, PartsMatmul)


def check_logits(folder: Path, hf: Any) -> Any:
    from tests.models.tiny import hf_logits
    from tests.quantization.checkpoints import TOKENS

    model = load(folder)
    torch.testing.assert_close(logits(model), hf_logits(hf, TOKENS), atol=1e-4, rtol=0.0)
    return model


def test_an_order_that_the_configuration_does_not_announce_is_used(tmp_path: Path) -> None:
    check_logits(tmp_path, write(tmp_path, CONFIG, quantizer(desc_act=True)))


def test_g_idx_may_be_missing_only_if_inputs_are_in_order(tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, CONFIG, quantizer(g_idx=False)))
    write(tmp_path, CONFIG | {"desc_act": True}, quantizer(g_idx=False))
    with pytest.raises(ModelError, match=r"missing: model.layers.0.self_attn.q_proj.g_idx \[64\]"):
        load(tmp_path)


def test_zeros_for_layers_without_bias_are_skipped(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.bias"
    check(tmp_path, write(tmp_path, CONFIG, quantizer(), extra={name: torch.zeros(64)}))
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(ModelError, match=f"unexpected: {name}"):
        load(tmp_path)


def test_only_the_named_modules_of_a_block_are_quantized(tmp_path: Path) -> None:
    only = [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]

    def quantize(name: str, weight: Tensor) -> Quantized | None:
        return quantizer()(name, weight) if name.endswith(("k_proj", "v_proj", "down_proj")) else None

    check(tmp_path, write(tmp_path, CONFIG | {"modules_in_block_to_quantize": only}, quantize))


@pytest.mark.parametrize(("announced", "stored"), [("gptq_v2", False), ("gptq", True)])
def test_zeros_of_the_other_checkpoint_format_are_an_error(announced: str, stored: bool, tmp_path: Path) -> None:
    write(tmp_path, CONFIG | {"checkpoint_format": announced}, quantizer(v2=stored))
    with pytest.raises(ModelError, match=rf"zeros .* are {9 if stored else 7} as {announced} .*with sym they are 8: correct check"):
        load(tmp_path)


def test_fields_that_record_how_a_checkpoint_was_made_change_nothing() -> None:
    made = {"meta": {"quantizer": ["gptqmodel:5"]}, "damp_percent": 0.1, "true_sequential": True, "provider": "auto-round", "iters": 200,
            "block_name_to_quantize": "model.layers,visual.blocks", "unknown": None, "also_unknown": False, "extra_config": {}}
    linear = LinearSpec("layers.0.down", (64,), 96, ("layers.0.mlp.down_proj",), False, "row")
    assert method_of(CONFIG | made)(linear) == method_of(CONFIG)(linear)


def test_exclusions_of_dynamic_come_first_and_then_the_first_pattern_that_matches(tmp_path: Path) -> None:
    dynamic = {r"-:model\.layers\.0\.mlp": {}, r"+:.*\.down_proj": {"bits": 8, "group_size": 48}, r".*\.(k|v)_proj$": {"sym": False},
               r".*\.v_proj$": {"bits": 2}, "-:lm_head": {}, r"-:model\.layers\.1\.mlp\.down": {}}

    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if name.startswith(("model.layers.0.mlp", "model.layers.1.mlp.down")) or "head" in name:
            return None
        if name.endswith("down_proj"):
            return quantizer(8, 48)(name, weight)
        return quantizer(sym=not name.endswith(("k_proj", "v_proj")))(name, weight)

    check(tmp_path, write(tmp_path, CONFIG | {"dynamic": dynamic, "lm_head": True}, quantize))


def test_the_separate_file_of_old_checkpoints_is_read(tmp_path: Path) -> None:
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": True, "sym": True, "true_sequential": True}
    hf = write(tmp_path, old, quantizer(desc_act=True), separate_file="quantize_config.json")
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    check(tmp_path, hf)


@pytest.mark.parametrize("change", [{}, {"desc_act": True}, {"bits": 3}, {"lm_head": True}])
def test_random_weights_run(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, CONFIG | change, quantizer())
    model = load(tmp_path, "dummy")
    assert bool(logits(model).isfinite().all())
    assert resident(model) == weight_bytes(model.spec, model.build) or change  # without a random order, and zeros of whole bytes


def test_a_group_size_that_the_weights_contradict_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, CONFIG | {"desc_act": True}, quantizer(desc_act=True))
    rewrite(tmp_path, lambda tensors: tensors["model.layers.0.mlp.down_proj.g_idx"].fill_(0))
    with pytest.raises(ModelError, match="does not divide its 96 inputs into groups of 32"):
        load(tmp_path)


@pytest.mark.parametrize(("change", "says"), [
    ({"bits": 5}, r"gptq with bits 5\) .* bits 2 or 3 or 4 or 8"), ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({"format": "gptq_p"}, "checkpoint_format 'gptq_p'"), ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    ({"is_marlin_format": True}, "is_marlin_format True"), ({"dynamic": {"x": {"bits": 6}}}, "bits 6"),
    ({"dynamic": {"x": {"pack_dtype": "int8"}}}, r"quantization_config.dynamic\['x'\]: pack_dtype 'int8' is not known"),
    ({"dynamic": {"x": {"checkpoint_format": "gptq_v2"}}}, r"dynamic\['x'\]: checkpoint_format 'gptq_v2' is not known"),
    ({"dynamic": {"-:x": {"bits": 8}}}, r"dynamic\['-:x'\]: bits 8 is not known"),
    ({"adapter": {"path": "x"}}, "adapter .* is not known in gptq"), ({"modules_to_not_convert": ["x"]}, "modules_to_not_convert"),
    ({"block_name_to_quantize": "model.vision"}, "block_name_to_quantize 'model.vision'"), ({"data_type": "mx_fp"}, "data_type 'mx_fp'"),
])
def test_another_layout_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(NotSupportedYet, match=says):
        method_of({**CONFIG, **change})


@pytest.mark.parametrize(("change", "says"), [
    ({"format": "gptq_v2", "checkpoint_format": "gptq"}, "checkpoint_format 'gptq' and format 'gptq_v2' contradict each other"),
    ({"static_groups": "yes"}, "'static_groups' must be of type bool"),
    ({"bits": True}, "'bits' must be of type int"), ({"group_size": -2}, "group_size must be"),
    ({"dynamic": []}, "'dynamic' must be of type"), ({"bits": None}, "'bits' must be of type int, got null"),
    ({"modules_in_block_to_quantize": [["q_proj"], [3]]}, "modules_in_block_to_quantize must be a list of names, and contains 3"),
    ({"dynamic": {"x": 1}}, "dynamic has no object of fields for 'x'"), ({"sym": "yes"}, "'sym' must be of type bool"),
])
def test_a_damaged_configuration_is_an_error(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        method_of({**CONFIG, **change})


def test_a_pattern_that_is_no_regular_expression_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"dynamic has '\(', which is no regular expression"):
        method_of(CONFIG | {"dynamic": {"-:(": {}}})
