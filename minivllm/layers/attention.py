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
    metas: tuple[Any, ...]  # [G] from ops.prepare_attention; None for a group without layers here


@dataclass(frozen=True, slots=True)
class LastTokens:
    """What the last layer does if nobody asks for more: keys and values of all T tokens, but queries of each sequence's last one."""

    rows: Tensor  # [B] of T
    step: StepContext  # of these alone: B decodes


class Attention:
    __slots__ = ("_self_attention", "_store_kv", "group", "o", "qk_norm", "qkv", "scale")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, layer: int, group: int) -> None:
        name = f"layers.{layer}"
        self.scale, self.group = spec.head_dim**-0.5, group
        self.qkv = Linear(build, take(f"{name}.qkv.weight"), take(f"{name}.qkv.bias") if spec.qkv_bias else None)
        self.o = Linear(build, take(f"{name}.o.weight"), take(f"{name}.o.bias") if spec.out_bias else None)
        self.qk_norm: tuple[Tensor, float] | None = None  # one row of weights per head: [H + Hk, D]
        if spec.qk_norm:
            q, k = take(f"{name}.q_norm.weight"), take(f"{name}.k_norm.weight")
            self.qk_norm = torch.cat((q.expand(spec.num_heads, -1), k.expand(spec.num_kv_heads, -1))), spec.norm_eps
        self._self_attention, self._store_kv = build.ops.self_attention, build.ops.store_kv

    def __call__(self, x: Tensor, norm: Norm | None, step: StepContext, kv: KVLayer, last: LastTokens | None = None) -> Tensor:
        """x: [T, hidden] -> x + attention(norm(x)), which may be written over x; stores this layer's keys and values in `kv`.

        With `last` only its B rows: [B, hidden]."""
        qkv, g = self.qkv(x, norm=norm), self.group
        if last is not None:
            # On a GPU the attention of a decode fetches cached keys before the kernel ahead of it has ended. These keys are new: the
            # gathers between are what it must not overtake, ordinary launches that begin when the store has ended.
            self._store_kv(qkv, kv, step.slots[g], step.metas[g], rope=step.rope, qk_norm=self.qk_norm)
            qkv, x, step = qkv.index_select(0, last.rows), x.index_select(0, last.rows), last.step
        heads = self._self_attention(qkv, kv, step.slots[g], step.metas[g], scale=self.scale, rope=step.rope, qk_norm=self.qk_norm)
        return self.o(heads, residual=x)
