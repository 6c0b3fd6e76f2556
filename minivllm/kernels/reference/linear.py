"""Matrix products with weights in the layout the device multiplies fastest with."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: [N, K] as checkpoints store it -> what `linear` multiplies with."""
    return weight.to(dtype).contiguous()


def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [T, K] -> [T, N]."""
    return F.linear(x, packed, bias)
