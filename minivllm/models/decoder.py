"""The one decoder. Every family is this code with other flags (families.py).

    tokens -> embedding -> x [ + attention(norm(x)) ] [ + mlp(norm(x)) ] ... -> (rows asked for) -> norm -> logits
                           '------------- a layer ---------------------'

Run state is an argument: the batch and the KV cache come with each call, and the model itself never changes.
"""
from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from minivllm.families import ModelSpec, kv_groups
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.layers.attention import Attention, LastTokens, StepContext
from minivllm.layers.build import BuildContext, Take
from minivllm.layers.embedding import Embedding
from minivllm.layers.linear import Linear
from minivllm.layers.mlp import MLP
from minivllm.layers.norm import LayerNorm, Norm, RMSNorm
from minivllm.layers.rope import RotaryEmbedding


class PreNormLayer:
    """x + attention(norm(x)), then the same with the MLP."""

    __slots__ = ("attention", "attn_norm", "mlp", "mlp_norm")

    def __init__(self, attention: Attention, mlp: MLP, attn_norm: Norm, mlp_norm: Norm) -> None:
        self.attention, self.mlp, self.attn_norm, self.mlp_norm = attention, mlp, attn_norm, mlp_norm

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None) -> Tensor:
        """x: [T, hidden] -> the same shape, written over x or not; with `last` its rows alone: [B, hidden]."""
        x = self.attention(x, self.attn_norm, step, kv, last)
        return self.mlp(x, self.mlp_norm)


class PostNormLayer:
    """norm(x + attention(x)), then the same with the MLP: OPT-350m's order."""

    __slots__ = ("attention", "attn_norm", "mlp", "mlp_norm")

    def __init__(self, attention: Attention, mlp: MLP, attn_norm: Norm, mlp_norm: Norm) -> None:
        self.attention, self.mlp, self.attn_norm, self.mlp_norm = attention, mlp, attn_norm, mlp_norm

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None) -> Tensor:
        x = self.attn_norm(self.attention(x, None, step, kv, last))
        return self.mlp_norm(self.mlp(x, None))


class Decoder:
    """A decoder-only transformer over a paged KV cache."""

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take) -> None:
        self.spec, self.build = spec, build
        self.groups = kv_groups(spec)
        place = {layer: (g, j) for g, group in enumerate(self.groups) for j, layer in enumerate(group.layers)}

        def norm(name: str) -> Norm:
            weight = take(f"{name}.weight") if spec.norm_affine else None
            if spec.norm == "layer":
                return LayerNorm(build, weight, take(f"{name}.bias") if spec.norm_affine else None, spec.norm_eps)
            assert weight is not None
            return RMSNorm(build, weight, spec.norm_eps)

        kind = PreNormLayer if spec.norm_first else PostNormLayer
        self.embedding = Embedding(spec, build, take)
        self.rope = None if spec.rope is None else RotaryEmbedding(build, spec.rope, spec.head_dim, spec.max_model_len)
        self.layers = []
        for i in range(spec.num_layers):
            attention, mlp = Attention(spec, build, take, i, place[i][0]), MLP(spec, build, take, i)
            self.layers.append(kind(attention, mlp, norm(f"layers.{i}.attn_norm"), norm(f"layers.{i}.mlp_norm")))
        self.kv_tensors = [place[i][1] for i in range(spec.num_layers)]  # layer -> its tensor in the cache
        self.norm = norm("norm") if spec.final_norm else None
        self.project_out = Linear(build, take("project_out.weight")) if spec.embed_size != spec.hidden_size else None
        self.head = Linear(build, self.embedding.table if spec.tied else take("head.weight"))

    def without_repetition(self) -> Decoder:
        """A model of the first layers of each KV group: it runs every kernel that the whole one runs."""
        few = copy(self)
        chosen = sorted(i for group in self.groups for i in group.layers[:2])
        few.layers, few.kv_tensors = [self.layers[i] for i in chosen], [self.kv_tensors[i] for i in chosen]
        return few

    @torch.inference_mode()
    def forward(self, batch: InputBatch, kv: Sequence[KVLayer], block_size: int) -> Tensor:
        """-> hidden states before the final norm: [T, hidden], or [B, hidden] if `batch.last_only`.

        kv[j] holds the j-th layer of every KV group. Nothing comes after the last layer that would read what it makes of a
        prompt's other tokens: unless they are asked for, it only stores their keys and values.
        """
        step, last = self._prepare(batch, block_size), None
        if batch.last_only:
            rows, tail = batch.last_tokens()
            last = LastTokens(rows, self._prepare(tail, block_size, only=self.layers[-1].attention.group))
        x = self.embedding(batch)
        for layer, j in zip(self.layers[:-1], self.kv_tensors, strict=False):
            x = layer(x, step, kv[j])
        return self.layers[-1](x, step, kv[self.kv_tensors[-1]], last)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """hidden: [L, hidden] of `forward`, only the rows that are needed -> [L, vocab] in `dtype`; None: as the head leaves them."""
        if self.project_out is not None:
            logits = self.head(self.project_out(hidden, norm=self.norm))
        else:
            logits = self.head(hidden, norm=self.norm)
        return logits if dtype is None else logits.to(dtype)

    def _prepare(self, batch: InputBatch, block_size: int, only: int | None = None) -> StepContext:
        """only: the one KV group whose layers will ask."""
        spec = self.spec
        metas = tuple(
            None if only not in (None, g) else self.build.ops.prepare_attention(
                batch, g, block_size=block_size, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
                window=group.window, dtype=self.build.dtype,
            )
            for g, group in enumerate(self.groups)
        )
        return StepContext(None if self.rope is None else self.rope(batch.positions), batch.slots, metas)
