"""Converting GGUF files. The oracle for tensors and tokenizers is transformers' own GGUF loader, bit for bit."""
from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file

from minivllm.families import parse_config
from minivllm.models import gguf as ours
from minivllm.models import gguf_weights
from minivllm.models.hub import ModelFiles, default_gguf
from minivllm.quantization.methods import parameters
from tests.models.gguf_files import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, config_of, convert, refused


def oracle(path: Path, folder: Path) -> dict[str, Any]:
    """State dict as transformers reads it from the GGUF file itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]


def assert_same_tensors(folder: Path, expected: dict[str, Any]) -> None:
    import torch

    got = load_file(folder / "model.safetensors")
    assert sorted(got) == sorted(expected)
    for name, tensor in got.items():
        assert tensor.shape == expected[name].shape, name
        assert torch.equal(tensor.float(), expected[name].float()), name


def tensor_names(folder: Path) -> set[str]:
    """Names of the checkpoint tensors that the decoder needs for this folder's config.json."""
    spec = parse_config(json.loads((folder / "config.json").read_text()))
    return {source.name for parameter in parameters(spec).values() for source in parameter.sources}


# ---- the embedded default model

def test_default_model_tensors_equal_transformers_own_reading_bit_for_bit(default_float32: Path) -> None:
    assert_same_tensors(default_float32, oracle(default_gguf(), default_float32))


def test_default_model_tokenizer_and_chat_template_equal_transformers_own_reading(default_float32: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    path = default_gguf()
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    backend = Tokenizer.from_file(str(default_float32 / "tokenizer.json"))
    for text in ("Hello, world!", "", " a  b\n\n\tc", "naïve 漢字 🎉", "x = 12345", "<|im_start|>user\nhi<|im_end|>", "I've 3.14"):
        assert backend.encode(text).ids == theirs.encode(text), text
    again = AutoTokenizer.from_pretrained(default_float32)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so?"}]
    for prompt in (True, False):
        kwargs = {"tokenize": False, "add_generation_prompt": prompt}
        assert again.apply_chat_template(chat, **kwargs) == theirs.apply_chat_template(chat, **kwargs)
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 2)


def test_default_model_splits_digits_one_by_one_as_its_vocabulary_requires(default_float32: Path) -> None:
    """transformers' conversion splits as GPT-2 does: it would join the second space and the digit to one piece."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(default_float32 / "tokenizer.json"))
    assert backend.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]


def test_the_cached_folder_equals_a_new_one(default_model: ModelFiles, tmp_path: Path) -> None:
    """If this fails, `prepare` has changed without an increase of CONVERSION, so users would keep the old output."""
    ours.prepare(default_gguf(), tmp_path / "new")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert sorted(path.name for path in default_model.folder.iterdir()) == names
    assert filecmp.cmpfiles(tmp_path / "new", default_model.folder, names, shallow=False) == (names, [], [])


# ---- every architecture and many types

@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_each_architecture_gives_exactly_the_tensors_that_the_decoder_needs(write_gguf: Callable[..., Path], arch: str, tied: bool) -> None:
    path = write_gguf(arch, tied=tied)
    folder = convert(path)
    got = {name.removeprefix("model.") for name in load_file(folder / "model.safetensors")}
    assert got == tensor_names(folder)
    assert_same_tensors(folder, oracle(path, folder))


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K,
                                  Q.IQ4_NL, Q.IQ4_XS], ids=lambda kind: kind.name)
def test_each_tensor_type_is_dequantized_bit_for_bit_as_transformers_does(write_gguf: Callable[..., Path], kind: Q) -> None:
    path = write_gguf("llama", kind)
    folder = convert(path)
    assert_same_tensors(folder, oracle(path, folder))


def test_float_tensors_keep_their_type_and_quantized_ones_become_float32(write_gguf: Callable[..., Path]) -> None:
    for kind, stored, runs_in in ((Q.F16, "float16", "float16"), (Q.BF16, "bfloat16", "bfloat16"), (Q.Q8_0, "float32", "bfloat16")):
        folder = convert(write_gguf("llama", kind))
        tensors = load_file(folder / "model.safetensors")
        assert str(tensors["model.embed_tokens.weight"].dtype) == f"torch.{stored}"
        assert str(tensors["model.norm.weight"].dtype) == "torch.float32"
        assert config_of(folder)["torch_dtype"] == runs_in


def test_quantized_tensors_of_a_large_model_are_stored_as_bfloat16(write_gguf: Callable[..., Path], monkeypatch: Any) -> None:
    import torch

    exact = {name: t.clone() for name, t in load_file(convert(write_gguf("llama", Q.Q4_1)) / "model.safetensors").items()}
    monkeypatch.setattr(gguf_weights, "LARGE", 1000)
    rounded = load_file(convert(write_gguf("llama", Q.Q4_1)) / "model.safetensors")
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
        assert tensor.dtype == (torch.bfloat16 if tensor.dim() == 2 else torch.float32)


def test_biases_of_a_llama_are_reordered_like_its_rows(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf("llama", bias=True)
    folder = convert(path)
    assert config_of(folder)["attention_bias"] is True
    assert {name.removeprefix("model.") for name in load_file(folder / "model.safetensors")} == tensor_names(folder)
    assert_same_tensors(folder, oracle(path, folder))


# ---- metadata -> config.json

def test_head_dim_is_the_key_length_of_the_metadata(write_gguf: Callable[..., Path]) -> None:
    spec = parse_config(config_of(convert(write_gguf("qwen3"))))
    heads = spec.layers[0].attention
    assert (heads.head_dim, heads.num_heads, heads.num_kv_heads, heads.rope.theta) == (HEAD_DIM, HEADS, KV_HEADS, 500000.0)


@pytest.mark.parametrize(("meta", "expected"), [
    ({}, None),
    ({"rope.scaling.type": "none"}, None),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
      "rope.scaling.yarn_beta_fast": 16.0},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}),
])
def test_rope_scaling_is_read_from_the_metadata(write_gguf: Callable[..., Path], meta: dict[str, Any],
                                                expected: dict[str, Any] | None) -> None:
    config = config_of(convert(write_gguf("qwen2", meta=meta)))
    assert config["rope_scaling"] == expected
    parse_config(config)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192)])
def test_llama3_rope_is_recovered_from_its_frequency_divisors(write_gguf: Callable[..., Path], factor: float, original: int) -> None:
    """The divisors come from Hugging Face's own function, which llama.cpp's converter copied."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=rope,
                         max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    divisors = (plain / scaled.double().numpy()).astype(np.float32)
    got = config_of(convert(write_gguf("llama", extra={"rope_freqs.weight": divisors})))["rope_scaling"]
    assert got == {key: value for key, value in rope.items() if key != "rope_theta"}


