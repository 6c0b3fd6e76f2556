"""The table of families: config.json becomes a specification, or an error that names the key."""
from __future__ import annotations

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from minivllm.errors import InvalidInput, ModelError, NotSupportedYet
from minivllm.families import FAMILIES, ModelSpec, kv_groups, num_kv_tensors, parse_config
from minivllm.families.table import MODEL_TYPES
from minivllm.quantization.methods import parameters

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                     "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}
MISTRAL_7B_V0_1 = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 152064,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}
OPT_125M = {
    "_remove_final_layer_norm": False, "activation_function": "relu", "architectures": ["OPTForCausalLM"], "do_layer_norm_before": True,
    "ffn_dim": 3072, "hidden_size": 768, "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12,
    "torch_dtype": "float16", "vocab_size": 50272, "word_embed_proj_dim": 768,
}
OPT_350M = {**OPT_125M, "do_layer_norm_before": False, "ffn_dim": 4096, "hidden_size": 1024, "num_attention_heads": 16,
            "num_hidden_layers": 24, "word_embed_proj_dim": 512}
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}
QWEN1_5_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}
OLMOE_1B_7B = {
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 50304,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                                            "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                                            "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy",
    "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
}
DEEPSEEK_V3 = {
    **DEEPSEEK_V2_LITE, "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


def windows(spec: ModelSpec) -> tuple[int | None, ...]:
    return tuple(layer.attention.window for layer in spec.layers)


def size(spec: ModelSpec) -> int:
    return sum(math.prod(p.shape) for p in parameters(spec).values())


@pytest.mark.parametrize(("config", "count"), [
    (LLAMA_3_1_8B, 8_030_261_248), (MISTRAL_7B_V0_1, 7_241_732_096), (QWEN2_5_7B, 7_615_616_512), (QWEN3_0_6B, 596_049_920),
    (OPT_125M, 125_239_296), (OPT_350M, 331_196_416),
    (MIXTRAL_8X7B, 46_702_792_704), (QWEN1_5_MOE, 14_315_784_192), (QWEN3_30B_A3B, 30_532_122_624), (OLMOE_1B_7B, 6_919_161_856),
    (GPT_OSS_20B, 20_914_757_184), (DEEPSEEK_V2_LITE, 15_706_484_224), (DEEPSEEK_V3, 671_026_419_200),
])
def test_real_models_have_their_published_number_of_parameters(config: dict[str, Any], count: int) -> None:
    assert size(parse_config(config)) == count


def test_all_fields_of_a_published_llama_config_are_read() -> None:
    spec = parse_config(LLAMA_3_1_8B)
    assert (spec.num_layers, spec.max_model_len, spec.dtype, spec.attention_shapes) == (32, 131072, "bfloat16", ((32, 8, 128),))
    rope = spec.layers[31].attention.rope
    assert rope is not None and (rope.scaling, rope.theta, rope.original_max_len) == ("llama3", 500000.0, 8192)
    assert not spec.tied and spec.norm_eps == 1e-5


def test_the_keys_of_transformers_5_mean_the_same_as_those_of_4() -> None:
    old = LLAMA_3_1_8B
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"dtype": "bfloat16", "head_dim": 128, "rope_parameters": {**old["rope_scaling"], "rope_theta": 500000.0}}  # type: ignore[dict-item]
    assert parse_config(new) == parse_config(old)
    legacy = {**MISTRAL_7B_V0_1, "rope_scaling": {"type": "linear", "factor": 4.0}}
    today = {**{k: v for k, v in MISTRAL_7B_V0_1.items() if k != "rope_theta"},
             "rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 10000.0}}
    assert parse_config(legacy) == parse_config(today)


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "intermediate_size": 128,
         "vocab_size": 100, "max_position_embeddings": 64}
