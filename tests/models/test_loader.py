"""Loading is total: every kind of file gives the same weights, and each missing, extra or damaged tensor is an error that names it."""
from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minivllm.errors import ModelError
from minivllm.models.decoder import Decoder
from minivllm.models.loader import load_model
from tests.models.paged import Paged, make_build
from tests.models.tiny import hf_logits, load, make_hf, read_spec

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def logits(model: Decoder) -> torch.Tensor:
    return Paged(model, len(TOKENS)).run((0, TOKENS))


@pytest.fixture(scope="module")
def hf() -> Any:
    return make_hf("Llama", num_key_value_heads=2)


@pytest.fixture
def folder(hf: Any, tmp_path: Path) -> Path:
    hf.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the tensors of model.safetensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, file)


# Each kind of file


def test_sharded_weights_equal_single_ones(hf: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sharded = tmp_path_factory.mktemp("sharded")
    hf.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(sharded)), logits(load(folder)))


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_a_pytorch_file_equal_those_of_safetensors(hf: Any, folder: Path, legacy: bool) -> None:
    want = logits(load(folder))
    (folder / "model.safetensors").unlink()
    torch.save(hf.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(logits(load(folder)), want)
    with pytest.raises(ModelError, match=r"has only pytorch_model.bin weights: use load_format 'auto'"):
        load_model(read_spec(folder), folder, "safetensors", make_build())


def test_sharded_pytorch_files_load_too(hf: Any, folder: Path) -> None:
    want = logits(load(folder))
    (folder / "model.safetensors").unlink()
    names = list(hf.state_dict())
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({n: hf.state_dict()[n].clone() for n in part}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {n: f for f, part in parts.items() for n in part}}))
    assert torch.equal(logits(load(folder)), want)


def test_a_single_safetensors_file_may_have_any_name(folder: Path) -> None:
    want = logits(load(folder))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert torch.equal(logits(load(folder)), want)
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"several files, no index: more.safetensors, weights.safetensors"):
        load(folder)


def test_names_may_lack_the_prefix(folder: Path) -> None:
    want = logits(load(folder))
    rewrite(folder, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in list(t)])
    assert torch.equal(logits(load(folder)), want)


def test_opt_names_start_with_decoder_or_model_decoder(tmp_path: Path) -> None:
    hf = make_hf("OPT")
    hf.save_pretrained(tmp_path)
    want = logits(load(tmp_path))
    torch.testing.assert_close(want, hf_logits(hf, TOKENS), atol=1e-4, rtol=0)
    rewrite(tmp_path, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in list(t)])
    assert torch.equal(logits(load(tmp_path)), want)


def test_weights_are_converted_to_the_dtype_of_the_engine(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    model = load(folder)
    assert model.embedding.table.dtype == torch.float32 and logits(model).isfinite().all()


def test_the_model_does_not_read_its_files_after_loading(folder: Path) -> None:
    model = load(folder)
    want = logits(model)
    file = folder / "model.safetensors"
    with file.open("r+b") as f:  # in place, so a memory map would show the change
        f.seek(2000)
        f.write(b"\0" * (file.stat().st_size - 2000))
    assert torch.equal(logits(model), want)


# What is missing, extra or mis-shaped


def test_missing_and_unexpected_tensors_are_all_named_at_once(folder: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        del t["model.layers.1.self_attn.k_proj.weight"], t["model.norm.weight"]
        t["model.layers.0.self_attn.sinks"] = torch.zeros(4)

    rewrite(folder, change)
    with pytest.raises(ModelError) as e:
        load(folder)
    assert e.value.param == "model"
    for part in ("missing: model.layers.1.self_attn.k_proj.weight [24, 48]", "missing: model.norm.weight [48]",
                 "unexpected: model.layers.0.self_attn.sinks [4] in model.safetensors"):
        assert part in e.value.message


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.2.mlp.down_proj.weight": torch.zeros(48, 79)}))
    with pytest.raises(ModelError, match=r"wrong shape: model.layers.2.mlp.down_proj.weight in model.safeten.* \[48, 79\], not \[48, 80\]"):
        load(folder)


def test_a_transposed_tensor_is_not_mistaken_for_the_right_one(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 80)}))
    with pytest.raises(ModelError, match="wrong shape"):
        load(folder)


