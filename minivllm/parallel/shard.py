"""Which part of a model each rank holds (Shoeybi et al. 2019, Megatron-LM).

    qkv, gate_up   by outputs: whole heads, equal parts of the width of MLPs or experts   column-parallel
    o, down        by the same inputs; the ranks' outputs are summed                      row-parallel
    embed, head    by tokens of the vocabulary, padded to a multiple of the ranks
    the rest       on every rank

With fewer KV heads than ranks, several ranks hold the same KV head. Shapes are equal on all ranks.
"""
from __future__ import annotations

import dataclasses

from minivllm.errors import InvalidInput
from minivllm.families import AttentionSpec, MLPSpec, ModelSpec, MoESpec

FIELD = "tensor_parallel_size"
MOST_RANKS = 64  # that an error suggests


def shard_spec(spec: ModelSpec, size: int) -> ModelSpec:
    """The specification of one of `size` ranks.

    Raises `InvalidInput` naming what does not divide, and the sizes that do."""
    if size == 1:
        return spec
    problem = _problem(spec, size)
    if problem is not None:
        sizes = ", ".join(str(n) for n in range(1, MOST_RANKS + 1) if _problem(spec, n) is None)
        raise InvalidInput(f"{FIELD} {size} does not fit this model: {problem}; use one of {sizes}", FIELD)
    layers = tuple(dataclasses.replace(
        layer, mlp=_shard_mlp(layer.mlp, size),
        attention=dataclasses.replace(layer.attention, num_heads=layer.attention.num_heads // size,
                                      num_kv_heads=max(1, layer.attention.num_kv_heads // size)),
    ) for layer in spec.layers)
    return dataclasses.replace(spec, layers=layers, shards=size)


def _shard_mlp(mlp: MLPSpec | MoESpec, size: int) -> MLPSpec | MoESpec:
    width = mlp.intermediate_size // size
    if isinstance(mlp, MLPSpec):
        return dataclasses.replace(mlp, intermediate_size=width)
    shared = None if mlp.shared is None else dataclasses.replace(mlp.shared, intermediate_size=mlp.shared.intermediate_size // size)
    return dataclasses.replace(mlp, intermediate_size=width, shared=shared)


def _problem(spec: ModelSpec, size: int) -> str | None:
    if spec.vocab_size < size:
        return f"vocab_size is {spec.vocab_size}"
    for layer in spec.layers:
        heads, kv_heads, mlp = layer.attention.num_heads, layer.attention.num_kv_heads, layer.mlp
        shared = mlp.shared if isinstance(mlp, MoESpec) else None
        if layer.attention.latent is not None:
            return "its attention is latent, which is not divided yet"
        if heads % size:
            return f"it has {heads} attention heads, which {size} does not divide"
        if kv_heads % size and size % kv_heads:
            return f"it has {kv_heads} key-value heads, which {size} neither divides nor is a multiple of"
        for width in (mlp.intermediate_size, *(() if shared is None else (shared.intermediate_size,))):
            if width % size:
                return f"its MLPs have a width of {width}, which {size} does not divide"
    return None


def span(whole: int, part: int, rank: int, size: int) -> tuple[int, int]:
    """The (start, end) of the outputs or inputs that a rank holds: `part` of `whole`, cut off at the end of `whole`.

    Several ranks hold the same part if there are fewer parts than ranks."""
    copies = max(1, size * part // whole)  # with padding, size * part is less than 2 * whole
    start = rank // copies * part
    return min(start, whole), min(start + part, whole)


def grouped_spans(a: AttentionSpec, rank: int, size: int) -> list[tuple[int, int]]:
    """The rows of a rank in a matrix whose rows are those of q, k and v of the first KV head, then of the second, ...: (start, end)."""
    group = a.num_heads // a.num_kv_heads
    each = (group + 2) * a.head_dim
    if a.num_kv_heads >= size:
        return [span(a.num_kv_heads * each, a.num_kv_heads // size * each, rank, size)]
    copies, queries = size // a.num_kv_heads, a.num_heads // size
    start = rank // copies * each
    first = start + rank % copies * queries * a.head_dim
    return [(first, first + queries * a.head_dim), (start + group * a.head_dim, start + each)]
