"""`minivllm quantize`: the algorithms are better than rounding where they should be, and the output loads."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minivllm.cli.main import main
from minivllm.errors import InvalidInput, ModelError
from minivllm.families import parse_config
from minivllm.quantization.methods import METHODS, method_of
from minivllm.quantization.packing import unpack_awq, unpack_bits, unpack_gptq, unpack_gptq_zeros
from minivllm.quantization.quantize import calibration
from minivllm.quantization.quantize.awq import LLAMA, awq
from minivllm.quantization.quantize.checkpoint import awq_tensors, gptq_tensors
from minivllm.quantization.quantize.gptq import gptq
from minivllm.quantization.quantize.groups import Grid, RoundedWeight, round_to_nearest
from minivllm.quantization.quantize.run import quantize
from minivllm.quantization.quantize.settings import QuantizeConfig
from minivllm.quantization.quantize.statistics import observed, output_error
from tests.models.paged import Paged, make_build
from tests.models.tiny import hf_logits, load, make_hf
from tests.quantization import checkpoints

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SEEDS = st.integers(0, 2**31)
FEW: dict[str, Any] = {"num_samples": 4, "seq_len": 32}  # enough for tests of files


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, tokens: int, k: int) -> Tensor:
    """Inputs in a subspace of a quarter of the dimensions, and some noise. [tokens, k]"""
    return randn(seed, tokens, k // 4) @ randn(seed + 1, k // 4, k) + 0.1 * randn(seed + 2, tokens, k)


# ---- the grid

@given(SEEDS, st.sampled_from((2, 3, 4, 8)), st.booleans(), st.sampled_from((0, 1)))
def test_rounding_errs_by_at_most_a_step(seed: int, bits: int, symmetric: bool, lowest_zero: int) -> None:
    weight = randn(seed, 3, 32)
    found = round_to_nearest(weight, Grid(bits, 16, symmetric, lowest_zero))
    assert int(found.codes.max()) < 1 << bits and found.zeros.min() >= lowest_zero and found.zeros.max() < 1 << bits
    error = (found.dequantized() - weight).abs() / found.scales[:, found.groups]
    assert error.max() <= 1.01  # half a step, and half a step because the zero point is rounded too


@pytest.mark.parametrize("weight", [torch.zeros(2, 16), torch.full((2, 16), 3.0), torch.full((2, 16), -1e-9)])
def test_groups_of_equal_weights_are_kept(weight: Tensor) -> None:
    for symmetric in (False, True):
        found = round_to_nearest(weight, Grid(4, 16, symmetric, 1)).dequantized()
        torch.testing.assert_close(found, weight, atol=1e-6, rtol=0.15 if symmetric else 0.01)


# ---- GPTQ and AWQ against rounding

@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_halves_the_output_error_for_correlated_inputs(bits: int, desc_act: bool) -> None:
    x, weight, grid = correlated(1, 512, 256), randn(9, 32, 256), Grid(bits, 32, False, 1)
    hessian = x.t() @ x
    rounded = round_to_nearest(weight, grid).dequantized()
    found = gptq(weight, hessian, grid, desc_act=desc_act)
    assert output_error(found.dequantized() - weight, hessian) < 0.5 * output_error(rounded - weight, hessian)
    assert torch.bincount(found.groups.long()).tolist() == [32] * 8
    assert desc_act == (found.groups.diff() < 0).any()


def test_gptq_equals_the_definition_column_by_column() -> None:
    """Blocks are only a faster order of the same operations: here, one column at a time with the exact inverse."""
    x, weight, grid = correlated(2, 300, 160), randn(3, 4, 160), Grid(4, 160, False, 1)
    hessian = (x.t() @ x).double()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian[order][:, order] + 0.01 * hessian.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    scales, zeros = grid.fit(weight.amin(1), weight.amax(1))
    work, codes = weight[:, order].double(), torch.empty(4, 160)
    for j in range(160):
        inverse = torch.linalg.inv(damped[j:, j:])  # of the columns that are left
        codes[:, j] = grid.round(work[:, j].float(), scales, zeros)
        error = work[:, j] - (codes[:, j] - zeros) * scales
        work[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0]
    found = gptq(weight, hessian.float(), grid)
    assert (found.codes[:, order] != codes).float().mean() < 0.02  # rounding of float32 decides a few


def test_inputs_that_are_always_0_are_rounded_to_nearest() -> None:
    x, weight, grid = correlated(4, 200, 64), randn(5, 8, 64), Grid(4, 32, False, 1)
    x[:, 7] = 0
    assert torch.equal(gptq(weight, x.t() @ x, grid).codes[:, 7], round_to_nearest(weight, grid).codes[:, 7])


class OneLayer(nn.Module):
    """The parts of a decoder layer that folds change, with an outlier channel in the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(64)
        self.self_attn = nn.Module()
        self.self_attn.head_dim = 16
        for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
            setattr(self.self_attn, name, nn.Linear(64, rows))
        with torch.no_grad():
            self.input_layernorm.weight[5] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_layernorm(x)
        return torch.cat([getattr(self.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj")], -1)


@torch.no_grad()
def test_awq_reduces_the_output_error_with_an_outlier_channel() -> None:
    torch.manual_seed(0)
    layer, x, grid = OneLayer(), randn(6, 256, 64), Grid(4, 32, False, 0)
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    with observed(linears) as statistics:
        want = layer(x)
    assert len({id(stats) for stats in statistics.values()}) == 1  # one input, measured once
    exact = {name: linear.weight.clone() for name, linear in linears.items()}
    for linear in linears.values():
        linear.weight.copy_(round_to_nearest(linear.weight, grid).dequantized())
    rounded = (layer(x) - want).square().sum()
    for name, linear in linears.items():
        linear.weight.copy_(exact[name])
    found = awq(layer, statistics, LLAMA[:1], grid)
    torch.testing.assert_close(layer(x), want, atol=1e-3, rtol=1e-3)  # the folds alone change nothing
    for name, linear in linears.items():
        linear.weight.copy_(found[name].dequantized())
    assert (layer(x) - want).square().sum() < 0.5 * rounded


@pytest.mark.parametrize(("family", "changes"), [
    ("Llama", {"num_key_value_heads": 2}), ("Qwen2", {"num_key_value_heads": 2}), ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    ("Mistral", {"num_key_value_heads": 4, "sliding_window": 16}), ("OPT", {}), ("OPT", {"do_layer_norm_before": False}),
    ("OPT", {"activation_function": "gelu"}),
])
def test_folds_leave_the_logits_unchanged(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """With 16-bit codes, quantization itself changes nothing."""
    from minivllm.quantization.quantize import awq as module
    from minivllm.quantization.quantize.layers import decoder_layers, layer_inputs, linears_of, run_layer

    hf = make_hf(family, **{"hidden_size": 64, **changes})
    ids = torch.arange(40)[None] % 97
    with torch.no_grad():
        want = hf(ids).logits
        inputs = layer_inputs(hf, ids, torch.device("cpu"))
        scaled = []
        for i, layer in enumerate(decoder_layers(hf)):
            with observed(linears_of(layer)) as statistics:
                hidden = list(run_layer(layer, inputs.hidden, inputs.arguments[i], torch.device("cpu")))
            inputs.hidden = hidden
            scaled.append({name: p.clone() for name, p in layer.named_parameters()})
            module.awq(layer, statistics, module.FOLDS[hf.config.model_type], Grid(4, 16, False, 0))
        torch.testing.assert_close(hf(ids).logits, want, atol=2e-3, rtol=2e-3)
    changed = {name for before, layer in zip(scaled, decoder_layers(hf), strict=True)
               for name, p in layer.named_parameters() if not torch.equal(before[name], p)}
    assert len(changed) >= 4


# ---- layouts

def random_weight(seed: int, bits: int, n: int, k: int, group: int) -> RoundedWeight:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, k // group)
    return RoundedWeight(
        torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8), torch.rand(shape, generator=generator).half().float(),
        torch.randint(1, 1 << bits, shape, generator=generator).float(), torch.arange(k, dtype=torch.int32) // group)


@given(SEEDS, st.sampled_from((2, 3, 4, 8)))
def test_gptq_tensors_hold_the_weight(seed: int, bits: int) -> None:
    weight = random_weight(seed, bits, 32, 64, 32)
    found = gptq_tensors(weight, bits)
    assert found["scales"].dtype == torch.float16 and found["g_idx"].dtype == torch.int32
    codes, zeros = unpack_gptq(found["qweight"], bits).float(), unpack_gptq_zeros(found["qzeros"], bits).float()
    g_idx = found["g_idx"].long()
    assert torch.equal(((codes - zeros[g_idx]) * found["scales"].float()[g_idx]).t(), weight.dequantized())


@given(SEEDS)
def test_awq_tensors_hold_the_weight(seed: int) -> None:
    weight = random_weight(seed, 4, 16, 64, 32)
    found = awq_tensors(weight)
    codes, zeros = unpack_awq(found["qweight"]).float(), unpack_awq(found["qzeros"]).float()
    assert torch.equal(((codes.unflatten(0, (2, 32)) - zeros[:, None]) * found["scales"].float()[:, None]).flatten(0, 1).t(),
                       weight.dequantized())


# ---- whole models

def dequantized(folder: Path) -> dict[str, Tensor]:
    """The tensors of an output, each quantized weight as float32 [N, K]."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    found = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[2] in ("weight", "bias")}
    for name, scale in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "scales":
            packed, qzeros, scale = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"], scale.float()
            if config["quant_method"] == "awq":
                codes, zeros = unpack_awq(packed), unpack_awq(qzeros)
                groups = torch.arange(len(codes)) // config["group_size"]
            else:
                codes, zeros = unpack_gptq(packed, config["bits"]), unpack_gptq_zeros(qzeros, config["bits"])
                groups = tensors[f"{module}.g_idx"].long()
            found[f"{module}.weight"] = ((codes.float() - zeros.float()[groups]) * scale[groups]).t()
        elif suffix == "weight_scale":
            packed = tensors.get(f"{module}.weight_packed")
            codes = found[f"{module}.weight"] if packed is None else unpack_bits(packed, 8, 1).float() - 128
            found[f"{module}.weight"] = codes * scale.float()
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] + 3).logits[0]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def run(source: Path, out: Path, **settings: Any) -> list[str]:
    """Quantize with a random model, which amplifies errors. -> the printed lines"""
    said: list[str] = []
    config = QuantizeConfig(**{"device": "cpu", **settings})
    quantize(source, out, config, say=said.append)
    return said


@pytest.mark.parametrize(("settings", "most"), [
    ({"method": "awq", **FEW}, 0.7), ({"method": "gptq", **FEW}, 0.8),
    ({"method": "gptq", "desc_act": True, "symmetric": True, **FEW}, 0.8), ({"method": "gptq", "bits": 8, "group_size": -1, **FEW}, 0.1),
    ({"method": "gptq", "bits": 3, "group_size": 16, **FEW}, 1.1),
    ({"method": "rtn"}, 0.6), ({"method": "fp8"}, 0.3), ({"method": "int8"}, 0.1),
], ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "")
def test_an_output_holds_nearly_the_same_model_and_loads_here(
    settings: dict[str, Any], most: float, tiny_llama: Callable[..., Path], tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoQuantizationConfig

    source = tiny_llama(tie_word_embeddings=True, num_key_value_heads=4)  # 3 bits need multiples of 32 outputs
    said = run(source, tmp_path / "out", **settings)
    assert any("MB of weights" in line for line in said) and "MiB resident" in said[-1]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    want = logits(model)
    found = dequantized(tmp_path / "out")
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert 0 < distance(logits(model), want) < most
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if described["quant_method"] in ("awq", "gptq"):
        parsed = AutoQuantizationConfig.from_dict(dict(described))
        assert (parsed.bits, parsed.group_size) == (described["bits"], described["group_size"])
    here = checkpoints.logits(checkpoints.load(tmp_path / "out"))  # this engine, from the packed tensors
    assert distance(here, hf_logits(model, checkpoints.TOKENS)) < (0.2 if settings["method"] == "fp8" else 1e-3)  # fp8: inputs too
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_transformers_loads_what_it_has_packages_for(method: str, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from transformers import AutoModelForCausalLM

    run(tiny_llama(), tmp_path / "out", method=method)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)
    model.load_state_dict(dequantized(tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert distance(logits(theirs), logits(model)) < (0.2 if method == "fp8" else 1e-3)


@pytest.mark.parametrize(("family", "settings"), [
    ("GPTNeoX", {}), ("Glm", {"num_key_value_heads": 2, "head_dim": 16}), ("Bloom", {}),
    ("Gemma2", {"head_dim": 16, "num_key_value_heads": 2}),
], ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("method", ["rtn", "fp8"])
def test_families_with_another_order_of_rows_have_the_logits_of_their_dequantized_weights(
    method: str, family: str, settings: dict[str, Any], tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    hf = make_hf(family, **{**sizes, **settings})
    hf.save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", method=method)
    hf.load_state_dict(dequantized(tmp_path / "out"), strict=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = load(tmp_path / "out", parse_config(config, methods=METHODS), replace(make_build(), method=method_of(config)))
    tokens = list(range(40, 60))
    torch.testing.assert_close(Paged(model, 20).run((0, tokens)), hf_logits(hf, tokens), atol=2e-3, rtol=0.0)


def test_large_outputs_are_split_into_files_with_an_index(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minivllm.quantization.quantize import checkpoint

    run(tiny_llama(), tmp_path / "whole", method="rtn")
    monkeypatch.setattr(checkpoint, "SHARD", "20KB")
    run(tiny_llama(), tmp_path / "split", method="rtn")
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 1 and {file.name for file in files} == set(index.values())
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == whole.keys() == index.keys() and all(torch.equal(found[name], whole[name]) for name in found)


# ---- what is refused

def test_only_an_empty_folder_is_written_to(tiny_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["quantize", str(tiny_llama()), "--method", "int8", "--device", "cpu"]
    assert main([*argv, "-o", str(tmp_path)]) == 0
    (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"")  # of an earlier, larger output
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*argv, "-o", str(tmp_path)]) == 1
    assert "is not empty: name another folder, or give --overwrite" in capsys.readouterr().err
    assert main([*argv, "-o", str(tmp_path), "--overwrite"]) == 0
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"] and (tmp_path / "notes.txt").exists()
    assert main([*argv, "-o", str(tiny_llama()), "--overwrite"]) == 1
    assert "is the model's own folder" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path), "-o", str(tmp_path / "again"), "--method", "int8"]) == 1
    assert "is quantized already" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "says"), [
    ({"method": "awq", "bits": 8}, "bits must be 4 with method awq, got 8"),
    ({"method": "gptq", "bits": 5}, "bits must be one of 2, 3, 4, 8 with"),
    ({"method": "fp8", "bits": 4}, "bits must be 8 with method fp8"),
    ({"method": "awk"}, "method must be one of .* did you mean 'awq'"),
    ({"method": "fp8", "calibration": "x.txt"}, "calibration has no effect on method fp8, only on awq and gptq: leave it out"),
    ({"method": "awq", "desc_act": True}, "desc_act has no effect on method awq, only on gptq"),
    ({"method": "awq", "group_size": -1}, "group_size must be at least 8, got -1"),
    ({"method": "gptq", "group_size": 0}, "group_size must be at least 8, or -1"),
    ({"method": "gptq", "num_samples": 0}, "num_samples must be in 1"), ({"method": "gptq", "damping": 0.0}, "damping must be in"),
])
def test_wrong_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        QuantizeConfig(**settings)


@pytest.mark.parametrize(("sizes", "settings", "says"), [
    ({}, {"method": "gptq", "group_size": 128}, "group_size 128 does not divide the inputs of every layer \\(32, 64\\): give 32"),
    ({"intermediate_size": 72}, {"method": "awq"}, "group_size 128 or 64 or 32 does not divide .* give 8 or a divisor"),
    ({"intermediate_size": 72}, {"method": "gptq", "bits": 3, "group_size": 8},
     "multiples of 32 outputs and inputs, but self_attn.k_proj has 16 and 32"),
    ({}, {"method": "awq", "calibration": "/no/such.txt"}, "calibration file '/no/such.txt' cannot be read"),
    ({}, {"method": "awq", "calibration": __file__, "num_samples": 4096}, "tokens, but 4096 windows of 512 need 2,097,152: lower"),
    ({}, {"method": "rtn", "device": "cuda"}, "device is cuda, but PyTorch finds no GPU"),
])
def test_what_does_not_fit_the_model_is_refused(
    sizes: dict[str, Any], settings: dict[str, Any], says: str, tiny_llama: Callable[..., Path], tmp_path: Path,
) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InvalidInput, match=says):
        run(tiny_llama(**sizes), tmp_path / "out", **settings)
    assert not any((tmp_path / "out").glob("*"))


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    make_hf("Qwen3Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24).save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"is a mixture of experts .*gate_up_proj.*, which cannot be quantized here yet"):
        run(tmp_path / "source", tmp_path / "out", method="rtn")


def test_a_model_that_makes_no_numbers_is_refused(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama(), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"inputs of mlp.down_proj in layer 0 are not finite"):
        run(source, tmp_path / "out", method="gptq", **FEW)


def test_calibration_reads_plain_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\nthree")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    (tmp_path / "bad.jsonl").write_text('{"txt": "one"}\n')
    assert calibration.read_text(str(tmp_path / "a.txt")) == "one two\nthree"
    assert calibration.read_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"
    with pytest.raises(InvalidInput, match="no JSON object with a field text"):
        calibration.read_text(str(tmp_path / "bad.jsonl"))


def test_the_standard_library_has_text_without_repetition() -> None:
    text = calibration.standard_library(50_000)
    parts = text.split("\n\n")
    assert len(text) >= 50_000 and len(set(parts)) > 0.9 * len(parts)
