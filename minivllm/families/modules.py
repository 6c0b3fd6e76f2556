"""ModelSpec -> its modules: every linear layer, norm and table, with their sizes and their names in checkpoints.

How a linear layer's weight is stored (one matrix, or packed integers with scales) is the linear method's choice
(`minivllm.quantization`); this file has only its rows, its columns and its name.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from minivllm.families.spec import AttentionSpec, MLPSpec, ModelSpec, MoESpec

# The norms of a layer, by its block.
NORMS: Mapping[str, tuple[str, ...]] = {
    "pre": ("attn_norm", "mlp_norm"), "post": ("attn_norm", "mlp_norm"), "output": ("attn_out_norm", "mlp_out_norm"),
    "sandwich": ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"), "parallel": ("attn_norm", "mlp_norm"),
    "parallel_one_norm": ("attn_norm",),
}


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
    heads: AttentionSpec | None = None  # of a qkv layer whose rows differ in order from those of checkpoints: see `row_order`
    transposed: bool = False  # checkpoints store a plain matrix as [cols, rows]
    dense: bool = False  # in memory it is a plain matrix, and has no LoRA adapters: an expert, or `LatentSpec`'s kv_b

    @property
    def stored_rows(self) -> tuple[int, ...]:
        """Outputs of each tensor of a checkpoint: of each part, or of all parts together."""
        return self.rows if len(self.checkpoint_names) == len(self.rows) else (sum(self.rows),)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter that no method stores: the table of positions, or a norm's scale or bias."""

    name: str  # ours: layers.3.attn_norm.weight
    shape: tuple[int, ...]
    checkpoint_names: tuple[str, ...]  # equal parts, joined along the first dimension
    dtype: str | None = None  # None: the model's
    is_scale: bool = False  # a norm's scale, which is 1 in a model with random weights


@dataclass(frozen=True)
class ExpertsSpec:
    """One product of all experts of a layer, stacked: a weight [num_experts, sum of rows, cols], with one part more than `LinearSpec`.

    Checkpoints store each expert's matrices, or one tensor of three dimensions for all of them.
    """

    name: str  # ours: layers.3.experts_gate_up
    num_experts: int
    rows: tuple[int, ...]  # outputs of each part, of one expert
    cols: int
    checkpoint_names: tuple[str, ...]  # one per part; {e}: number of the expert
    fused_name: str  # of the tensor of three dimensions
    bias: bool
    parallel: Literal["column", "row"]
    interleaved: bool = False  # see `MoESpec`

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """The part p of expert e, at index e * parts + p: layers.3.experts_gate_up.e.p."""
        return tuple(LinearSpec(f"{self.name}.{e}.{p}", (rows,), self.cols, (name.format(e=e),), self.bias, self.parallel, dense=True)
                     for e in range(self.num_experts) for p, (rows, name) in enumerate(zip(self.rows, self.checkpoint_names, strict=True)))

    @property
    def size(self) -> int:
        """Elements."""
        return self.num_experts * sum(self.rows) * (self.cols + self.bias)


def embedding_spec(spec: ModelSpec) -> LinearSpec:
    """The embedding table. It is stored like the weight of a linear layer, and is one if the output head is tied to it."""
    return LinearSpec("embed", (spec.vocab_rows,), spec.embed_size, spec.names["embed"], bias=False, parallel="column")


def linear_specs(spec: ModelSpec) -> dict[str, LinearSpec]:
    """Every linear layer, by our name. A tied output head is not among them: its weight is the embedding table."""
    return {} if spec.parameters else {linear.name: linear for linear in _linears(spec)}


def expert_specs(spec: ModelSpec) -> dict[str, ExpertsSpec]:
    """The products of the experts of every layer, by our name. They are not among `linear_specs`."""
    found = {}
    for i, layer in enumerate(spec.layers):
        if isinstance(m := layer.mlp, MoESpec):
            for module, rows, cols, parallel in (("experts_gate_up", (m.intermediate_size,) * 2, spec.hidden_size, "column"),
                                                 ("experts_down", (spec.hidden_size,), m.intermediate_size, "row")):
                names = tuple(name.format(i=i, e="{e}") for name in spec.names[module])
                fused = spec.names[f"{module}_fused"][0].format(i=i)
                found[f"layers.{i}.{module}"] = ExpertsSpec(
                    f"layers.{i}.{module}", m.num_experts, rows, cols, names, fused, m.bias, parallel,  # type: ignore[arg-type]
                    m.interleaved)
    return found


