"""Unquantized weights: one matrix in the model's dtype."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minivllm.quantization.base import Epilogue, LinearMethod, Matmul, ParamSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minivllm.kernels import Ops
    from minivllm.kernels.layout import AdapterWeights


class DenseMatmul(Matmul):
    """A matrix in the memory layout with which the device multiplies fastest."""

    __slots__ = ("_fused_linear", "_lora_linear", "weight")

    def __init__(self, weight: Tensor, ops: Ops) -> None:
        """weight: [N, K]."""
        self.weight = ops.pack_weight(weight, weight.dtype)
        self._fused_linear, self._lora_linear = ops.fused_linear, ops.lora_linear

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K] -> [T, N]."""
        return self._fused_linear(x, self.weight, bias)

    def fused(self, x: Tensor, epilogue: Epilogue, residual: Tensor | None) -> Tensor | None:
        """x: [T, K] -> [T, N or N / 2]; None for activations other than silu_and_mul."""
        if epilogue.activation not in (None, "silu_and_mul"):
            return None
        return self._fused_linear(x, self.weight, epilogue.bias, norm=epilogue.norm, gated=epilogue.activation is not None,
                                  residual=residual)

    def adapted(self, x: Tensor, epilogue: Epilogue, residual: Tensor | None, adapters: AdapterWeights, lora: Any) -> Tensor | None:
        """See `Matmul`."""
        if epilogue.activation not in (None, "silu_and_mul"):
            return None
        return self._lora_linear(x, self.weight, epilogue.bias, adapters, lora, norm=epilogue.norm,
                                 gated=epilogue.activation is not None, residual=residual)

    def dense(self, rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Matmul`."""
        from minivllm.kernels.reference.linear import unpack_weight

        return unpack_weight(self.weight).to(dtype)


class DenseMethod(LinearMethod):
    """See `LinearMethod`."""

    type_name = ""
    rows_in_any_order = True

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """One matrix [sum of rows, cols]."""
        return {"weight": ParamSpec(tuple((n, cols) for n in rows))}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> DenseMatmul:
        """See `LinearMethod`."""
        return DenseMatmul(tensors["weight"], ops)


DENSE = DenseMethod()
