"""The product of every method whose weight is a `GroupedWeight`, and the bytes that such a weight takes."""
from __future__ import annotations

from typing import TYPE_CHECKING

from minivllm.quantization.base import Epilogue, Matmul

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minivllm.kernels import Ops
    from minivllm.kernels.grouped import GroupedWeight


class GroupedMatmul(Matmul):
    """Integers or fp8 numbers with scales per group, packed for the device."""

    __slots__ = ("_linear", "_order", "_rows", "packed")

    def __init__(self, weight: GroupedWeight, ops: Ops, order: Tensor | None = None) -> None:
        """order: [K], the input that each column multiplies, if the columns are not in the order of the inputs."""
        self.packed = ops.pack_groups(weight)
        self._linear, self._rows, self._order = ops.grouped_linear, ops.grouped_rows, order

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K] -> [T, N]."""
        return self._linear(x if self._order is None else x.index_select(1, self._order), self.packed, bias)

    def fused(self, x: Tensor, epilogue: Epilogue, residual: Tensor | None) -> Tensor | None:
        """x: [T, K] -> [T, N or N / 2]; None for activations other than silu_and_mul, and for a norm before reordered inputs."""
        if epilogue.activation not in (None, "silu_and_mul"):
            return None
        if self._order is not None:
            if epilogue.norm is not None:
                return None
            x = x.index_select(1, self._order)
        return self._linear(x, self.packed, epilogue.bias, norm=epilogue.norm, gated=epilogue.activation is not None, residual=residual)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids: [T] -> rows [T, K] of the weight, for an embedding table."""
        return self._rows(self.packed, ids, dtype)


def grouped_bytes(n: int, k: int, bits: int, group: int, *, scale_bytes: int = 2, zero_bytes: int = 0, min_bytes: int = 0,
                  super_group: int = 0, supers: int = 0) -> int:
    """Bytes of a packed weight [n, k]. supers: float16 numbers per super-group of inputs."""
    per_row = k * bits // 8 + k // group * (scale_bytes + zero_bytes + min_bytes) + (k // super_group * supers * 2 if super_group else 0)
    return n * per_row
