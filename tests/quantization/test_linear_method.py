"""A linear method that the package does not contain runs through loader, layers and engine. It is one file (toy_int4.py)."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm.config import EngineConfig
from minivllm.engine.compose import build_engine
from minivllm.errors import ModelError, NotSupportedYet
from minivllm.families import LinearSpec, parse_config
from minivllm.kernels import select
from minivllm.layers.build import BuildContext
from minivllm.layers.linear import Linear
from minivllm.layers.norm import LayerNorm, RMSNorm
from minivllm.models.decoder import Decoder
from minivllm.models.loader import load_model, weight_bytes
from minivllm.quantization.methods import METHODS, method_of, parameters
from minivllm.sampling_params import SamplingParams
from minivllm.worker.worker import Components
from tests.models.paged import Paged
from tests.models.tiny import hf_logits, make_hf
from tests.quantization import toy_int4

CPU = torch.device("cpu")
WITH_TOY = {**METHODS, "toy_int4": toy_int4.method_of}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "qwen3, tied": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "opt, norms after": ("OPT", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}


def quantized(folder: Path, family: str, **config: Any) -> Any:
    """A folder with an int4 checkpoint; returns HF's model with the dequantized weights."""
    hf = make_hf(family, **{"hidden_size": 64, **config})
    tensors: dict[str, torch.Tensor] = {}
    names = {f"{name}.weight": module for name, module in hf.named_modules() if isinstance(module, torch.nn.Linear) and "head" not in name}
    for name, tensor in hf.state_dict().items():
        if name not in names:
            tensors[name] = tensor.clone()
            continue
        packed = toy_int4.quantize(tensor)
        tensors |= {f"{name.removesuffix('weight')}{suffix}": t for suffix, t in packed.items()}
        names[name].weight.data = toy_int4.dequantize(**packed)
    if hf.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    hf.config.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    described["architectures"] = [type(hf).__name__]
    described["quantization_config"] = {"quant_method": "toy_int4", "group_size": toy_int4.GROUP}
    (folder / "config.json").write_text(json.dumps(described))
    return hf


def load(folder: Path, load_format: str = "auto") -> Decoder:
    config = json.loads((folder / "config.json").read_text())
    build = BuildContext(CPU, torch.float32, select(CPU), method_of(config, WITH_TOY))
    return load_model(parse_config(config, methods=WITH_TOY), folder, load_format, build)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_checkpoint_gives_the_logits_of_its_dequantized_weights(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    hf = quantized(tmp_path, family, **config)
    tokens = [(7 * i) % 97 for i in range(29)]
    paged = Paged(load(tmp_path), 29)
    got = torch.cat([paged.run((0, tokens[:20])), *(paged.run((0, [t])) for t in tokens[20:])])
    want = hf_logits(hf, tokens)
    assert want.abs().max() > 0.5
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0.0)


def test_an_engine_built_with_the_method_generates_the_tokens_of_transformers(tmp_path: Path) -> None:
    hf = quantized(tmp_path, "Llama", num_key_value_heads=2)
    config = EngineConfig(model=str(tmp_path), device="cpu", dtype="float32", skip_tokenizer_init=True, num_gpu_blocks_override=20)
    with pytest.raises(NotSupportedYet, match="toy_int4"):
        build_engine(config)
    engine = build_engine(config, Components(methods=WITH_TOY))
    engine.add_request("a", {"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    tokens: list[int] = [5, 6, 7]
    while engine.has_unfinished_requests():
        tokens += [token for delta in engine.step() for token in delta.token_ids]
    engine.close()
    assert tokens[3:] == hf_logits(hf, tokens[:-1]).argmax(-1).tolist()[2:]


def test_the_size_of_packed_weights_is_known_before_they_are_loaded(tmp_path: Path) -> None:
    quantized(tmp_path, "Llama", num_key_value_heads=2)
    model = load(tmp_path)
    packed = sum(t.nbytes for layer in model.layers for linear in (layer.attention.qkv, layer.attention.o, layer.mlp.up, layer.mlp.down)
                 for t in linear._matmul.tensors)
    dense = 4 * (2 * 97 * 64 + 7 * 64)  # table, head and norms
    assert weight_bytes(model.spec, model.build) == packed + dense


def test_random_packed_weights_have_the_declared_shapes_and_run(tmp_path: Path) -> None:
    quantized(tmp_path, "Llama", num_key_value_heads=2)
    model = load(tmp_path, "dummy")
    qweight, scales, zeros = model.layers[0].attention.qkv._matmul.tensors
    assert (qweight.dtype, qweight.shape, scales.shape) == (torch.uint8, (64, 64), (4, 128))
    assert qweight.unique().numel() > 200 and bool((zeros == 8).all())
    assert bool(Paged(model, 4).run((0, [1, 2, 3])).isfinite().all())


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.scales"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 64)


def cast(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.self_attn.k_proj.qweight"] = tensors["model.layers.2.self_attn.k_proj.qweight"].short()


def cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.self_attn.v_proj.zeros"] = tensors["model.layers.2.self_attn.v_proj.zeros"][:, :-1].contiguous()


@pytest.mark.parametrize(("change", "message"), [
    (drop, r"missing: model\.layers\.1\.mlp\.up_proj\.scales"), (add, r"unexpected: model\.layers\.1\.mlp\.up_proj\.weight"),
    (cast, r"k_proj\.qweight in model.safetensors has dtype int16, but its method needs uint8"),
    (cut, r"wrong shape: .*v_proj\.zeros"),
])
def test_loading_is_total_for_packed_tensors_too(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path,
) -> None:
    quantized(tmp_path, "Llama", num_key_value_heads=2)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_shard_dimensions_follow_the_methods_declaration() -> None:
    spec = parse_config(make_hf("Llama", attention_bias=True).config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    wanted = parameters(spec, toy_int4.method_of({"group_size": toy_int4.GROUP}))
    dims = {name.removeprefix("layers.0."): p.shard_dim for name, p in wanted.items() if name.startswith(("layers.0.qkv", "layers.0.o"))}
    assert dims == {"qkv.qweight": 1, "qkv.scales": 1, "qkv.zeros": 1, "qkv.bias": 0, "o.qweight": 0, "o.scales": 0, "o.zeros": 0,
                    "o.bias": None}


class Unfused:
    """A product without fused kernels."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, bias)

    def fused(self, x: torch.Tensor, epilogue: Any, residual: torch.Tensor | None) -> None:
        return None


@pytest.mark.parametrize("activation", [None, "silu_and_mul", "silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_composed_layer_equals_the_fused_one(activation: str | None, norm: str, residual: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    build = BuildContext(CPU, torch.float32, select(CPU))
    weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((12, 8), (12,), (5, 8)))
    before = {"none": None, "rms": RMSNorm(build, torch.randn(8, generator=generator), 1e-5),
              "layer": LayerNorm(build, torch.randn(8, generator=generator), None, 1e-5)}[norm]
    spec = LinearSpec("up", (12,), 8, ("up",), True, None)
    stored = {"up.weight": weight, "up.bias": bias}
    fused = Linear.load(build, lambda name: stored[name].clone(), spec, norm=before, activation=activation)
    composed = Linear(build, Unfused(weight), bias=bias, norm=before, activation=activation)
    added = torch.randn(5, 6 if activation == "silu_and_mul" else 12, generator=generator) if residual else None
    got = [linear(x.clone(), None if added is None else added.clone()) for linear in (fused, composed)]
    torch.testing.assert_close(got[0], got[1], atol=1e-5, rtol=1e-5)
