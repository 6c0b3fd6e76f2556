"""Find a model's files. `model` is a folder, a `.gguf` file, a hub id, the name of a packaged model, or nothing, which means the default.

In each case the result is one folder in Hugging Face's layout. Downloads and folders of GGUF files are made once (`cache.py`).
config.json is read and checked first, so that a model that cannot run here is refused before its weights are looked for.
"""
from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput, ModelError, nearest
from minivllm.families import parse_config
from minivllm.families.model_folder import check_links, read_json
from minivllm.lora.peft_config import PeftConfig
from minivllm.models import gguf
from minivllm.models.cache import build_once, conversion_folder
from minivllm.models.hub_repository import (
    HubName,
    download_adapter,
    download_config,
    download_gguf,
    download_model,
    download_tokenizer,
    not_a_model,
    parse_name,
    read_gguf_header,
    read_tensors,
)
from minivllm.models.packaged import DEFAULT, PACKAGED, packaged_gguf, packaged_model
from minivllm.models.remote_code import FOLDER
from minivllm.models.weight_files import find_parts, find_weight_files, read_safetensors_header
from minivllm.quantization.methods import METHODS, QUANTIZATION_FILES, method_of, quantization_elsewhere

DEFAULT_NAME = PACKAGED[DEFAULT].title

ADAPTER_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


Check = Callable[[dict[str, Any]], object]  # raises for a config.json that describes a model that cannot run here


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine's disk, ready to load."""

    name: str  # as the user named it
    folder: Path  # config.json, weights
    config: dict[str, Any]  # config.json
    generation_config: dict[str, Any]  # generation_config.json; {} if the file is missing
    tokenizer_folder: Path | None  # None: with skip_tokenizer_init


def check_config(config: dict[str, Any]) -> None:
    """Raise for a config.json that describes a model that cannot run here."""
    parse_config(config, methods=METHODS)
    method_of(config)


def find_model(config: EngineConfig, check: Check = check_config) -> ModelFiles:
    """Find the model that `config.model` names; download it if necessary. Raises `ModelError` with a fix."""
    folder = _locate("model", config.model, config, check)
    model_config = _checked_config(folder, config, check)
    if config.load_format != "dummy":
        find_weight_files(folder, safetensors_only=config.load_format == "safetensors")
    return ModelFiles(
        name=config.model or DEFAULT_NAME,
        folder=folder,
        config=model_config,
        generation_config=_generation_config(config, folder),
        tokenizer_folder=_find_tokenizer(config, folder),
    )


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model without its weights."""

    name: str
    config: dict[str, Any]  # config.json
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]  # name -> (dtype, shape, bytes) in safetensors files; {}: not known
    size: int = 0  # bytes of the files with the weights; 0: not known
    is_local: bool = True


def describe_model(config: EngineConfig, check: Check = check_config) -> ModelDescription:
    """Read config.json and the headers of the weights, on the hub with range requests. Raises as `find_model`, in the same order."""
    given, check = config.model, _overridden(config, check)
    packaged = packaged_model(given)
    if given is not None and packaged is None and _is_remote(given):
        name = parse_name("model", given, revision=config.revision, cache_dir=config.download_dir, token=config.hf_token,
                          trust_code=config.trust_remote_code)
        if name.gguf is None:
            found = _checked_config(download_config(name), config, check)
            tensors = read_tensors(name)
            return ModelDescription(given, found, tensors, sum(size for _, _, size in tensors.values()), is_local=False)
        return read_gguf_header(name, lambda head, shown: _of_gguf(given, head, config, check, shown))
    path = Path(os.path.expanduser(str(given))) if packaged is None else packaged_gguf(packaged)
    if path.suffix.lower() == ".gguf":
        _check_parts(path, "model")
        return _of_gguf(given or DEFAULT_NAME, path, config, check)
    found = _checked_config(_check_folder(path, "model"), config, check)
    tensors = {}
    with contextlib.suppress(ModelError):  # a folder with a config.json alone is enough
        for file in find_weight_files(path).files:
            tensors.update(read_safetensors_header(file) if file.suffix == ".safetensors" else {})
    return ModelDescription(str(given), found, tensors, sum(size for _, _, size in tensors.values()))


def _of_gguf(name: str, path: Path, config: EngineConfig, check: Check, shown: str | None = None) -> ModelDescription:
    found = with_overrides(gguf.read_header(path, shown).config, config.hf_overrides or {})
    check(found)
    size = sum(part.stat().st_size for part in find_parts(path))
    return ModelDescription(name, found, {}, size, is_local=shown is None)


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
    if source not in ("auto", "vllm"):
        check_links(place, "generation_config")
    found = read_json(file) if file.exists() else {}
    if source == "vllm":
        return {name: found[name] for name in ("eos_token_id",) if name in found} | overrides
    packaged = packaged_model(config.model) if source == "auto" else None
    return dict(packaged.sampling if packaged else {}) | found | overrides


def default_gguf() -> Path:
    """The default model's `.gguf` file, downloaded with pip at the first call."""
    return packaged_gguf(PACKAGED[DEFAULT])


def find_adapter(lora_path: str, config: EngineConfig) -> Path:
    """The folder of a LoRA adapter: a local one, or that of a hub id (owner/name), downloaded if its settings can be applied."""
    folder = Path(lora_path).expanduser()
    if folder.exists() or ADAPTER_ID.fullmatch(lora_path) is None:
        return folder
    name = HubName("lora_path", lora_path, lora_path, None, cache_dir=config.download_dir, token=config.hf_token)
    return download_adapter(name, PeftConfig.read)


# ---- what `model` and `tokenizer` may name

