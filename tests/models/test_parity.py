"""Every family has the logits of Transformers, within 1e-4 in fp32, for any division of the tokens into steps."""
from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from minivllm.families import FAMILIES, kv_groups, parse_config
from minivllm.families.config_json import one_window
from minivllm.families.llama import MISTRAL
from minivllm.kernels import REFERENCE, Ops
from minivllm.quantization.dense import DenseMethod
from tests.models.paged import Paged, make_build
from tests.models.tiny import BASE, hf_logits, load, make_hf, randomized

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "n_routed_experts": 8, "n_group": 4,
          "topk_group": 2, "moe_intermediate_size": 24, "n_shared_experts": 2, "num_key_value_heads": 4}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, 9 heads share 3": ("Llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama, one KV head": ("Llama", {"num_key_value_heads": 1}),
    "llama, wide heads": ("Llama", {"head_dim": 20, "num_key_value_heads": 2}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "llama, other theta and eps": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.1}),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "llama, llama3 rope": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "head_dim": 24, "num_key_value_heads": 2}),
    "llama, yarn rope": ("Llama", {"rope_parameters": YARN}),
    "llama, yarn rope, its borders moved": ("Llama", {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}}),
    "llama, yarn rope, explicit attention factor": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 0.7}}),
    "llama, yarn rope, mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}}),
    "mistral, no window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, window 7": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral, window of a block, wide heads": ("Mistral", {"num_key_value_heads": 1, "sliding_window": 4, "head_dim": 24}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2, tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2, the last layer has a window": (
        "Qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen2, alternating windows": (
        "Qwen2", {"num_key_value_heads": 2, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 6,
                  "layer_types": LAYER_TYPES}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, biases, tied, yarn": (
        "Qwen3", {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3, 3 windowed layers of 4": (
        "Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9,
                  "max_window_layers": 1}),
    "opt-125m's shape": ("OPT", {}),
    "opt-350m's shape": ("OPT", {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "opt, untied": ("OPT", {"tie_word_embeddings": False}),
    "galactica's shape": ("OPT", {"enable_bias": False, "activation_function": "gelu", "layer_norm_elementwise_affine": False}),
    "opt, other activation": ("OPT", {"activation_function": "gelu_new"}),
    "smollm3": ("SmolLM3", {"num_key_value_heads": 2, "num_hidden_layers": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}),
    "smollm3, the first layer is not rotated, yarn": (
        "SmolLM3", {"num_key_value_heads": 2, "no_rope_layers": [0, 1, 1], "attention_bias": True, "mlp_bias": True,
                    "tie_word_embeddings": False, "rope_parameters": {**YARN, "rope_theta": 5e4}, "bos_token_id": 0, "eos_token_id": 1,
                    "pad_token_id": 2}),
    "phi3": ("Phi3", {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}),
    "phi3, window 7": ("Phi3", {"sliding_window": 7, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}),
    "olmo": ("Olmo", {"num_key_value_heads": 2, "eos_token_id": 1}),
    "starcoder2": ("Starcoder2", {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}),
    "starcoder2, no biases, untied, window 7": (
        "Starcoder2", {"num_key_value_heads": 1, "use_bias": False, "tie_word_embeddings": False, "sliding_window": 7, "bos_token_id": 0,
                       "eos_token_id": 1}),
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 5, "sliding_window": 7}),
    "qwen2-moe": ("Qwen2Moe", {"num_key_value_heads": 2, **QWEN_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3-moe, a dense layer": ("Qwen3Moe", {"num_key_value_heads": 2, **QWEN_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "olmoe": ("Olmoe", {"num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "eos_token_id": 1}),
    "gpt-oss": ("GptOss", {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7,
                           "swiglu_limit": 0.5, "rope_parameters": {**YARN, "rope_theta": 1e4, "truncate": False}}),
    "deepseek-v2": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
                                   "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}),
    "deepseek-v3, yarn": ("DeepseekV3", {**LATENT, "q_lora_rank": 20, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
                                         "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    "opt, no final norm": ("OPT", {"_remove_final_layer_norm": True}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 24}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 7,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"num_key_value_heads": 1, "head_dim": 24, "num_hidden_layers": 4, "layer_types": LAYER_TYPES, "sliding_window": 7,
                          "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
                                              "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
    "phi": ("Phi", TOKENS),
    "phi, 2 KV heads, norms of q and k": ("Phi", {"num_key_value_heads": 2, "qk_layernorm": True, **TOKENS}),
    "phi3, longrope, partial": ("Phi3", {
        "num_key_value_heads": 2, "original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "partial_rotary_factor": 0.75, "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
            "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]}, **TOKENS}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "olmo3, yarn in layers with full attention": ("Olmo3", {
        "num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 7,
        "rope_parameters": {"full_attention": {**YARN, "rope_theta": 1e4},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "granite": ("Granite", {"num_key_value_heads": 2, "embedding_multiplier": 12.0, "logits_scaling": 3.0, "residual_multiplier": 0.22,
                            "attention_multiplier": 0.1, "attention_bias": True, "rms_norm_eps": 0.01}),
    "glm": ("Glm", {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1}),
    "glm4": ("Glm4", {"num_key_value_heads": 1, "head_dim": 24, "attention_bias": False, "pad_token_id": 0, "eos_token_id": 1}),
    "exaone4": ("Exaone4", {"num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 7}),
    "exaone4, no window": ("Exaone4", {"num_key_value_heads": 2, "sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "cohere": ("Cohere", {"num_key_value_heads": 2, "logit_scale": 0.5, **TOKENS}),
    "cohere, norms of q and k": ("Cohere", {"num_key_value_heads": 2, "use_qk_norm": True, "attention_bias": True, "logit_scale": 0.7,
                                            **TOKENS}),
    "cohere2": ("Cohere2", {"num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 7, "logit_scale": 2.0, **TOKENS}),
    "stablelm": ("StableLm", {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm, parallel, norms of q and k": ("StableLm", {"num_key_value_heads": 2, "use_parallel_residual": True, "qk_layernorm": True}),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt-neox, sequential, no biases": ("GPTNeoX", {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast"}),
    "gpt-j": ("GPTJ", {"rotary_dim": 8, **TOKENS}),
    "gpt2": ("GPT2", TOKENS),
    "gpt2, scores by layer": ("GPT2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40, "tie_word_embeddings": False, **TOKENS}),
    "falcon, 7b's shape": ("Falcon", TOKENS),
    "falcon, 40b's shape": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80, **TOKENS}),
    "falcon, one norm": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True,
                                    **TOKENS}),
    "falcon, rw's shape": ("Falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, **TOKENS}),
    "bloom": ("Bloom", TOKENS),
    "bloom, 6 heads": ("Bloom", {"num_attention_heads": 6, "hidden_size": 96, **TOKENS}),
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0.0)


KERNELS = pytest.mark.parametrize("ops", [None, REFERENCE], ids=["serving", "reference"])  # the kernels of a CPU, and their specification


@KERNELS
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_in_one_step_in_chunks_and_token_by_token(name: str, ops: Ops | None, tmp_path: Path) -> None:
    family, config = MODELS[name]
    hf = make_hf(family, **{"hidden_size": 64, **config})  # heads of 16, which the compiled kernels cover
    hf.save_pretrained(tmp_path)
    model = load(tmp_path, build=make_build(ops=ops))
    rng = random.Random(0)
    tokens = [rng.randrange(97) for _ in range(33)]
    if family == "Gemma":
        hf.double()  # in float32 its own logits are 1e-4 from those in float64
    want = hf_logits(hf, tokens).float()
    assert want.abs().max() > 0.5  # a comparison of zeros would prove nothing

    close(Paged(model, 33, seed=1).run((0, tokens)), want)

    chunked = Paged(model, 33, seed=2)
    cuts = [0, 1, 6, 14, 27, 33]  # not at the ends of blocks
    close(torch.cat([chunked.run((0, tokens[a:b])) for a, b in itertools.pairwise(cuts)]), want)

    decoded = Paged(model, 33, block_size=5, seed=3)
    close(torch.cat([decoded.run((0, tokens[:9])), *(decoded.run((0, [t])) for t in tokens[9:])]), want)


@KERNELS
@pytest.mark.parametrize("name", MODELS)
def test_with_last_only_a_model_returns_last_tokens_logits_and_stores_all_keys(name: str, ops: Ops | None, tmp_path: Path) -> None:
    family, config = MODELS[name]
    make_hf(family, **{"hidden_size": 64, **config}).save_pretrained(tmp_path)
    model = load(tmp_path, build=make_build(ops=ops))
    both = [Paged(model, 33, num_seqs=3, seed=1) for _ in range(2)]
    compare_last_tokens(*both)


def compare_last_tokens(whole: Paged, short: Paged) -> None:
    rng = random.Random(0)
    for counts in ([(0, 12), (1, 3), (2, 20)], [(1, 1), (0, 9), (2, 4)], [(2, 1), (0, 1), (1, 1)]):
        work = [(s, [rng.randrange(97) for _ in range(n)]) for s, n in counts]
        ends = list(itertools.accumulate(n for _, n in counts))
        close(short.run(*work, last_only=True), whole.run(*work)[[end - 1 for end in ends]])
    for a, b in zip(whole.kv, short.kv, strict=True):
        close(a.k.nan_to_num(99.0), b.k.nan_to_num(99.0))
        close(a.v.nan_to_num(99.0), b.v.nan_to_num(99.0))


@KERNELS
@pytest.mark.parametrize("name", ["llama, 9 heads share 3", "qwen2, alternating windows", "opt-125m's shape"])
def test_logits_do_not_depend_on_the_other_sequences_of_the_batch(name: str, ops: Ops | None, tmp_path: Path) -> None:
    family, config = MODELS[name]
    hf = make_hf(family, **{"hidden_size": 64, **config})
    hf.save_pretrained(tmp_path)
    rng = random.Random(1)
    a, b, c = ([rng.randrange(97) for _ in range(n)] for n in (20, 11, 30))
    paged = Paged(load(tmp_path, build=make_build(ops=ops)), 32, num_seqs=3)
    got: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}

    def step(*work: tuple[int, list[int]]) -> None:
        rows = paged.run(*work)
        for (s, _), part in zip(work, rows.split([len(t) for _, t in work]), strict=True):
            got[s].append(part)

    step((0, a[:7]))
    step((0, a[7:8]), (1, b[:9]), (2, c[:13]))  # a decode and two prompts
    step((0, a[8:9]), (1, b[9:10]), (2, c[13:29]))
    step((2, c[29:]), (1, b[10:]), (0, a[9:10]))  # decodes only, in another order
    step((0, a[10:]))
    for s, tokens in enumerate((a, b, c)):
        close(torch.cat(got[s]), hf_logits(hf, tokens))


def test_dynamic_rope_up_to_the_original_length_is_unscaled_as_in_transformers(tmp_path: Path) -> None:
    hf = make_hf("Llama", max_position_embeddings=24, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    hf.save_pretrained(tmp_path)
    spec = load(tmp_path).spec
    assert spec.max_model_len == 48
    tokens = list(range(24))
    model = load(tmp_path, dataclasses.replace(spec, max_model_len=24))
    close(Paged(model, 24).run((0, tokens)), hf_logits(hf, tokens))


@pytest.mark.parametrize(("name", "change"), [
    ("llama, yarn rope", {"original_max_position_embeddings": 32}),  # beside the rotary parameters, it replaces the one in them
    ("llama, llama3 rope", {"original_max_position_embeddings": 32}),
    ("gemma", {"hidden_activation": "silu"}),
    ("gemma2", {"hidden_act": "silu", "layer_types": None, "sliding_window_pattern": 3}),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_theta": 50.0, "rope_local_base_freq": 20.0}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": None, "no_rope_layers": [1, 0, 1, 0]}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": LAYER_TYPES}),
    ("gpt-oss", {"rope_parameters": None}),
    ("gpt-oss", {"rope_parameters": {}}),
    ("gpt-oss", {"hidden_act": "gelu"}),
    ("deepseek-v3, yarn", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": 0.7}}),
    ("deepseek-v2", {"rope_interleave": False}),  # a key of DeepSeek-V3
    ("deepseek-v3, yarn", {"norm_topk_prob": None, "rope_interleave": None}),
])
def test_the_same_config_json_means_the_same_to_transformers(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    """Keys that one of the two could read and the other not."""
    hf = make_hf(MODELS[name][0], **MODELS[name][1])
    hf.save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text(encoding="utf-8")), **change}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hf = type(hf).from_pretrained(tmp_path).eval()
    tokens = [(7 * i) % 97 for i in range(33)]
    close(Paged(load(tmp_path), 33).run((0, tokens)), hf_logits(hf, tokens))


def test_the_decoder_of_a_model_that_also_reads_images_runs_on_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {**BASE, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7, "num_hidden_layers": 6}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}
    torch.manual_seed(0)
    hf = randomized(transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=94, eoi_token_index=95, image_token_index=96)))
    hf.save_pretrained(tmp_path)
    tokens = [(7 * i) % 90 for i in range(30)]
    close(Paged(load(tmp_path), 30).run((0, tokens)), hf_logits(hf, tokens))
    assert "tensors of the encoder of images are not used" in capsys.readouterr().err


@pytest.mark.parametrize("served", [16, 17])
def test_longrope_uses_its_long_factors_if_more_than_the_original_length_is_served(served: int, tmp_path: Path) -> None:
    family, config = MODELS["phi3, longrope, partial"]
    hf = make_hf(family, **{"hidden_size": 64, **config})
    hf.save_pretrained(tmp_path)
    tokens = [(7 * i) % 97 for i in range(served)]  # Transformers chooses the factors by the length of the prompt
    model = load(tmp_path, dataclasses.replace(load(tmp_path).spec, max_model_len=served))
    close(Paged(model, served).run((0, tokens)), hf_logits(hf, tokens))


@pytest.mark.parametrize("name", ["gpt-neox", "glm", "phi"])
def test_outputs_are_reordered_after_the_product_if_a_weight_cannot_be_reordered(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, config = MODELS[name]
    hf = make_hf(family, **{"hidden_size": 64, **config})
    hf.save_pretrained(tmp_path)
    monkeypatch.setattr(DenseMethod, "rows_in_any_order", False)
    model, tokens = load(tmp_path), list(range(40, 60))
    monkeypatch.undo()
    close(Paged(model, 20).run((0, tokens)), hf_logits(hf, tokens))


@pytest.mark.parametrize("served", [31, 48])
def test_dynamic_rope_beyond_it_equals_transformers_for_a_prompt_of_the_served_length(served: int, tmp_path: Path) -> None:
    hf = make_hf("Llama", max_position_embeddings=24, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    hf.save_pretrained(tmp_path)
    tokens = [(7 * i) % 97 for i in range(served)]
    model = load(tmp_path, dataclasses.replace(load(tmp_path).spec, max_model_len=served))
    want = hf_logits(hf, tokens)
    close(Paged(model, served).run((0, tokens)), want)
    decoded = Paged(model, served)  # token by token, where Transformers would use a different base for each length
    close(torch.cat([decoded.run((0, tokens[:5])), *(decoded.run((0, [t])) for t in tokens[5:])]), want)


def test_layers_with_different_windows_are_in_groups_of_equal_size_over_the_same_tensors(tmp_path: Path) -> None:
    family, config = MODELS["qwen2, alternating windows"]
    make_hf(family, **config).save_pretrained(tmp_path)
    groups = kv_groups(load(tmp_path).spec)
    assert [(g.window, g.layers) for g in groups] == [(None, (0, 2)), (6, (1, 3))]


@pytest.mark.parametrize("name", {family: name for name, (family, _) in reversed(MODELS.items())}.values())  # the first of each family
def test_bfloat16_is_as_close_to_fp32_as_transformers_own_bfloat16(name: str, tmp_path: Path) -> None:
    """By the median token: rounding may choose other experts for a token."""
    family, config = MODELS[name]
    hf = make_hf(family, **{"hidden_size": 64, **config})
    hf.save_pretrained(tmp_path)
    tokens = random.Random(0).choices(range(97), k=60)
    exact = hf_logits(hf, tokens)
    got = Paged(load(tmp_path, build=make_build(torch.bfloat16)), 60).run((0, tokens))
    assert got.dtype == torch.float32
    theirs = hf_logits(hf.bfloat16(), tokens).float()
    assert (got - exact).abs().mean(dim=1).median() < 1.3 * (theirs - exact).abs().mean(dim=1).median()


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_logits_on_a_gpu_equal_those_of_transformers_on_a_cpu(name: str, tmp_path: Path) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    family, config = MODELS[name]
    hf = make_hf(family, **{"hidden_size": 64, **config})
    hf.save_pretrained(tmp_path)
    tokens = [(11 * i) % 97 for i in range(33)]
    model = load(tmp_path, build=make_build(device="cuda"))
    paged = Paged(model, 33)
    got = torch.cat([paged.run((0, tokens[:20])), paged.run((0, tokens[20:32])), paged.run((0, tokens[32:]))])
    torch.testing.assert_close(got, hf_logits(hf, tokens), atol=1e-4, rtol=0.0)
    compare_last_tokens(*(Paged(model, 33, num_seqs=3, seed=1) for _ in range(2)))


def test_a_new_family_is_a_row_of_the_table(tmp_path: Path) -> None:
    # The example of docs/adding_a_model.md: Phi-3 stores q, k and v as one tensor, and gate and up as another.
    phi3 = MISTRAL.variant(
        attention={"window": one_window(None)},
        names={"qkv": ("layers.{i}.self_attn.qkv_proj",), "gate_up": ("layers.{i}.mlp.gate_up_proj",)},
    )
    hf = make_hf("Phi3", num_key_value_heads=2, pad_token_id=0, sliding_window=7)
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    spec = parse_config(config, {**FAMILIES, "Phi3ForCausalLM": phi3})
    tokens = list(range(30, 60))
    close(Paged(load(tmp_path, spec), 30).run((0, tokens)), hf_logits(hf, tokens))
