"""Adapters over HTTP: models with a parent, requests that name them, loading and unloading at run time."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from minivllm.config import EngineConfig
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.server.adapters import parse_module
from minivllm.server.run import start_engine
from tests.lora.adapters import write_adapter
from tests.server.scripted import LiveServer, serving


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    found = {name: write_adapter(root / "allowed" / name, base, seed=i) for i, name in enumerate(("sql", "chat", "third"))}
    return found | {"outside": write_adapter(root / "outside", base, seed=9)}


@pytest.fixture(scope="module")
def live(base: Path, folders: dict[str, Path], one_torch_thread: None) -> Iterator[LiveServer]:
    config = EngineConfig(model=str(base), dtype="float32", device="cpu", num_gpu_blocks_override=128, enable_lora=True)
    client = start_engine(config, process=False, log_level="warning")
    modules = (f"sql-lora={folders['sql']}", json.dumps({"name": "chat-lora", "path": str(folders["chat"]), "base_model_name": "tiny"}))
    try:
        with serving(client, Tokenizer(client.info.tokenizer_folder), served_model_name=("tiny",), lora_modules=modules,
                     lora_folders=(str(folders["sql"].parent),)) as live:
            yield live
    finally:
        client.close()


def complete(live: LiveServer, model: str) -> str:
    client = openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model=model, prompt="the cat and the hat", max_tokens=12, temperature=0)
    assert answer.model == model
    return answer.choices[0].text


def post(live: LiveServer, path: str, **body: object) -> httpx.Response:
    return httpx.post(live.url + path, json=body, timeout=60)


def test_a_request_names_its_adapter_as_model_and_the_cards_have_a_parent(live: LiveServer, folders: dict[str, Path]) -> None:
    texts = {complete(live, model) for model in ("tiny", "sql-lora", "chat-lora")}
    assert len(texts) == 3
    cards = {card["id"]: card for card in httpx.get(live.url + "/v1/models").json()["data"]}
    assert [cards[name]["parent"] for name in ("tiny", "sql-lora", "chat-lora")] == [None, "tiny", "tiny"]
    assert cards["sql-lora"]["root"] == str(folders["sql"]) and httpx.get(live.url + "/v1/models/chat-lora").json() == cards["chat-lora"]
    for path, body in (("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
                       ("/v1/responses", {"input": "hi", "max_output_tokens": 3}), ("/tokenize", {"prompt": "hi"})):
        assert post(live, path, model="sql-lora", **body).status_code == 200
        refused = post(live, path, model="sql", **body)
        assert refused.status_code == 404 and "'sql-lora'" in refused.json()["error"]["message"]


def test_an_adapter_is_loaded_replaced_and_unloaded_at_run_time(live: LiveServer, folders: dict[str, Path]) -> None:
    load = {"lora_name": "new", "lora_path": str(folders["third"])}
    answer = post(live, "/v1/load_lora_adapter", **load)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    third = complete(live, "new")
    again = post(live, "/v1/load_lora_adapter", **load)
    assert again.status_code == 400 and "already been loaded" in again.json()["error"]["message"]
    replaced = post(live, "/v1/load_lora_adapter", **{**load, "lora_path": str(folders["sql"])}, load_inplace=True)
    assert replaced.status_code == 200
    assert complete(live, "new") == complete(live, "sql-lora") != third
    assert post(live, "/v1/unload_lora_adapter", lora_name="new").text == "Success: LoRA adapter 'new' removed successfully."
    with pytest.raises(openai.NotFoundError):
        complete(live, "new")
    assert post(live, "/v1/unload_lora_adapter", lora_name="new").status_code == 404


@pytest.mark.parametrize(("name", "path", "param"), [
    ("a", "outside", "lora_path"), ("tiny", "third", "lora_name"), ("a", "third/../../outside", "lora_path"),
    ("a", "third/missing", "lora_path"), ("", "third", "lora_name"),
])
def test_what_may_not_be_loaded_is_refused(live: LiveServer, folders: dict[str, Path], name: str, path: str, param: str) -> None:
    first, _, rest = path.partition("/")
    answer = post(live, "/v1/load_lora_adapter", lora_name=name, lora_path=str(folders[first] / rest if rest else folders[first]))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_link_out_of_the_allowed_folder_is_refused(live: LiveServer, folders: dict[str, Path]) -> None:
    link = folders["sql"].parent / "link"
    link.symlink_to(folders["outside"])
    assert post(live, "/v1/load_lora_adapter", lora_name="a", lora_path=str(link)).json()["error"]["param"] == "lora_path"


@pytest.mark.parametrize("module", ["sql", "=x", "sql=", '{"name": "a"}', '{"name": "a", "path": "b", "rank": 3}', "{"])
def test_a_wrong_lora_module_is_refused_by_name(module: str) -> None:
    with pytest.raises(InvalidInput, match="lora_modules"):
        parse_module(module)


def test_without_lora_folders_the_endpoints_say_how_to_turn_them_on(tokenizer_folder: Path) -> None:
    from tests.server.scripted import ScriptedEngine, scripted_server

    with scripted_server(ScriptedEngine(tokenizer_folder)) as live:
        answer = post(live, "/v1/load_lora_adapter", lora_name="a", lora_path="/x")
        assert answer.status_code == 404 and "--lora-folders" in answer.json()["error"]["message"]
