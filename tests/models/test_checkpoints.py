"""Checkpoint folders as exporters really write them: HF Transformers is the oracle for what loads, and for the values."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm.errors import ModelError
from tests.models.test_loader import TOKENS, logits, rewrite
from tests.models.tiny import hf_logits, load, make_hf

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hf() -> Any:
    return make_hf("Llama", num_key_value_heads=2)


@pytest.fixture
def folder(hf: Any, tmp_path: Path) -> Path:
    hf.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    make_hf("Llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


def from_hf(folder: Path) -> torch.Tensor:
    """Logits of Transformers with the weights in `folder`."""
    from transformers import AutoModelForCausalLM

    return hf_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), TOKENS)


def same_as_hf(folder: Path) -> None:
    torch.testing.assert_close(logits(load(folder)), from_hf(folder), atol=1e-4, rtol=0)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Tensors that follow from the configuration


@pytest.mark.parametrize(("name", "shape"), [
    ("model.layers.1.self_attn.rotary_emb.inv_freq", (6,)),
    ("model.layers.1.self_attn.rotary_emb.cos_cached", (1, 1, 64, 12)),
    ("model.layers.1.self_attn.rotary_emb.sin_cached", (64, 12)),
    ("model.rotary_emb.original_inv_freq", (6,)),
    ("rope.freqs", (6,)),
    ("model.layers.0.self_attn.bias", (1, 1, 64, 64)),
    ("model.layers.0.self_attn.masked_bias", ()),
    ("model.layers.0.attention.masked_bias", (1,)),
    ("model.causal_mask", (64, 64)),
    ("model.embeddings.position_ids", (1, 64)),
    ("model.decoder.version", (1,)),
    ("freqs_cis", (64, 6)), ("model.layers.0.attention.rotary.inv_freq", (6,)), ("model.layers.0.rotary_embed.inv_freq", (6,)),
    ("model.layers.0.self_attn.rotary_emb._cos_cached", (64, 12)), ("model.rotary_emb.sin", (64, 12)), ("model.inv_freq", (6,)),
    ("model.layers.0.self_attn.mask", (64, 64)), ("model.layers.0.attn.tril", (1, 1, 64, 64)), ("model.attention_mask", (64, 64)),
])
def test_a_stored_buffer_that_config_json_determines_is_skipped(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    want = logits(load(folder))
    rewrite(folder, lambda t: t.update({name: torch.full(shape, 7.0)}))
    assert torch.equal(logits(load(folder)), want)


@pytest.mark.parametrize(("name", "shape"), [
    ("model.layers.0.self_attn.bias", (48,)),  # a bias, not a mask
    ("model.layers.0.self_attn.q_proj.bias", (48, 48)),
    ("model.layers.0.self_attn.masked_bias", (2,)),
    ("model.layers.0.mlp.bias", (64, 64)),
    ("model.layers.0.self_attn.rotary_emb.scale", (6,)),
    ("model.layers.0.my_position_ids", (4,)),
    ("model.layers.0.self_attn.mask", (64,)), ("model.layers.0.mlp.cos", (64, 12)), ("model.layers.0.mlp.mask", (64, 64)),
    ("model.version", (48,)),
])
def test_a_tensor_that_only_looks_like_a_buffer_is_an_error(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    rewrite(folder, lambda t: t.update({name: torch.zeros(shape)}))
    with pytest.raises(ModelError, match=f"unexpected: {name}"):
        load(folder)


# Tied weights


def test_a_tied_matrix_may_be_stored_as_output_head_only(tied: Path) -> None:
    want = logits(load(tied))
    rewrite(tied, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits(load(tied)), want)
    same_as_hf(tied)


def test_a_tied_matrix_of_the_wrong_shape_is_named_as_it_is_stored(tied: Path) -> None:
    rewrite(tied, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")[1:].clone()}))
    with pytest.raises(ModelError, match=r"wrong shape: lm_head.weight .* \[96, 48\], not \[97, 48\]"):
        load(tied)


def test_unequal_matrices_are_not_tied_and_a_warning_says_so(tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    same_as_hf(tied)
    assert "lm_head.weight and" not in caplog.text and "model.embed_tokens.weight and lm_head.weight differ" in caplog.text


def test_a_missing_output_head_has_a_hint_to_tie_it(tied: Path) -> None:
    edit_config(tied, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"missing: lm_head.weight \[97, 48\] \(if .* set tie_word_embeddings to true"):
        load(tied)


# Names


@pytest.mark.parametrize("prefix", ["", "model.model.", "language_model.model.", "model.language_model.", "transformer.", "module.model.",
                                    "_orig_mod.model.", "base_model.model.model."])
def test_every_usual_prefix_loads(folder: Path, prefix: str) -> None:
    want = logits(load(folder))
    rewrite(folder, lambda t: [t.update({prefix + k.removeprefix("model."): t.pop(k)}) for k in list(t)])
    assert torch.equal(logits(load(folder)), want)


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model."])
def test_a_missing_tensor_is_named_as_the_checkpoint_spells_it(folder: Path, prefix: str) -> None:
    def change(t: Tensors) -> None:
        for name in list(t):
            if name.startswith("model."):
                t[prefix + name.removeprefix("model.")] = t.pop(name)
        for name in (f"{prefix}layers.1.mlp.up_proj.weight", f"{prefix}norm.weight", f"{prefix}embed_tokens.weight", "lm_head.weight"):
            del t[name]

    rewrite(folder, change)
    with pytest.raises(ModelError) as error:
        load(folder)
    for name in (f"{prefix}layers.1.mlp.up_proj.weight", f"{prefix}norm.weight", f"{prefix}embed_tokens.weight", "lm_head.weight"):
        assert f"missing: {name} [" in error.value.message


def test_an_unknown_prefix_is_named_once_and_missing_tensors_have_it(folder: Path) -> None:
    def change(t: Tensors) -> None:
        for name in list(t):
            t["llm." + name] = t.pop(name)
        del t["llm.model.layers.1.mlp.up_proj.weight"]

    rewrite(folder, change)
    with pytest.raises(ModelError) as error:
        load(folder)
    message = error.value.message
    assert "missing: llm.model.layers.1.mlp.up_proj.weight [" in message and "unexpected" not in message, message
    assert message.count("missing:") == 1 and "names begin with 'llm.', such as llm." in message, message


# Files


def shards(hf: Any, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Save in shards; the index's weight_map, and the names of the files."""
    hf.save_pretrained(folder, max_shard_size="60KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map, sorted(set(weight_map.values()))


def change_file(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, file, metadata={"format": "pt"})


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("weight_map", [{"model.norm.weight": "model-00001-of-00002.safetensors"}, {}, {"a": "b"}])
def test_a_complete_file_wins_over_a_stale_index_beside_it(folder: Path, weight_map: dict[str, str]) -> None:
    want = logits(load(folder))
    write_index(folder, weight_map)
    assert torch.equal(logits(load(folder)), want)
    same_as_hf(folder)


@pytest.mark.parametrize("copy", [0, -1])
def test_of_two_copies_in_two_shards_the_one_that_the_index_names_counts(hf: Any, tmp_path: Path, copy: int) -> None:
    weight_map, files = shards(hf, tmp_path)
    want = logits(load(tmp_path))
    name = next(n for n, file in weight_map.items() if file not in (files[0], files[-1]) and n.endswith("weight"))
    shape = load_file(tmp_path / weight_map[name])[name].shape
    change_file(tmp_path / files[copy], lambda t: t.update({name: torch.ones(shape)}))
    assert torch.equal(logits(load(tmp_path)), want)
    del weight_map[name]  # without the index's word it is the last copy, as in Transformers
    write_index(tmp_path, weight_map)
    same_as_hf(tmp_path)


def test_a_shard_that_the_index_does_not_name_is_not_read(hf: Any, tmp_path: Path) -> None:
    shards(hf, tmp_path)
    save_file({"model.norm.weight": torch.zeros(48)}, tmp_path / "model-00099-of-00099.safetensors")
    same_as_hf(tmp_path)


def test_entries_that_an_index_lacks_or_has_too_many_do_not_matter_if_the_tensors_exist(hf: Any, tmp_path: Path) -> None:
    weight_map, files = shards(hf, tmp_path)
    weight_map.pop("model.norm.weight")
    weight_map["lm_head.weight"] = files[0]  # it is in another file
    write_index(tmp_path, weight_map)
    same_as_hf(tmp_path)


def test_a_tensor_that_the_index_names_and_no_shard_holds_is_missing(hf: Any, tmp_path: Path) -> None:
    weight_map, _ = shards(hf, tmp_path)
    change_file(tmp_path / weight_map["model.norm.weight"], lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"missing: model.norm.weight \[48\]"):
        load(tmp_path)


def test_shards_of_a_complete_series_load_without_an_index(hf: Any, tmp_path: Path) -> None:
    _, files = shards(hf, tmp_path)
    want = logits(load(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"tok_embeddings.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert torch.equal(logits(load(tmp_path)), want)
    (tmp_path / files[1]).unlink()
    with pytest.raises(ModelError, match=rf"has only {files[0]}, .* of {len(files)} weight files; is the download complete"):
        load(tmp_path)


@pytest.mark.parametrize("huge", ["model-00001-of-99999.safetensors", "model-00000-of-00000.safetensors"])
def test_a_series_with_odd_numbers_is_incomplete(folder: Path, huge: str) -> None:
    (folder / "model.safetensors").rename(folder / huge)
    with pytest.raises(ModelError, match="is the download complete"):
        load(folder)


def test_mistrals_own_file_beside_a_complete_one_is_not_read(folder: Path) -> None:
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    same_as_hf(folder)


@pytest.mark.parametrize(("file", "what"), [
    ("consolidated.safetensors", "the original format of Mistral or Meta"), ("consolidated.00.pth", "the original format"),
    ("m.Q4_K_M.gguf", "GGUF"), ("tf_model.h5", "TensorFlow"), ("adapter_model.safetensors", "a LoRA adapter, not a model"),
    ("pytorch_model-00001-of-00002.bin", "a part, without pytorch_model.bin.index.json"),
])
def test_weights_in_another_format_are_named(folder: Path, file: str, what: str) -> None:
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(ModelError, match=rf"no weights in .* found {file} \({what}"):
        load(folder)


@pytest.mark.parametrize("weight_map", [{}, None, [], "x"])
def test_an_index_without_files_is_an_error(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    with pytest.raises(ModelError, match=r"names no files \(its weight_map is empty\)|is not a valid weight index"):
        load(folder)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool])
def test_a_dtype_that_needs_scales_is_refused_by_name_before_any_weight_is_read(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(80, 48).to(dtype),
                                        "model.layers.1.mlp.up_proj.weight": torch.zeros(80, 48).to(dtype)}))
    with pytest.raises(ModelError) as error:
        load(folder)
    for layer in (0, 1):
        assert (f"wrong dtype: model.layers.{layer}.mlp.up_proj.weight in model.safetensors has dtype {str(dtype)[6:]}, "
                "which its config.json does not announce") in error.value.message


