"""Loading GGUF files without dequantizing them. The oracle is Transformers with the dequantized weights, in float32."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Q

from minivllm.config import EngineConfig
from minivllm.errors import ModelError
from minivllm.families import parse_config
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.models.gguf_weights import read_index
from minivllm.models.hub import ModelFiles, find_model
from minivllm.models.loader import load_model
from minivllm.models.weight_files import GGUF_INDEX
from minivllm.quantization.grouped import GroupedMatmul
from minivllm.quantization.methods import METHODS, method_of, resident_bytes
from tests.models.gguf_files import NARROW, VOCAB, convert, prepare, refused
from tests.models.paged import Paged, make_build
from tests.models.tiny import hf_logits

Q4_K_M = {"token_embd": Q.Q6_K, "attn_v": Q.Q6_K, "ffn_down": Q.Q6_K, "output.": Q.Q6_K}
TOKENS = [(7 * i) % VOCAB for i in range(23)]


def load(folder: Path, load_format: str = "auto") -> Decoder:
    config = json.loads((folder / "config.json").read_text())
    plain = make_build()
    build = BuildContext(plain.device, plain.dtype, plain.ops, method_of(config))
    return load_model(parse_config(config, methods=METHODS), folder, load_format, build)


def assert_equals_transformers(path: Path) -> Decoder:
    """Compare logits, computed with a cache: a prompt and single tokens."""
    from transformers import AutoModelForCausalLM

    want = hf_logits(AutoModelForCausalLM.from_pretrained(convert(path), dtype=torch.float32).eval(), TOKENS)
    model = load(prepare(path))
    paged = Paged(model, len(TOKENS))
    got = torch.cat([paged.run((0, TOKENS[:20])), *(paged.run((0, [token])) for token in TOKENS[20:])])
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=2e-4 * float(want.abs().max()), rtol=0.0)
    return model


@pytest.mark.parametrize(("arch", "kind", "flags"), [
    ("llama", Q.Q4_K, {"kinds": Q4_K_M, "bias": True}), ("qwen3", Q.Q5_K, {"tied": True}), ("qwen2", Q.Q4_0, {"kinds": {"attn_v": Q.F16}}),
    ("llama", Q.Q8_0, {}), ("llama", Q.Q2_K, {"kinds": {"attn_v": Q.Q4_1, "ffn_down": Q.Q3_K}}),
], ids=["Q4_K_M", "Q5_K tied", "Q4_0 with F16", "Q8_0", "Q2_K with Q4_1"])
def test_logits_equal_those_of_the_dequantized_model(write_gguf: Callable[..., Path], arch: str, kind: Q, flags: dict[str, Any]) -> None:
    assert_equals_transformers(write_gguf(arch, kind, **flags))


@pytest.mark.parametrize(("arch", "kind"), [("llama", Q.Q4_K), ("qwen2moe", Q.Q8_0), ("qwen3moe", Q.Q5_0), ("olmoe", Q.F16)])
def test_experts_are_read_from_tensors_of_three_dimensions(
    write_gguf: Callable[..., Path], arch: str, kind: Q, capsys: pytest.CaptureFixture[str],
) -> None:
    heads = {"attention.key_length": 32, "attention.value_length": 32} if arch in NARROW else {}
    path = write_gguf(arch, kind, meta={"expert_count": 3, "expert_used_count": 2, **heads}, experts=True,
                      kinds={"ffn_gate_inp": Q.F32, "ffn_down_exps": Q.Q8_0})
    assert_equals_transformers(path)
    assert "are dequantized to float32 while loading: no kernel multiplies packed ones" in capsys.readouterr().err


def test_how_experts_are_chosen_must_be_the_architectures_way(write_gguf: Callable[..., Path]) -> None:
    for key, value in (("expert_gating_func", 2), ("expert_weights_norm", True), ("expert_weights_scale", 2.5)):
        refused(write_gguf("qwen2moe", meta={"expert_count": 3, "expert_used_count": 2, key: value}), f"qwen2moe.{key}")


def test_a_tied_head_and_the_table_are_one_packed_weight(write_gguf: Callable[..., Path]) -> None:
    model = load(prepare(write_gguf("qwen3", Q.Q4_K, kinds=Q4_K_M, tied=True)))
    assert isinstance(model.embedding.table, GroupedMatmul) and model.head._matmul is model.embedding.table


def test_the_weights_take_as_much_memory_as_the_file(write_gguf: Callable[..., Path], default_model: ModelFiles) -> None:
    for folder in (prepare(write_gguf("llama", Q.Q4_K, kinds=Q4_K_M)), default_model.folder):
        config = json.loads((folder / "config.json").read_text())
        spec = parse_config(config, methods=METHODS)
        in_file = sum(tensor.size for tensor in read_index(folder / GGUF_INDEX).values())
        assert 0.95 * in_file < resident_bytes(spec, method_of(config), itemsize=2, on_gpu=False) < 1.05 * in_file


def test_types_that_do_not_stay_packed_are_named(write_gguf: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf("llama", Q.Q4_K, kinds={"ffn_down": Q.Q2_K, "attn_output": Q.IQ4_XS})
    load(prepare(path))
    assert f"{path}: dequantized while loading, because they have no packed form here: IQ4_XS (2 tensors), Q2_K" in capsys.readouterr().err


def test_random_weights_need_no_tensors(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf("llama", Q.Q4_K, kinds=Q4_K_M)
    folder = prepare(path)
    path.unlink()
    logits = Paged(load(folder, "dummy"), 4).run((0, [1, 2, 3]))
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0


def test_nothing_large_is_written(write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "cache"))
    path = write_gguf("llama", Q.Q4_K)
    files = find_model(EngineConfig(model=str(path), skip_tokenizer_init=True))
    assert files.config["quantization_config"]["types"]["layers.0.mlp.up_proj"] == "Q4_K"
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file()) < 12_000 < path.stat().st_size


# ---- files of several parts

def test_any_part_of_a_split_file_loads_all(write_gguf: Callable[..., Path]) -> None:
    first = write_gguf("llama", Q.Q4_K, kinds=Q4_K_M, per_part=9)
    parts = sorted(first.parent.glob("*.gguf"))
    assert len(parts) == 4
    model = assert_equals_transformers(first)
    again = Paged(load(prepare(parts[2])), 3).run((0, [1, 2, 3]))
    assert torch.equal(again, Paged(model, 3).run((0, [1, 2, 3])))


def test_missing_parts_are_named(write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "cache"))
    first = write_gguf("llama", Q.Q4_K, per_part=9)
    config = EngineConfig(model=str(first), skip_tokenizer_init=True)
    folder = find_model(config).folder
    second = first.with_name(first.name.replace("00001-of", "00002-of"))
    stamp = second.stat()
    second.write_bytes(second.read_bytes() + b"1")  # a part that changes makes another folder
    assert find_model(config).folder != folder and stamp.st_size != second.stat().st_size
    second.unlink()
    with pytest.raises(ModelError, match=f"these are missing: {second.name}"):
        find_model(config)


def test_damaged_and_renamed_parts_are_named(write_gguf: Callable[..., Path]) -> None:
    first = write_gguf("llama", Q.Q4_K, per_part=9)
    second, third = (first.with_name(first.name.replace("00001-of", f"0000{i}-of")) for i in (2, 3))
    whole = second.read_bytes()
    second.write_bytes(whole[:300])
    with pytest.raises(ModelError, match=rf"{second.name} .*truncated"):
        prepare(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelError, match=rf"{second.name}: by its metadata it is part 3 of 4, by its name part 2 of 4"):
        prepare(first)
    alone = first.rename(first.with_name("m.gguf"))
    with pytest.raises(ModelError, match=r"m\.gguf: by its metadata it is part 1 of 4"):
        prepare(alone)


# ---- what happens to the file later

def test_a_file_that_was_cut_or_removed_after_the_index_was_made_is_named(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf("llama", Q.Q4_K)
    folder = prepare(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ModelError, match=rf"{path.name}: ends inside a tensor"):
        load(folder)
    path.unlink()
    with pytest.raises(ModelError, match=rf"{path.name}: cannot be read: No such file"):
        load(folder)
    (folder / GGUF_INDEX).write_text('{"a": {"kind": 1}}')
    with pytest.raises(ModelError, match=f"{GGUF_INDEX} is not an index"):
        load(folder)
