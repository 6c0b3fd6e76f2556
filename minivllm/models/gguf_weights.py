"""The tensors of GGUF files under Hugging Face's names: an index with the place of each, its bytes, and its values.

    model.gguf.index.json     {"model.layers.7.self_attn.q_proj.weight": {"kind": "Q4_K", "shape": [4096, 4096], "file": ..}, ..}

The index is made once from a file's header, so later starts read no header. Its tensors stay in the GGUF file. Packed ones are loaded as
rows of blocks (`quantization.gguf`).
"""
from __future__ import annotations

import json
import os
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from minivllm.errors import ModelError, shown
from minivllm.families.model_folder import read_json
from minivllm.quantization.base import StoredTensor
from minivllm.quantization.gguf import PACKED

if TYPE_CHECKING:
    from torch import Tensor

LARGE = 2_000_000_000  # parameters; of larger models `write_safetensors` stores quantized tensors as bfloat16, the dtype they run in
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file, not read yet."""

    kind: str  # of its numbers: F32, Q4_K, ...
    shape: tuple[int, ...]  # [outputs, inputs], or [outputs] of biases and norms; Hugging Face's, so [inputs, outputs] if `transposed`
    file: str
    offset: int  # in bytes
    size: int  # in bytes
    heads: int = 0  # of a query or key projection whose rows are in llama.cpp's order; 0: in Hugging Face's
    kv_heads: int = 0  # of a projection of q, k and v that Hugging Face stores by KV head; `heads` are its query heads
    shift: float = 0.0  # what is added to the numbers: -1 for norms whose weights llama.cpp stores with 1 added
    transposed: bool = False  # Hugging Face stores it as [inputs, outputs] (GPT-2)
    is_plain: bool = False  # the model needs plain numbers, whatever the file stores

    @property
    def is_packed(self) -> bool:
        """Whether the loader gets its blocks. Others are plain numbers, or become float32 while they are loaded."""
        return self.kind in PACKED and len(self.shape) == 2 and not self.is_plain

    @property
    def dtype(self) -> str:
        """Of what the loader gets: torch's name."""
        return "uint8" if self.is_packed else FLOATS.get(self.kind, "float32")

    @property
    def outputs(self) -> int:
        """Rows in the file."""
        return self.shape[-1] if self.transposed else self.shape[0]

    @property
    def loaded_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.size // self.outputs) if self.is_packed else tuple(self.shape)

    def loaded(self) -> np.ndarray:
        """What the loader gets, of `loaded_shape` and `dtype`."""
        return self.rows() if self.is_packed else self.values()

    def rows(self) -> np.ndarray:
        """Its bytes, with Hugging Face's order of rows. [outputs, bytes] uint8"""
        try:
            if self.offset + self.size > os.path.getsize(self.file):  # checked first, because memory is allocated first
                raise ModelError(f"{self.file}: ends inside a tensor: download it again", "model")
            raw = np.fromfile(self.file, np.uint8, self.size, offset=self.offset)
        except OSError as error:
            raise ModelError(f"{self.file}: cannot be read: {error.strerror or error}", "model") from error
        rows = raw.reshape(self.outputs, -1)
        if self.kv_heads:
            return by_kv_head(rows, self.heads, self.kv_heads)
        return split_halves(rows, self.heads) if self.heads else rows

    def values(self) -> np.ndarray:
        """Its numbers, of `shape`: float32 or float16. bfloat16 ones are raw 16-bit words, because NumPy has no such type."""
        shape = self.shape[::-1] if self.transposed else self.shape
        if self.kind in FLOATS:
            values = self.rows().view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.kind]).reshape(shape)
            values = values + np.float32(self.shift) if self.shift else values
        else:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize

            values = dequantize(self.rows(), GGMLQuantizationType[self.kind]).reshape(shape)
        return values.T if self.transposed else values


@dataclass(frozen=True, slots=True)
class LatentKeysAndValues:
    """The matrix kv_b of latent attention, which newer files store as two tensors. Each head's keys are transposed there:

        attn_k_b   heads * [rank, nope_dim]   \
                                               >   kv_b   heads * [nope_dim + value_dim, rank]
        attn_v_b   heads * [value_dim, rank]  /
    """

    keys: GGUFTensor  # [heads * rank, nope_dim]
    of_values: GGUFTensor  # [heads * value_dim, rank]
    heads: int
    is_packed = False
    dtype = "float32"

    @property
    def kind(self) -> str:
        """A type that `open_index` names if it is dequantized."""
        return self.of_values.kind if self.keys.kind in FLOATS else self.keys.kind

    @property
    def file(self) -> str:
        return self.keys.file

    @property
    def shape(self) -> tuple[int, int]:
        rank = self.of_values.shape[1]
        return self.heads * self.keys.shape[1] + self.of_values.shape[0], rank

    @property
    def loaded_shape(self) -> tuple[int, int]:
        return self.shape

    def loaded(self) -> np.ndarray:
        """What the loader gets."""
        return self.values()

    def values(self) -> np.ndarray:
        """Its numbers, float32 [heads * (nope_dim + value_dim), rank]."""
        keys, values = (as_float32(part).reshape(self.heads, -1, part.shape[1]) for part in (self.keys, self.of_values))
        return np.concatenate((keys.swapaxes(1, 2), values), axis=1).reshape(self.shape)