TYPES = ["sliding_attention"] * 3 + ["full_attention"]
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
GPT2_NAMES = {"n_embd": 64, "n_head": 4, "n_layer": 4, "vocab_size": 100}
# Class -> the same model in the spelling of Transformers 4 (or of its first files), and of 5.
SPELLINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Gemma3ForCausalLM", {"rope_theta": 5e5, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                           "sliding_window_pattern": 4, "head_dim": 16},
     {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}, "layer_types": TYPES, "head_dim": 16}),
    ("Olmo3ForCausalLM", {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
     {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e6},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 1e6}}, "layer_types": TYPES}),
    ("PhiForCausalLM", {"partial_rotary_factor": 0.25, "rope_theta": 500.0},
     {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25, "rope_theta": 500.0}}),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", **LONG}, "rope_theta": 500.0, "original_max_position_embeddings": 32},
     {"rope_parameters": {"rope_type": "longrope", **LONG, "rope_theta": 500.0}, "original_max_position_embeddings": 32}),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "su", **LONG}, "rope_theta": 500.0, "original_max_position_embeddings": 32},
     {"rope_parameters": {"rope_type": "longrope", **LONG, "rope_theta": 500.0}, "original_max_position_embeddings": 32}),
    ("GPTNeoXForCausalLM", {"rotary_pct": 0.5, "rotary_emb_base": 500},
     {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 500.0}}),
    ("GlmForCausalLM", {"partial_rotary_factor": 0.5, "rope_theta": 500.0, "head_dim": 16},
     {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 500.0}, "head_dim": 16}),
    ("Cohere2ForCausalLM", {"rope_theta": 500.0, "sliding_window_pattern": 4},
     {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "layer_types": TYPES}),
    ("Exaone4ForCausalLM", {"sliding_window_pattern": "LLLG", "rope_theta": 500.0},
     {"layer_types": TYPES, "sliding_window": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("FalconForCausalLM", {**GPT2_NAMES, "hidden_size": 64, "max_position_embeddings": 64, "n_head_kv": 2,
                           "new_decoder_architecture": True},
     {"num_kv_heads": 2, "new_decoder_architecture": True}),
    ("BloomForCausalLM", {**GPT2_NAMES, "n_embed": 64, "seq_length": 64}, {"seq_length": 64}),
    ("GPT2LMHeadModel", {**GPT2_NAMES, "n_positions": 64}, {}),
    ("GPTJForCausalLM", {**GPT2_NAMES, "n_positions": 64, "rotary_dim": 8}, {"rotary_dim": 8}),
    ("Gemma3ForConditionalGeneration", {"text_config": {**SMALL, "head_dim": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}},
     {"text_config": {**SMALL, "head_dim": 16, "rope_parameters": {
         "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}}),
]


@pytest.mark.parametrize(("architecture", "old", "new"), SPELLINGS)
def test_both_spellings_of_a_family_mean_the_same(architecture: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    only_own_names = GPT2_NAMES.items() <= old.items()
    before = parse_config({"architectures": [architecture], **({} if only_own_names else SMALL), **old})
    assert before == parse_config({"architectures": [architecture], **SMALL, **new})
    assert len(before.layers) == 4


def test_mistral_has_its_window_in_every_layer_unless_null() -> None:
    assert windows(parse_config(MISTRAL_7B_V0_1)) == (4096,) * 32
    assert windows(parse_config({**MISTRAL_7B_V0_1, "sliding_window": None})) == (None,) * 32
    without_key = {k: v for k, v in MISTRAL_7B_V0_1.items() if k != "sliding_window"}
    assert windows(parse_config(without_key)) == (4096,) * 32  # Transformers' default


def test_qwen_has_windows_only_if_enabled_and_only_in_the_upper_layers() -> None:
    assert windows(parse_config(QWEN2_5_7B)) == (None,) * 28
    on = parse_config({**QWEN2_5_7B, "use_sliding_window": True, "max_window_layers": 21, "sliding_window": 1024})
    assert windows(on) == (None,) * 21 + (1024,) * 7
    assert [(g.window, len(g.layers)) for g in kv_groups(on)] == [(None, 7), (None, 7), (None, 7), (1024, 7)]


def test_a_window_of_at_least_max_model_len_is_full_attention() -> None:
    spec = parse_config({**MISTRAL_7B_V0_1, "sliding_window": 32768})
    assert [g.window for g in kv_groups(spec)] == [None]
    short = dataclasses.replace(parse_config(MISTRAL_7B_V0_1), max_model_len=4096)
    assert [g.window for g in kv_groups(short)] == [None]


def test_rope_scaling_multiplies_the_context_length_if_the_config_states_the_original_one() -> None:
    def limit(**scaling: Any) -> int:
        return parse_config({**QWEN2_5_7B, "rope_scaling": scaling}).max_model_len

    assert limit(type="linear", factor=4.0) == 131072
    assert limit(type="dynamic", factor=2.0) == 65536
    assert limit(type="yarn", factor=4.0, original_max_position_embeddings=32768) == 131072
    assert limit(type="yarn", factor=4.0, original_max_position_embeddings=8192) == 32768
    assert parse_config(LLAMA_3_1_8B).max_model_len == 131072


def test_the_first_supported_architecture_of_those_named_is_used() -> None:
    assert parse_config({**OPT_125M, "architectures": ["Custom", "OPTForCausalLM"]}).architecture == "OPTForCausalLM"


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported; supported: LlamaForCausalLM"),
    ({"architectures": None, "model_type": None}, "names no model class"),
    ({"hidden_size": None}, "'hidden_size' must be of type int"),
    ({"num_hidden_layers": "32"}, "'num_hidden_layers' must be of type int, got '32'"),
    ({"rms_norm_eps": True}, "'rms_norm_eps' must be of type float"),
    ({"num_key_value_heads": 5}, "num_attention_heads 32 must be a multiple of num_key_value_heads 5"),
    ({"num_attention_heads": 0}, "num_attention_heads must be between 1 and 65536, got 0"),
    ({"num_attention_heads": 31, "num_key_value_heads": 31}, "hidden_size 4096 is not a multiple"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be between 1 and 10000, got 0"),
    ({"head_dim": 31}, "head_dim must be even"),
    ({"hidden_act": "gelu"}, "gated MLP with activation 'gelu'"),
    ({"hidden_act": "sinus"}, "hidden_act 'sinus' is not supported"),
    ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "no 'short_factor'"),
    ({"rope_scaling": {"rope_type": "sparse", "factor": 2.0}}, "rope type 'sparse' is not supported"),
    ({"rope_scaling": {"rope_type": "linear"}}, "no 'factor'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor must be between 1 and 1000000"),
    ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
])
def test_an_invalid_llama_config_is_an_error_that_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        parse_config({**LLAMA_3_1_8B, **change})
    assert caught.value.param == "model"


@pytest.mark.parametrize(("change", "message"), [
    ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "use_sliding_window is off"),
    ({"layer_types": ["full_attention"] * 27 + ["chunked_attention"]}, "'chunked_attention' is not supported"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, but num_hidden_layers is 28"),
    ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0}, "sliding_window must be between 1"),
])
def test_contradictory_layer_types_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config({**QWEN2_5_7B, **change})


def test_quantized_checkpoints_are_refused_as_not_supported_yet() -> None:
    with pytest.raises(NotSupportedYet, match="awq"):
        parse_config({**LLAMA_3_1_8B, "quantization_config": {"quant_method": "awq", "bits": 4}})


@pytest.mark.parametrize("method", [None, 7, "", ["awq"], {}])
def test_an_odd_quantization_method_is_refused_like_an_unknown_one(method: Any) -> None:
    with pytest.raises(NotSupportedYet, match="quant_method"):
        parse_config({**LLAMA_3_1_8B, "quantization_config": {"quant_method": method, "bits": 4}})


@pytest.mark.parametrize("names", [[["x"]], [{}], [None], [7]])
def test_an_architecture_that_is_not_text_is_refused(names: Any) -> None:
    with pytest.raises(ModelError, match="is not supported; supported"):
        parse_config({**LLAMA_3_1_8B, "architectures": names})


def test_learned_positions_limit_the_context_length() -> None:
    with pytest.raises(ModelError, match="2048 learned positions"):
        dataclasses.replace(parse_config(OPT_125M), max_model_len=2049)


def test_a_specification_can_be_sent_to_another_process() -> None:
    for config in (LLAMA_3_1_8B, OPT_350M):
        spec = parse_config(config)
        assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec) == hash(parse_config(config))


def test_each_checkpoint_tensor_belongs_to_exactly_one_parameter() -> None:
    for config in (LLAMA_3_1_8B, MISTRAL_7B_V0_1, QWEN2_5_7B, QWEN3_0_6B, OPT_125M, OPT_350M):
        params = parameters(parse_config(config))
        names = [s.name for p in params.values() for s in p.sources]
        assert len(names) == len(set(names))
        for p in params.values():
            assert p.shape[0] == sum(s.shape[0] for s in p.sources) and all(s.shape[1:] == p.shape[1:] for s in p.sources)


def test_column_and_row_sharding_alternate_so_that_a_layer_needs_two_all_reduces() -> None:
    params = parameters(parse_config(QWEN2_5_7B))
    dims = {name.removeprefix("layers.0."): p.shard_dim for name, p in params.items() if name.startswith("layers.0.")}
    assert dims == {"attn_norm.weight": None, "qkv.weight": 0, "qkv.bias": 0, "o.weight": 1, "mlp_norm.weight": None, "gate_up.weight": 0,
                    "down.weight": 1}
    assert params["embed.weight"].shard_dim == params["head.weight"].shard_dim == 0
    opt = parameters(parse_config(OPT_125M))
    # Each rank of a row-parallel layer has a part of the sum, so only one of them may add the bias.
    assert [opt[f"layers.0.{name}.bias"].shard_dim for name in ("qkv", "o", "up", "down")] == [0, None, 0, None]


@given(st.lists(st.sampled_from([None, None, 64, 128]), min_size=1, max_size=60))
def test_every_layer_is_in_one_group_and_few_tensors_stay_unused(windows: list[int | None]) -> None:
    spec = parse_config(MISTRAL_7B_V0_1)
    layer = spec.layers[0]
    spec = dataclasses.replace(spec, layers=tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, window=w)) for w in windows))
    groups = kv_groups(spec)
    assert sorted(layer for g in groups for layer in g.layers) == list(range(len(windows)))
    assert all(windows[layer] == g.window for g in groups for layer in g.layers)
    assert (len(groups) * num_kv_tensors(groups) - len(windows)) * 8 <= len(windows)


