"""Hostile model files: each gives one line that names the file, without a hang, much memory, or a step outside the model's folder."""
from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput, ModelError, NotSupportedYet
from minivllm.families.model_folder import compile_pattern, parse_json
from minivllm.models import gguf, gguf_structure
from minivllm.models.gguf_weights import read_index
from minivllm.models.hub import check_config, find_model
from minivllm.models.weight_files import GGUF_INDEX, find_weight_files, read_safetensors_header
from minivllm.quantization.awq import method_of
from minivllm.quantization.grouped import check_finite
from tests.models.gguf_files import refused

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "eos_token_id": [1, 2], "torch_dtype": "bfloat16",
}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(40)], "tokenizer.ggml.token_type": [1] * 40,
    "tokenizer.ggml.merges": ["t 1"], "tokenizer.ggml.eos_token_id": 1,
}


def memory() -> int:
    """Most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# -- GGUF --------------------------------------------------------------------------------------------------------------


def header(*numbers: tuple[str, int], count: int = 1) -> bytes:
    """A file with one key "a", whose type and value are these numbers."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, count, 1) + b"a" + b"".join(struct.pack("<" + form, number) for form, number in numbers)


@pytest.mark.parametrize(("content", "says"), [
    (header(("I", 9), ("I", 4), ("Q", 2**62)), "elements in one array"),
    (header(("I", 9), ("I", 8), ("Q", 2**22)), "bytes less than its header says"),
    (header(("I", 9), ("I", 9), ("Q", 1), ("I", 9), ("Q", 1)), "array of arrays"),
    (header(("I", 8), ("Q", 2**63)), "bytes less than its header says"), (header(("I", 77)), "77 is not the type"),
    (header(("I", 4), ("I", 1), count=2**60), "metadata keys"), (b"GGUF" + struct.pack("<IQQ", 3, 2**50, 0), "tensors"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), "a name has"), (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "gguf-convert-endian"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\x1b" + struct.pack("<II", 4, 1), "not printable"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I4QIQ", 4, *[2**15] * 4, 0, 0), "cannot be in a file"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 2**31), "dimensions"),
])
def test_numbers_of_a_gguf_header_must_fit_the_file(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    before = memory()
    refused(tmp_path / "m.gguf", says)
    assert memory() - before < 100 << 10


@pytest.mark.parametrize("change", [
    {"meta": {"attention.head_count": 0}}, {"meta": {"split.count": "two"}}, {"meta": {"tokenizer.ggml.tokens": 3}},
    {"meta": {"tokenizer.ggml.merges": "t 1"}}, {"meta": {"attention.head_count_kv": [2, 0]}}, {"meta": {"block_count": [2, 1]}},
    {"drop": ("token_embd.weight",), "extra": 40}, {"drop": ("blk.0.attn_q.weight",), "extra": 256},
], ids=str)
def test_odd_values_of_a_gguf_file_are_named(write_gguf: Callable[..., Path], tmp_path: Path, change: dict[str, Any]) -> None:
    import numpy as np

    extra = {change["drop"][0]: np.ones(change["extra"], np.float32)} if "extra" in change else {}
    path = write_gguf(meta={**TOKENIZER, **change.get("meta", {})}, drop=change.get("drop", ()), extra=extra)
    with pytest.raises(ModelError) as error:
        gguf.prepare(path, tmp_path / "out", check_config)
        find_model(EngineConfig(model=str(path)))
    assert "\n" not in str(error.value) and path.stem in str(error.value)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_damaged_bytes_of_a_gguf_header_give_a_model_or_one_line(
        write_gguf: Callable[..., Path], tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        whole.write_bytes(write_gguf(meta=TOKENIZER).read_bytes())
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 4000))
        number = data.draw(st.sampled_from([0, 1, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**62, 2**64 - 1]) | st.integers(0, 2**64 - 1))
        size = data.draw(st.sampled_from([1, 4, 8]))
        content[at:at + data.draw(st.sampled_from([size, size, 0, 8]))] = number.to_bytes(8, "little")[:size]
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content[:data.draw(st.sampled_from([len(content)] * 3 + [2000]))])
    before = memory()
    try:
        check_config(gguf.read_header(damaged).config)
    except InvalidInput as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    assert memory() - before < 200 << 10


def test_the_limits_of_a_gguf_header_are_far_above_real_files() -> None:
    """The largest vocabulary of 2026 has 262,144 tokens and twice as many merges; each token has a text, a score and a type."""
    assert gguf_structure.MAX_ELEMENTS > 2 * 5 * 262_144 and gguf_structure.MAX_TENSORS > 10_000 * 13


# -- JSON --------------------------------------------------------------------------------------------------------------


