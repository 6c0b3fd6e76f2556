"""The bytes of a plan are those of the loaded tensors, for each storage of the weights; on the hub they are read from headers."""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from minivllm.cli.main import main
from minivllm.config import EngineConfig
from minivllm.engine.plan_model import plan_model
from minivllm.errors import ModelError
from minivllm.families import parse_config
from minivllm.kernels import select
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.models.hub import describe_model
from minivllm.models.loader import load_model
from minivllm.planning.gpus import GPUS
from minivllm.planning.what_if import quantization_config
from minivllm.quantization.methods import METHODS, ONLINE, method_of, parameters
from tests.models.hub_server import serve_hub

CPU = torch.device("cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "tied": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True, "head_dim": 128},
    "opt": {"architectures": ["OPTForCausalLM"], "ffn_dim": 512, "word_embed_proj_dim": 128, "do_layer_norm_before": True},
    "experts": {"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
                "shared_expert_intermediate_size": 512, "decoder_sparse_step": 2},
    "latent": {"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
               "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_group": 4,
               "topk_group": 2, "first_k_dense_replace": 1},
}
BASE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "max_position_embeddings": 128, "torch_dtype": "float32"}


def tensors(part: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that an object of the package holds, each storage once."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        opaque = part.layout == torch._mkldnn  # a CPU with bfloat16 instructions packs weights in a form without a storage
        if opaque or (storage := part.untyped_storage().data_ptr()) not in seen:
            seen.update(() if opaque else (storage,))
            yield part
    elif isinstance(part, dict | list | tuple):
        for item in part.values() if isinstance(part, dict) else part:
            yield from tensors(item, seen)
    elif type(part).__module__.startswith("minivllm."):
        names = {*getattr(part, "__dict__", ()), *(name for cls in type(part).__mro__ for name in getattr(cls, "__slots__", ()))}
        for name in names - {"build"}:
            yield from tensors(getattr(part, name, None), seen)


def held_bytes(part: Any) -> int:
    """Bytes of the tensors that an object holds."""
    return sum(t.numel() * t.element_size() if t.layout == torch._mkldnn else t.untyped_storage().nbytes() for t in tensors(part, set()))


def loaded_bytes(model: Decoder) -> int:
    """Bytes of the weights. Rotary frequencies are none."""
    return held_bytes([model.embedding, model.layers, model.head, model.project_out])


@pytest.mark.parametrize("quantization", [None, "awq", "gptq", "fp8", "int8", "Q4_K_M", "Q8_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_of_a_plan_have_the_bytes_of_the_loaded_tensors(name: str, quantization: str | None) -> None:
    config = BASE | CONFIGS[name]
    spec = parse_config(config)
    online = quantization if quantization in ONLINE else None
    if online is None and quantization is not None:
        config = config | {"quantization_config": dict(quantization_config(quantization, spec, METHODS))}
    planned = plan_model(EngineConfig(dtype="bfloat16", quantization=online), config, None).memory.weight_bytes
    # Dense weights stay as they are: the layouts of a CPU's fast products have other sizes.
    ops = replace(select(CPU), pack_weight=lambda weight, dtype: weight)
    build = BuildContext(CPU, torch.bfloat16, ops, method_of(config, METHODS, online))
    assert loaded_bytes(load_model(spec, Path(), "dummy", build)) == planned
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    packed_weight = pytest.importorskip("minivllm.kernels.triton.packed_weight")
    planned = plan_model(EngineConfig(dtype="bfloat16", quantization=online), config, GPUS["h200"]).memory.weight_bytes
    build = replace(build, ops=replace(ops, pack_groups=packed_weight.pack_groups))
    assert loaded_bytes(load_model(spec, Path(), "dummy", build)) == planned


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, bytes]:
    """A repository on the hub with two files of weights."""
    config = BASE | CONFIGS["llama"]
    sources = [source for param in parameters(parse_config(config)).values() for source in param.sources]
    halves = [{source.name if "head" in source.name else f"model.{source.name}": torch.zeros(source.shape) for source in some}
              for some in (sources[::2], sources[1::2])]
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {tensor: file for file, some in zip(names, halves, strict=True) for tensor in some}}
    return {"config.json": json.dumps(config).encode(), "model.safetensors.index.json": json.dumps(index).encode(),
            **{file: save(some) for file, some in zip(names, halves, strict=True)}}


def test_a_model_on_the_hub_is_planned_from_its_headers(checkpoint: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: Any) -> None:
    stored = sum(len(content) for name, content in checkpoint.items() if name.endswith(".safetensors"))
    with serve_hub(checkpoint, monkeypatch, tmp_path / "hub") as server:
        assert main(["plan", "owner/name", "--gpu", "rtx4060", "--dtype", "float32", "--json"]) == 0
        assert server.bytes_sent(".safetensors") < stored / 5  # the headers, or 100 kB of each file
    found = json.loads(capsys.readouterr().out)
    assert found["weight_bytes"] == found["download_bytes"] < stored < found["download_bytes"] * 1.01


def test_headers_that_do_not_match_the_config_are_refused(checkpoint: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: Any) -> None:
    config = json.loads(checkpoint["config.json"]) | {"num_hidden_layers": 5}
    changed = checkpoint | {"config.json": json.dumps(config).encode()}
    with serve_hub(changed, monkeypatch, tmp_path / "hub"):
        assert main(["plan", "owner/name", "--gpu", "rtx4060"]) == 1
    assert "missing: model.layers.4.self_attn.q_proj.weight" in capsys.readouterr().err


def test_a_folder_is_described_by_its_files(checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in checkpoint.items():
        (tmp_path / name).write_bytes(content)
    found = describe_model(EngineConfig(model=str(tmp_path)))
    assert found.is_local and found.size == sum(size for _, _, size in found.tensors.values())
    assert found.tensors["model.embed_tokens.weight"] == ("F32", (320, 256), 4 * 320 * 256)


def test_a_missing_part_of_a_gguf_file_is_named(tmp_path: Path) -> None:
    for name, message in (("m.gguf", "no such file"), ("m-00001-of-00002.gguf", "several parts, .* missing: m-00002-of-00002.gguf")):
        if "of" in name:
            (tmp_path / name).touch()
        with pytest.raises(ModelError, match=message):
            describe_model(EngineConfig(model=str(tmp_path / name)))
