"""compressed-tensors checkpoints give the logits of their dequantized weights, and the library's own files too."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.errors import ModelError, NotSupportedYet
from minivllm.quantization.compressed_tensors import method_of
from minivllm.quantization.packing import pack_bits
from tests.models.test_loader import rewrite
from tests.quantization.checkpoints import Quantized, check, grouped, in_groups, load, logits, ungrouped, write
from tests.quantization.test_fp8 import quantizer as fp8_quantizer

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def group(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, targets: tuple[str, ...] = ("Linear",)) -> Any:
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None, "format": layout}


def config(*groups: Any, ignore: tuple[str, ...] = ("lm_head",), **more: Any) -> dict[str, Any]:
    """format: of the first group, as files of one format have it."""
    return {"quant_method": "compressed-tensors", "format": groups[0]["format"], "ignore": list(ignore),
            "config_groups": {f"group_{i}": {k: v for k, v in g.items() if len(groups) > 1 or k != "format"} for i, g in enumerate(groups)},
            **more}


def padded(codes: Tensor, dim: int) -> Tensor:
    shape = list(codes.shape)
    shape[dim] = -shape[dim] % 32
    return torch.cat([codes, codes.new_zeros(shape)], dim)


def quantizer(weights: dict[str, Any], packed: bool = True, ordered: bool = False, dense: tuple[str, ...] = ("head",)) -> Any:
    """Stores layers as the library's compressors do."""
    bits, sym, size = weights["num_bits"], weights["symmetric"], weights.get("group_size", -1)

    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if any(part in name for part in dense):
            return None
        (n, k), group_of = weight.shape, in_groups(weight.shape[1], size)
        if ordered:
            group_of = group_of[torch.randperm(k, generator=torch.Generator().manual_seed(len(name.rsplit(".", 1)[0])))]
        order = group_of.argsort(stable=True)
        codes, scales, zeros = grouped(weight[:, order], bits, size, sym)
        codes = codes[:, order.argsort()]
        tensors = {"weight_scale": scales}
        if packed:
            words = pack_bits(padded(codes, 1), bits, 1)[:, : -(-k * bits // 32)]
            tensors |= {"weight_packed": words, "weight_shape": torch.tensor([n, k])}
        else:
            tensors["weight"] = (codes.short() - 128).to(torch.int8)
        if not sym:
            tensors["weight_zero_point"] = (pack_bits(padded(zeros, 0), bits, 0)[: -(-n * bits // 32)] if packed else
                                            (zeros.short() - 128).to(torch.int8))
        if ordered:
            tensors["weight_g_idx"] = group_of.int()
        return tensors, ungrouped(codes, scales, zeros, group_of)
    return quantize


@pytest.mark.parametrize(("described", "quantize", "model"), [
    (config(group("pack-quantized", INT4)), quantizer(INT4), {}),
    (config(group("pack-quantized", INT4 | {"symmetric": False})), quantizer(INT4 | {"symmetric": False}), {"family": "Qwen2"}),
    (config(group("pack-quantized", INT8)), quantizer(INT8), {}),
    (config(group("pack-quantized", INT8 | {"symmetric": False}), ignore=()), quantizer(INT8 | {"symmetric": False}, dense=()), {}),
    (config(group("pack-quantized", INT4 | {"num_bits": 3, "symmetric": False}), ignore=()),
     quantizer(INT4 | {"num_bits": 3, "symmetric": False}, dense=()), {}),
    (config(group("pack-quantized", INT4 | {"actorder": "group"})), quantizer(INT4, ordered=True), {}),
    (config(group("pack-quantized", INT4 | {"actorder": "weight"})), quantizer(INT4), {}),
    (config(group("int-quantized", INT8, INT8 | {"dynamic": True, "strategy": "token"})), quantizer(INT8, packed=False), {}),
    (config(group("int-quantized", INT8 | {"strategy": "group", "group_size": 32, "actorder": "group"})),
     quantizer(INT8 | {"group_size": 32}, packed=False, ordered=True), {}),
    (config(group("naive-quantized", INT8 | {"symmetric": False, "strategy": "group", "group_size": 32})),
     quantizer(INT8 | {"symmetric": False, "group_size": 32}, packed=False), {}),
    (config(group("float-quantized", FP8, {"num_bits": 8, "type": "float"})), fp8_quantizer(shape=(1,), inputs="input_scale"), {}),
    (config(group("float-quantized", FP8, FP8)), fp8_quantizer(shape=(1,), inputs="input_scale"), {}),
    (config(group("float-quantized", FP8 | {"strategy": "channel"}, DYNAMIC)), fp8_quantizer((1, 64)), {"intermediate_size": 64}),
    (config(group("naive-quantized", FP8 | {"strategy": "block", "block_structure": [32, 32]}, DYNAMIC)), fp8_quantizer((32, 32)), {}),
    (config(group("float-quantized", FP8)), fp8_quantizer(dense=("head",)), {"family": "OPT", "num_key_value_heads": None, "ffn_dim": 96}),
])
def test_logits_equal_those_of_the_dequantized_weights(described: Any, quantize: Any, model: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, write(tmp_path, described, quantize, **model))


def test_groups_are_chosen_by_name_then_by_pattern_then_by_class(tmp_path: Path) -> None:
    described = config(
        group("pack-quantized", INT4), group("float-quantized", FP8, DYNAMIC, (r"re:.*\.(k|v)_proj$", "re:.*o_proj")),
        group("int-quantized", INT8, None, ("model.layers.1.self_attn.k_proj",)), ignore=("re:.*layers.0.mlp", "lm_head"),
        format="mixed-precision")

    def quantize(name: str, weight: Tensor) -> Quantized | None:
        if "layers.0.mlp" in name or "head" in name:
            return None
        if name == "model.layers.1.self_attn.k_proj":
            return quantizer(INT8, packed=False)(name, weight)
        return (fp8_quantizer() if name.endswith(("k_proj", "v_proj", "o_proj")) else quantizer(INT4))(name, weight)

    check(tmp_path, write(tmp_path, described, quantize))


def test_zeros_of_symmetric_weights_and_scales_of_inputs_are_skipped(tmp_path: Path) -> None:
    described = config(group("int-quantized", INT8, INT8 | {"strategy": "tensor"}), kv_cache_scheme={"num_bits": 8, "type": "float"})
    hf = write(tmp_path, described, quantizer(INT8, packed=False))
    extra = {"weight_zero_point": torch.zeros(64, 1, dtype=torch.int8), "input_scale": torch.ones(1), "input_zero_point": torch.zeros(1)}
    rewrite(tmp_path, lambda tensors: tensors.update({f"model.layers.0.mlp.down_proj.{name}": t for name, t in extra.items()}))
    check(tmp_path, hf)


@pytest.mark.parametrize(("name", "values"), [("weight_zero_point", torch.ones(64, 1, dtype=torch.int8)),
                                              ("weight_shape", torch.tensor([63, 96]))])
def test_tensors_that_contradict_the_weights_are_an_error(name: str, values: Tensor, tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.down_proj"
    write(tmp_path, config(group("int-quantized", INT8)), quantizer(INT8, packed=False), extra={f"{layer}.{name}": values})
    with pytest.raises(ModelError, match=f"unexpected: {layer}.{name}"):
        load(tmp_path)


def test_weights_whose_inputs_are_not_quantized_here_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, config(group("int-quantized", INT8, INT8 | {"dynamic": True, "strategy": "token"})), quantizer(INT8, packed=False))
    load(tmp_path)
    assert capsys.readouterr().err.count("inputs of the int8 weights stay in 16 bits, where the checkpoint describes 8") == 1


@pytest.mark.parametrize("weights", [INT4, INT4 | {"symmetric": False, "actorder": "group"}, INT8])
def test_random_weights_run(weights: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, config(group("pack-quantized", weights)), quantizer(weights))
    assert bool(logits(load(tmp_path, "dummy")).isfinite().all())


@pytest.mark.parametrize(("described", "says"), [
    *((config(group(layout, INT4)), f"format '{layout}'.*pack-quantized or int-quantized") for layout in
      ("marlin-24", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "dense", "sparse-24-bitmask")),
    (config(group("pack-quantized", INT4), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format 'sparse-24"),
    (config(group("pack-quantized", INT4), transform_config={"config_groups": {"u": {}}}), "transform_config"),
    (config(group("pack-quantized", INT4 | {"num_bits": 5})), "num_bits in format pack-quantized 5"),
    (config(group("pack-quantized", INT4 | {"actorder": "sideways"})), "actorder 'sideways'"),
    (config(group("int-quantized", INT4)), "num_bits in format int-quantized 4"),
    (config(group("float-quantized", FP8 | {"num_bits": 4})), "num_bits of float weights 4"),
    (config(group("float-quantized", FP8 | {"strategy": "group", "group_size": 16})), "strategy of float weights 'group'"),
    (config(group("pack-quantized", FP8)), "format of float weights 'pack-quantized'"),
    (config(group("pack-quantized", INT4) | {"output_activations": FP8}), "output_activations"),
    (config(group("pack-quantized", INT4) | {"x": 1}), r"quantization_config.config_groups.group_0: x 1 is not known"),
    (config(group("pack-quantized", INT4 | {"num_bitz": 3})), "weights: num_bitz 3 is not known .* did you mean 'num_bits'"),
    (config(group("pack-quantized", INT4), moe_sparsity_config={"x": 1}), "moe_sparsity_config"),
    (config(group("pack-quantized", INT4), quantization_status="decompressed"), "quantization_status 'decompressed'"),
    (config(group("pack-quantized", INT4, targets=("Embedding", "Linear"))), "targets 'Embedding'.* targets Linear"),
    (config(group("pack-quantized", INT4 | {"dynamic": True})), "dynamic of weights True"),
    (config(group("float-quantized", FP8 | {"symmetric": False})), "symmetric of float weights False"),
    *((config(group("float-quantized", FP8, DYNAMIC | change)), says) for change, says in (
        ({"type": "int"}, "type of input_activations 'int'"), ({"num_bits": 4}, "num_bits of input_activations 4"),
        ({"symmetric": False}, "symmetric of input_activations"), ({"dynamic": False}, "strategy of input_activations 'token'"),
        ({"strategy": "group", "group_size": 128}, "strategy of input_activations 'group'"), ({"x": 1}, "input_activations: x 1"))),
    (config(group("pack-quantized", INT4, INT4 | {"strategy": "token", "dynamic": True})), "num_bits of input_activations 4"),
])
def test_other_formats_are_refused_by_name(described: dict[str, Any], says: str) -> None:
    with pytest.raises(NotSupportedYet, match=says):
        method_of(described)


@pytest.mark.parametrize(("change", "says"), [
    ({"config_groups": None}, "'config_groups' must be of type dict"), ({"config_groups": {"g": 1}}, "config_groups.g must be an object"),
    ({"config_groups": {"g": {"targets": ["Linear"]}}}, "has no 'weights'"), ({"ignore": [1]}, "ignore must be a list of names"),
    ({"format": None}, "'format' must be of type str"), ({"config_groups": {}}, "config_groups is empty"),
    ({"kv_cache_scheme": 8}, "'kv_cache_scheme' must be of type dict"),
    (config(group("pack-quantized", INT4 | {"block_structure": [2, 2]})), "block_structure .* needs strategy 'block', got 'group'"),
])
def test_a_damaged_configuration_is_an_error(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        method_of(config(group("pack-quantized", INT4)) | change)


LIBRARY = {
    "int4": group("pack-quantized", INT4), "int4, zeros": group("pack-quantized", INT4 | {"symmetric": False}),
    "int3, zeros": group("pack-quantized", INT4 | {"num_bits": 3, "symmetric": False}),
    "int8 per output": group("int-quantized", INT8), "int8, packed": group("pack-quantized", INT8),
    "fp8": group("float-quantized", FP8), "fp8 per output": group("float-quantized", FP8 | {"strategy": "channel"}),
    "fp8 in blocks": group("float-quantized", FP8 | {"strategy": "block", "block_structure": [32, 32]}),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_files_of_the_library_give_the_weights_that_it_decompresses(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    described = LIBRARY[name]
    scheme = QuantizationScheme(**{key: value for key, value in described.items() if key != "format"})
    weights = scheme.weights
    compressor = BaseCompressor.get_value_from_registry(described["format"])

    def quantize(module: str, weight: Tensor) -> Quantized | None:
        if "head" in module:
            return None
        n, k = weight.shape
        height, width = {"tensor": (n, k), "channel": (1, k), "group": (1, weights.group_size), "block": (32, 32)}[weights.strategy]
        parts = weight.view(n // height, height, k // width, width)
        scale, zero = calculate_qparams(parts.amin((1, 3)), parts.amax((1, 3)), weights)
        scale = scale.flatten() if weights.strategy == "tensor" else scale.half().float() if weights.type == "int" else scale
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.view_as(scale)}
        state = compressor.compress(state, scheme)
        return state, compressor.decompress(state, scheme)["weight"]

    check(tmp_path, write(tmp_path, config(described), quantize))
