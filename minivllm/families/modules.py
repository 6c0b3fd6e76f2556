"""ModelSpec -> its modules: every linear layer, norm and table, with their sizes and their names in checkpoints.

How a linear layer's weight is stored (one matrix, or packed integers with scales) is the linear method's choice
(`minivllm.quantization`); this file has only its rows, its columns and its name.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from minivllm.families.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """y = W x + b. A fused layer consists of several parts, which are joined into one weight:

        qkv   [q + 2 kv rows, hidden]     |   q_proj   | k_proj | v_proj |
    """

    name: str  # ours: layers.3.qkv
    rows: tuple[int, ...]  # outputs of each part
    cols: int  # inputs
    checkpoint_names: tuple[str, ...]  # one per part, or one for all parts; without the prefix ("model.") that varies between exporters
    bias: bool
    # How tensor-parallel ranks split W. column: by rows (outputs). row: by columns (inputs), so outputs are summed over ranks.
    parallel: Literal["column", "row"] | None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter that no method stores: the table of positions, or a norm's scale or bias."""

    name: str  # ours: layers.3.attn_norm.weight
    shape: tuple[int, ...]
    checkpoint_name: str
    kind: Literal["table", "scale", "bias"]


def embedding_spec(spec: ModelSpec) -> LinearSpec:
    """The embedding table. It is stored like the weight of a linear layer, and is one if the output head is tied to it."""
    return LinearSpec("embed", (spec.vocab_size,), spec.embed_size, spec.names["embed"], bias=False, parallel="column")


def linear_specs(spec: ModelSpec) -> dict[str, LinearSpec]:
    """Every linear layer, by our name. A tied output head is not among them: its weight is the embedding table."""
    return {linear.name: linear for linear in _linears(spec)}


def tensor_specs(spec: ModelSpec) -> dict[str, TensorSpec]:
    """Every other parameter, by our name."""
    return {tensor.name: tensor for tensor in _tensors(spec)}


def _linears(spec: ModelSpec) -> Iterator[LinearSpec]:
    def linear(module: str, rows: tuple[int, ...], cols: int, bias: bool = False, parallel: Literal["column", "row"] | None = None,
               layer: int | None = None) -> LinearSpec:
        ours = module if layer is None else f"layers.{layer}.{module}"
        return LinearSpec(ours, rows, cols, tuple(name.format(i=layer) for name in spec.names[module]), bias, parallel)

    hidden = spec.hidden_size
    if spec.embed_size != hidden:
        yield linear("project_in", (hidden,), spec.embed_size)
        yield linear("project_out", (spec.embed_size,), hidden)
    for i, layer in enumerate(spec.layers):
        a, m = layer.attention, layer.mlp
        yield linear("qkv", (a.q_size, a.kv_size, a.kv_size), hidden, a.qkv_bias, "column", i)
        yield linear("o", (hidden,), a.q_size, a.out_bias, "row", i)
        if m.gated:
            yield linear("gate_up", (m.intermediate_size, m.intermediate_size), hidden, m.bias, "column", i)
        else:
            yield linear("up", (m.intermediate_size,), hidden, m.bias, "column", i)
        yield linear("down", (hidden,), m.intermediate_size, m.bias, "row", i)
    if not spec.tied:
        yield linear("head", (spec.vocab_size,), spec.embed_size, parallel="column")


def _tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    def norm(module: str, layer: int | None = None, size: int = spec.hidden_size,
             bias: bool = spec.norm == "layer") -> Iterator[TensorSpec]:
        ours, (theirs,) = module if layer is None else f"layers.{layer}.{module}", spec.names[module]
        yield TensorSpec(f"{ours}.weight", (size,), f"{theirs.format(i=layer)}.weight", "scale")
        if bias:
            yield TensorSpec(f"{ours}.bias", (size,), f"{theirs.format(i=layer)}.bias", "bias")

    if spec.learned_positions:
        yield TensorSpec("positions.weight", (spec.learned_positions + spec.position_offset, spec.hidden_size),
                         f"{spec.names['positions'][0]}.weight", "table")
    for i, layer in enumerate(spec.layers):
        if spec.norm_affine:
            yield from norm("attn_norm", i)
            yield from norm("mlp_norm", i)
        if layer.attention.qk_norm:
            yield from norm("q_norm", i, layer.attention.head_dim, bias=False)
            yield from norm("k_norm", i, layer.attention.head_dim, bias=False)
    if spec.final_norm and spec.norm_affine:
        yield from norm("norm")