def test_a_bias_that_the_config_excludes_is_unexpected(tmp_path: Path) -> None:
    make_hf("Llama", attention_bias=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(ModelError, match=r"unexpected: model.layers.0.self_attn.k_proj.bias .*; and 4 more"):
        load(tmp_path)


def test_an_untied_head_must_be_in_the_checkpoint(tmp_path: Path) -> None:
    make_hf("Llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"missing: lm_head.weight \[97, 48\]"):
        load(tmp_path)


def test_a_stored_copy_of_a_tied_head_is_accepted(tmp_path: Path) -> None:
    make_hf("Llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    want = logits(load(tmp_path))
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert torch.equal(logits(load(tmp_path)), want)


def test_rotary_frequencies_that_old_exporters_stored_are_ignored(folder: Path) -> None:
    want = logits(load(folder))
    rewrite(folder, lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}))
    assert torch.equal(logits(load(folder)), want)


def test_one_tensor_under_two_names_is_an_error(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"norm.weight": t["model.norm.weight"]}))
    with pytest.raises(ModelError, match="stored twice"):
        load(folder)


def test_integer_weights_are_an_error(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.o_proj.weight": torch.zeros(48, 48, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.o_proj.weight in model.safetensors has dtype int8"):
        load(folder)


# Damaged files


@given(cut=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_truncated_anywhere_is_an_error_that_names_it(folder: Path, cut: float) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[: int(cut * len(whole))])
        with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
            load(folder)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_a_weight_file_with_other_content_is_an_error_that_names_it(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model.safetensors is damaged or not a safetensors file"):
        load(folder)


@pytest.mark.parametrize("cut", [0, 100, 5000])
def test_a_truncated_pytorch_file_is_an_error_that_names_it(hf: Any, folder: Path, cut: int) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(hf.state_dict(), folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:cut])
    with pytest.raises(ModelError, match=r"pytorch_model.bin is damaged"):
        load(folder)


class Payload:
    """An object whose unpickling runs code: it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("save", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x, 2))])
def test_a_pickle_with_code_is_an_error_and_the_code_does_not_run(folder: Path, save: Callable[[object, Path], object]) -> None:
    (folder / "model.safetensors").unlink()
    save({"model.norm.weight": Payload(folder / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is damaged or holds more than tensors"):
        load(folder)
    assert not (folder / "ran").exists()


def test_a_pytorch_file_without_tensors_is_an_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(3)], folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not a dictionary of tensors"):
        load(folder)


@pytest.mark.parametrize(("index", "message"), [
    ("{", "is not a valid weight index"),
    ("[]", "is not a valid weight index"),
    ('{"weight_map": 3}', "is not a valid weight index"),
    ('{"weight_map": {"a": 3}}', "names 3, which is not in"),
    ('{"weight_map": {"model.norm.weight": "model-2-of-2.safetensors"}}', "names model-2-of-2.safetensors, which is not in"),
    ('{"weight_map": {"model.norm.weight": "../outside.safetensors"}}', "names ../outside.safetensors, which is outside"),
])
def test_an_invalid_index_is_an_error_that_names_it(folder: Path, index: str, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder.parent / "outside.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_a_folder_without_weights_is_an_error_that_lists_the_expected_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights in .*: expected one of model.safetensors, .*pytorch_model.bin"):
        load(folder)


# Random weights


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "OPT"])
def test_dummy_weights_need_no_folder_and_depend_only_on_the_seed(family: str, tmp_path: Path) -> None:
    make_hf(family, **({"num_key_value_heads": 2} if family == "Qwen3" else {})).save_pretrained(tmp_path)
    spec, nowhere = read_spec(tmp_path), tmp_path / "nowhere"
    first, second, other = (logits(load_model(spec, nowhere, "dummy", make_build(), seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.isfinite().all() and 1e-4 < first.std() < 10


def test_dummy_norms_are_one_and_matrices_small(tmp_path: Path) -> None:
    make_hf("Llama").save_pretrained(tmp_path)
    model = load_model(read_spec(tmp_path), tmp_path, "dummy", make_build())
    norm = model.head._norm
    assert norm is not None and norm.weight is not None and bool((norm.weight == 1).all())
    assert 0.018 < model.embedding.table.std() < 0.022
