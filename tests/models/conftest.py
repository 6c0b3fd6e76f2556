"""Fixtures of the tests of model files."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from tests.models.gguf_files import HEAD_DIM, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, VOCAB, block_bytes, shapes


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny random GGUF file. `kind`: the type of matrices; `kinds`: that of some, by a part of their names. `meta`: more (or,
    with None, fewer) metadata. `rows`: of the embedding. `per_part`: tensors in each part of a split file."""

    def write(arch: str = "llama", kind: Q = Q.F32, meta: dict[str, Any] | None = None, extra: dict[str, np.ndarray] | None = None,
              drop: tuple[str, ...] = (), kinds: dict[str, Q] | None = None, per_part: int = 0, **flags: Any) -> Path:
        path = tmp_path / f"{arch}-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, arch, split_max_tensors=per_part, small_first_shard=bool(per_part))
        numbers: dict[str, Any] = {
            "block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": INNER,
            "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM, "rope.freq_base": 500000.0, "attention.layer_norm_rms_epsilon": 1e-5,
            "vocab_size": flags.get("rows", VOCAB), **({"rope.dimension_count": HEAD_DIM} if arch == "llama" else {}), **(meta or {}),
        }
        for key, value in numbers.items():
            key = key if key.startswith(("tokenizer.", "general.")) else f"{arch}.{key}"
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
                   list: writer.add_array}.get(type(value))
            if add is not None:
                add(key, value)
        rng = np.random.default_rng(0)
        for name, shape in shapes(arch, **flags).items():
            if name in drop:
                continue
            values = rng.standard_normal(shape).astype(np.float32)
            own = next((own for part, own in (kinds or {}).items() if part in name), kind)
            if len(shape) == 1 or own == Q.F32:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, block_bytes(values, own, rng), raw_dtype=own)
        for name, values in (extra or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return min(tmp_path.glob(f"{path.stem}-*.gguf")) if per_part else path

    return write
