"""The feed-forward half of a layer."""
from __future__ import annotations

from torch import Tensor

from minivllm.families import ModelSpec
from minivllm.layers.build import BuildContext, Take
from minivllm.layers.linear import Linear


class MLP:
    """down(silu(gate(x)) * up(x)) with gate and up as one product, or the plain down(act(up(x)))."""

    __slots__ = ("_activation", "down", "up")

    def __init__(self, spec: ModelSpec, build: BuildContext, take: Take, layer: int) -> None:
        up = f"layers.{layer}.gate_up" if spec.mlp == "gated" else f"layers.{layer}.up"
        down = f"layers.{layer}.down"
        self.up = Linear(build, take(f"{up}.weight"), take(f"{up}.bias") if spec.mlp_bias else None)
        self.down = Linear(build, take(f"{down}.weight"), take(f"{down}.bias") if spec.mlp_bias else None)
        self._activation = getattr(build.ops, "silu_and_mul" if spec.mlp == "gated" else spec.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        return self.down(self._activation(self.up(x)))
