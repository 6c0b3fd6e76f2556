"""Reading PEFT folders: what is applied, and what is refused by name."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.errors import InvalidInput
from minivllm.families import parse_config
from minivllm.families.modules import LinearSpec
from minivllm.lora.adapter import Adapter, ModuleDelta, read_adapter
from minivllm.lora.layout import AdaptedLinear, AdapterLayout
from minivllm.lora.slots import AdapterStore
from tests.lora.adapters import write_adapter, write_folder


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def layout(base: Path) -> AdapterLayout:
    return AdapterLayout.of(parse_config(json.loads((base / "config.json").read_text())), 8)


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(("settings", "says"), [
    ({"use_dora": True}, "use_dora True"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias 'all'"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"peft_type": "IA3"}, "peft_type 'IA3'"), ({"target_parameters": ["experts"]}, "target_parameters"), ({"new_thing": 3}, "new_thing 3"),
    ({"r": 0}, "r must be a whole number"), ({"lora_alpha": "x"}, "lora_alpha must be a number"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"), ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
    ({"use_rslora": "yes"}, "use_rslora must be true or false, got 'yes'"), ({"target_modules": [3]}, "target_modules must be a string"),
    ({"target_modules": "(.*)*"}, r"target_modules has '\(\.\*\)\*', which is no regular"),
    ({"exclude_modules": {"q_proj": 1}}, "exclude_modules must be a string or a list"),
    ({"layers_to_transform": "all"}, "layers_to_transform must be a layer or a list of layers, got 'all'"),
    ({"layers_to_transform": [0]}, "gives model.layers.1.mlp.down_proj no adapter"),
    ({"exclude_modules": ["up_proj"]}, "gives model.layers.0.mlp.up_proj no adapter"),
    ({"target_modules": ["q_proj"]}, "no adapter .see target_modules"), ({"lora_bias": True}, "lora_bias True"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out True"), ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"r": 2}, "r makes it"), ({"rank_pattern": {"q_proj": 3}}, "q_proj.lora_A.weight"),
])
def test_a_setting_that_is_not_applied_is_refused_by_name(
    base: Path, layout: AdapterLayout, tmp_path: Path, settings: dict[str, Any], says: str,
) -> None:
    with pytest.raises(InvalidInput, match=says) as error:
        read_adapter(change(write_adapter(tmp_path / "a", base), **settings), layout, 8)
    assert error.value.param == "lora_path"


@pytest.mark.parametrize(("name", "shape", "says"), [
    ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 320), "an adapter of the embeddings"),
    ("base_model.model.lm_head.lora_A.weight", (4, 32), "the output head"),
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", (32,), "DoRA"),
    ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", (4, 32), "no such linear layer"),
    ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", (4, 32), "an expert of a mixture of experts"),
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (4, 48), r"q_proj.lora_A.weight is \[4, 48\], and the base model"),
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", (32, 4), "only lora_B"),
])
def test_a_tensor_that_does_not_belong_to_the_base_model_is_named(
    layout: AdapterLayout, tmp_path: Path, name: str, shape: tuple[int, ...], says: str,
) -> None:
    tensors = {name: torch.zeros(shape)}
    if "48" in says:
        tensors[name.replace("lora_A", "lora_B")] = torch.zeros(32, 4)
    write_folder(tmp_path / "a", tensors, {"r": 4, "lora_alpha": 4})
    with pytest.raises(InvalidInput, match=says):
        read_adapter(tmp_path / "a", layout, 8)


def test_settings_that_change_nothing_are_accepted(base: Path, layout: AdapterLayout, tmp_path: Path) -> None:
    settings = {"init_lora_weights": "gaussian", "task_type": None, "lora_dropout": 0.3, "eva_config": {"rho": 2.0},
                "layers_to_transform": [0, 1], "exclude_modules": ["lm_head"], "target_modules": "ALL-linear",
                "use_dora": False, "lora_bias": False, "kasa_config": None}
    assert read_adapter(change(write_adapter(tmp_path / "a", base), **settings), layout, 8).rank == 4


def test_two_tensors_for_the_same_weight_are_refused(base: Path, layout: AdapterLayout, tmp_path: Path) -> None:
    name = "layers.0.self_attn.q_proj.lora_A"
    write_folder(tmp_path / "a", {f"base_model.model.model.{name}.weight": torch.zeros(4, 32),
                                  f"base_model.model.model.{name}.default.weight": torch.ones(4, 32)}, {"r": 4, "lora_alpha": 4})
    with pytest.raises(InvalidInput, match=r"has two tensors lora_A for model\.layers\.0\.self_attn\.q_proj"):
        read_adapter(tmp_path / "a", layout, 8)


def test_a_rank_above_the_limit_names_the_flag(base: Path, layout: AdapterLayout, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--max-lora-rank 9") as error:
        read_adapter(write_adapter(tmp_path / "a", base, rank=9), layout, 8)
    assert error.value.param == "max_lora_rank"


def test_folders_without_readable_weights_are_named(base: Path, layout: AdapterLayout, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", base)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InvalidInput, match="damaged"):
        read_adapter(folder, layout, 8)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidInput, match="safe_serialization=True"):
        read_adapter(folder, layout, 8)
    with pytest.raises(InvalidInput, match=r"it has no adapter_config\.json"):
        read_adapter(base, layout, 8)


def test_a_checkpoint_module_for_all_parts_of_a_layer_is_split() -> None:
    linear = LinearSpec("layers.0.qkv", (6, 2, 2), 8, ("layers.0.qkv_proj",), False, "column")
    layout = AdapterLayout(16, {linear.name: AdaptedLinear(linear, 0, 384, linear)}, 384 + 160)
    store = AdapterStore(layout, 1, torch.float32, torch.device("cpu"))
    a, b, x = torch.randn(3, 8), torch.randn(10, 3), torch.randn(5, 8)
    store.add(1, store.pack(Adapter({"layers.0.qkv_proj": ModuleDelta(a, b, 0.5)})))
    store.load(0, 1)
    weights = store.layer(linear.name)
    assert weights is not None and store.layer("head") is None and store.ranks.tolist() == [3, 0]  # the base model's is last
    h = x @ weights.a[0].T
    parts = [h[:, 16 * i : 16 * i + 16] @ part.T for i, part in enumerate(weights.b[0].split((6, 2, 2)))]
    torch.testing.assert_close(torch.cat(parts, 1), 0.5 * x @ a.T @ b.T)
