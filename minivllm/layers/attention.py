"""Self-attention over the paged KV cache: project, rotate, store the new keys and values, attend, project back.

    x [T, hidden] -> norm -> qkv [T, (H + 2 Hk) * D]  =  | q heads | k heads | v heads |  -> heads' outputs [T, H * D] -> o -> + x
                                                         |-- norm, rotate ---|
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from minivllm.families import AttentionSpec, LinearSpec, ModelSpec, head_order
from minivllm.kernels.layout import KVLayer
from minivllm.layers.build import BuildContext, Take
from minivllm.layers.linear import Linear
from minivllm.layers.norm import Norm, QKNorm

Rotation: TypeAlias = tuple[Tensor, Tensor]  # cosines and signed sines: [T, 1, head_dim]


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the layers of one forward pass share, computed once from the batch."""

    rotations: tuple[Rotation | None, ...]  # one per rotary embedding of the model; each layer stores an index into them
    slots: tuple[Tensor, ...]  # [G] of [T]
    metas: tuple[Any, ...]  # [G] from ops.prepare_attention; None: not prepared, because this step does not use the group
    lora: Any = None  # from ops.prepare_lora; None: no token has an adapter


@dataclass(frozen=True, slots=True)
class LastTokens:
    """For the last layer: it stores the keys and values of all T tokens, but only each sequence's last token has a query."""

    rows: Tensor  # [B]: indices of these last tokens among the T tokens
    step: StepContext  # of a batch of only these tokens: B decodes


class Attention:
    __slots__ = ("_alibi", "_other_norm", "_rope", "_self_attention", "_sinks", "_softcap", "_store_kv", "group", "o", "out_norm",
                 "qk_norm", "qkv", "scale")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, linears: Mapping[str, LinearSpec], layer: int, group: int,
                 rope: int, norm: Norm | None, out_norm: Norm | None = None) -> None:
        """group, rope: index of this layer's KV group, and of its rotary embedding.

        norm: of the input. out_norm: of the output, before the residual is added."""
        name, attention = f"layers.{layer}", spec.layers[layer].attention
        self.scale, self._softcap, self.group, self._rope = attention.scale, attention.softcap, group, rope
        self.qkv = Linear.load(build, take, linears[f"{name}.qkv"], norm=norm)
        self.o = Linear.load(build, take, linears[f"{name}.o"])
        self.out_norm = out_norm
        self.qk_norm: tuple[Tensor, float] | None = None  # weights [H + Hk, D], one row per head, and epsilon
        self._other_norm: QKNorm | None = None
        if attention.qk_norm is not None:
            q, k = (self._load_qk(take, spec, attention, f"{name}.{which}_norm.weight") for which in "qk")
            if attention.qk_norm == "head":
                self.qk_norm = torch.cat((q.expand(attention.num_heads, -1), k.expand(attention.num_kv_heads, -1))), spec.norm_eps
            else:
                biases = None
                if attention.qk_norm == "layer":
                    qb, kb = (self._load_qk(take, spec, attention, f"{name}.{which}_norm.bias") for which in "qk")
                    biases = qb, kb
                self._other_norm = QKNorm(build, attention, (q, k), biases, spec.norm_eps)
        self._sinks = take(f"{name}.sinks") if attention.sinks else None
        self._alibi: Tensor | None = None
        if attention.alibi is not None:  # of all ranks' heads, or of this one's
            first = build.group.rank * attention.num_heads % len(attention.alibi)
            slopes = attention.alibi[first : first + attention.num_heads]
            self._alibi = torch.tensor(slopes, dtype=torch.float32, device=build.device)
        self._self_attention, self._store_kv = build.ops.self_attention, build.ops.store_kv

    @staticmethod
    def _load_qk(take: Take, spec: ModelSpec, attention: AttentionSpec, name: str) -> Tensor:
        """A weight or bias of the norms of q or k, in our order of a head's dimensions."""
        tensor, order = take(name), head_order(attention)
        if spec.norm_offset and name.endswith("weight"):
            tensor = (tensor.float() + spec.norm_offset).to(tensor.dtype)
        if attention.qk_norm == "width" and order is None:
            return tensor
        heads = tensor.view(-1, attention.head_dim)
        heads = heads if order is None else heads[:, list(order)]
        return heads.flatten() if attention.qk_norm == "width" else heads

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None, normed: Tensor | None = None) -> Tensor:
        """x: [T, hidden] -> x + out_norm(attention(norm(x))); x may be overwritten. Stores this layer's keys and values in `kv`.

        With `last`, only the rows of its B tokens: [B, hidden]. normed: the input of the projection, if it is not x."""
        qkv, g = self.qkv(x if normed is None else normed, lora=step.lora), self.group
        if self._other_norm is not None:
            self._other_norm(qkv)
        if last is not None:
            # On a GPU, a decode's attention kernel may start before the kernel before it has ended, and then loads cached keys. Here some
            # of these keys are new. The two gathers in between are ordinary launches: they wait for the store, and attention for them.
            self._store_kv(qkv, kv, step.slots[g], step.metas[g], rope=step.rotations[self._rope], qk_norm=self.qk_norm)
            qkv, x, step = qkv.index_select(0, last.rows), x.index_select(0, last.rows), last.step
        heads = self._self_attention(qkv, kv, step.slots[g], step.metas[g], scale=self.scale, rope=step.rotations[self._rope],
                                     qk_norm=self.qk_norm, softcap=self._softcap, alibi=self._alibi, sinks=self._sinks)
        if self.out_norm is None:
            return self.o(heads, residual=x, lora=step.lora)
        return x.add_(self.out_norm(self.o(heads, lora=step.lora)))
