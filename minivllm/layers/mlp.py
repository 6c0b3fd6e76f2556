"""The feed-forward part of a layer."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minivllm.families import LinearSpec, MLPSpec
from minivllm.layers.build import BuildContext, Take
from minivllm.layers.linear import Linear
from minivllm.layers.norm import Norm


class MLP:
    """down(act(gate(x)) * up(x)) with gate and up as one product, or the plain down(act(up(x)))."""

    __slots__ = ("down", "out_norm", "up")

    def __init__(self, spec: MLPSpec, build: BuildContext, take: Take, linears: Mapping[str, LinearSpec], layer: int,
                 norm: Norm | None, out_norm: Norm | None = None, prefix: str = "") -> None:
        """linears: see `linear_specs`. norm: of the input. out_norm: of the output, before the residual is added.

        prefix: shared_ of a shared expert."""
        self.out_norm = out_norm
        name = f"layers.{layer}.{prefix}"
        if spec.gated:
            self.up = Linear.load(build, take, linears[f"{name}gate_up"], norm=norm, activation=f"{spec.activation}_and_mul")
        else:
            self.up = Linear.load(build, take, linears[f"{name}up"], norm=norm, activation=spec.activation)
        self.down = Linear.load(build, take, linears[f"{name}down"])

    def __call__(self, x: Tensor, lora: Any = None) -> Tensor:
        """x: [T, hidden] -> x + out_norm(mlp(norm(x))); x may be overwritten. lora: see `Linear`."""
        inner = self.up(x, lora=lora)
        if self.out_norm is None:
            return self.down(inner, residual=x, lora=lora)
        return x.add_(self.out_norm(self.down(inner, lora=lora)))
