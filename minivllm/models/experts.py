"""Checkpoints that store all experts of a layer as one tensor, as Transformers 5 has them in memory -> the matrices of each expert.

    layers.3.mlp.experts.gate_up_proj [E, 2 I, H]     ->  layers.3.mlp.experts.7.gate_proj.weight [I, H], ..7.up_proj.weight [I, H], ...
    layers.3.mlp.experts.down_proj    [E, H, I]       ->  layers.3.mlp.experts.7.down_proj.weight [H, I], ...
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from minivllm.families import ModelSpec, expert_specs
from minivllm.quantization.base import StoredTensor

FUSED_ROUTER = "layers.{i}.mlp.gate"  # beside such tensors, whatever the router's name is beside single experts


def split_experts(spec: ModelSpec, checkpoint: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The checkpoint with one tensor per matrix of an expert. Tensors of other shapes stay, so that the loader reports them."""
    found = dict(checkpoint)
    for experts in expert_specs(spec).values():
        stored = found.get(experts.fused_name)
        if stored is None or stored.shape != (experts.num_experts, sum(experts.rows), experts.cols):
            continue
        del found[experts.fused_name]
        start = 0
        for linear in experts.linears:
            shape = (linear.rows[0], linear.cols)
            found[f"{linear.checkpoint_names[0]}.weight"] = replace(stored, shape=shape, read=partial(_part, stored, start, shape))
            start += linear.rows[0]
        layer = experts.name.split(".")[1]
        fused, single = FUSED_ROUTER.format(i=layer), spec.names["router"][0].format(i=layer)
        if (router := found.pop(f"{fused}.weight", None)) is not None:
            found[f"{single}.weight"] = router
    return found


def _part(stored: StoredTensor, start: int, shape: tuple[int, int]) -> Tensor:
    """Rows of all experts' matrices, one below the other."""
    return stored.read().flatten(0, 1)[start : start + shape[0]]
