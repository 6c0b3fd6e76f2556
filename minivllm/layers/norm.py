"""RMSNorm and LayerNorm with one interface."""
from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from minivllm.layers.build import BuildContext


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
