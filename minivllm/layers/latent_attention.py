"""Multi-head latent attention over the paged cache, in its absorbed form (DeepSeek-AI 2024, DeepSeek-V2, section 2.1).

A head's score is (q_nope)^T (W_k c) + (q_rope)^T k_rope. W_k moves to the query, (W_k^T q_nope)^T c, so that all heads share one cached
vector per token: | latent c | rotated key |. That is attention with one KV head whose keys are also its values: of the heads' outputs,
the first `rank` numbers are a mean of latents, and W_v makes the head's output of it.

    x ── norm ─┬─ q_a, norm, q_b ─▶ q_nope ── W_k^T ─▶ | rank | rope_dim |  each head's query ─┐
               │                    q_rope ── rotated ──────────▲                              ├─▶ attention ─▶ [:rank] ── W_v ─▶ o ─▶ + x
               └─ kv_a ─▶ | c, normed | k_rope, rotated |  stored in the cache ────────────────┘

The plain PyTorch functions of ordinary attention compute it: such wide heads, with so many queries each, are too large for the tiles of
Triton's and Numba's kernels. On a GPU, steps are therefore not captured in CUDA graphs.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minivllm.families import LinearSpec, ModelSpec
from minivllm.kernels import REFERENCE, Ops
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference.rope import apply_rope
from minivllm.layers.attention import LastTokens, Rotation, StepContext
from minivllm.layers.build import BuildContext, Take, dense_weight
from minivllm.layers.linear import Linear
from minivllm.layers.norm import Norm, RMSNorm


def attention_ops(build: BuildContext, latent: bool) -> Ops:
    """The functions of ordinary or of latent attention."""
    return REFERENCE if latent else build.ops


class LatentAttention:
    """In place of an `Attention`."""

    __slots__ = ("_interleaved", "_kv_norm", "_norm", "_q_a", "_q_b", "_rope", "group", "keys", "kv_a", "latent",
                 "num_heads", "o", "scale", "values")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, linears: Mapping[str, LinearSpec], layer: int, group: int,
                 rope: int, norm: Norm | None, out_norm: Norm | None = None) -> None:
        """See `Attention`."""
        name, attention = f"layers.{layer}", spec.layers[layer].attention
        assert attention.latent is not None and attention.rope is not None and out_norm is None
        self.latent = latent = attention.latent
        self._interleaved = attention.rope.interleaved
        self.num_heads, self.scale, self.group, self._rope, self._norm = attention.num_heads, attention.scale, group, rope, norm
        self._q_a: Linear | None = None
        if latent.q_rank is None:
            self._q_b = Linear.load(build, take, linears[f"{name}.q"])
        else:
            self._q_a = Linear.load(build, take, linears[f"{name}.q_a"])
            self._q_b = Linear.load(build, take, linears[f"{name}.q_b"],
                                    norm=RMSNorm(build, take(f"{name}.q_a_norm.weight"), latent.norm_eps))
        self.kv_a = Linear.load(build, take, linears[f"{name}.kv_a"])
        self._kv_norm = RMSNorm(build, take(f"{name}.kv_a_norm.weight"), latent.norm_eps)
        weight = dense_weight(linears[f"{name}.kv_b"], build, take)
        # [H, nope_dim, rank] and [H, value_dim, rank]
        self.keys, self.values = weight.view(self.num_heads, -1, latent.rank).split([latent.nope_dim, latent.value_dim], dim=1)
        self.o = Linear.load(build, take, linears[f"{name}.o"])

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None, normed: Tensor | None = None) -> Tensor:
        """See `Attention`."""
        latent, g, h = self.latent, self.group, x if normed is None else normed
        if self._norm is not None:
            h = self._norm(h)
        rotation = step.rotations[self._rope]
        assert rotation is not None
        cached = self.kv_a(h, lora=step.lora)  # [T, rank + rope_dim]
        rotated = self._rotated(cached[:, None, latent.rank :], rotation)[:, 0]
        key = torch.cat((self._kv_norm(cached[:, : latent.rank].contiguous()), rotated), 1)
        q = self._q_b(h if self._q_a is None else self._q_a(h, lora=step.lora), lora=step.lora).view(len(x), self.num_heads, -1)
        absorbed = torch.einsum("thn,hnr->thr", q[..., : latent.nope_dim], self.keys)
        queries = torch.cat((absorbed, self._rotated(q[..., latent.nope_dim :], rotation)), -1)  # [T, H, rank + rope_dim]
        qkv = torch.cat((queries.flatten(1), key, key), 1)
        if last is not None:
            REFERENCE.store_kv(qkv, kv, step.slots[g], step.metas[g])
            qkv, x, step = qkv.index_select(0, last.rows), x.index_select(0, last.rows), last.step
        heads = REFERENCE.self_attention(qkv, kv, step.slots[g], step.metas[g], scale=self.scale)
        means = heads.view(len(x), self.num_heads, -1)[..., : latent.rank]
        return self.o(torch.einsum("thr,hvr->thv", means, self.values).flatten(1), residual=x, lora=step.lora)

    def _rotated(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x: [T, heads, rope_dim], in the order of checkpoints."""
        if self._interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return apply_rope(x, *rotation)