HUGE = (10**400, 10**5000, -(10**400), 10**12, 1e308, -1e308, float("nan"), float("inf"), 2**31, [[10**400]], "x" * 100_000)


SCALINGS = st.fixed_dictionaries({"type": st.sampled_from(["linear", "dynamic", "llama3", "yarn", "none", 3])}, optional={
    "factor": st.one_of(st.floats(), st.just("4")), "original_max_position_embeddings": st.integers(-1, 100),
    "low_freq_factor": st.floats(), "high_freq_factor": st.integers(0, 3), "rope_theta": st.floats(),
})


@given(st.sampled_from([LLAMA_3_1_8B, QWEN2_5_7B, OPT_350M]), st.data())
def test_a_damaged_config_gives_a_specification_or_a_user_error(config: dict[str, Any], data: st.DataObject) -> None:
    damaged = dict(config)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3)):
        damaged[key] = data.draw(st.one_of(st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=5),
                                           st.just([]), st.just({}), st.just([None]), SCALINGS, st.sampled_from(HUGE)))
    try:
        parameters(parse_config(damaged))
    except InvalidInput as e:
        assert 0 < len(e.message) < 500


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
                                 "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "torch_dtype", "hidden_act"])
def test_a_value_beyond_every_model_is_refused_by_its_key(key: str, value: Any) -> None:
    if key == "rope_theta" and value in (10**12, 2**31):
        return  # there are models with such a base
    with pytest.raises(ModelError, match=key.removeprefix("torch_")) as error:
        parse_config({**LLAMA_3_1_8B, "rope_scaling": None, key: value})
    assert len(error.value.message) < 250


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
@pytest.mark.parametrize(("kind", "key"), [
    *((kind, "factor") for kind in ("linear", "dynamic", "llama3", "yarn")), ("llama3", "low_freq_factor"), ("llama3", "high_freq_factor"),
    ("yarn", "original_max_position_embeddings"), ("yarn", "beta_fast"), ("yarn", "beta_slow"), ("yarn", "attention_factor"),
    ("yarn", "mscale"), ("yarn", "mscale_all_dim"), ("yarn", "rope_type"),
])
def test_a_rotary_value_beyond_every_model_is_refused_by_its_key(kind: str, key: str, value: Any) -> None:
    scaling = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    with pytest.raises(ModelError, match=key.replace("_", ".")) as error:
        parse_config({**LLAMA_3_1_8B, "rope_scaling": {**scaling, key: value}})
    assert len(error.value.message) < 250


