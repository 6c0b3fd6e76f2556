"""Every GGUF architecture: a model of Transformers, written as llama.cpp's converter writes it, has Transformers' logits here."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM

from minivllm.cli.main import main
from minivllm.errors import ModelError
from minivllm.families import FAMILIES, parse_config
from minivllm.models import gguf as ours
from minivllm.models.gguf_config import ARCHITECTURES
from minivllm.models.loader import load_model
from minivllm.quantization.methods import METHODS, method_of
from tests.models.paged import Paged, make_build
from tests.models.test_parity import LATENT, YARN
from tests.models.tiny import hf_logits, make_hf

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
FLOATS = re.compile(r"ffn_gate_inp|bias$")  # what llama.cpp never quantizes
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYER_NORM, RMS_NORM = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5],
            "original_max_position_embeddings": 16, "attention_factor": 1.25, "partial_rotary_factor": 1.0}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": YARN["factor"],
             "rope.scaling.original_context_length": YARN["original_max_position_embeddings"]}
SPLIT_KV = {"attention.kv_lora_rank": 32, "rope.dimension_count": 8, "attention.key_length": 40, "attention.value_length": 32,
            "attention.key_length_mla": 20, "attention.value_length_mla": 10, "attention.head_count_kv": 1}
WHOLE_KV = {"attention.kv_lora_rank": 32, "rope.dimension_count": 8, "attention.key_length": 20, "attention.value_length": 10}
DEEPSEEK = {**LATENT, "kv_lora_rank": 32, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "moe_intermediate_size": 32}
EXPERTS = {"expert_count": 8, "expert_used_count": 3, "leading_dense_block_count": 1, "expert_shared_count": 2}
GPT_OSS = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7,
           "intermediate_size": 96, "rope_parameters": {
               **YARN, "rope_theta": 150000.0, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5}}
GPT_OSS_KEYS = {"attention.key_length": 16, "attention.sliding_window": 7, "rope.freq_base": 150000.0, "expert_count": 5,
                "expert_used_count": 3, **YARN_KEYS, "rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5}
# GGUF architecture -> (family in Transformers, its settings, metadata that only this architecture has)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("GPT2", IDS, {}),
    "gpt-oss": ("GptOss", GPT_OSS, GPT_OSS_KEYS),
    "deepseek2": ("DeepseekV3", {**DEEPSEEK, "q_lora_rank": 32, "rope_parameters": {
        **YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.7}, "routed_scaling_factor": 1.5}, {
        **SPLIT_KV, **EXPERTS, "attention.q_lora_rank": 32, "expert_gating_func": 2, "expert_weights_norm": True,
        "expert_weights_scale": 1.5, "expert_group_count": 4, "expert_group_used_count": 2, **YARN_KEYS,
        "rope.scaling.yarn_log_multiplier": 0.07}),
    "deepseek2, whole kv_b": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None, "routed_scaling_factor": 1.0}, {**WHOLE_KV, **EXPERTS}),
    "deepseek2, V2 in groups": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": 32, "topk_method": "group_limited_greedy",
                                               "routed_scaling_factor": 2.0}, {
        **SPLIT_KV, **EXPERTS, "attention.q_lora_rank": 32, "expert_weights_scale": 2.0, "expert_group_count": 4,
        "expert_group_used_count": 2, "expert_gating_func": 1}),
    "gpt-oss, fused experts": ("GptOss", GPT_OSS, GPT_OSS_KEYS),
    "deepseek2, fused experts": ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None, "routed_scaling_factor": 1.0}, {**SPLIT_KV, **EXPERTS}),
    "chatglm": ("Glm", {**IDS, "head_dim": 16}, {"rope.dimension_count": 8}),
    "chatglm, fused qkv": ("Glm", {**IDS, "head_dim": 16}, {"rope.dimension_count": 8}),
    "mistral3": ("Mistral", {"sliding_window": None, "head_dim": 16}, {"attention.key_length": 16, "attention.value_length": 16}),
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


def experts(name: str, values: np.ndarray, interleaved: bool, fused: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of all experts: gate and up apart unless `fused`, and [experts, outputs, inputs]. interleaved: as in gpt-oss."""
    name, kind = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
    if interleaved and kind == "weight":
        values = values.swapaxes(1, 2)
    if name.endswith("gate_up_proj"):
        halves = (values[:, ::2], values[:, 1::2]) if interleaved else np.split(values, 2, axis=1)
        if fused:
            yield f"{name}.{kind}", np.concatenate(halves, axis=1)
            return
        for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            yield f"{name.removesuffix('gate_up_proj')}{part}.{kind}", half
    else:
        yield f"{name}.{kind}", values


