"""Metadata of GGUF files: every key that could change the output is honored, or an error that names it."""
from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minivllm.errors import ModelError
from minivllm.families import parse_config
from minivllm.models import gguf_metadata as keys
from minivllm.models.gguf_metadata import Metadata, check_keys
from tests.models.gguf_files import HEAD_DIM, HIDDEN, LAYERS, config_of, convert, refused

# Every key that llama.cpp reads for language models (LLM_KV_NAMES in src/llama-arch.cpp), without the ones of other kinds of layers
# (ssm, wkv, posnet, convnext, shortconv, ...), which are unknown here.
LLAMA_CPP_KEYS = """
vocab_size context_length embedding_length embedding_length_out embedding_length_per_layer_input block_count leading_dense_block_count
feed_forward_length expert_feed_forward_length expert_shared_feed_forward_length use_parallel_residual tensor_data_layout expert_count
expert_used_count expert_shared_count expert_group_count expert_group_used_count expert_weights_scale expert_weights_norm
expert_gating_func expert_group_scale experts_per_group moe_every_n_layers nextn_predict_layers pooling_type logit_scale
attn_logit_softcapping router_logit_softcapping final_logit_softcapping swin_norm rescale_every_n_layers residual_scale embedding_scale
interleave_moe_layer_step attention.head_count attention.head_count_kv attention.max_alibi_bias attention.clamp_kqv attention.key_length
attention.value_length attention.layer_norm_epsilon attention.layer_norm_rms_epsilon attention.causal attention.q_lora_rank
attention.kv_lora_rank attention.sliding_window attention.sliding_window_pattern attention.rope_pattern attention.scale
attention.output_scale attention.value_scale attention.temperature_length attention.temperature_scale attention.key_length_mla
attention.value_length_mla attention.key_length_swa attention.value_length_swa rope.dimension_count rope.dimension_count_swa
rope.dimension_sections rope.freq_base rope.freq_base_per_layer rope.freq_base_swa rope.scale_linear rope.scaling.type rope.scaling.factor
rope.scaling.alpha rope.scaling.attn_factor rope.scaling.original_context_length rope.scaling.finetuned rope.scaling.yarn_log_multiplier
rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
classifier.output_labels"""


def test_every_key_of_llama_cpp_is_in_exactly_one_group() -> None:
    groups = [set(keys.ARCHITECTURE_KEYS), set(keys.MUST_BE_NEUTRAL), set(keys.WITHOUT_EFFECT)]
    for name in LLAMA_CPP_KEYS.split():
        assert sum(name in group for group in groups) == 1, name
    tokenizer = [set(keys.TOKENIZER_KEYS), set(keys.TOKENIZER_MUST_BE_NEUTRAL), set(keys.TOKENIZER_WITHOUT_EFFECT)]
    assert sum(map(len, groups)) == len(set.union(*groups)) and sum(map(len, tokenizer)) == len(set.union(*tokenizer))


def checked(**values: Any) -> None:
    check_keys(Metadata(Path("m.gguf"), {"general.architecture": "llama", **{k.replace("__", "."): v for k, v in values.items()}}))


@pytest.mark.parametrize("name", keys.MUST_BE_NEUTRAL)
def test_a_key_that_is_not_supported_is_an_error_unless_its_value_changes_nothing(name: str, capsys: Any) -> None:
    allowed = keys.MUST_BE_NEUTRAL[name]
    for value in allowed if allowed is keys.ONLY_TRUE else (0, 0.0, [0, 0], [], *allowed):
        checked(**{f"llama.{name}": value})
    assert capsys.readouterr().err == ""
    with pytest.raises(ModelError, match=re.escape(f"m.gguf: metadata llama.{name} = 3.5 is not supported")):
        checked(**{f"llama.{name}": 3.5})


@pytest.mark.parametrize(("key", "value", "says"), [
    ("llama.rope.freq_bsae", 1e6, "is not known, and may change the model's output; did you mean 'rope.freq_base'?"),
    ("llama.ssm.conv_kernel", 4, "is not known"),
    ("llama.new_trick", True, "gguf-new-metadata --remove-metadata llama.new_trick m.gguf NEW.gguf"),
    ("tokenizer.ggml.suppress_tokens", [3], "is not supported"),
    ("tokenizer.ggml.normalizer.lowercase", True, "is not supported"),
    ("tokenizer.ggml.escape_whitespaces", False, "is not supported"),
    ("llama.attention.causal", False, "is not supported"),
    ("general.type", "adapter", "is not a language model"),
])
def test_a_key_that_may_change_the_output_is_an_error_that_names_it(key: str, value: Any, says: str) -> None:
    with pytest.raises(ModelError, match=re.escape(f"metadata {key} = {value!r} ")) as error:
        checked(**{key: value})
    assert says in str(error.value)