@pytest.mark.parametrize("change", [
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": -1.0}}, {"rope_theta": 0.5}, {"rope_theta": -1.0},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, {"rms_norm_eps": -1e-6},
    {"rope_scaling": {"type": "linear", "factor": 1e6}}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": -14.426950408889634}},
])
def test_values_for_which_the_rotary_frequencies_do_not_exist_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config.json: "):
        parse_config({**LLAMA_3_1_8B, "rope_scaling": None, **change})


@pytest.mark.parametrize(("named", "kind", "architecture"), [
    (None, "llama", "LlamaForCausalLM"), ([], "mistral", "MistralForCausalLM"), (None, "qwen2", "Qwen2ForCausalLM"),
    ([], "qwen3", "Qwen3ForCausalLM"), (["Custom", "LlamaForCausalLM"], "custom", "LlamaForCausalLM"),
    (["LlamaForCausalLM"], None, "LlamaForCausalLM"),
])
def test_without_architectures_the_model_type_decides(named: Any, kind: Any, architecture: str) -> None:
    config = {**LLAMA_3_1_8B, "architectures": named, "model_type": kind}
    assert parse_config(config).architecture == architecture
    if named is None:
        del config["architectures"]
        assert parse_config(config).architecture == architecture


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": [], "model_type": "mamba"}, "the model_type 'mamba' is not supported; supported: llama, mistral"),
    ({"architectures": [], "model_type": 7}, "'model_type' must be of type str, got 7"),
    ({"architectures": "LlamaForCausalLM"}, "'architectures' must be of type list, got 'LlamaForCausalLM'"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
    ({"architectures": [], "model_type": None}, "names no model class under 'architectures' and no model_type"),
])
def test_a_model_that_is_not_named_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config({**LLAMA_3_1_8B, **change})


