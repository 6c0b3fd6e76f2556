"""Read a GGUF file: a model folder without weights is made from it once (config.json, tokenizer.json), and an index of its tensors.

llama.cpp stores everything in one file, or in several parts: metadata and tensors under its own names (most tensors are quantized in
blocks that share a scale), and the tokenizer as lists of strings. Only the modules `gguf*` read that format. The weights stay in the
file: they are loaded from there, packed (`gguf_weights`). `convert` makes a folder with dequantized weights, for other programs.

    token_embd.weight      Q8_0  ->  model.embed_tokens.weight                               (`gguf_weights`, `quantization.gguf`)
    blk.7.attn_q.weight    Q4_1  ->  model.layers.7.self_attn.q_proj.weight   rows in Hugging Face's order again
    llama.rope.freq_base         ->  rope_theta                                              (`gguf_metadata`, `gguf_config`)
    tokenizer.ggml.merges ..     ->  tokenizer.json, with the splitting rules of its name    (`gguf_tokenizer`, `gguf_pre`)
    tokenizer.chat_template      ->  tokenizer_config.json

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minivllm.errors import ModelError
from minivllm.families import FAMILIES
from minivllm.models.gguf_config import (
    ROPE_TENSORS,
    Architecture,
    find_architecture,
    make_config,
    make_generation_config,
    vocabulary_rows,
)
from minivllm.models.gguf_metadata import Metadata
from minivllm.models.gguf_structure import OtherByteOrder, check_structure
from minivllm.models.gguf_tokenizer import SpecialIds, Vocabulary, convert_tokenizer, read_vocabulary, special_ids
from minivllm.models.gguf_weights import GGUFTensor, Indexed, LatentKeysAndValues, write_index, write_safetensors
from minivllm.models.weight_files import GGUF_INDEX, find_parts

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

CONVERSION = 5  # increased whenever the output of `prepare` changes, so that caches made by older code are not used


class Header(NamedTuple):
    """What a file says before its weights: enough to refuse a model that cannot run here, and to plan its memory."""

    meta: Metadata
    tensors: Mapping[str, Indexed]  # by Hugging Face's names
    vocabulary: Vocabulary | None
    ids: SpecialIds
    config: dict[str, Any]  # config.json


def read_header(path: Path, shown: str | None = None) -> Header:
    """Raises `ModelError` for a file that cannot run here: for its architecture first, then for the types of its tensors.

    path: the file, or one of several parts; each may be only its beginning, lengthened with zeros. shown: its name in messages, if that
    is not `path`.
    """
    files = find_parts(path)
    names = [Path(shown or path).with_name(file.name) for file in files]
    readers = [_open(file, name) for file, name in zip(files, names, strict=True)]
    meta = _read_metadata(names[0], readers[0])
    arch = find_architecture(meta)
    places: dict[str, Path] = {}  # llama.cpp's name of a tensor -> its file
    for i, (file, name, reader) in enumerate(zip(files, names, readers, strict=True)):
        _check_part(name, reader, i, len(files))
        _check_types(name, reader.tensors)
        places |= {tensor.name: file for tensor in reader.tensors}
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    if len(tensors) != (count := _value(readers[0], "split.tensors.count", len(tensors))):
        raise ModelError(f"{names[0]}: its parts have {len(tensors)} tensors, not {count}: download them again", "model")
    rows = vocabulary_rows(meta, tensors)
    vocabulary = read_vocabulary(meta, rows)
    ids = special_ids(meta, vocabulary, rows)
    config = make_config(meta, arch, tensors, ids)
    found = _checkpoint_names(names[0], meta.architecture, config, tensors)
    stored: dict[str, Indexed] = {}
    for theirs, targets in found.items():
        if theirs.endswith(LATENT_KEYS):
            stored[targets[0]] = _latent(names[0], config, theirs, tensors, places)
        else:
            stored |= _stored(names[0], config, arch, tensors[theirs], places[theirs], targets)
    types = {re.sub(rf"^({'|'.join(map(re.escape, PREFIXES))})", "", name).removesuffix(".weight"): tensor.kind
             for name, tensor in stored.items() if tensor.is_packed}
    return Header(meta, stored, vocabulary, ids, config | {"quantization_config": {"quant_method": "gguf", "types": types}})


def prepare(path: Path, out: Path, check: Callable[[dict[str, Any]], object] = lambda config: None) -> None:
    """Make the model folder of a GGUF file: everything but its weights. Raises `ModelError` naming the file and what is wrong with it.

    check: raises for a config.json that describes a model that cannot run here, before anything is written.
    """
    header = read_header(path)
    check(header.config)
    _write_folder(out, header, header.config)
    write_index(out / GGUF_INDEX, header.tensors)


def convert(path: Path, out: Path) -> None:
    """Make a model folder in Hugging Face's format from a GGUF file, with dequantized weights. Raises as `prepare`."""
    header = read_header(path)
    _write_folder(out, header, {key: value for key, value in header.config.items() if key != "quantization_config"})
    write_safetensors(out / "model.safetensors", header.tensors)