Indexed: TypeAlias = GGUFTensor | LatentKeysAndValues


def as_float32(tensor: GGUFTensor) -> np.ndarray:
    """The numbers of a tensor, of its shape."""
    values = tensor.values()
    return (values.astype(np.uint32) << 16).view(np.float32) if tensor.kind == "BF16" else values.astype(np.float32, copy=False)


def split_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows from llama.cpp's pairs (x0 y0 x1 y1 ..) to halves (x0 x1 .. y0 y1 ..). [heads * head_dim, ...]"""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def by_kv_head(array: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Reorder rows from q, k, v to those of each KV head: its queries, its key, its value. [(heads + 2 * kv_heads) * head_dim, ...]"""
    group = heads // kv_heads
    each = array.reshape(heads + 2 * kv_heads, -1, *array.shape[1:])
    q, k, v = np.split(each, (heads, heads + kv_heads))
    q = q.reshape(kv_heads, group, *each.shape[1:])
    return np.concatenate((q, k[:, None], v[:, None]), axis=1).reshape(array.shape)


def write_index(path: Path, tensors: Mapping[str, Indexed]) -> None:
    path.write_text(json.dumps({name: asdict(tensor) for name, tensor in tensors.items()}), encoding="utf-8")


def read_index(path: Path) -> dict[str, Indexed]:
    """Raises `ModelError` for a damaged index."""
    try:
        return {name: _entry(fields) for name, fields in read_json(path).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not an index of GGUF tensors ({error}): delete its folder, it is made again", "model") from error


def _entry(fields: Mapping[str, Any]) -> Indexed:
    if "keys" not in fields:
        return _checked(GGUFTensor(**fields))
    parts = {name: _checked(GGUFTensor(**fields[name])) for name in ("keys", "of_values")}
    heads, (keys, values) = fields["heads"], (part.shape for part in parts.values())
    if type(heads) is not int or heads < 1 or not len(keys) == len(values) == 2 or keys[0] != heads * values[1] or values[0] % heads:
        raise ValueError(f"a wrong entry for {shown(parts['keys'].file)}")
    return LatentKeysAndValues(**parts, heads=heads)


def _checked(tensor: GGUFTensor) -> GGUFTensor:
    """Raise `ValueError` for an entry that `write_index` does not write: an index in a downloaded folder could name any file."""
    numbers = (*tensor.shape, tensor.offset, tensor.size, tensor.heads, tensor.kv_heads)
    if any(type(number) is not int or number < 0 for number in numbers) or not tensor.shape or not all(tensor.shape) or (
            tensor.size % tensor.outputs) or tensor.shift not in (0, -1) or not (
            isinstance(tensor.transposed, bool) and isinstance(tensor.is_plain, bool)) or not str(tensor.file).lower().endswith(".gguf"):
        raise ValueError(f"a wrong entry for {shown(tensor.file)}")
    return tensor


def open_index(path: Path) -> list[StoredTensor]:
    """The tensors of an index, for the loader. Says which types are dequantized."""
    tensors = read_index(path)
    others = Counter(tensor.kind for tensor in tensors.values() if not tensor.is_packed and tensor.kind not in FLOATS)
    if others:
        kinds = ", ".join(f"{kind} ({count} tensors)" for kind, count in sorted(others.items()))
        file = next(iter(tensors.values())).file
        print(f"minivllm: {file}: dequantized while loading, because they have no packed form here: {kinds}", file=sys.stderr, flush=True)
    found = []
    for name, tensor in tensors.items():
        found.append(StoredTensor(Path(tensor.file).name, name, tensor.loaded_shape, tensor.dtype, partial(_read, tensor)))
    return found


def _read(tensor: Indexed) -> Tensor:
    import torch

    found = torch.from_numpy(np.ascontiguousarray(tensor.loaded()))
    return found.view(torch.bfloat16) if tensor.dtype == "bfloat16" else found


# ---- safetensors, for programs that read no GGUF

def write_safetensors(out: Path, tensors: Mapping[str, Indexed]) -> None:
    """Dequantize tensor by tensor straight into the file, so that only one tensor is in memory at a time.

        8 bytes: header length | JSON {name: dtype, shape, [begin, end)} | the tensors, back to back
    """
    from tqdm import tqdm

    large = sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) > LARGE
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        plain = isinstance(tensor, GGUFTensor) and tensor.kind in FLOATS
        dtype = tensor.kind if plain else "BF16" if large else "F32"  # float32 represents the blocks' values exactly
        begin, end = end, end + int(np.prod(tensor.shape)) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc="dequantizing", disable=None) as bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            values = tensor.values()
            if header[name]["dtype"] == "BF16" and tensor.dtype != "bfloat16":
                values = to_bfloat16(values)
            bar.update(file.write(np.ascontiguousarray(values).data))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest even. float32 [...] -> uint16 [...]"""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