def test_frequency_divisors_that_are_not_llama3s_are_an_error(write_gguf: Callable[..., Path]) -> None:
    refused(write_gguf("llama", extra={"rope_freqs.weight": np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)}), "rope_freqs.weight")


def test_a_llama_with_a_window_is_a_mistral(write_gguf: Callable[..., Path]) -> None:
    spec = parse_config(config_of(convert(write_gguf("llama", meta={"attention.sliding_window": 16}))))
    assert (spec.architecture, [layer.attention.window for layer in spec.layers]) == ("MistralForCausalLM", [16] * LAYERS)


def test_the_end_of_turn_token_is_an_eos_token_too(write_gguf: Callable[..., Path]) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.eos_token_id": 8, "tokenizer.ggml.eot_token_id": 9}
    folder = convert(write_gguf("llama", meta=ids))
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 7, "eos_token_id": [8, 9]}


# ---- files that cannot be converted

def test_a_file_truncated_anywhere_is_an_error_that_names_it(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf("llama", Q.Q8_0)
    whole = path.read_bytes()
    for size in (0, 3, 4, 20, 300, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        refused(path, "truncated")


def test_a_file_that_is_not_gguf_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("this is not a model, but it is long enough to be read as one")
    refused(path, "not a GGUF file")


@pytest.mark.parametrize(("change", "says"), [
    ({"meta": {"embedding_length": None}}, "llama.embedding_length is missing"),
    ({"meta": {"expert_count": 8}}, "expert_count"),
    ({"meta": {"rope.dimension_count": 16}}, "partial rotary"),
    ({"meta": {"attention.head_count_kv": [2, 1]}}, "differs between layers"),
    ({"meta": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}}, "longrope"),
    ({"extra": {"blk.0.ffn_gate_inp.weight": np.zeros((4, 4), np.float32)}}, "blk.0.ffn_gate_inp.weight"),
    ({"extra": {"surprise": np.zeros(4, np.float32)}}, "surprise"),
    ({"extra": {"output.bias": np.zeros(4, np.int32)}}, "I32"),
    ({"drop": ("token_embd.weight",)}, "token_embd.weight"),
])
def test_unsupported_content_is_an_error_that_names_it(write_gguf: Callable[..., Path], change: dict[str, Any], says: str) -> None:
    refused(write_gguf("llama", **change), says)


def test_an_unknown_architecture_is_an_error_that_lists_the_supported_ones(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, "'mamba'")
    refused(path, "llama, qwen2, qwen3")


def test_minivllm_quantize_dequantizes_the_file_first(
    write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from minivllm.cli.main import main

    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "cache"))
    source = write_gguf(kind=Q.Q8_0)
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--method", "fp8", "--device", "cpu"]) == 0
    assert not list(tmp_path.glob(".out*"))
    ours.convert(source, tmp_path / "dequantized")
    wanted, found = load_file(tmp_path / "dequantized" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in wanted.items():
        scale = found.get(f"{name}_scale", torch.ones(1))
        assert (found[name].float() * scale - weight).norm() < 0.04 * weight.norm()
