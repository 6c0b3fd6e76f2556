"""The product of every method whose weight is a `GroupedWeight`, and the bytes that such a weight takes."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minivllm.errors import ModelError
from minivllm.quantization.base import Epilogue, Matmul

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minivllm.kernels import Ops
    from minivllm.kernels.grouped import GroupedWeight


CHUNK = 64  # inputs: on a GPU, a weight's are padded to a multiple


class GroupedMatmul(Matmul):
    """Integers or fp8 numbers with scales per group, packed for the device."""

    __slots__ = ("_linear", "_order", "_rows", "packed")

    def __init__(self, weight: GroupedWeight, ops: Ops, order: Tensor | None = None) -> None:
        """order: [K], the input that each column multiplies, if the columns are not in the order of the inputs."""
        check_finite(weight.scales, weight.mins, weight.super_scales, weight.super_mins, weight.input_scale)
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

    def dense(self, rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Matmul`."""
        import torch

        weight = self._rows(self.packed, torch.arange(rows, device=device), dtype)
        return weight if self._order is None else torch.empty_like(weight).index_copy_(1, self._order.long(), weight)


def check_finite(*factors: Tensor | None) -> None:
    """Raise `ModelError` if a scale or minimum of a weight is infinite or not a number: every answer would be wrong."""
    for values in factors:
        if values is not None and values.is_floating_point() and not bool(values.float().isfinite().all()):
            raise ModelError("a scale of its quantized weight is infinite or not a number: the checkpoint is damaged, download it again",
                             "model")


def spread(values: Tensor, group: int, count: int, dim: int = 1) -> Tensor:
    """One value for each `group` of `count` elements -> one for each `even_group`, so that all groups are equally large."""
    step = even_group(group, count)
    return values if group in (-1, step) else values.repeat_interleave(group // step, dim).narrow(dim, 0, count // step).clone()


def even_group(group: int, count: int) -> int:
    """The largest size that divides `group` and `count`. 576 inputs in groups of 128 are 9 groups of 64. -1: one group."""
    return count if group == -1 else math.gcd(group, count)


def grouped_bytes(n: int, k: int, bits: int, group: int, on_gpu: bool, *, scale_bytes: int = 2, rows_per_scale: int = 1,
                  zeros: bool = False, mins: bool = False, super_group: int = 0) -> int:
    """Bytes of a packed weight [n, k]. The keywords describe a `GroupedWeight`: zeros of one byte, mins as large as scales, float16 supers.

    on_gpu: as `kernels/triton/packed_weight.py` packs it.
    """
    from minivllm.kernels import tuning

    group = even_group(group, k)
    supers = n * (k // super_group) * 2 * (1 + mins) if super_group else 0
    row_scale = group == k and not (zeros or mins or super_group)
    stored = stored_group(group, bits)
    if not on_gpu or (stored is None and not row_scale):
        return n * k * bits // 8 + n // rows_per_scale * (k // group) * (scale_bytes * (1 + mins) + zeros) + supers
    padded = -(-k // CHUNK) * CHUNK
    groups = 1 if row_scale or stored is None else -(-padded // stored)
    each = scale_bytes if not (zeros or mins) else 2 if super_group else 4
    counters = -(-n // 16) * tuning.PACKED_MAX_ROWS // 16 * 4
    return n * padded * bits // 8 + n // rows_per_scale * groups * each + supers + counters


def stored_group(group: int, bits: int) -> int | None:
    """Inputs for which a GPU stores one scale. None: not even 16 inputs share one, so that the reference multiplies."""
    from minivllm.kernels import tuning

    if group % ((2 if bits == 8 else 4) * tuning.UNPACK_WORDS) == 0:
        return group
    power = group & -group  # the largest power of two that divides it
    return power if power >= CHUNK // 4 else None