@pytest.mark.parametrize(("key", "value", "says"), [
    ("llama.new_trick", 0, "metadata llama.new_trick = 0 is not known, and not used"),
    ("tokenizer.ggml.tokenz", ["a"], "is not known, and not used; did you mean 'ggml.tokens'?"),
    ("general.sampling.mirostat", 2, "general.sampling.mirostat is not supported"),
])
def test_a_key_that_changes_nothing_here_is_a_warning(key: str, value: Any, says: str, capsys: Any) -> None:
    checked(**{key: value})
    assert says in capsys.readouterr().err


def test_descriptions_and_other_programs_keys_are_accepted_silently(capsys: Any) -> None:
    checked(**{"general.name": "x", "general.tags": ["a"], "general.quantization_version": 2, "quantize.imatrix.file": "x",
               "mradermacher.quantized_by": "x", "tokenizer.ggml.add_sep_token": True, "tokenizer.huggingface.json": "{}",
               "llama.expert_used_count": 2, "llama.attention.layer_norm_epsilon": 1e-5})
    assert capsys.readouterr().err == ""


# ---- values

@pytest.mark.parametrize(("name", "wrong"), [
    ("block_count", "2"), ("block_count", 0), ("block_count", 2.0), ("block_count", True), ("block_count", 2**40), ("block_count", [2, 3]),
    ("context_length", 0), ("context_length", -1), ("embedding_length", "big"), ("feed_forward_length", 0), ("attention.head_count", 0),
    ("attention.head_count_kv", 0), ("attention.key_length", 0), ("rope.dimension_count", 0), ("rope.freq_base", 0.0),
    ("rope.freq_base", math.nan), ("rope.freq_base", math.inf), ("rope.freq_base", "1e4"), ("rope.freq_base", -1.0),
    ("attention.layer_norm_rms_epsilon", 0.0), ("attention.layer_norm_rms_epsilon", math.nan), ("attention.sliding_window", -1),
    ("rope.scaling.type", 1), ("rope.scaling.factor", -2.0), ("rope.scaling.factor", math.inf), ("rope.scale_linear", math.nan),
    ("rope.scaling.original_context_length", 0), ("rope.scaling.attn_factor", 0.0), ("vocab_size", "many"),
])
def test_a_value_of_a_wrong_kind_is_an_error_that_names_key_and_value(name: str, wrong: Any) -> None:
    meta = Metadata(Path("m.gguf"), {"general.architecture": "llama", f"llama.{name}": wrong})
    with pytest.raises(ModelError, match=re.escape(f"m.gguf: metadata llama.{name} = ")) as error:
        meta.hparam(name)
    assert "must be" in str(error.value) or "differs between layers" in str(error.value)


@pytest.mark.parametrize(("meta", "says"), [
    ({"block_count": LAYERS + 1}, f"llama.block_count = {LAYERS + 1} but the file has the tensors of {LAYERS} layers"),
    ({"block_count": 2**31 - 1}, "but the file has the tensors of"),
    ({"embedding_length": HIDDEN + 8}, "but tensor 'token_embd.weight' has rows of 256"),
    ({"attention.head_count": 3, "attention.head_count_kv": 2}, "is not a multiple of the 2 key and value heads"),
    ({"attention.head_count": 4}, "rows, not 4 heads of 64"),
    ({"attention.head_count": 7, "attention.head_count_kv": 7, "attention.key_length": None}, "is not a multiple of the 7 attention heads"),
    ({"attention.value_length": 32}, "unequal key and value widths"),
    ({"attention.scale": 0.5}, "llama.attention.scale = 0.5 is not supported, only 1 / sqrt(head width) = 0.125 is"),
    ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; supported: llama, qwen2, qwen3"),
])
def test_sizes_that_do_not_fit_the_tensors_are_an_error(write_gguf: Callable[..., Path], meta: dict[str, Any], says: str) -> None:
    refused(write_gguf("llama", meta=meta) if "general.architecture" not in meta else write_gguf("mamba"), says)


def test_values_that_say_nothing_new_are_accepted(write_gguf: Callable[..., Path], capsys: Any) -> None:
    meta = {"attention.scale": HEAD_DIM**-0.5, "attention.sliding_window": 0, "attention.head_count": [8] * LAYERS, "vocab_size": 77}
    config = config_of(convert(write_gguf("llama", meta=meta)))
    assert (config["architectures"], config["num_attention_heads"], config["vocab_size"]) == (["LlamaForCausalLM"], 8, 40)
    assert "llama.vocab_size = 77 is not used: the embedding has 40 rows" in capsys.readouterr().err


