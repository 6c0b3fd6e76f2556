"""Convert a GGUF file, once, to an ordinary model folder (config.json, safetensors, tokenizer.json).

llama.cpp stores everything in one file: metadata and tensors under its own names (most tensors are quantized in blocks that
share a scale), and the tokenizer as lists of strings. Only the modules `gguf*` read that format. This one dequantizes the weights, so a
converted folder loads like any other, and the second start reads no GGUF.

    token_embd.weight      Q8_0  ->  model.embed_tokens.weight             float32, exactly the blocks' values
    blk.7.attn_q.weight    Q4_1  ->  model.layers.7.self_attn.q_proj.weight   rows in Hugging Face's order again
    llama.rope.freq_base         ->  rope_theta                                            (`gguf_metadata`, `gguf_config`)
    tokenizer.ggml.merges ..     ->  tokenizer.json, with the splitting rules of its name  (`gguf_tokenizer`, `gguf_pre`)
    tokenizer.chat_template      ->  tokenizer_config.json

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minivllm.errors import ModelError
from minivllm.families import FAMILIES
from minivllm.models.gguf_config import (
    ROPE_FACTORS,
    Architecture,
    find_architecture,
    make_config,
    make_generation_config,
    vocabulary_rows,
)
from minivllm.models.gguf_metadata import Metadata
from minivllm.models.gguf_tokenizer import SpecialIds, Vocabulary, convert_tokenizer, read_vocabulary, special_ids

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

CONVERSION = 2  # increased whenever the output of `convert` changes, so that caches made by older code are not used
LARGE = 2_000_000_000  # parameters; larger models store quantized tensors as bfloat16, the dtype they run in


class Header(NamedTuple):
    """What a file says before its weights: enough to refuse a model that cannot run here, and to plan its memory."""

    meta: Metadata
    arch: Architecture
    tensors: Mapping[str, ReaderTensor]  # by llama.cpp's names
    names: Mapping[str, str]  # llama.cpp's name -> Hugging Face's
    vocabulary: Vocabulary | None
    ids: SpecialIds
    config: dict[str, Any]  # config.json


def read_header(path: Path, shown: str | None = None) -> Header:
    """Raises `ModelError` for a file that cannot run here: for its architecture first, then for the types of its tensors.

    path: the file, or its beginning lengthened with zeros. shown: its name in messages, if that is not `path`.
    """
    reader = _open(path)
    meta = _read_metadata(Path(shown or path), reader)
    arch = find_architecture(meta)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_types(meta.path, reader.tensors)
    names = _checkpoint_names(meta.path, meta.architecture, arch, tensors)
    rows = vocabulary_rows(meta, tensors)
    vocabulary = read_vocabulary(meta, rows)
    ids = special_ids(meta, vocabulary, rows)
    return Header(meta, arch, tensors, names, vocabulary, ids, make_config(meta, arch, tensors, ids))


def convert(path: Path, out: Path, check: Callable[[dict[str, Any]], object] = lambda config: None) -> None:
    """Write the model in `path` into the folder `out`. Raises `ModelError` naming the file and what is wrong with it.

    check: raises for a config.json that describes a model that cannot run here, before anything is written.
    """
    header = read_header(path)
    check(header.config)
    tokenizer = None if header.vocabulary is None else convert_tokenizer(header.meta, header.vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", header.config)
    _write_json(out / "generation_config.json", make_generation_config(header.meta, header.ids))
    _write_weights(path, out / "model.safetensors", header.config, header.arch, header.tensors, header.names)
    if tokenizer is not None:
        _write_json(out / "tokenizer.json", tokenizer[0])
        _write_json(out / "tokenizer_config.json", tokenizer[1])


def _check_types(path: Path, tensors: Iterable[ReaderTensor]) -> None:
    """Raise `ModelError` for a type that stores no weights, or that the gguf package cannot dequantize (tried with one block)."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors}.items():
        if kind.name in ("F64", "I8", "I16", "I32", "I64"):
            raise ModelError(f"{path}: tensor {tensor.name!r} has type {kind.name}, which is not a type for weights", "model")
        try:
            if kind.name not in ("F32", "F16"):
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise ModelError(f"{path}: tensor {tensor.name!r} has type {kind.name}, which gguf cannot dequantize: {error}",
                             "model") from error


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModelError(f"{path}: reading GGUF files needs the gguf package: pip install gguf", "model") from error
    try:
        return GGUFReader(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}", "model") from error
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        size = path.stat().st_size
        raise ModelError(f"{path} ({size:,} bytes): not a GGUF file, or a truncated one ({error}): download it again", "model") from error


