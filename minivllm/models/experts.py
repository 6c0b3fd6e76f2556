"""Checkpoints that store all experts of a layer as one tensor, as Transformers 5 has them in memory -> the matrices of each expert.

    layers.3.mlp.experts.gate_up_proj [E, 2 I, H]     ->  layers.3.mlp.experts.7.gate_proj.weight [I, H], ..7.up_proj.weight [I, H], ...
    layers.3.mlp.experts.down_proj    [E, H, I]       ->  layers.3.mlp.experts.7.down_proj.weight [H, I], ...

gpt-oss stores them in another order, which is `interleaved` here: gate and up take turns.

    experts.gate_up_proj        [E, H, 2 I]           or in MXFP4   gate_up_proj_blocks [E, 2 I, H / 32, 16], gate_up_proj_scales
    experts.gate_up_proj_bias   [E, 2 I]
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from minivllm.families import ExpertsSpec, ModelSpec, expert_specs
from minivllm.quantization.base import StoredTensor
from minivllm.quantization.mxfp4 import GROUP

FUSED_ROUTER = "layers.{i}.mlp.gate"  # beside such tensors, whatever the router's name is beside single experts
KINDS = {"": "weight", "_bias": "bias", "_blocks": "blocks", "_scales": "scales"}  # end of the name -> suffix of the tensors of an expert


def split_experts(spec: ModelSpec, checkpoint: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The checkpoint with one tensor per matrix of an expert. Tensors of other shapes stay, so that the loader reports them."""
    found = dict(checkpoint)
    for experts in expert_specs(spec).values():
        for end, suffix in KINDS.items():
            stored = found.get(f"{experts.fused_name}{end}")
            if stored is None or stored.shape != _shapes(experts).get(suffix):
                continue
            del found[f"{experts.fused_name}{end}"]
            parts = len(experts.rows)
            for i, linear in enumerate(experts.linears):
                shape = {"weight": (linear.rows[0], linear.cols), "bias": linear.rows, "blocks": (linear.rows[0], linear.cols // 2),
                         "scales": (linear.rows[0], linear.cols // GROUP)}[suffix]
                read = partial(_taken, stored, suffix, *divmod(i, parts), parts, experts.interleaved)
                found[f"{linear.checkpoint_names[0]}.{suffix}"] = replace(stored, shape=shape, read=read)
        layer = experts.name.split(".")[1]
        fused, single = (f"{name.format(i=layer)}.weight" for name in (FUSED_ROUTER, spec.names["router"][0]))
        if fused in found and single not in found:
            found[single] = found.pop(fused)
    return found


def _shapes(experts: ExpertsSpec) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of the tensor for all experts."""
    e, rows, cols = experts.num_experts, sum(experts.rows), experts.cols
    if not experts.interleaved:
        return {"weight": (e, rows, cols)}
    groups = cols // GROUP
    return {"weight": (e, cols, rows), "bias": (e, rows), "blocks": (e, rows, groups, GROUP // 2), "scales": (e, rows, groups)}


def _taken(stored: StoredTensor, suffix: str, expert: int, part: int, parts: int, interleaved: bool) -> Tensor:
    """The part of an expert."""
    matrix = stored.read()[expert]
    if not interleaved:
        return matrix.chunk(parts)[part]
    taken = (matrix.T if suffix == "weight" else matrix)[part::parts]
    return taken.flatten(1) if suffix == "blocks" else taken