# ---- rotary embedding

@pytest.mark.parametrize(("meta", "expected"), [
    ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # without a type: linear
    ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # the older name
    ({"rope.scale_linear": 4.0, "rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"rope.scale_linear": 1.0}, None),
    ({"rope.scaling.factor": 0.0}, None),
    ({"rope.scaling.type": "linear"}, None),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 2 * (0.1 * math.log(4) + 1)}),
])
def test_rope_scaling_follows_llama_cpps_rules(
    write_gguf: Callable[..., Path], meta: dict[str, Any], expected: dict[str, Any] | None,
) -> None:
    for arch in ("llama", "qwen2"):
        config = config_of(convert(write_gguf(arch, meta=meta)))
        assert config["rope_scaling"] == expected
        parse_config(config)


@pytest.mark.parametrize(("meta", "says"), [
    ({"rope.scaling.type": "yarn"}, "rope.scaling.factor is missing, which yarn needs"),
    ({"rope.scaling.factor": 0.5}, "must be at least 1"),
    ({"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}, "attn_factor = 1.5 is supported only with yarn"),
    ({"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, "rope.scaling.type = 'ntk' is not supported"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_ext_factor": 0.5},
     "yarn_ext_factor = 0.5 is not supported"),
])
def test_rope_scaling_that_is_not_supported_is_an_error(write_gguf: Callable[..., Path], meta: dict[str, Any], says: str) -> None:
    refused(write_gguf("llama", meta=meta), says)


def test_frequency_divisors_of_one_change_nothing_and_do_not_mix_with_a_factor(write_gguf: Callable[..., Path]) -> None:
    ones, twos = np.ones(HEAD_DIM // 2, np.float32), np.full(HEAD_DIM // 2, 2, np.float32)
    assert config_of(convert(write_gguf("llama", extra={"rope_freqs.weight": ones})))["rope_scaling"] is None
    both = write_gguf("llama", meta={"rope.scaling.factor": 2.0}, extra={"rope_freqs.weight": ones})
    assert config_of(convert(both))["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    refused(write_gguf("llama", meta={"rope.scaling.factor": 2.0}, extra={"rope_freqs.weight": twos}), "both scale")


# ---- generation_config.json

def test_recommended_sampling_parameters_become_the_models_defaults(write_gguf: Callable[..., Path], capsys: Any) -> None:
    meta = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.95, "general.sampling.min_p": 0.0,
            "general.sampling.penalty_repeat": 1.05, "general.sampling.xtc_probability": 0.5}
    folder = convert(write_gguf("llama", meta=meta))
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.05}
    assert "general.sampling.xtc_probability is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [
    ("temp", -1.0), ("penalty_repeat", 0.0), ("top_p", 5.0), ("top_p", 0.0), ("min_p", 2.0), ("top_k", 20.5),
])
def test_a_recommended_sampling_parameter_out_of_range_is_a_warning_with_its_key(
    write_gguf: Callable[..., Path], key: str, value: float, capsys: Any,
) -> None:
    folder = convert(write_gguf("llama", meta={f"general.sampling.{key}": value, "general.sampling.min_p": 0.25} if key != "min_p" else {
        "general.sampling.min_p": value}))
    kept = json.loads((folder / "generation_config.json").read_text())
    assert kept == ({} if key == "min_p" else {"min_p": 0.25})
    printed = capsys.readouterr().err
    assert f"metadata general.sampling.{key} = {value!r} is not used" in printed and "must be" in printed


def test_a_whole_number_of_recommended_candidates_may_be_written_as_a_fraction(write_gguf: Callable[..., Path]) -> None:
    folder = convert(write_gguf("llama", meta={"general.sampling.top_k": 20.0}))
    assert (folder / "generation_config.json").read_text().count("20.0") == 0
    assert json.loads((folder / "generation_config.json").read_text()) == {"top_k": 20}


def test_special_ids_of_a_file_without_a_token_list_are_checked_against_the_embedding(write_gguf: Callable[..., Path], capsys: Any) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.eos_token_id": 40, "tokenizer.ggml.padding_token_id": 4294967295}
    folder = convert(write_gguf("llama", meta=ids))
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 7}
    assert capsys.readouterr().err.count("outside the vocabulary (0 to 39), and not used") == 2