def _read_metadata(path: Path, reader: GGUFReader) -> Metadata:
    values = {}
    for key, field in reader.fields.items():
        try:
            values[key] = field.contents()
        except (ValueError, IndexError) as error:
            raise ModelError(f"{path}: metadata {key} cannot be read ({error}): download the file again", "model") from error
    return Metadata(path, values)


def _checkpoint_names(path: Path, name: str, arch: Architecture, tensors: Iterable[str]) -> dict[str, str]:
    """GGUF's tensor names -> Hugging Face's: ``blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight``.

    The modules are those of the family's row; their names in GGUF come from the table of the gguf package.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    table = get_tensor_name_map(next(key for key, value in MODEL_ARCH_NAMES.items() if value == name), 1)
    modules: dict[str, str] = {}  # of layer 0, and outside the layers
    for module in (module for parts in FAMILIES[arch.class_name].names.values() for module in parts):
        prefixed = module if module == "lm_head" else f"model.{module}"
        if (theirs := table.get_name(prefixed.format(i=0))) is not None:
            modules[theirs] = prefixed
    found = {}
    for tensor in tensors:
        if tensor == ROPE_FACTORS:
            continue
        module, _, kind = tensor.rpartition(".")
        layer = match[1] if (match := re.match(r"blk\.(\d+)\.", module)) else ""
        target = modules.get(re.sub(r"^blk\.\d+\.", "blk.0.", module))
        if target is None or kind not in ("weight", "bias"):
            raise ModelError(f"{path}: tensor {tensor!r} is not used by this engine's decoder", "model")
        found[tensor] = f"{target.format(i=layer)}.{kind}"
    return found


# ---- model.safetensors

def _write_weights(path: Path, out: Path, config: dict[str, Any], arch: Architecture, tensors: Mapping[str, ReaderTensor],
                   names: Mapping[str, str]) -> None:
    """Dequantize tensor by tensor straight into the file, so that only one tensor is in memory at a time.

        8 bytes: header length | JSON {name: dtype, shape, [begin, end)} | the tensors, back to back
    """
    from tqdm import tqdm

    large = sum(tensor.n_elements for tensor in tensors.values()) > LARGE
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, target in names.items():
        dtype, size = _stored_as(tensors[name], large)
        begin, end = end, end + tensors[name].n_elements * size
        shape = [int(n) for n in reversed(tensors[name].shape)]
        header[target] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc=f"converting {path.name}", disable=None) as bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, target in names.items():
            array = _dequantize(tensors[name], header[target]["dtype"])
            if arch.interleaved_rope and (match := re.search(r"\.attn_([qk])\.", name)):
                heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
                if (rows := array.shape[0]) != heads * config["head_dim"]:
                    raise ModelError(f"{path}: tensor {name!r} has {rows} rows, not {heads} heads of {config['head_dim']}", "model")
                array = split_halves(array, heads)
            bar.update(file.write(np.ascontiguousarray(array).data))


def _stored_as(tensor: ReaderTensor, large: bool) -> tuple[str, int]:
    """-> (safetensors dtype, bytes per number). Float types are kept. Quantized blocks become float32, which represents them exactly."""
    kind = tensor.tensor_type.name
    if kind in ("F16", "BF16"):
        return kind, 2
    return ("BF16", 2) if large and kind != "F32" else ("F32", 4)


def _dequantize(tensor: ReaderTensor, dtype: str) -> np.ndarray:
    """The tensor's values. bfloat16 values are raw 16-bit words, because NumPy has no such type."""
    from gguf.quants import dequantize

    kind = tensor.tensor_type.name
    if kind in ("F32", "F16"):
        return tensor.data
    if kind == "BF16":
        return tensor.data.view(np.uint16)
    values = dequantize(tensor.data, tensor.tensor_type)
    return to_bfloat16(values) if dtype == "BF16" else values


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest even. float32 [...] -> uint16 [...]"""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def split_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows from llama.cpp's pairs (x0 y0 x1 y1 ..) to halves (x0 x1 .. y0 y1 ..). [heads * head_dim, ...]"""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
