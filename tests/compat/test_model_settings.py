"""Settings that change what is read from a model's folder, and where it is downloaded to."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput
from minivllm.models.hub import ModelFiles, find_model, with_overrides


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "m"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "llama", "vocab_size": 7, "rope_parameters": {"rope_type": "default"}}')
    (place / "model.safetensors").touch()
    (place / "tokenizer.json").write_text("{}")
    (place / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 9, "eos_token_id": 2}')
    return place


def find(model: Path | str, **settings: Any) -> ModelFiles:
    return find_model(EngineConfig(model=str(model), **settings), lambda config: None)


def test_hf_overrides_replace_entries_of_config_json(folder: Path) -> None:
    config = find(folder, hf_overrides={"vocab_size": 8, "rope_theta": 5.0}).config
    assert config["vocab_size"] == 8 and config["model_type"] == "llama"
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5.0}
    assert with_overrides({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": None}) == {"a": {"b": 1, "c": 3}, "d": None}


def test_generation_config_names_the_source_of_the_sampling_defaults(folder: Path, tmp_path: Path) -> None:
    assert find(folder).generation_config == {"temperature": 0.5, "top_k": 9, "eos_token_id": 2}
    assert find(folder, generation_config="vllm").generation_config == {"eos_token_id": 2}
    assert find(folder, override_generation_config={"top_k": 3}).generation_config["top_k"] == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"top_p": 0.25}))
    assert find(folder, generation_config=str(other)).generation_config == {"top_p": 0.25}
    with pytest.raises(InvalidInput, match="no folder with a generation_config") as caught:
        find(folder, generation_config=str(tmp_path / "missing"))
    assert caught.value.param == "generation_config"


def test_download_folder_token_and_revisions_reach_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find("owner/model", revision="v1", tokenizer="owner/tokenizer", tokenizer_revision="v2", download_dir="/downloads", hf_token="hf_x")
    revisions = {(name, options["revision"]) for name, options in calls}
    assert revisions == {("owner/model", "v1"), ("owner/tokenizer", "v2")}
    assert all(options["cache_dir"] == "/downloads" and options["token"] == "hf_x" for _, options in calls)
