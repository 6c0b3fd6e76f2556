"""Python code in a model's folder. It runs only with `trust_remote_code`, and never by this module's own decision.

    config.json            "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    tokenizer_config.json  "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x_fast.XTokenizerFast"]}

Each entry names a file of the folder and a class in it. Importing the file runs it, and the files that it imports, with all rights of this
process. One line on stderr names the file before that.
"""
from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minivllm.errors import ModelError, shown
from minivllm.families.model_folder import check_inside, read_json

FOLDER = "_name_or_path"  # Transformers' key of config.json for its place; `models/hub.py` sets it, and only with `trust_remote_code`
REFERENCE = re.compile(r"(\w+)\.(\w+)", re.ASCII)  # file without .py, class


def references(config: Mapping[str, Any], auto_class: str) -> list[str]:
    """What "auto_map" of config.json or tokenizer_config.json has for a class of Transformers; of a tokenizer, up to two entries."""
    found = config.get("auto_map")
    if isinstance(found, Mapping):
        found = found.get(auto_class)
    elif auto_class != "AutoTokenizer":  # an older tokenizer_config.json has the list alone
        found = None
    return [entry for entry in (found if isinstance(found, list) else [found]) if isinstance(entry, str)]


@functools.lru_cache(maxsize=8)
def load_class(folder: Path, reference: str) -> Any:
    """The class that an entry names. Importing it runs code of the folder, so callers have checked `trust_remote_code`.

    Raises `ModelError` for an entry that names no file of this folder, and for code that fails."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    file = announce(folder, reference, "model")
    try:
        return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
    except (Exception, SystemExit) as error:  # it is any code
        raise ModelError(f"the code in {file} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})",
                         "trust_remote_code") from error


@functools.cache
def announce_unused(architecture: str, reference: str) -> None:
    """Say once that a folder's code does not run though it may, because this engine or Transformers has the architecture."""
    print(f"minivllm: trust_remote_code: {reference} in the model's folder does not run, because {architecture} is known without it",
          file=sys.stderr, flush=True)


def announce(folder: Path, reference: str, param: str) -> Path:
    """Print the file whose code will run, and return it. Raises `ModelError` if an entry names no file of this folder."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        why = "code of another repository is not run: save it in this folder" if "--" in reference else "expected FILE.CLASS"
        raise ModelError(f"auto_map in {folder} has {shown(reference)}: {why}", param)
    file = folder / f"{match[1]}.py"
    if not file.is_file():
        raise ModelError(f"auto_map in {folder} has {shown(reference)}, but there is no {file.name}: fetch it again", param)
    check_inside(file, folder, param)
    _print_once(file, match[2])
    return file


@functools.cache
def _print_once(file: Path, name: str) -> None:
    print(f"minivllm: trust_remote_code: running code of the model's author, {name} in {file}", file=sys.stderr, flush=True)


def announce_tokenizer(folder: Path) -> None:
    """Print the files of a folder's own tokenizer code, if it has any. Raises as `announce`."""
    for name in ("tokenizer_config.json", "config.json"):
        found = references(read_json(folder / name, "tokenizer"), "AutoTokenizer") if (folder / name).is_file() else []
        for reference in found:
            announce(folder, reference, "tokenizer")
        if found:
            return