def test_float64_is_converted_as_in_transformers(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({k: v.double() for k, v in t.items()}))
    same_as_hf(folder)


@pytest.mark.parametrize(("state", "message"), [
    (lambda s: {**s, "model.norm.weight": torch.ones(48).to_sparse()}, "model.norm.weight in .* has no plain values"),
    (lambda s: {**s, "model.norm.weight": torch.ones(48, device="meta")}, "model.norm.weight in .* has no plain values"),
    (lambda s: {**s, 7: torch.ones(48)}, "not a dictionary of tensors"),
    (lambda s: {"model": s}, "not a dictionary of tensors"),
    (lambda s: {**s, "model.norm.weight": torch.ones(48, dtype=torch.complex64)}, "has dtype complex64"),
    (lambda s: {**s, "model.norm.weight": torch.ones(0)}, r"is \[0\], not \[48\]"),
])
def test_an_odd_pytorch_file_is_an_error_that_names_what_is_odd(hf: Any, folder: Path, state: Callable[[Any], Any], message: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(state(dict(hf.state_dict())), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_an_index_may_name_files_in_folders_below(hf: Any, tmp_path: Path) -> None:
    weight_map, names = shards(hf, tmp_path)
    want = from_hf(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).rename(tmp_path / "sub" / name)
    write_index(tmp_path, {tensor: f"sub/{file}" for tensor, file in weight_map.items()})
    torch.testing.assert_close(logits(load(tmp_path)), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(from_hf(tmp_path), want, atol=1e-4, rtol=0)


def test_an_index_must_not_name_files_outside_the_folder(hf: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    weight_map, names = shards(hf, folder)
    (tmp_path / "other.safetensors").write_bytes((folder / names[0]).read_bytes())
    for outside in ("../other.safetensors", str(tmp_path / "other.safetensors"), "x/../../other.safetensors"):
        write_index(folder, {**weight_map, "x": outside})
        with pytest.raises(ModelError, match="outside the model's folder"):
            load(folder)