def active_weights(spec: ModelSpec, prefix: str = "") -> int:
    """Numbers of the linear layers whose names begin with `prefix` that one token is multiplied with: of its top_k experts only."""
    linears = sum(sum(linear.rows) * linear.cols for name, linear in linear_specs(spec).items() if name.startswith(prefix))
    return linears + sum(3 * m.top_k * m.intermediate_size * spec.hidden_size for m in (layer.mlp for layer in spec.layers)
                         if isinstance(m, MoESpec))


def tensor_specs(spec: ModelSpec) -> dict[str, TensorSpec]:
    """Every other parameter, by our name."""
    return {tensor.name: tensor for tensor in _tensors(spec)}


def head_order(a: AttentionSpec) -> tuple[int, ...] | None:
    """Our order of the dimensions of a head of q or k: entry d is the checkpoint's dimension. None: the same order.

        checkpoint, 4 of 6 rotated    a b | a' b' | c d        (a, a') is a pair that is rotated; interleaved: a a' b b' | c d
        ours                          a b c | a' b' d          dimension d is paired with d + head_dim / 2

    Scores do not depend on an order that q and k share. So kernels know one kind of rotation only, of all dimensions; the angle of those
    that are not rotated is 0 (`layers/rope.py`).
    """
    if a.rope is None or (not a.rope.interleaved and a.rope.dim in (0, a.head_dim)):
        return None
    dim = a.rope.dim or a.head_dim
    pairs, rest = dim // 2, (a.head_dim - dim) // 2
    first, second = (range(0, dim, 2), range(1, dim, 2)) if a.rope.interleaved else (range(pairs), range(pairs, dim))
    return (*first, *range(dim, dim + rest), *second, *range(dim + rest, a.head_dim))


