"""MXFP4 experts of gpt-oss give the logits of their dequantized weights."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivllm.errors import NotSupportedYet
from minivllm.families import LinearSpec
from minivllm.quantization.dense import DENSE
from minivllm.quantization.mxfp4 import METHOD, VALUES, dequantize, method_of
from tests.models.test_parity import MODELS
from tests.models.tiny import make_hf
from tests.quantization.checkpoints import check, load


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight: [E, N, K] -> blocks [E, N, K / 32, 16], scales [E, N, K / 32], and the values that these hold."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).log2().floor() - 2  # the largest magnitude becomes 4 to 8
    values = torch.tensor([*VALUES, *(-value for value in VALUES)])
    codes = (groups / exponent.exp2()[..., None]).unsqueeze(-1).sub(values).abs().argmin(-1)
    values = (values[codes] * exponent.exp2()[..., None]).flatten(-2)
    return (codes[..., ::2] | codes[..., 1::2] << 4).byte(), (exponent + 127).byte(), values


def test_dequantized_values_are_those_of_transformers() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    torch.manual_seed(0)
    blocks, scales = torch.randint(256, (6, 3, 16), dtype=torch.uint8), torch.randint(100, 140, (6, 3), dtype=torch.uint8)
    want = mxfp4.convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)  # [1, K, N]
    torch.testing.assert_close(dequantize(blocks.flatten(1), scales), want[0].T, atol=0.0, rtol=0.0)


def test_excluded_experts_are_plain_matrices_and_other_fields_are_refused() -> None:
    expert = LinearSpec("layers.1.experts_down.0.0", (64,), 64, ("layers.1.mlp.experts.0.down_proj",), False, "row", dense=True)
    excluded = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1.mlp.experts", "model.layers.*.self_attn"]}
    assert method_of(excluded)(expert) is DENSE and method_of({"quant_method": "mxfp4"})(expert) is METHOD
    with pytest.raises(NotSupportedYet, match="group_size 16 is not known in mxfp4"):
        method_of({"quant_method": "mxfp4", "group_size": 16})


def test_logits_equal_those_of_the_dequantized_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make_hf("GptOss", **{**MODELS["gpt-oss"][1], "hidden_size": 64, "intermediate_size": 96})
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], values = quantize(tensors.pop(name).mT)
        hf.get_parameter(name).data = values.mT.contiguous()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {
        "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"]}}))
    check(tmp_path, hf)
    assert "the experts' weights (mxfp4) are dequantized to float32 while loading" in capsys.readouterr().err
    assert load(tmp_path, "dummy").layers[0].mlp.experts.down.isfinite().all()
