"""Every GGUF architecture: a model of Transformers, written as llama.cpp's converter writes it, has Transformers' logits here."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from minivllm.errors import ModelError
from minivllm.families import parse_config
from minivllm.models import gguf as ours
from minivllm.models.gguf_config import ARCHITECTURES
from minivllm.models.loader import load_model
from minivllm.quantization.methods import METHODS, method_of
from tests.models.paged import Paged, make_build
from tests.models.tiny import hf_logits, make_hf

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYER_NORM, RMS_NORM = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5],
            "original_max_position_embeddings": 16, "attention_factor": 1.25, "partial_rotary_factor": 1.0}
# GGUF architecture -> (family in Transformers, its settings, metadata that only this architecture has)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 16}, {"attention.key_length": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7, "attn_logit_softcapping": 3.0,
                          "final_logit_softcapping": 5.0},
               {"attention.key_length": 16, "attention.sliding_window": 7, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 7, "num_hidden_layers": 6, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
               {"attention.key_length": 16, "attention.sliding_window": 7, "rope.freq_base": 500.0, "rope.scaling.type": "linear",
                "rope.scaling.factor": 2.0}),
    "phi2": ("Phi", IDS, {"rope.dimension_count": 8}),
    "phi3": ("Phi3", {**IDS, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
             {"rope.freq_base": 100.0, "rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.25}),
    "olmo": ("Olmo", {"eos_token_id": 1}, {}),
    "olmo2": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 7}, {
        "attention.sliding_window": 7, "rope.freq_base": 500000.0, "attention.sliding_window_pattern": [True, True, True, False]}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "logits_scaling": 1.5, "residual_multiplier": 0.22, "attention_multiplier": 0.2},
                {"embedding_scale": 3.0, "logit_scale": 1.5, "residual_scale": 0.22, "attention.scale": 0.2}),
    "command-r": ("Cohere", {**IDS, "logit_scale": 0.5, "use_qk_norm": True},
                  {"logit_scale": 0.5, "rope.freq_base": 500000.0, "rope.scaling.type": "none"}),
    "cohere2": ("Cohere2", {**IDS, "logit_scale": 0.5, "num_hidden_layers": 4, "sliding_window": 7},
                {"logit_scale": 0.5, "rope.freq_base": 10000.0, "attention.sliding_window": 7}),
    "glm4": ("Glm4", {**IDS, "head_dim": 16}, {"rope.dimension_count": 8}),
    "exaone4": ("Exaone4", {"num_hidden_layers": 4, "sliding_window": 7}, {"attention.sliding_window": 7}),
    "smollm3": ("SmolLM3", {**IDS, "num_hidden_layers": 4}, {"rope.freq_base": 2000000.0}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}, {"rope.dimension_count": 4, "use_parallel_residual": True}),
    "starcoder2": ("Starcoder2", IDS, {}),
    "gptneox": ("GPTNeoX", {}, {"rope.dimension_count": 4, "use_parallel_residual": True}),
    "falcon": ("Falcon", {**IDS, "new_decoder_architecture": True, "num_kv_heads": 2}, {"tensor_data_layout": "jploski"}),
    "bloom": ("Bloom", IDS, {}),
}


def write(path: Path, arch: str, hf: Any, further: dict[str, Any]) -> None:
    """What convert_hf_to_gguf.py makes of a model, by its description: names, permuted rows, norms with 1 added."""
    config = hf.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = heads if arch in ("gptneox", "bloom") else getattr(config, "num_kv_heads", None) or config.num_key_value_heads
    eps = next((getattr(config, name) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
                if hasattr(config, name)), 1e-5)
    meta = {"block_count": layers, "context_length": 64, "embedding_length": 64, "feed_forward_length": 256 if arch in (
        "falcon", "bloom") else config.intermediate_size, "attention.head_count": heads, "attention.head_count_kv": kv_heads,
        RMS_NORM if hasattr(config, "rms_norm_eps") else LAYER_NORM: eps, **further}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{arch}.{key}", value)
    table = gguf.get_tensor_name_map(next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), layers)
    tied = config.tie_word_embeddings
    for name, tensor in hf.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        if arch in ("granite", "smollm3", "olmo") and ("q_proj" in name or "k_proj" in name):  # pairs beside each other
            n = heads if "q_proj" in name else kv_heads
            values = values.reshape(n, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if "query_key_value" in name:
            parts = values.reshape(kv_heads, heads // kv_heads + 2, 16, *values.shape[1:])
            values = np.concatenate([part.reshape(-1, *values.shape[1:]) for part in (parts[:, :-2], parts[:, -2], parts[:, -1])])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        target = table.get_name(name, (".weight", ".bias")) or table.get_name(name.removeprefix("transformer."), (".weight", ".bias"))
        assert target is not None, name
        writer.add_tensor(target, np.ascontiguousarray(values))
    if arch == "phi3":
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(LONGROPE[f"{name}_factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("arch", MODELS)
def test_a_file_has_the_logits_of_the_model_that_it_was_made_from(arch: str, tmp_path: Path) -> None:
    family, settings, further = MODELS[arch]
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads" or family not in ("GPTNeoX", "Bloom", "Falcon")}
    hf = make_hf(family, **{**sizes, **settings})
    write(tmp_path / "m.gguf", arch, hf, further)
    ours.prepare(tmp_path / "m.gguf", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    build = make_build()
    build = type(build)(build.device, build.dtype, build.ops, method_of(config))
    model = load_model(parse_config(config, methods=METHODS), tmp_path / "folder", "auto", build)
    tokens = [(7 * i) % 97 for i in range(24)]
    want = hf_logits(hf, tokens)
    assert want.abs().max() > 0.3
    torch.testing.assert_close(Paged(model, 24).run((0, tokens)), want, atol=1e-4, rtol=0.0)


def test_an_epsilon_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    hf = make_hf("Olmo", **SIZES, eos_token_id=1)
    write(tmp_path / "m.gguf", "olmo", hf, {LAYER_NORM: 1e-6})
    with pytest.raises(ModelError, match=r"olmo\.attention\.layer_norm_epsilon = .* is not supported for this architecture, only 1e-5 is"):
        ours.prepare(tmp_path / "m.gguf", tmp_path / "folder")


def test_every_architecture_is_compared() -> None:
    elsewhere = {"llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmoe"}  # test_gguf.py and test_gguf_packed.py
    assert set(MODELS) | elsewhere == set(ARCHITECTURES)