def row_order(a: AttentionSpec) -> tuple[int, ...]:
    """Our order of the rows of a qkv layer, q then k then v: entry n is the checkpoint's row."""
    d, group, order = a.head_dim, a.num_heads // a.num_kv_heads, head_order(a) or range(a.head_dim)
    first_v = a.num_heads + a.num_kv_heads
    q, k, v = (list(heads) for heads in (range(a.num_heads), range(a.num_heads, first_v), range(first_v, first_v + a.num_kv_heads)))
    if a.grouped_qkv:  # heads of the checkpoint: those of q that share a KV head, then its k and v
        q = [h // group * (group + 2) + h % group for h in q]
        k, v = ([h * (group + 2) + group + i for h in range(a.num_kv_heads)] for i in (0, 1))
    return (*(h * d + i for heads in (q, k) for h in heads for i in order), *(h * d + i for h in v for i in range(d)))


def _linears(spec: ModelSpec) -> Iterator[LinearSpec]:
    def linear(module: str, rows: tuple[int, ...], cols: int, bias: bool = False, parallel: Literal["column", "row"] | None = None,
               layer: int | None = None, heads: AttentionSpec | None = None, dense: bool = False) -> LinearSpec:
        ours = module if layer is None else f"layers.{layer}.{module}"
        return LinearSpec(ours, rows, cols, tuple(name.format(i=layer) for name in spec.names[module]), bias, parallel, heads,
                          spec.transposed and layer is not None, dense)

    hidden = spec.hidden_size
    if spec.embed_size != hidden:
        yield linear("project_in", (hidden,), spec.embed_size)
        yield linear("project_out", (spec.embed_size,), hidden)
    for i, layer in enumerate(spec.layers):
        a = layer.attention
        reordered = a if a.grouped_qkv or head_order(a) is not None else None
        if (latent := a.latent) is not None:
            queries = a.num_heads * (latent.nope_dim + latent.rope_dim)
            if latent.q_rank is None:
                yield linear("q", (queries,), hidden, parallel="column", layer=i)
            else:
                yield linear("q_a", (latent.q_rank,), hidden, a.qkv_bias, layer=i)
                yield linear("q_b", (queries,), latent.q_rank, parallel="column", layer=i)
            yield linear("kv_a", (a.head_dim,), hidden, a.qkv_bias, layer=i)
            yield linear("kv_b", (a.num_heads * (latent.nope_dim + latent.value_dim),), latent.rank, parallel="column", layer=i, dense=True)
        else:
            yield linear("qkv", (a.q_size, a.kv_size, a.kv_size), hidden, a.qkv_bias, "column", i, reordered)
        yield linear("o", (hidden,), a.q_size if latent is None else a.num_heads * latent.value_dim, a.out_bias, "row", i)
        m, prefix = (layer.mlp, "") if isinstance(layer.mlp, MLPSpec) else (layer.mlp.shared, "shared_")
        if m is not None:
            up = ("gate_up", (m.intermediate_size, m.intermediate_size)) if m.gated else ("up", (m.intermediate_size,))
            yield linear(f"{prefix}{up[0]}", up[1], hidden, m.bias, "column", i)
            yield linear(f"{prefix}down", (hidden,), m.intermediate_size, m.bias, "row", i)
    if not spec.tied:
        yield linear("head", (spec.vocab_rows,), spec.embed_size, spec.head_bias, "column")


def _tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    def norm(module: str, layer: int | None = None, shape: tuple[int, ...] = (spec.hidden_size,),
             bias: bool = spec.norm == "layer" and spec.norm_bias) -> Iterator[TensorSpec]:
        ours, (theirs,) = module if layer is None else f"layers.{layer}.{module}", spec.names[module]
        for suffix in ("weight", "bias") if bias else ("weight",):
            if "{h}" in theirs:  # checkpoints have one module per head
                names = tuple(f"{theirs.format(i=layer, h=h)}.{suffix}" for h in range(shape[0]))
                yield TensorSpec(f"{ours}.{suffix}", (math.prod(shape),), names, is_scale=suffix == "weight")
            else:
                yield TensorSpec(f"{ours}.{suffix}", shape, (f"{theirs.format(i=layer)}.{suffix}",), is_scale=suffix == "weight")

    if spec.learned_positions:
        yield TensorSpec("positions.weight", (spec.learned_positions + spec.position_offset, spec.hidden_size),
                         (f"{spec.names['positions'][0]}.weight",))
    if spec.embed_norm:
        yield from norm("embed_norm")
    for i, layer in enumerate(spec.layers):
        if spec.norm_affine:
            for module in NORMS[layer.block]:
                yield from norm(module, i)
        a = layer.attention
        for module, heads in (("q_norm", a.num_heads), ("k_norm", a.num_kv_heads)) if a.qk_norm else ():
            shapes = {"width": (heads * a.head_dim,), "layer_by_head": (heads, a.head_dim)}
            yield from norm(module, i, shapes.get(a.qk_norm or "", (a.head_dim,)), bias=a.qk_norm == "layer")
        if a.latent is not None:
            for module, size in (("q_a_norm", a.latent.q_rank), ("kv_a_norm", a.latent.rank)):
                yield from norm(module, i, (size,), bias=False) if size is not None else ()
        if a.sinks:
            yield TensorSpec(f"layers.{i}.sinks", (a.num_heads,), (spec.names["sinks"][0].format(i=i),), "float32")
        if isinstance(m := layer.mlp, MoESpec):
            theirs = spec.names["router"][0].format(i=i)
            yield TensorSpec(f"layers.{i}.router.weight", (m.num_experts, spec.hidden_size), (f"{theirs}.weight",), "float32")
            if m.router_bias:
                yield TensorSpec(f"layers.{i}.router.bias", (m.num_experts,), (f"{theirs}.bias",), "float32")
            if m.correction:
                yield TensorSpec(f"layers.{i}.router.correction", (m.num_experts,), (f"{theirs}.e_score_correction_bias",), "float32")
            if m.shared_gate:
                yield TensorSpec(f"layers.{i}.shared_gate.weight", (1, spec.hidden_size),
                                 (f"{spec.names['shared_gate'][0].format(i=i)}.weight",))
    if spec.final_norm and spec.norm_affine:
        yield from norm("norm")
