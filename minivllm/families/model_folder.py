"""Reading the small files of a model folder, which may be damaged or hostile: JSON within limits, and no links to other places."""
from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from minivllm.errors import ModelError, shown

MAX_JSON_BYTES = 64 << 20  # the index of a model with 100,000 tensors has 10 MB
MAX_DIGITS = 40  # of a whole number
MAX_DEPTH = 64  # nested objects and lists
MAX_REPEATS = 6  # of one pattern for names of modules
LINKED = frozenset({".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".gguf"})  # kinds of files that are read


def read_json(path: Path, param: str = "model") -> dict[str, Any]:
    """The object in a JSON file. Raises `ModelError` in one line for anything else, also for what JSON allows but no model has: a key
    twice, NaN, a number of thousands of digits, deep nesting. param: the setting that names the folder."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"it has {size:,} bytes, and at most {MAX_JSON_BYTES:,} are read")
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}): download it again", param) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__} instead of a JSON object", param)
    return value


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises `ValueError` beyond the limits above."""
    try:
        value = json.loads(content.decode(), object_pairs_hook=_object, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part) if isinstance(item, (dict, list))]
    if level:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} is there twice")
    return found


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits, and at most {MAX_DIGITS} are read")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is not a finite number")
    return value


def compile_pattern(text: str) -> re.Pattern[str]:
    """A regular expression from a file, which is matched with names of modules. Raises `ValueError` if it is none, or if matching it could
    take very long: Python's `re` tries all ways in which repetitions share a text, and cannot be interrupted."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", text)  # without escapes and sets of characters
    if re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+]|\{\d*,", plain)) > MAX_REPEATS:
        raise ValueError(f"it repeats a group, or has more than {MAX_REPEATS} repetitions")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


def check_links(folder: Path, param: str) -> None:
    """Raise `ModelError` if a file that may be read is a symbolic link to a place outside the folder."""
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        check_inside(templates, folder, param)
    for place in (folder, templates):
        with os.scandir(place) if place.is_dir() else contextlib.nullcontext(()) as entries:
            for entry in entries:
                if entry.is_symlink() and Path(entry.name).suffix.lower() in LINKED:
                    check_inside(Path(entry.path), folder, param)


def check_inside(path: Path, folder: Path, param: str) -> None:
    """Raise `ModelError` if links lead from a path out of its model folder.

    A snapshot in the hub's cache (models--OWNER--NAME/snapshots/COMMIT) consists of links to the blobs of the same repository.
    """
    root = folder.resolve()
    allowed = root.parent.parent if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--") else root
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ModelError(f"{path} is a link that leads nowhere ({error}): remove it", param) from None
    if not target.is_relative_to(allowed):
        raise ModelError(f"{path} is a link to {target}, outside the model's folder, and is not followed: replace it by the file, or name "
                         "the folder that holds the files", param)
