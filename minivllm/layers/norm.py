"""RMSNorm and LayerNorm with one interface."""
from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from minivllm.families import ModelSpec
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


def load_norm(build: BuildContext, take: Take, spec: ModelSpec, name: str) -> Norm:
    """The norm `name`: RMSNorm or LayerNorm, as the model's specification states."""
    weight = take(f"{name}.weight") if spec.norm_affine else None
    if spec.norm == "layer":
        return LayerNorm(build, weight, take(f"{name}.bias") if spec.norm_affine else None, spec.norm_eps)
    assert weight is not None
    return RMSNorm(build, weight, spec.norm_eps)
