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
from typing import TYPE_CHECKING, Any

import numpy as np

from minivllm.errors import ModelError, shown
from minivllm.families.model_folder import read_json
from minivllm.quantization.base import StoredTensor
from minivllm.quantization.gguf import BLOCKS

if TYPE_CHECKING:
    from torch import Tensor

LARGE = 2_000_000_000  # parameters; of larger models `write_safetensors` stores quantized tensors as bfloat16, the dtype they run in
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file, not read yet."""

    kind: str  # of its numbers: F32, Q4_K, ...
    shape: tuple[int, ...]  # [outputs, inputs], or [outputs] of biases and norms
    file: str
    offset: int  # in bytes
    size: int  # in bytes
    heads: int = 0  # of a query or key projection whose rows are in llama.cpp's order; 0: in Hugging Face's
    kv_heads: int = 0  # of a projection of q, k and v that Hugging Face stores by KV head; `heads` are its query heads
    shift: float = 0.0  # what is added to the numbers: -1 for norms whose weights llama.cpp stores with 1 added

    @property
    def is_packed(self) -> bool:
        """Whether the model keeps its blocks. Others are plain numbers, or become float32 while they are loaded."""
        return self.kind in BLOCKS and len(self.shape) == 2

    def rows(self) -> np.ndarray:
        """Its bytes, with Hugging Face's order of rows. [outputs, bytes] uint8"""
        try:
            if self.offset + self.size > os.path.getsize(self.file):  # checked first, because memory is allocated first
                raise ModelError(f"{self.file}: ends inside a tensor: download it again", "model")
            raw = np.fromfile(self.file, np.uint8, self.size, offset=self.offset)
        except OSError as error:
            raise ModelError(f"{self.file}: cannot be read: {error.strerror or error}", "model") from error
        rows = raw.reshape(self.shape[0], -1)
        if self.kv_heads:
            return by_kv_head(rows, self.heads, self.kv_heads)
        return split_halves(rows, self.heads) if self.heads else rows

    def values(self) -> np.ndarray:
        """Its numbers, of `shape`: float32 or float16. bfloat16 ones are raw 16-bit words, because NumPy has no such type."""
        if self.kind in FLOATS:
            values = self.rows().view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.kind]).reshape(self.shape)
            return values + np.float32(self.shift) if self.shift else values
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(self.rows(), GGMLQuantizationType[self.kind]).reshape(self.shape)


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


def write_index(path: Path, tensors: Mapping[str, GGUFTensor]) -> None:
    path.write_text(json.dumps({name: asdict(tensor) for name, tensor in tensors.items()}), encoding="utf-8")


def read_index(path: Path) -> dict[str, GGUFTensor]:
    """Raises `ModelError` for a damaged index."""
    try:
        return {name: _checked(GGUFTensor(**fields)) for name, fields in read_json(path).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not an index of GGUF tensors ({error}): delete its folder, it is made again", "model") from error


def _checked(tensor: GGUFTensor) -> GGUFTensor:
    """Raise `ValueError` for an entry that `write_index` does not write: an index in a downloaded folder could name any file."""
    numbers = (*tensor.shape, tensor.offset, tensor.size, tensor.heads, tensor.kv_heads)
    if any(type(number) is not int or number < 0 for number in numbers) or not tensor.shape or not all(tensor.shape) or (
            tensor.size % tensor.shape[0]) or tensor.shift not in (0, -1) or not str(tensor.file).lower().endswith(".gguf"):
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
        shape = (tensor.shape[0], tensor.size // tensor.shape[0]) if tensor.is_packed else tuple(tensor.shape)
        dtype = "uint8" if tensor.is_packed else FLOATS.get(tensor.kind, "float32")
        found.append(StoredTensor(Path(tensor.file).name, name, shape, dtype, partial(_read, tensor)))
    return found


def _read(tensor: GGUFTensor) -> Tensor:
    import torch

    found = torch.from_numpy(np.ascontiguousarray(tensor.rows() if tensor.is_packed else tensor.values()))
    return found.view(torch.bfloat16) if tensor.kind == "BF16" else found


# ---- safetensors, for programs that read no GGUF

def write_safetensors(out: Path, tensors: Mapping[str, GGUFTensor]) -> None:
    """Dequantize tensor by tensor straight into the file, so that only one tensor is in memory at a time.

        8 bytes: header length | JSON {name: dtype, shape, [begin, end)} | the tensors, back to back
    """
    from tqdm import tqdm

    large = sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) > LARGE
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        dtype = tensor.kind if tensor.kind in FLOATS else "BF16" if large else "F32"  # float32 represents the blocks' values exactly
        begin, end = end, end + int(np.prod(tensor.shape)) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc="dequantizing", disable=None) as bar:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            values = tensor.values()
            if header[name]["dtype"] == "BF16" and tensor.kind != "BF16":
                values = to_bfloat16(values)
            bar.update(file.write(np.ascontiguousarray(values).data))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest even. float32 [...] -> uint16 [...]"""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
