"""A draft that does not fit the target is refused before any weights are loaded; its bytes are planned."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput
from minivllm.models.decoder import Decoder
from minivllm.quantization.quantize.eight_bit import int8
from minivllm.quantization.quantize.settings import QuantizeConfig, quantization_config
from minivllm.speculative.load import describe_draft, find_draft, load_draft, load_head
from minivllm.worker.kv_cache import KVLayout
from tests.models.tiny import load, make_hf, read_spec
from tests.speculative.heads import SIZES, write_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("target")
    make_hf("Llama", num_key_value_heads=2).save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def target(folder: Path) -> Decoder:
    return load(folder)


def configured(folder: Path, draft: Path, method: str = "eagle", **entries: Any) -> EngineConfig:
    chosen = {"method": method, "model": str(draft), "num_speculative_tokens": 2, **entries}
    return EngineConfig(model=str(folder), speculative_config=chosen)


def refusal(folder: Path, draft: Path, method: str = "eagle", **entries: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        find_draft(configured(folder, draft, method, **entries), read_spec(folder), folder, folder)
    assert caught.value.param == "speculative_config"
    return str(caught.value)


@pytest.mark.parametrize(("config", "says"), [
    ({"vocab_size": 98}, "has vocab_size 98 and the target 97, so its tokens mean something else: use a draft made for this target"),
    ({"hidden_size": 40}, "has hidden_size 40 and the target 48: a head reads the hidden states of the target that it was trained with"),
    ({"num_hidden_layers": 2}, "has num_hidden_layers 2, and method eagle needs a head of 1 layer: use method draft_model"),
    ({"architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": 80, "max_position_embeddings": 64},
     "has the architecture OPTForCausalLM, and the layer of a head must be Llama's"),
    ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
     "has the architecture MixtralForCausalLM, and the layer of a head must be Llama's"),
    ({"architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
      "moe_intermediate_size": 8}, "has the architecture DeepseekV2ForCausalLM, and the layer of a head must be Llama's"),
    ({"architectures": ["BertModel"]}, "the architecture BertModel is not supported"),
])
def test_a_head_that_does_not_fit_is_named_with_its_field(folder: Path, tmp_path: Path, config: dict[str, Any], says: str) -> None:
    write_head(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config}), encoding="utf-8")
    assert says in refusal(folder, tmp_path)


def test_a_head_is_no_model_and_a_model_is_no_head(folder: Path, tmp_path: Path) -> None:
    write_head(tmp_path)
    assert "it has fc.weight, so it is a learned head and no whole model: set method to eagle" in refusal(folder, tmp_path, "draft_model")
    make_hf("Llama", num_key_value_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    assert "it has no fc.weight, so it is no head in EAGLE's layout: set method to draft_model" in refusal(folder, tmp_path)


def test_a_missing_folder_or_config_is_named(folder: Path, tmp_path: Path) -> None:
    assert "has no config.json" in refusal(folder, tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    assert "no weights" in refusal(folder, tmp_path, "draft_model")


def test_a_draft_with_another_tokenizer_is_refused_with_a_token_that_differs(folder: Path, tmp_path: Path) -> None:
    make_hf("Llama", num_key_value_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["c", 0.0]]}}), encoding="utf-8")
    assert "another tokenizer than the target: 'b' is token None there and 1 here" in refusal(folder, tmp_path, "draft_model")


def test_a_target_with_sliding_windows_only_is_refused(tmp_path: Path) -> None:
    make_hf("Mistral", num_key_value_heads=2, sliding_window=8).save_pretrained(tmp_path / "target")
    write_head(tmp_path / "head")
    assert "needs a target with full attention in at least one layer" in refusal(tmp_path / "target", tmp_path / "head")


@pytest.mark.parametrize(("method", "vocabulary"), [("eagle", None), ("eagle", [1, 5, 9]), ("draft_model", None)])
def test_the_planned_bytes_are_those_of_the_loaded_draft(
    folder: Path, target: Decoder, tmp_path: Path, method: str, vocabulary: list[int] | None,
) -> None:
    if method == "eagle":
        write_head(tmp_path, vocabulary)
    else:
        make_hf("Llama", num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path)
    draft = find_draft(configured(folder, tmp_path, method), target.spec, folder)
    assert draft is not None
    planned = describe_draft(configured(folder, tmp_path, method), target.spec)
    assert planned is not None
    load_draft(draft, target)
    stored = sum(t.numel() for name, t in load_file(tmp_path / "model.safetensors").items() if name != "d2t")
    extra = 48 * len(vocabulary or ())
    assert planned.weight_bytes(4, False) == draft.weight_bytes(4, False)
    assert draft.weight_bytes(4, False) // 4 == pytest.approx(stored + extra, abs=200)  # besides: norms that a head does not have
    layout, alone = (KVLayout.of(target.spec, 4, torch.float32, draft=d) for d in (draft.spec, None))
    heads = sum(layer.attention.num_kv_heads * layer.attention.head_dim for layer in draft.spec.layers)
    assert layout.block_bytes - alone.block_bytes == 2 * 4 * 4 * heads


def test_a_head_in_int8_is_half_the_size_and_computes_almost_the_same(target: Decoder, tmp_path: Path) -> None:
    weights = write_head(tmp_path)
    exact = load_head(tmp_path, read_spec(tmp_path), target.build, target, num_drafts=1, group=0)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if weight.dim() == 1:
            stored[name] = weight
        else:
            stored.update({f"{name.removesuffix('.weight')}.{suffix}": t for suffix, t in int8(weight, torch.bfloat16).items()})
    save_file(stored, tmp_path / "model.safetensors")
    entry = quantization_config(QuantizeConfig(method="int8"), -1, [])
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "quantization_config": entry}), encoding="utf-8")
    config = EngineConfig(speculative_config={"method": "eagle", "model": str(tmp_path), "num_speculative_tokens": 1})
    draft = find_draft(config, target.spec, tmp_path)
    assert draft is not None
    rounded = load_draft(draft, target)
    x = torch.randn(5, 96)
    torch.testing.assert_close(rounded._fc(x), exact._fc(x), atol=0.05, rtol=0.02)  # type: ignore[attr-defined]
