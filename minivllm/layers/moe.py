"""Mixture of experts: a router chooses the experts that compute a token, beside a shared expert that computes all of them.

    x [T, H] ── norm ──┬── router [E] ──▶ ids, weights [T, k] ──▶ sum of weight * expert(x) ──┐
                       └── shared expert, perhaps gated ──────────────────────────────────────┴──▶ + x

The experts' weights are dense and stacked, [E, ...], whatever the checkpoint stores. The router is never quantized. A tensor-parallel
rank has a part of each expert's width: rank 0 adds x and the biases, and the ranks' outputs are summed.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minivllm.families import ExpertsSpec, LinearSpec, MoESpec
from minivllm.kernels.layout import ExpertWeights
from minivllm.layers.build import BuildContext, Take, dense_weight
from minivllm.layers.mlp import MLP
from minivllm.layers.norm import Norm


class MoE:
    """x + experts(norm(x)): in place of an `MLP`."""

    __slots__ = ("_fused_experts", "_group", "_norm", "_route", "_router", "_shared", "_shared_gate", "experts", "spec")

    def __init__(self, spec: MoESpec, build: BuildContext, take: Take, linears: Mapping[str, LinearSpec], layer: int, norm: Norm | None,
                 out_norm: Norm | None, experts: Mapping[str, ExpertsSpec]) -> None:
        """See `MLP`. experts: see `expert_specs`."""
        assert out_norm is None, "no family has a norm behind its experts"
        name = f"layers.{layer}"
        self.spec, self._norm, self._route, self._fused_experts = spec, norm, build.ops.route, build.ops.fused_experts
        self._router = (take(f"{name}.router.weight"), take(f"{name}.router.bias") if spec.router_bias else None,
                        take(f"{name}.router.correction") if spec.correction else None)
        gate_up, gate_up_bias = load_experts(experts[f"{name}.experts_gate_up"], build, take)
        down, down_bias = load_experts(experts[f"{name}.experts_down"], build, take)
        self._group = build.group
        self.experts = ExpertWeights(gate_up, down, gate_up_bias, down_bias if build.group.rank == 0 else None, spec.clamp)
        self._shared = None if spec.shared is None else MLP(spec.shared, build, take, linears, layer, None, prefix="shared_")
        self._shared_gate = take(f"{name}.shared_gate.weight") if spec.shared_gate else None

    def __call__(self, x: Tensor, lora: Any = None) -> Tensor:
        """x: [T, hidden] -> x + moe(norm(x)); x may be overwritten. lora: see `Linear`. Only the shared expert can have adapters."""
        h = x if self._norm is None else self._norm(x)
        ids, weights = self._route(h, *self._router, self.spec)
        if self._shared is not None:
            if self._shared_gate is None:
                x = self._shared.down(self._shared.up(h, lora=lora), residual=x, lora=lora)
            else:
                x = x.addcmul_(self._shared.down(self._shared.up(h, lora=lora), lora=lora), (h @ self._shared_gate.T).sigmoid())
        x = x if self._group.rank == 0 else torch.zeros_like(x)
        return self._group.all_reduce(self._fused_experts(h, self.experts, ids, weights, x))


def load_experts(spec: ExpertsSpec, build: BuildContext, take: Take) -> tuple[Tensor, Tensor | None]:
    """The stacked weights [E, rows, cols] and biases [E, rows]. Quantized experts are dequantized, one matrix at a time."""
    weight = torch.empty(spec.num_experts, sum(spec.rows), spec.cols, dtype=build.dtype, device=build.device)
    bias = torch.empty(weight.shape[:2], dtype=build.dtype, device=build.device) if spec.bias else None
    at = 0
    for linear in spec.linears:
        end = at + linear.rows[0]
        weight.flatten(0, 1)[at:end] = dense_weight(linear, build, take)
        if bias is not None:
            bias.flatten()[at:end] = take(f"{linear.name}.bias")
        at = end
    return weight, bias
