"""A hub id as `lora_path`: its settings are checked before its weights are downloaded."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minivllm import LLM, InvalidInput, LoRARequest, SamplingParams
from minivllm.config import EngineConfig
from minivllm.models.hub import find_adapter
from tests.lora.adapters import write_adapter
from tests.models.hub_server import HubServer, serve_hub


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = write_adapter(tmp_path / "local", base, rank=3)
    files = {file.name: file.read_bytes() for file in folder.iterdir()} | {"README.md": b"x"}
    with serve_hub(files, monkeypatch, tmp_path / "cache") as hub:
        yield hub


def test_an_adapter_of_the_hub_answers_like_its_folder(base: Path, hub: HubServer, tmp_path: Path) -> None:
    with LLM(str(base), dtype="float32", max_model_len=64, num_gpu_blocks_override=64, enable_lora=True) as llm:
        loras = [LoRARequest("hub", 1, "owner/name"), LoRARequest("local", 2, str(tmp_path / "local")), None]
        outputs = llm.generate([{"prompt_token_ids": [5, 6, 7]}] * 3, SamplingParams(temperature=0, max_tokens=6), lora_request=loras)
    first, second, plain = (output.outputs[0].token_ids for output in outputs)
    assert first == second != plain
    assert {file for file, _ in hub.sent} == {"adapter_config.json", "adapter_model.safetensors"}


def test_settings_that_are_not_supported_are_refused_before_the_download(hub: HubServer) -> None:
    settings = json.loads(hub.files["adapter_config.json"])
    hub.files = {**hub.files, "adapter_config.json": json.dumps({**settings, "use_dora": True}).encode()}
    with pytest.raises(InvalidInput, match="use_dora True is not supported"):
        find_adapter("owner/name", EngineConfig())
    assert hub.bytes_sent(".safetensors") == 0


@pytest.mark.parametrize(("missing", "added", "says"), [
    ("adapter_config.json", "config.json", r"'owner/name' has no adapter_config\.json on the hub, so it is no LoRA adapter"),
    ("adapter_model.safetensors", "adapter_model.bin", r"adapter_model\.bin, which may run code when it is read: save the adapter"),
    ("adapter_model.safetensors", "x.txt", r"has no adapter_model\.safetensors on the hub: save"),
])
def test_a_repository_without_an_adapter_is_named(hub: HubServer, missing: str, added: str, says: str) -> None:
    hub.files = {name: content for name, content in hub.files.items() if name != missing} | {added: b"{}"}
    with pytest.raises(InvalidInput, match=says) as error:
        find_adapter("owner/name", EngineConfig())
    assert error.value.param == "lora_path"


@pytest.mark.parametrize("path", ["/nowhere", "./owner/name", "a/b/c", "name", "~/owner", "owner/name:Q4"])
def test_what_can_only_be_a_path_sends_nothing(path: str, hub: HubServer) -> None:
    assert find_adapter(path, EngineConfig()) == Path(path).expanduser() and not hub.sent