def folder_with(tmp_path: Path, name: str, content: str | bytes) -> Path:
    folder = tmp_path / "m"
    folder.mkdir(exist_ok=True)
    for file, text in {"config.json": json.dumps(CONFIG), "tokenizer.json": "{}", "model.safetensors": ""}.items():
        (folder / file).write_text(text)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize(("content", "says"), [
    ('{"a": NaN}', "'NaN' is not a finite number"), ('{"a": -Infinity}', "not a finite number"), ('{"a": 1e999}', "not a finite number"),
    (f'{{"a": {"9" * 4000}}}', "4000 digits"), ('{"a": ' * 90 + "1" + "}" * 90, "deeper than 64"), ("[" * 100_000, "deeper than 64"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"), ("[1]", "a list instead"), (b"\xff\xfe", "not readable as JSON"),
    ("", "not readable as JSON"), ("7", "a int instead"),
])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_no_model_has_is_one_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    folder = folder_with(tmp_path, name, content)
    with pytest.raises(ModelError, match=rf"m/{name}: .*{says}") as error:
        find_model(EngineConfig(model=str(folder)), lambda config: None)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


ODD = [b"1e9", b"NaN", b"-1", b"999999999999", b"[", b"{}", b'"', b"null", b"true", b"\x00", b"\xff", b"0", b",", b"1" * 5000]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_of_a_config_give_a_specification_or_one_line(data: st.DataObject) -> None:
    content = bytearray(json.dumps(CONFIG).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at:at + data.draw(st.integers(0, 4))] = data.draw(st.sampled_from(ODD) | st.binary(max_size=3))
    before = memory()
    try:
        config = parse_json(bytes(content))
        if isinstance(config, dict):
            check_config(config)
    except (InvalidInput, ValueError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    assert memory() - before < 200 << 10


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 90) + b"{}", b"\x02", b"",
    *(struct.pack("<Q", len(text)) + text for text in (
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,0]}}', b'{"a":{"dtype":3,"shape":[],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[1e300,0]}}', b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}')),
])
def test_a_lying_safetensors_header_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    before = memory()
    with pytest.raises(ModelError, match="damaged or not a safetensors file") as error:
        read_safetensors_header(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value) and memory() - before < 50 << 10


@pytest.mark.parametrize("change", [
    {"file": "/etc/passwd"}, {"offset": -1}, {"size": 2.5}, {"shape": [0, 4]}, {"shape": []}, {"shape": [3]}, {"heads": True},
    {"offset": "0"}, {"transposed": 1}, {"is_plain": None},
])
def test_an_index_of_gguf_tensors_cannot_name_other_files_or_odd_numbers(tmp_path: Path, change: dict[str, Any]) -> None:
    entry = {"kind": "F32", "shape": [4], "file": str(tmp_path / "m.gguf"), "offset": 0, "size": 16, "heads": 0}
    (tmp_path / GGUF_INDEX).write_text(json.dumps({"a": entry}))
    assert read_index(tmp_path / GGUF_INDEX)["a"].size == 16
    part = {**entry, "shape": [4, 1]}
    latent = {"keys": part, "of_values": {**part, "shape": [2, 2], "size": 16}, "heads": 2}
    (tmp_path / GGUF_INDEX).write_text(json.dumps({"a": latent}))
    assert read_index(tmp_path / GGUF_INDEX)["a"].shape == (4, 2)
    for wrong in ({**entry, **change}, {**latent, "of_values": {**part, **change}}, {**latent, "heads": 4}, {**latent, "heads": 0},
                  {**latent, "heads": True}):
        (tmp_path / GGUF_INDEX).write_text(json.dumps({"a": wrong}))
        with pytest.raises(ModelError, match="not an index"):
            read_index(tmp_path / GGUF_INDEX)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_not_finite_are_refused(value: float) -> None:
    check_finite(torch.ones(3), None, torch.ones(2, dtype=torch.uint8))
    with pytest.raises(ModelError, match="infinite or not a number"):
        check_finite(torch.ones(3), torch.tensor([1.0, value], dtype=torch.float16))


def test_an_awq_backend_with_another_layout_is_refused() -> None:
    config = {"bits": 4, "group_size": 32, "version": "gemm"}
    method_of({**config, "backend": "autoawq"})
    for backend in ("llm-awq", "unheard-of"):
        with pytest.raises(NotSupportedYet, match="backend"):
            method_of({**config, "backend": backend})


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "(a|a)*b", ".*" * 7 + "x", "a{1,}" * 7, "(", "(?:x.*){9}"])
def test_a_pattern_that_may_take_very_long_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"repeats a group|unterminated"):
        compile_pattern(pattern)


def test_usual_patterns_of_modules_are_kept() -> None:
    for pattern in (r".*lm_head", r"model\.layers\.(\d+|1[0-9])\..*(q|k)_proj.*", r".*\.mlp\.(gate|up)_proj(\.weight)?",
                    r"^(?!.*lm_head).*$", r"re[+*()]{2}x*"):
        assert compile_pattern(pattern).pattern == pattern


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, name, "{}")
    (tmp_path / "elsewhere").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=rf"{name} is a link to .*elsewhere, outside the model's folder"):
        find_model(EngineConfig(model=str(folder)), lambda config: None)


def test_links_inside_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "real.bin", b"")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("real.bin")
    (tmp_path / "name").symlink_to(folder)
    for model in (folder, tmp_path / "name"):
        assert find_model(EngineConfig(model=str(model)), lambda config: None).config["hidden_size"] == 64


def test_a_snapshot_of_the_hubs_cache_links_to_its_own_blobs_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "c0ffee", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file, text in {"config.json": json.dumps(CONFIG), "tokenizer.json": "{}", "model.safetensors": ""}.items():
        (blobs / f"hash of {file}").write_text(text)
        (snapshot / file).symlink_to(os.path.join("..", "..", "blobs", f"hash of {file}"))
    assert find_model(EngineConfig(model=str(snapshot)), lambda config: None).config["hidden_size"] == 64
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (snapshot / "generation_config.json").symlink_to(other / "x")
    with pytest.raises(ModelError, match="outside the model's folder"):
        find_model(EngineConfig(model=str(snapshot)), lambda config: None)


def test_an_index_does_not_reach_files_through_a_linked_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "m", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "x.safetensors").touch()
    (folder / "sub").symlink_to(outside)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "sub/x.safetensors"}}))
    with pytest.raises(ModelError, match="outside the model's folder"):
        find_weight_files(folder)


def test_code_in_a_model_folder_is_neither_run_nor_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tokenizer.json, Transformers reads the tokenizer, and would ask whether to run its code."""
    from minivllm.engine.tokenizer import Tokenizer

    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("a question on the terminal"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilTokenizer: ...\nclass EvilConfig: ...\n")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match="Python code from its folder, which is not run") as error:
        Tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)
