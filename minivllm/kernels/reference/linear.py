"""Matrix products with weights in the layout that the device multiplies fastest with.

On an x86 CPU that is oneDNN's own blocked layout, made once when the model is loaded. A plain [N, K] weight is reordered
by each product anew, which costs as much as a small batch's product itself: with AMX, bfloat16 and a decode's one to 32
rows a packed weight takes 0.6 of the time, with AVX2 and float32 0.5 to 0.8 of it (`python -m bench.cpu_kernels`
prints the table). A packed weight is opaque: only this file reads it. Elsewhere the weight stays as checkpoints have it.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels.reference.activation import silu_and_mul
from minivllm.kernels.reference.norm import rms_norm

# Rows of x that the packed layout is chosen for; other numbers work with it too. The values were measured over 1 to 1,024
# rows: with AMX a layout for one row is as fast as any for small batches and the only one that is fast for long prompts.
_ROWS_PACKED_FOR = {torch.bfloat16: 1, torch.float32: 32}


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: [N, K] as checkpoints store it -> what `linear` multiplies with; keeps no reference to `weight` if packed."""
    weight = weight.to(dtype)
    if weight.device.type == "cpu" and dtype in _ROWS_PACKED_FOR and torch.backends.mkldnn.is_available():
        try:
            return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_PACKED_FOR[dtype])
        except (AttributeError, RuntimeError):
            pass  # this build or this CPU has no packed products in this dtype
    return weight.contiguous()


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
    """A linear layer and its surroundings: x: [T, K] -> [T, N].

    norm: weight [K] and epsilon of an RMSNorm of x before it. gated: the layer gives [gate | up], the result is silu(gate) * up.
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