def _write_folder(out: Path, header: Header, config: Mapping[str, Any]) -> None:
    tokenizer = None if header.vocabulary is None else convert_tokenizer(header.meta, header.vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", make_generation_config(header.meta, header.ids))
    if tokenizer is not None:
        _write_json(out / "tokenizer.json", tokenizer[0])
        _write_json(out / "tokenizer_config.json", tokenizer[1])


def _stored(path: Path, config: Mapping[str, Any], arch: Architecture, tensor: ReaderTensor, file: Path,
            targets: tuple[str, ...]) -> dict[str, Indexed]:
    """Hugging Face's name -> tensor: one per target and, if their names have {e}, per expert."""
    shape, of_experts = tuple(int(n) for n in reversed(tensor.shape)), "{e}" in targets[0]
    if len(shape) not in ((2 if targets[0].endswith(".bias") else 3,) if of_experts else (1, 2)) or 0 in shape:
        raise ModelError(f"{path}: tensor {tensor.name!r} has the shape {list(shape)}, not that of a matrix or a vector", "model")
    experts, shape = (shape[0], shape[1:]) if of_experts else (1, shape)
    kind, norm = tensor.tensor_type.name, tensor.name.endswith("norm.weight")
    if norm and arch.norm_offset and kind != "F32":
        raise ModelError(f"{path}: tensor {tensor.name!r} has type {kind}, and norms must have F32", "model")
    common: dict[str, Any] = {
        "kind": kind, "file": os.path.abspath(file), "shift": -arch.norm_offset if norm else 0.0,
        "is_plain": not of_experts and (kind == "MXFP4" or tensor.name == POSITIONS)}
    if transposed := arch.transposed and len(shape) == 2 and tensor.name.startswith("blk."):
        common["transposed"] = True
    if arch.grouped_qkv and ".attn_qkv." in tensor.name:
        _parts(path, config, tensor, 3, shape[0])
        common["kv_heads"] = config["num_key_value_heads"]
    found: dict[str, Indexed] = {}
    row, offset = int(tensor.n_bytes) // (experts * shape[0]), tensor.data_offset
    parts = [*zip(targets, _parts(path, config, tensor, len(targets), shape[0]), strict=True)]
    for e in range(experts):
        for target, rows in parts:
            own = (rows, *shape[1:])
            own = own[::-1] if transposed else (1, *own) if target.endswith("shared_expert_gate.weight") else own
            found[target.replace("{e}", str(e))] = GGUFTensor(shape=own, offset=offset, size=row * rows, heads=_heads(
                path, config, arch, tensor.name, target, rows), **common)
            offset += row * rows
    return found


def _parts(path: Path, config: Mapping[str, Any], tensor: ReaderTensor, count: int, rows: int) -> list[int]:
    """Rows of each of the parts that are stored as one tensor: q, k and v, or two of equal size."""
    parts = [rows // count] * count
    if count == 3:
        parts = [config["head_dim"] * config[f"num_{name}_heads"] for name in ("attention", "key_value", "key_value")]
    if sum(parts) != rows:
        raise ModelError(f"{path}: tensor {tensor.name!r} has {rows} rows, not {sum(parts)}", "model")
    return parts


def _heads(path: Path, config: Mapping[str, Any], arch: Architecture, name: str, target: str, rows: int) -> int:
    """The heads of a tensor whose rows have another order in llama.cpp; 0: they have not."""
    if arch.grouped_qkv and ".attn_qkv." in name:
        return int(config["num_attention_heads"])
    if not arch.interleaved_rope or (match := re.search(r"\.([qk])_proj\.", target)) is None:
        return 0
    heads = int(config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"])
    if rows != heads * config["head_dim"]:
        raise ModelError(f"{path}: tensor {name!r} has {rows} rows, not {heads} heads of {config['head_dim']}", "model")
    return heads


def _latent(path: Path, config: Mapping[str, Any], name: str, tensors: Mapping[str, ReaderTensor],
            places: Mapping[str, Path]) -> LatentKeysAndValues:
    """kv_b from the tensor `name`, which has its keys, and the one with its values."""
    heads, nope, rank = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "kv_lora_rank"))
    parts: list[GGUFTensor] = []
    for theirs, rows, cols in ((name, rank, nope), (name.replace(LATENT_KEYS, LATENT_VALUES), config["v_head_dim"], rank)):
        if theirs not in tensors:
            raise ModelError(f"{path}: tensor {theirs!r} is missing", "model")
        tensor = tensors[theirs]
        shape = [int(n) for n in reversed(tensor.shape)]
        if shape not in ([heads, rows, cols], [heads * rows, cols]):
            raise ModelError(f"{path}: tensor {theirs!r} has the shape {shape}, not {[heads, rows, cols]}", "model")
        parts.append(GGUFTensor(tensor.tensor_type.name, (heads * rows, cols), os.path.abspath(places[theirs]), tensor.data_offset,
                                int(tensor.n_bytes), is_plain=True))
    return LatentKeysAndValues(parts[0], parts[1], heads)


def _check_part(path: Path, reader: GGUFReader, number: int, count: int) -> None:
    """Raise `ModelError` unless a file is the part that its name says: part `number`, from 0 on, of `count`."""
    found = _value(reader, "split.no", 0), max(1, _value(reader, "split.count", 1))
    if found != (number, count):
        raise ModelError(f"{path}: by its metadata it is part {found[0] + 1} of {found[1]}, by its name part {number + 1} of {count}: "
                         f"give the parts their names back, NAME-{found[0] + 1:05}-of-{found[1]:05}.gguf", "model")


def _value(reader: GGUFReader, key: str, default: int) -> int:
    value = reader.fields[key].contents() if key in reader.fields else default
    return value if isinstance(value, int) else -1


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


def _open(path: Path, shown: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModelError(f"{shown}: reading GGUF files needs the gguf package: pip install gguf", "model") from error
    try:
        check_structure(path)
        reader = GGUFReader(path)
    except OtherByteOrder as error:
        raise ModelError(f"{shown}: its bytes are in the order of another processor: run `gguf-convert-endian` on it", "model") from error
    except OSError as error:
        raise ModelError(f"{shown}: cannot be read: {error.strerror or error}", "model") from error
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        size = path.stat().st_size
        raise ModelError(f"{shown} ({size:,} bytes): not a GGUF file, or a truncated one ({error}): download it again", "model") from error
    return reader


def _read_metadata(path: Path, reader: GGUFReader) -> Metadata:
    values = {}
    for key, field in reader.fields.items():
        try:
            values[key] = field.contents()
        except (ValueError, IndexError) as error:
            raise ModelError(f"{path}: metadata {key} cannot be read ({error}): download the file again", "model") from error
    return Metadata(path, values)


PREFIXES = ("model.", "transformer.", "gpt_neox.")  # of Hugging Face's modules
LATENT, LATENT_KEYS, LATENT_VALUES = "attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight"  # whole, or in two parts
POSITIONS = "position_embd.weight"


def _checkpoint_names(path: Path, name: str, config: Mapping[str, Any], tensors: Collection[str]) -> dict[str, tuple[str, ...]]:
    """GGUF's tensor names -> Hugging Face's: ``blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight``.

    The modules are those of the family's row; their names in GGUF come from the table of the gguf package. Several names: the parts of a
    tensor that Hugging Face stores apart.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = next((key for key, value in MODEL_ARCH_NAMES.items() if value == name), None)
    if known is None:
        raise ModelError(f"{path}: architecture {name!r} is not known to the installed gguf package: pip install --upgrade gguf", "model")
    table, family = get_tensor_name_map(known, 1), FAMILIES[config["architectures"][0]]
    modules: dict[str, str] = {}  # of layer 0, and outside the layers
    for key, parts in family.names.items():
        for module in () if key.endswith("_fused") else parts(config) if callable(parts) else parts:
            for prefixed in (*(prefix + module for prefix in PREFIXES), module):
                if (theirs := table.get_name(prefixed.replace(".{e}", "").format(i=0, h=0))) is not None:  # ffn_gate_exps: all experts
                    modules[theirs] = prefixed
                    break
    targets: dict[str, str] = {}  # of tensors whose names differ in more than the module
    if "sinks" in family.names:
        targets["blk.0.attn_sinks.weight"] = f"model.{family.names['sinks'][0]}"
    if family.moe.get("correction"):
        targets["blk.0.exp_probs_b.bias"] = f"model.{family.names['router'][0]}.e_score_correction_bias"
    if latent := "kv_b" in family.names:
        targets[f"blk.0.{LATENT_KEYS}"] = f"model.{family.names['kv_b'][0]}.weight"
    joined = {"blk.0.ffn_gate_up_exps": ("blk.0.ffn_gate_exps", "blk.0.ffn_up_exps"),
              **({} if latent else {"blk.0.attn_qkv": ("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v")})}
    apart = {theirs: tuple(modules.get(part, "") for part in parts) for theirs, parts in joined.items()}
    by_module = {**{theirs: names for theirs, names in apart.items() if all(names)},
                 **{theirs: (ours,) for theirs, ours in modules.items()}}
    found = {}
    for tensor in tensors:
        if tensor in ROPE_TENSORS or (latent and _is_read_with_another(tensor, tensors)):
            continue
        layer = match[1] if (match := re.match(r"blk\.(\d+)\.", tensor)) else ""
        first = re.sub(r"^blk\.\d+\.", "blk.0.", tensor)
        module, _, kind = first.rpartition(".")
        if first not in targets and (module not in by_module or kind not in ("weight", "bias")):
            raise ModelError(f"{path}: tensor {tensor!r} is not used by this engine's decoder", "model")
        names = (targets[first],) if first in targets else tuple(f"{ours}.{kind}" for ours in by_module[module])
        found[tensor] = tuple(ours.format(i=layer, e="{e}") for ours in names)
    return found


def _is_read_with_another(tensor: str, tensors: Container[str]) -> bool:
    """Whether this is the second part of kv_b, which is read with the first one, or a copy of the first one beside the whole."""
    layer, _, name = tensor.rpartition(".attn_")
    whole = f"{layer}.{LATENT}" in tensors
    return f"attn_{name}" in ((LATENT_KEYS, LATENT_VALUES) if whole else (LATENT_VALUES,))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