def test_the_method_is_refused_before_the_architecture() -> None:
    with pytest.raises(NotSupportedYet, match="awq"):
        parse_config({**LLAMA_3_1_8B, "architectures": ["Gemma2ForCausalLM"], "quantization_config": {"quant_method": "awq"}})


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, minivllm.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_has_these_families() -> None:
    names = ("Llama", "Mistral", "Qwen2", "Qwen3", "OPT", "SmolLM3", "Phi3", "Olmo", "Starcoder2", "Gemma", "Gemma2", "Gemma3", "Phi",
             "Olmo2", "Olmo3", "Granite", "Glm", "Glm4", "Exaone4", "Cohere", "Cohere2", "StableLm", "GPTNeoX", "GPTJ")
    assert set(FAMILIES) >= {f"{name}ForCausalLM" for name in (*names, "Falcon", "Bloom")} | {"GPT2LMHeadModel"}
    assert set(MODEL_TYPES.values()) == set(FAMILIES)


EXPERTS = {"num_experts": 8, "n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
           "shared_expert_intermediate_size": 64}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_missing_key_means_its_default_in_transformers(architecture: str) -> None:
    theirs = getattr(transformers, architecture).config_class()
    config = {**json.loads(theirs.to_json_string(use_diff=False)), "architectures": [architecture]}
    if architecture == "DeepseekV2ForCausalLM":
        config["num_experts_per_tok"] = 6
    inside = "text_config" if "text_config" in config else None
    full, keys = parse_config(config), config[inside] if inside else config
    for key in keys:
        fewer = {name: value for name, value in keys.items() if name != key}
        try:
            found = parse_config({**config, inside: fewer} if inside else fewer)
        except ModelError:
            continue  # the key is required here
        assert found == full or key == "architectures", key


