"""The feed-forward half of a layer."""
from __future__ import annotations

from torch import Tensor

from minivllm.families import ModelSpec
from minivllm.layers.build import BuildContext, Take
from minivllm.layers.linear import Linear
from minivllm.layers.norm import Norm


class MLP:
    """down(silu(gate(x)) * up(x)) with gate and up as one product, or the plain down(act(up(x)))."""

    __slots__ = ("_activation", "down", "up")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, layer: int) -> None:
        gated = spec.mlp == "gated"
        up = f"layers.{layer}.gate_up" if gated else f"layers.{layer}.up"
        down = f"layers.{layer}.down"
        self.up = Linear(build, take(f"{up}.weight"), take(f"{up}.bias") if spec.mlp_bias else None, gated=gated)
        self.down = Linear(build, take(f"{down}.weight"), take(f"{down}.bias") if spec.mlp_bias else None)
        self._activation = None if gated else getattr(build.ops, spec.activation)

    def __call__(self, x: Tensor, norm: Norm | None) -> Tensor:
        """x: [T, hidden] -> x + mlp(norm(x)), which may be written over x."""
        y = self.up(x, norm=norm)
        if self._activation is not None:
            y = self._activation(y)
        return self.down(y, residual=x)
