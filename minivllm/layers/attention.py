"""Self-attention over the paged KV cache: project, position, store the new keys and values, attend, project back.

    x [T, hidden] -> qkv [T, (H + 2 Hk) * D]  =  | q heads | k heads | v heads |
                                                 |-- norm, rotate ---|              both act per head: one call for q and k
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


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all layers of one forward pass share, computed once from the batch."""

    rope: tuple[Tensor, Tensor] | None  # cos, signed sin: [T, 1, head_dim]
    slots: tuple[Tensor, ...]  # [G] of [T]
    metas: tuple[Any, ...]  # [G] from ops.prepare_attention


class Attention:
    __slots__ = ("_apply_rope", "_attention", "_norm", "_write_kv", "eps", "group", "head_dim", "num_heads", "num_kv_heads", "o",
                 "qk_weight", "qkv", "scale")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, layer: int, group: int) -> None:
        name = f"layers.{layer}"
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.scale, self.eps, self.group = spec.head_dim**-0.5, spec.norm_eps, group
        self.qkv = Linear(build, take(f"{name}.qkv.weight"), take(f"{name}.qkv.bias") if spec.qkv_bias else None)
        self.o = Linear(build, take(f"{name}.o.weight"), take(f"{name}.o.bias") if spec.out_bias else None)
        self.qk_weight: Tensor | None = None  # [H + Hk, D]: one row of norm weights per head
        if spec.qk_norm:
            q, k = take(f"{name}.q_norm.weight"), take(f"{name}.k_norm.weight")
            self.qk_weight = torch.cat((q.expand(spec.num_heads, -1), k.expand(spec.num_kv_heads, -1)))
        ops = build.ops
        self._norm, self._apply_rope, self._write_kv, self._attention = ops.rms_norm, ops.apply_rope, ops.write_kv, ops.attention

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer) -> Tensor:
        """x: [T, hidden] -> [T, hidden]; writes this layer's keys and values of the T tokens into `kv`."""
        h, hk, d = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv(x).view(-1, h + 2 * hk, d)
        qk, v = qkv[:, : h + hk], qkv[:, h + hk :]  # [T, H + Hk, D], [T, Hk, D]
        if self.qk_weight is not None:
            qk = self._norm(qk, self.qk_weight, self.eps)
        if step.rope is not None:
            qk = self._apply_rope(qk, *step.rope)
        self._write_kv(qk[:, h:], v, kv, step.slots[self.group])
        out = self._attention(qk[:, :h], kv, step.metas[self.group], scale=self.scale)  # [T, H, D]
        return self.o(out.view(-1, h * d))