@pytest.mark.parametrize(("architecture", "change", "message"), [
    ("OlmoForCausalLM", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported, only None is"),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 values for 32 layers"),
    ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be at least 1, got 0"),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0]}}, "short_factor must be a list of 64 positive"),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [True] * 64}}, "short_factor must be a list of 64 positive"),
    ("PhiForCausalLM", {"partial_rotary_factor": 0.01}, "partial_rotary_factor 0.01 rotates less than two of 128 dimensions"),
    ("PhiForCausalLM", {"partial_rotary_factor": 0.37}, "the rotated dimensions must be an even number up to head_dim, got 47"),
    ("GPTJForCausalLM", {"rotary_dim": 130, "rope_theta": 1e4}, "must be an even number up to head_dim, got 130 of 128"),
    ("GPTJForCausalLM", {"tie_word_embeddings": True, "rope_theta": 1e4}, "an output head with a bias cannot be tied"),
    ("GPTJForCausalLM", {}, "rope_theta 500000.0 is not supported, only 10000.0 is"),  # its angles are fixed
    ("GPTJForCausalLM", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .* is not supported"),
    ("GPTNeoXForCausalLM", {}, "rope_theta 500000.0 differs from rotary_emb_base 10000.0, which is in use: correct rotary_emb_base"),
    ("GPTNeoXForCausalLM", {"rotary_emb_base": 5e5, "partial_rotary_factor": 0.5}, "factor 0.5 differs from rotary_pct 0.25"),
    ("GPTNeoXForCausalLM", {"rotary_pct": 2.0}, "rotary_pct must be between 1e-06 and 1, got 2.0"),
    ("GlmForCausalLM", {"partial_rotary_factor": None}, "'partial_rotary_factor' must be of type float, got null"),
    ("Phi3ForCausalLM", {"rope_scaling": {"original_max_position_embeddings": 8}}, "embeddings 8 is inside the rotary"),
    ("LlamaForCausalLM", {"is_causal": False}, "is_causal False is not supported, only True is"),
    ("LlamaForCausalLM", {"per_layer_config": {"1": {"intermediate_size": 24}}}, "per_layer_config .* is not supported, only {} is"),
    ("LlamaForCausalLM", {"rope_parameters": "x"}, "'rope_parameters' must be of type dict, got 'x'"),
    ("LlamaForCausalLM", {"rope_parameters": {"full_attention": {}}}, r"rope_parameters per layer type \('full_attention'\)"),
    ("Gemma3ForCausalLM", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters must have one set of parameters for"),
    ("Olmo3ForCausalLM", {"rope_parameters": {"full_attention": {}, "sliding_attention": 3}}, "'sliding_attention' must be of type dict"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported, only None is"),
    ("Gemma3ForConditionalGeneration", {"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping 30.0 is not supported"),
    ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "gated MLP with activation 'gelu'"),
    ("SmolLM3ForCausalLM", {"layer_types": ["sliding_attention"] * 32}, "use_sliding_window is off or sliding_window is null: set both"),
    ("SmolLM3ForCausalLM", {"layer_types": ["chunked_attention"] * 32}, "layer type 'chunked_attention' is not supported"),
    *((name, {"hidden_act": "gelu", **EXPERTS}, r"experts with activation 'gelu' \(hidden_act\) are not supported, only with silu")
      for name in ("MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")),
    *((name, {"hidden_act": "gelu_new", **EXPERTS, "num_experts_per_tok": 2}, r"experts with activation 'gelu_tanh' \(hidden_act\)")
      for name in ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")),
    ("DeepseekV3ForCausalLM", {**EXPERTS, "head_dim": 128}, "head_dim 128 must be qk_rope_head_dim 64: correct or remove it"),
    ("DeepseekV2ForCausalLM", {**EXPERTS, "mlp_bias": True}, "mlp_bias True is not supported, only False is"),
    ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
    ("Gemma2ForCausalLM", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, but num_hidden_layers is 32"),
])
def test_variants_of_these_families_without_kernels_are_refused(architecture: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config({**LLAMA_3_1_8B, "rope_scaling": None, "architectures": [architecture], **change})
