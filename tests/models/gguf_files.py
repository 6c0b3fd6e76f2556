"""Small GGUF files for tests: their contents, and their conversion."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf.quants import quantize

from minivllm.errors import ModelError
from minivllm.models import gguf as ours

# Rows of 256, which super-blocks need; head_dim is not hidden / heads.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, LAYERS, EXPERTS = 256, 8, 2, 64, 256, 40, 2, 3
NARROW = ("qwen2moe", "olmoe")  # Transformers' models of these have heads of hidden / heads


def shapes(arch: str, *, tied: bool = False, bias: bool = False, rows: int = VOCAB,
           experts: bool = False) -> dict[str, tuple[int, ...]]:
    """Tensors of a tiny model, named as llama.cpp names them."""
    head = HIDDEN // HEADS if arch in NARROW else HEAD_DIM
    q, kv = HEADS * head, KV_HEADS * head
    out: dict[str, tuple[int, ...]] = {"token_embd.weight": (rows, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        out["output.weight"] = (rows, HIDDEN)
    for i in range(LAYERS):
        block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (q, HIDDEN), "attn_k": (kv, HIDDEN),
                 "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, q), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
                 "ffn_down": (HIDDEN, INNER)}
        if arch == "qwen3":
            block |= {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)}
        if arch.endswith("moe") or experts:
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                block[f"{name}_exps"] = (EXPERTS, *block.pop(name))
            block["ffn_gate_inp"] = (EXPERTS, HIDDEN)
        if arch == "qwen2moe":
            block |= {"ffn_gate_shexp": (512, HIDDEN), "ffn_up_shexp": (512, HIDDEN), "ffn_down_shexp": (HIDDEN, 512),
                      "ffn_gate_inp_shexp": (HIDDEN,)}
        if arch in ("qwen3moe", "olmoe"):
            whole = arch == "olmoe"
            block |= {"attn_q_norm": (q if whole else head,), "attn_k_norm": (kv if whole else head,)}
        out |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        if arch in ("qwen2", "qwen2moe") or bias:
            out |= {f"blk.{i}.attn_{p}.bias": (rows,) for p, rows in (("q", q), ("k", kv), ("v", kv))}
        if arch == "llama" and bias:
            out[f"blk.{i}.attn_output.bias"] = (HIDDEN,)
    return out


def block_bytes(values: np.ndarray, kind: Q, rng: np.random.Generator) -> np.ndarray:
    """`values` quantized. For types that gguf can only read: random blocks whose float16 scales are at most 0.0035."""
    try:
        return quantize(values, kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        return rng.integers(0, 28, size=shape, dtype=np.uint8)


def convert(path: Path) -> Path:
    """A folder with dequantized weights."""
    out = path.with_suffix("")
    ours.convert(path, out)
    return out


def prepare(path: Path) -> Path:
    """A folder whose weights are in the file."""
    out = path.with_suffix(".packed")
    ours.prepare(path, out)
    return out


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def refused(path: Path, says: str) -> None:
    with pytest.raises(ModelError, match=re.escape(says)) as error:
        convert(path)
    assert str(path) in str(error.value)
