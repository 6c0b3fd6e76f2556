"""Which files of a model folder hold its weights. Plain Python: a folder is refused here before torch is imported.

    model.safetensors                                 one file; it wins over an index beside it, as in Transformers
    model.safetensors.index.json                      the index of several files: {"weight_map": {tensor: file}}
    model-00001-of-00002.safetensors, ...             a complete series without an index
    one other *.safetensors
    model.gguf.index.json                             tensors in .gguf files elsewhere (`gguf_weights`)
    pytorch_model.bin, pytorch_model.bin.index.json   only without any of the above
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeVar

from minivllm.errors import ModelError, shown
from minivllm.families.model_folder import check_inside, parse_json

AnyPath = TypeVar("AnyPath", bound=PurePath)
GGUF_INDEX = "model.gguf.index.json"
SERIES = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
MOST_HEADER_BYTES = 100 << 20  # the format's limit
GGUF_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
# The same weights in Mistral's format. Names of a few other formats, for the error.
CONSOLIDATED = "consolidated*"
OTHER_FORMATS = {
    "*.gguf": "GGUF", CONSOLIDATED: "the original format of Mistral or Meta", "*.pth": "a PyTorch file with other names",
    "pytorch_model-*.bin": "a part, without pytorch_model.bin.index.json", "tf_model.h5": "TensorFlow", "flax_model.msgpack": "Flax",
    "*.onnx": "ONNX", "adapter_model.*": "a LoRA adapter, not a model",
}


@dataclass(frozen=True)
class WeightFiles:
    """The files, and for each tensor that an index names, the file that it names."""

    files: list[Path]
    file_of: Mapping[str, str] = field(default_factory=dict)


def find_weight_files(folder: Path, safetensors_only: bool = False) -> WeightFiles:
    """The files to load. Raises `ModelError` if there are none, or if an index or a series is incomplete."""
    if (single := folder / "model.safetensors").is_file():
        return WeightFiles([single])
    if (index := folder / "model.safetensors.index.json").is_file():
        return _of_index(index)
    others = sorted(f for f in folder.glob("*.safetensors") if not f.match(CONSOLIDATED) and not f.name.startswith("adapter_model"))
    if len(others) == 1 and SERIES.fullmatch(others[0].name) is None:
        return WeightFiles(others)
    if others:
        return _of_series(folder, others)
    if (index := folder / GGUF_INDEX).is_file() and not safetensors_only:
        return WeightFiles([index])
    single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if safetensors_only and (single.is_file() or index.is_file()):
        raise ModelError(f"model folder {str(folder)!r} has only pytorch_model.bin weights: use load_format 'auto'", "load_format")
    if single.is_file():
        return WeightFiles([single])
    if index.is_file():
        return _of_index(index)
    raise ModelError(f"no weights in {folder}{_other_formats(f.name for f in folder.glob('*'))}: expected one of model.safetensors, model."
                     "safetensors.index.json, pytorch_model.bin; download them, or use load_format 'dummy' for random weights", "model")


def read_safetensors_header(file: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> (dtype as the format spells it, shape, bytes) of each tensor.

        8 bytes: length of the header, little-endian | JSON {name: {"dtype", "shape", "data_offsets"}} | the tensors
    """
    try:
        rest = file.stat().st_size - 8
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(rest, MOST_HEADER_BYTES):
                raise ValueError(f"its header claims {length:,} bytes, and the file has {max(rest, 0):,} more")
            header = parse_json(stream.read(length))
        return {name: _header_entry(name, about, rest - length) for name, about in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged or not a safetensors file ({error}); download it again", "model") from error


def _header_entry(name: str, about: Mapping[str, Any], size: int) -> tuple[str, tuple[int, ...], int]:
    """size: bytes of all tensors together."""
    shape, (begin, end) = about["shape"], about["data_offsets"]
    if not isinstance(about["dtype"], str) or any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or not begin <= end <= size:
        raise ValueError(f"the entry of {shown(name)} does not fit the file")
    return about["dtype"], tuple(shape), end - begin


def _other_formats(names: Iterable[str]) -> str:
    """A note on weights in formats that this loader does not read."""
    found = [f"{name} ({what})" for name in sorted(names) for pattern, what in OTHER_FORMATS.items() if Path(name).match(pattern)]
    return f" that can be loaded; found {', '.join(found[:4])}{' ..' if len(found) > 4 else ''}" if found else ""


def _of_index(index: Path) -> WeightFiles:
    try:
        weight_map = {str(tensor): str(file) for tensor, file in parse_json(index.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{index} is not a valid weight index ({e!r})", "model") from e
    names = sorted(set(weight_map.values()))
    if not names:
        raise ModelError(f"{index} names no files (its weight_map is empty): download it again, or delete it", "model")
    for name in names:  # files in folders below are fine
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{index.name} names {name}, which is outside the model's folder: move the file there, and correct the index",
                             "model")
    for place in {Path(name).parent for name in names} - {Path()}:
        check_inside(index.parent / place, index.parent, "model")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(f"{index.name} names {missing[0]}{more}, which is not in {index.parent}; is the download complete?", "model")
    return WeightFiles([index.parent / name for name in names], weight_map)


def _of_series(folder: Path, files: list[Path]) -> WeightFiles:
    """`name-00001-of-00002.safetensors` and so on: loaded if no number is missing."""
    shown = ", ".join(f.name for f in files)
    matches = [SERIES.fullmatch(f.name) for f in files]
    series = {(m[1], int(m[2])) for m in matches if m is not None}
    if None in matches or len(series) != 1:
        raise ModelError(f"no weights in {folder} that can be loaded (several files, no index: {shown}): expected one of "
                         "model.safetensors, model.safetensors.index.json", "model")
    ((name, count),) = series
    missing = [file for i in range(1, min(count, 10_000) + 1)
               if not (folder / (file := f"{name}-{i:05}-of-{count:05}.safetensors")).is_file()]
    if missing or not count:
        raise ModelError(f"{folder} has only {shown} of {count} weight files; is the download complete?", "model")
    return WeightFiles(files)


def find_parts(path: AnyPath) -> list[AnyPath]:
    """The files of the model that a .gguf file belongs to: itself, or all parts NAME-00001-of-00003.gguf, whether they exist or not."""
    match = GGUF_PART.fullmatch(path.name)
    if match is None or not int(match[3]):
        return [path]
    name, _, count, suffix = match.groups()
    return [path.with_name(f"{name}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