def latent(name: str, values: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """kv_b in two parts, of which that for keys is transposed."""
    by_head = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    yield name.replace("kv_b", "k_b"), by_head[:, : config.qk_nope_head_dim].swapaxes(1, 2)
    yield name.replace("kv_b", "v_b"), by_head[:, config.qk_nope_head_dim :]


def converted(arch: str, variant: str, hf: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model, under names that gguf's table knows, as convert_hf_to_gguf.py makes them where it changes more than rows."""
    fused: dict[str, list[np.ndarray]] = {}
    for name, tensor in hf.state_dict().items():
        values = tensor.float().numpy()
        if ".mlp.experts." in name:
            yield from experts(name, values, arch == "gpt-oss", variant == "fused experts")
        elif "kv_b_proj" in name and "whole" not in variant:
            yield from latent(name, values, hf.config)
        elif arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            yield name, values.T
        elif variant == "fused qkv" and (part := next((p for p in "qkv" if f".{p}_proj." in name), "")):
            parts = fused.setdefault(name.replace(f".{part}_proj", ".qkv_proj"), [])
            parts.append(values)
            if part == "v":
                yield name.replace("v_proj", "qkv_proj"), np.concatenate(parts)
        else:
            yield {"sinks": f"{name}.weight"}.get(name.rpartition(".")[2], name.replace("correction_bias", "correction.bias")), values


def write(path: Path, name: str, hf: Any, further: dict[str, Any], kind: Q = Q.F32, only: str = "", unpacked: bool = False,
          extra: dict[str, np.ndarray] | None = None, drop: str = "-") -> None:
    """What convert_hf_to_gguf.py makes of a model, by its description: names, permuted rows, norms with 1 added.

    name: the architecture, and a variant. kind: of matrices, or those of them whose llama.cpp name contains `only`. unpacked: the values of
    that type are stored as F32. extra: more tensors. drop: what the names of left out ones contain.
    """
    arch, _, variant = name.partition(", ")
    config = hf.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = heads if arch in ("gptneox", "bloom", "gpt2") else getattr(config, "num_kv_heads", None) or config.num_key_value_heads
    eps = next((getattr(config, name) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
                if hasattr(config, name)), 1e-5)
    meta = {"block_count": layers, "context_length": 64, "embedding_length": 64, "feed_forward_length": 256 if arch in (
        "falcon", "bloom", "gpt2") else config.intermediate_size, "attention.head_count": heads, "attention.head_count_kv": kv_heads,
        RMS_NORM if hasattr(config, "rms_norm_eps") else LAYER_NORM: eps, **further}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{arch}.{key}", value)
    table = gguf.get_tensor_name_map(next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), layers)
    tied = config.tie_word_embeddings
    for name, values in converted(arch, variant, hf):
        if tied and name == "lm_head.weight":
            continue
        if arch in ("granite", "smollm3", "olmo", "mistral3") and ("q_proj" in name or "k_proj" in name):  # pairs beside each other
            n = heads if "q_proj" in name else kv_heads
            values = values.reshape(n, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if "query_key_value" in name:
            parts = values.reshape(kv_heads, heads // kv_heads + 2, 16, *values.shape[1:])
            values = np.concatenate([part.reshape(-1, *values.shape[1:]) for part in (parts[:, :-2], parts[:, -2], parts[:, -1])])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        # llama.cpp joins experts of all architectures if it is told to; gguf's table has that name for some.
        fused = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj\.(\w+)", name)
        target = table.get_name(name, (".weight", ".bias")) or table.get_name(name.removeprefix("transformer."), (".weight", ".bias"))
        if fused:
            target = f"blk.{fused[1]}.ffn_gate_up_exps.{fused[2]}"
        assert target is not None, name
        if drop in target:
            continue
        if values.ndim >= 2 and kind != Q.F32 and only in target and not FLOATS.search(target) and not values.shape[-1] % 32:
            blocks = quantize(np.ascontiguousarray(values), kind)
            if unpacked:
                writer.add_tensor(target, dequantize(blocks, kind))
            else:
                writer.add_tensor(target, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(target, np.ascontiguousarray(values))
    if arch == "phi3":
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(LONGROPE[f"{name}_factor"], np.float32))
    for target, values in (extra or {}).items():
        writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(name: str) -> Any:
    family, settings, _ = MODELS[name]
    without = ("GPTNeoX", "Bloom", "Falcon", "GPT2", "DeepseekV2", "DeepseekV3")
    return make_hf(family, **{**{key: value for key, value in SIZES.items() if key != "num_key_value_heads" or family not in without},
                              **settings})


TOKENS = [(7 * i) % 97 for i in range(24)]


def logits(path: Path) -> torch.Tensor:
    folder = path.with_suffix(".folder")
    ours.prepare(path, folder)
    config = json.loads((folder / "config.json").read_text())
    build = make_build()
    build = type(build)(build.device, build.dtype, build.ops, method_of(config))
    return Paged(load_model(parse_config(config, methods=METHODS), folder, "auto", build), 24).run((0, TOKENS))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_the_logits_of_the_model_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    hf = make(name)
    write(tmp_path / "m.gguf", name, hf, MODELS[name][2])
    want = hf_logits(hf, TOKENS)
    assert want.abs().max() > 0.3
    torch.testing.assert_close(logits(tmp_path / "m.gguf"), want, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(("name", "kind", "only"), [
    ("gpt2", Q.Q8_0, ""), ("gpt-oss", Q.MXFP4, "exps"), ("gpt-oss, fused experts", Q.MXFP4, "exps"),
    ("gpt-oss", Q.Q8_0, ""), ("deepseek2", Q.Q8_0, ""),
    ("deepseek2, whole kv_b", Q.Q8_0, ""), ("deepseek2, whole kv_b", Q.MXFP4, ""), ("chatglm, fused qkv", Q.Q4_0, ""),
])
def test_a_quantized_file_has_the_logits_of_its_values(name: str, kind: Q, only: str, tmp_path: Path) -> None:
    hf = make(name)
    for file, unpacked in (("packed.gguf", False), ("plain.gguf", True)):
        write(tmp_path / file, name, hf, MODELS[name][2], kind, only, unpacked)
    want = logits(tmp_path / "plain.gguf")
    assert (want - hf_logits(hf, TOKENS)).abs().max() > 1e-3  # that type has other values
    torch.testing.assert_close(logits(tmp_path / "packed.gguf"), want, atol=1e-4, rtol=0.0)


def test_a_whole_kv_b_beside_its_parts_is_the_one_that_is_read(tmp_path: Path) -> None:
    name = "deepseek2, whole kv_b"
    hf = make(name)
    copies = {f"blk.{i}.attn_{part}_b.weight": np.zeros((4, 8, 32), np.float32) for i in range(3) for part in "kv"}
    write(tmp_path / "m.gguf", name, hf, MODELS[name][2], extra=copies)
    torch.testing.assert_close(logits(tmp_path / "m.gguf"), hf_logits(hf, TOKENS), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(("name", "change", "says"), [
    ("deepseek2", {"further": {"attention.temperature_scale": 0.1}}, "deepseek2.attention.temperature_scale"),
    ("deepseek2", {"further": {"nextn_predict_layers": 1}}, "deepseek2.nextn_predict_layers"),
    ("deepseek2", {"further": {"rope.scaling.attn_factor": 2.0}}, "deepseek2.rope.scaling.attn_factor"),
    ("deepseek2", {"further": {"expert_gating_func": 4}}, "deepseek2.expert_gating_func = 4"),
    ("deepseek2", {"further": {"leading_dense_block_count": 2}}, r"dense_block_count = 2 but of 3 layers .* have experts: \[1, 2\]"),
    ("deepseek2", {"further": {"attention.key_length_mla": 8}}, "key_length_mla = 8 must be above .*dimension_count 8"),
    ("deepseek2", {"further": {"attention.value_length_mla": 12}}, r"attn_v_b.weight' has the shape \[4, 10, 32\], not \[4, 12, 32\]"),
    ("deepseek2", {"drop": "attn_v_b"}, "'blk.0.attn_v_b.weight' is missing"),
    ("deepseek2", {"extra": {"blk.1.ffn_gate_up_exps.weight": np.zeros((2, 2), np.float32)}}, "'blk.1.ffn_gate_up_exps.weight' has the sh"),
    ("deepseek2", {"extra": {"blk.1.ffn_gate_tid2eid.weight": np.zeros(8, np.float32)}}, "'blk.1.ffn_gate_tid2eid.weight' is not used"),
    ("gpt-oss", {"drop": "ffn_gate_exps", "extra": {"blk.0.ffn_gate_up_exps.weight": np.zeros((5, 7, 64), np.float32)}}, "7 rows, not 6"),
    ("deepseek2, whole kv_b", {"further": {"expert_weights_norm": True}}, "expert_weights_norm = True is not supported .* only False is"),
    ("deepseek2, whole kv_b", {"extra": {"blk.1.exp_probs_b.bias": np.zeros(8, np.float32)}}, "'blk.1.exp_probs_b.bias' is not used"),
    ("gpt-oss", {"further": {"expert_gating_func": 1}}, "gpt-oss.expert_gating_func = 1 is not supported .* only 3 is"),
    ("chatglm, fused qkv", {"further": {"attention.head_count_kv": 4}}, "'blk.0.attn_qkv.weight' has 128 rows, not 192"),
    ("mistral3", {"further": {"attention.temperature_scale": 0.1}}, "mistral3.attention.temperature_scale"),
    ("mistral3", {"extra": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}}, "'blk.0.attn_sinks.weight' is not used"),
])
def test_what_is_not_supported_is_named(name: str, change: dict[str, Any], says: str, tmp_path: Path) -> None:
    further = {**MODELS[name][2], **change.pop("further", {})}
    write(tmp_path / "m.gguf", name, make(name), further, **change)
    with pytest.raises(ModelError, match=says):
        ours.read_header(tmp_path / "m.gguf")


def test_a_gguf_package_that_does_not_know_the_architecture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.gguf", "gpt2", make("gpt2"), {})
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {})
    with pytest.raises(ModelError, match=r"m\.gguf: architecture 'gpt2' is not known to the installed gguf package: pip install --upgrade"):
        ours.read_header(tmp_path / "m.gguf")


def test_the_dequantized_folder_has_hugging_face_s_tensors(tmp_path: Path) -> None:
    for name in ("gpt2", "deepseek2"):
        hf, folder = make(name), tmp_path / name
        write(tmp_path / "m.gguf", name, hf, MODELS[name][2])
        ours.convert(tmp_path / "m.gguf", folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(hf_logits(again.eval(), TOKENS), hf_logits(hf, TOKENS), atol=1e-5, rtol=0.0)


def test_memory_is_planned_from_the_header(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "cache"))
    for name, kind in (("gpt-oss", Q.MXFP4), ("deepseek2", Q.Q8_0), ("gpt2", Q.Q8_0)):
        write(tmp_path / "m.gguf", name, make(name), MODELS[name][2], kind)
        assert main(["plan", str(tmp_path / "m.gguf"), "--memory-gib", "8"]) == 0, capsys.readouterr().err
        assert "fits: " in capsys.readouterr().out


def test_an_epsilon_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    hf = make_hf("Olmo", **SIZES, eos_token_id=1)
    write(tmp_path / "m.gguf", "olmo", hf, {LAYER_NORM: 1e-6})
    with pytest.raises(ModelError, match=r"olmo\.attention\.layer_norm_epsilon = .* is not supported for this architecture, only 1e-5 is"):
        ours.prepare(tmp_path / "m.gguf", tmp_path / "folder")


def test_every_architecture_is_compared() -> None:
    elsewhere = {"llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "olmoe"}  # test_gguf.py and test_gguf_packed.py
    assert {name.partition(",")[0] for name in MODELS} | elsewhere == set(ARCHITECTURES)


def test_every_family_that_llama_cpp_converts_has_an_architecture() -> None:
    named = {architecture.class_name for architecture in ARCHITECTURES.values()}
    # Files of some families have the architecture of another one. The images of Gemma 3 are in a separate file.
    shared = {"MixtralForCausalLM", "Olmo3ForCausalLM", "DeepseekV3ForCausalLM", "Gemma3ForConditionalGeneration"}
    assert set(FAMILIES) - named - shared == {"OPTForCausalLM", "GPTJForCausalLM"}
    assert "opt" not in gguf.MODEL_ARCH_NAMES.values()
