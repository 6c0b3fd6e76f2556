"""RMSNorm and LayerNorm with one interface."""
from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.families import AttentionSpec, ModelSpec
from minivllm.layers.build import BuildContext, Take


class RMSNorm:
    __slots__ = ("_norm", "eps", "weight")

    def __init__(self, build: BuildContext, weight: Tensor, eps: float) -> None:
        """weight: [N]."""
        self.weight, self.eps = weight, eps
        self._norm = build.ops.rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, N] -> [T, N]."""
        return self._norm(x, self.weight, self.eps)


class LayerNorm:
    __slots__ = ("_norm", "bias", "eps", "weight")

    def __init__(self, build: BuildContext, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        """weight, bias: [N], or None for a norm without parameters."""
        self.weight, self.bias, self.eps = weight, bias, eps
        self._norm = build.ops.layer_norm

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, N] -> [T, N]."""
        return self._norm(x, self.weight, self.bias, self.eps)


Norm: TypeAlias = RMSNorm | LayerNorm


def load_norm(build: BuildContext, take: Take, spec: ModelSpec, name: str, scale: float = 1.0) -> Norm:
    """The norm `name`: RMSNorm or LayerNorm, as the model's specification states. scale: factor on its output, folded into its weights."""
    weight = take(f"{name}.weight") if spec.norm_affine else None
    if weight is not None and (spec.norm_offset or scale != 1.0):
        weight = (weight.float() + spec.norm_offset).mul_(scale).to(weight.dtype)
    if spec.norm == "layer":
        bias = take(f"{name}.bias") if spec.norm_affine and spec.norm_bias else None
        return LayerNorm(build, weight, bias if bias is None or scale == 1.0 else bias * scale, spec.norm_eps)
    assert weight is not None
    return RMSNorm(build, weight, spec.norm_eps)


class QKNorm:
    """A norm of queries and keys that attention kernels do not have: RMSNorm over all heads, or LayerNorm of each head."""

    __slots__ = ("_biases", "_eps", "_group", "_norm", "_sizes", "_weights")

    def __init__(self, build: BuildContext, spec: AttentionSpec, weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor] | None,
                 eps: float) -> None:
        """weights, biases: of q and of k. For "width": [heads * head_dim], else [heads or 1, head_dim]."""
        self._weights, self._biases, self._eps = weights, biases, eps
        self._sizes = (spec.q_size, spec.kv_size, spec.kv_size)
        self._norm, self._group = build.ops.rms_norm if spec.qk_norm == "width" else None, build.group

    def __call__(self, qkv: Tensor) -> None:
        """Normalizes q and k in place; qkv: [T, q_size + 2 * kv_size]."""
        if self._norm is not None and self._group.size > 1:
            self._norm_of_all_ranks(qkv)
            return
        for i, (x, weight) in enumerate(zip(qkv.split(self._sizes, -1), self._weights, strict=False)):
            if self._norm is not None:
                x.copy_(self._norm(x.contiguous(), weight, self._eps))
                continue
            heads = x.unflatten(-1, (-1, weight.shape[-1]))
            y = F.layer_norm(heads.float(), heads.shape[-1:], eps=self._eps) * weight
            heads.copy_(y if self._biases is None else y + self._biases[i])

    def _norm_of_all_ranks(self, qkv: Tensor) -> None:
        """RMSNorm over the heads of all ranks, whose sums of squares are added. Ranks with the same KV head have equal means, which count
        once each."""
        parts = [x.float() for x in qkv.split(self._sizes, -1)[:2]]
        means = self._group.all_reduce(torch.cat([x.square().mean(-1, keepdim=True) for x in parts], -1)) / self._group.size
        for x, y, weight, mean in zip(qkv.split(self._sizes, -1), parts, self._weights, means.split(1, -1), strict=False):
            x.copy_((y * torch.rsqrt(mean + self._eps)).to(x.dtype) * weight)