def _locate(param: str, name: str | None, config: EngineConfig, check: Check) -> Path:
    """The folder of the model or tokenizer that `name`, the value of the field `param`, refers to. check: of a GGUF or hub model."""
    packaged = packaged_model(name)
    if name is not None and packaged is None and _is_remote(name):
        if "/" not in name and (hint := nearest(name.lower(), PACKAGED)):
            raise ModelError(f"{param} {name!r} is no folder, file or hub id (owner/name){hint}", param)
        return _from_hub(param, name, config, check)
    path = Path(os.path.expanduser(str(name)) if packaged is None else packaged.file)
    is_gguf = path.suffix.lower() == ".gguf"
    if param == "model":
        _check_load_format(config.load_format, str(path), is_gguf)
        if config.revision is not None:
            raise InvalidInput(f"revision {config.revision!r} needs a hub id, but model {str(path)!r} is local: leave it out", "revision")
    if packaged is not None:
        path = packaged_gguf(packaged)
    if is_gguf:
        return _from_gguf(path, param, _overridden(config, check))
    if path.is_dir():
        return _check_folder(path, param)
    raise ModelError(f"{param} {name!r} is a file, but not a .gguf file: name a folder, a .gguf file or a hub id", param)


def _is_remote(name: str) -> bool:
    """What does not exist here may be a hub id, except a .gguf file that is not named as owner/name/file or owner/name:file."""
    if os.path.exists(os.path.expanduser(name)):
        return False
    return not name.lower().endswith(".gguf") or ":" in name or (name.count("/") > 1 and not name.startswith((".", "/", "~")))


def _check_load_format(load_format: str, name: str, is_gguf: bool) -> None:
    if load_format == "gguf" and not is_gguf:
        raise InvalidInput(f"load_format is 'gguf' but model {name!r} is not a .gguf file: name the file, or use 'auto'", "load_format")
    if load_format == "safetensors" and is_gguf:
        raise InvalidInput(f"load_format is 'safetensors' but model {name!r} is a .gguf file: use 'auto'", "load_format")


def _from_hub(param: str, given: str, config: EngineConfig, check: Check) -> Path:
    """A snapshot in huggingface_hub's cache, or the folder of a GGUF file in it."""
    name = parse_name(param, given, revision=config.revision if param == "model" else config.tokenizer_revision,
                      cache_dir=config.download_dir, token=config.hf_token, trust_code=config.trust_remote_code)
    if param == "model":
        _check_load_format(config.load_format, given, name.gguf is not None)
    if name.gguf is not None:
        check = _overridden(config, check)
        return _from_gguf(download_gguf(name, lambda head, shown: check(gguf.read_header(head, shown).config)), param, check)
    if param != "model":
        return download_tokenizer(name)
    return download_model(name, config.load_format, lambda folder: _checked_config(folder, config, check),
                          lambda folder: _find_tokenizer(config, folder))


def _overridden(config: EngineConfig, check: Check) -> Check:
    """`check` of a config.json with the entries of `hf_overrides`."""
    return lambda found: check(with_overrides(found, config.hf_overrides or {}))


def _check_parts(path: Path, param: str) -> None:
    """Raise `ModelError` if a GGUF file, or another part of it, is not there."""
    if not path.is_file():
        raise ModelError(f"{param} {str(path)!r}: no such file", param)
    missing = [part.name for part in find_parts(path) if not part.is_file()]
    if missing:
        raise ModelError(f"{param} {str(path)!r} is one of several parts, of which these are missing: {', '.join(missing)}: "
                         "download them into the same folder", param)


def _from_gguf(path: Path, param: str, check: Check) -> Path:
    _check_parts(path, param)
    target = conversion_folder(path)
    return build_once(target, f"reading config and tokenizer of {path.name} into {target}, once",
                      lambda out: gguf.prepare(path, out, check))


def _check_folder(folder: Path, param: str) -> Path:
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.iterdir())
        ggufs = [file for file in files if file.lower().endswith(".gguf")]
        hint = f"it holds {', '.join(ggufs[:4])}; name that file" if ggufs else not_a_model(files)
        raise ModelError(f"{param} folder {str(folder)!r} has no config.json: {hint}", param)
    check_links(folder, param)
    return folder


def _checked_config(folder: Path, config: EngineConfig, check: Check) -> dict[str, Any]:
    """config.json, with the quantization of other places and with overrides. Raises for a model that cannot run here."""
    found = read_json(folder / "config.json")
    files = {name: read_json(folder / name) for name in QUANTIZATION_FILES if (folder / name).is_file()}
    if (quantization := quantization_elsewhere(found, files)) is not None:
        found["quantization_config"] = quantization
    found = with_overrides(found, config.hf_overrides or {})
    if config.trust_remote_code:
        found[FOLDER] = str(folder.absolute())  # of its code
    check(found)
    return found


def _find_tokenizer(config: EngineConfig, folder: Path) -> Path | None:
    if config.skip_tokenizer_init:
        return None
    found = _locate_tokenizer(config.tokenizer, config) if config.tokenizer else folder
    check_links(found, "tokenizer")
    if not any((found / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"folder {str(found)!r} has no tokenizer ({', '.join(TOKENIZER_FILES[:2])}, ..): name one with "
                         "tokenizer, or set skip_tokenizer_init and give prompts as token ids", "tokenizer")
    return found


def _locate_tokenizer(name: str, config: EngineConfig) -> Path:
    """As for a model, but a folder needs no config.json, and no weights are downloaded."""
    path = Path(os.path.expanduser(name))
    return path if path.is_dir() else _locate("tokenizer", name, config, lambda found: None)
