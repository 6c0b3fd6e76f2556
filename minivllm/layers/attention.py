"""Self-attention over the paged KV cache: project, position, store the new keys and values, attend, project back.

    x [T, hidden] -> norm -> qkv [T, (H + 2 Hk) * D]  =  | q heads | k heads | v heads |  -> heads' outputs [T, H * D] -> o -> + x
                                                         |-- norm, rotate ---|
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivllm.families import ModelSpec
from minivllm.kernels.layout import KVLayer
from minivllm.layers.build import BuildContext, Take
from minivllm.layers.linear import Linear
from minivllm.layers.norm import Norm


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all layers of one forward pass share, computed once from the batch."""

    rope: tuple[Tensor, Tensor] | None  # cos, signed sin: [T, 1, head_dim]
    slots: tuple[Tensor, ...]  # [G] of [T]
    metas: tuple[Any, ...]  # [G] from ops.prepare_attention


class Attention:
    __slots__ = ("_self_attention", "group", "o", "qk_norm", "qkv", "scale")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, layer: int, group: int) -> None:
        name = f"layers.{layer}"
        self.scale, self.group = spec.head_dim**-0.5, group
        self.qkv = Linear(build, take(f"{name}.qkv.weight"), take(f"{name}.qkv.bias") if spec.qkv_bias else None)
        self.o = Linear(build, take(f"{name}.o.weight"), take(f"{name}.o.bias") if spec.out_bias else None)
        self.qk_norm: tuple[Tensor, float] | None = None  # one row of weights per head: [H + Hk, D]
        if spec.qk_norm:
            q, k = take(f"{name}.q_norm.weight"), take(f"{name}.k_norm.weight")
            self.qk_norm = torch.cat((q.expand(spec.num_heads, -1), k.expand(spec.num_kv_heads, -1))), spec.norm_eps
        self._self_attention = build.ops.self_attention

    def __call__(self, x: Tensor, norm: Norm | None, step: StepContext, kv: KVLayer) -> Tensor:
        """x: [T, hidden] -> x + attention(norm(x)), which may be written over x; stores this layer's keys and values in `kv`."""
        heads = self._self_attention(self.qkv(x, norm=norm), kv, step.slots[self.group], step.metas[self.group], scale=self.scale,
                                     rope=step.rope, qk_norm=self.qk_norm)
        return self.o(heads, residual=x)
