"""Matrix products with weights in the layout that the device multiplies fastest with.

On an x86 CPU this is oneDNN's blocked layout. A weight is packed into it once, when the model is loaded. For a plain [N, K] weight each
product converts the layout again, which for a small batch takes as long as the product (`python -m bench.cpu_kernels`). A packed weight
is opaque: only this file reads it. On other devices the weight stays as checkpoints have it.
"""
from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels.reference.activation import silu_and_mul
from minivllm.kernels.reference.norm import rms_norm
from minivllm.kernels.tuning import PACKED_FOR_ROWS


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: [N, K] as checkpoints store it -> what `linear` multiplies with; a packed weight shares no memory with `weight`."""
    weight = weight.to(dtype).contiguous()
    if weight.device.type != "cpu" or not can_pack(dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS[_name(dtype)])


def unpack_weight(packed: Tensor) -> Tensor:
    """The weight [N, K] that `pack_weight` packed."""
    return packed.to_dense() if packed.is_mkldnn else packed


@lru_cache(maxsize=8)
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this CPU multiply with packed weights.

    The operators are private to PyTorch (its compiler emits them). If a version changes them, a small product fails here or is wrong,
    and weights stay plain.
    """
    if _name(dtype) not in PACKED_FOR_ROWS or not torch.backends.mkldnn.is_available():
        return False
    x, ops = torch.ones(16, 16, dtype=dtype, device="cpu"), torch.ops.mkldnn
    try:
        packed = ops._reorder_linear_weight(x.clone(), 1)
        product = ops._linear_pointwise(x, packed, None, "none", [], "")
        added = ops._linear_pointwise.binary(x, x, packed, None, "add")
        return bool(packed.is_mkldnn and (product == 16).all() and (added == 17).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [T, K], bias: [N] -> [T, N]."""
    if not packed.is_mkldnn:
        return F.linear(x, packed, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, packed.shape[0])
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def fused_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None, gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer with the operations before and after it: x: [T, K] -> [T, N].

    norm: weight [K] and epsilon of an RMSNorm of x before the product. gated: the product is [gate | up], the result silu(gate) * up.
    residual: [T, N] is added to the result, and may be overwritten.
    """
    if norm is not None:
        x = rms_norm(x, *norm)
    if residual is not None and not gated and packed.is_mkldnn and x.shape[0]:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    y = linear(x, packed, bias)
    if gated:
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)
