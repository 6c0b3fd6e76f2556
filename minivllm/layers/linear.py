"""x -> x W^T + b, with the weight in the layout that the device multiplies fastest with."""
from __future__ import annotations

from torch import Tensor

from minivllm.layers.build import BuildContext


class Linear:
    """A dense layer. Fused ones (qkv, gate_up) are this too: their weight's rows come from several checkpoint tensors."""

    __slots__ = ("_linear", "bias", "weight")

    def __init__(self, build: BuildContext, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [N, K], bias: [N]."""
        self.weight = build.ops.pack_weight(weight, build.dtype)
        self.bias = bias
        self._linear = build.ops.linear

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K] -> [T, N]."""
        return self._linear(x, self.weight, self.bias)
