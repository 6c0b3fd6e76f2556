"""x -> x W^T + b with what stands around it: an RMSNorm before, a gate or the residual stream after.

How much of that is one kernel is the device's affair (`ops.fused_linear`).
"""
from __future__ import annotations

from torch import Tensor

from minivllm.layers.build import BuildContext
from minivllm.layers.norm import Norm, RMSNorm


class Linear:
    """A dense layer. Fused ones (qkv, gate_up) are this too: their weight's rows come from several checkpoint tensors."""

    __slots__ = ("_linear", "bias", "gated", "weight")

    def __init__(self, build: BuildContext, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> None:
        """weight: [N, K], bias: [N]. gated: weight and bias are [gate | up], and the layer gives silu(gate) * up: [N / 2]."""
        self.weight = build.ops.pack_weight(weight, build.dtype)
        self.bias, self.gated = bias, gated
        self._linear = build.ops.fused_linear

    def __call__(self, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """x: [T, K] -> [T, N], of norm(x) and added to residual: [T, N], which may be overwritten."""
        before = None
        if isinstance(norm, RMSNorm):
            before = norm.weight, norm.eps
        elif norm is not None:
            x = norm(x)
        return self._linear(x, self.weight, self.bias, norm=before, gated=self.gated, residual=residual)
