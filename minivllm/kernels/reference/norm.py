"""Normalization. RMSNorm (Zhang and Sennrich 2019) is x / rms(x) * weight; LayerNorm also subtracts the mean."""
from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., N] / sqrt(mean(x^2) + eps) * weight, over the last dimension; weight: [N] or [heads, N]. Statistics are in fp32.

    A decode step on a CPU calls this twice per layer, so the number of operations matters. With |x| the length of a row,
    1 / sqrt(|x|^2 / N + eps) = sqrt(N) / hypot(|x|, sqrt(N eps)). Half precision is converted to fp32 once, not by each operation.
    """
    root, root_eps = _constants(x.shape[-1], eps, x.device)
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * (root / length.hypot_(root_eps))).to(x.dtype).mul_(weight)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension of x: [T, N]."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@lru_cache(maxsize=64)
def _constants(n: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """sqrt(n), sqrt(n * eps) as tensors: an operation converts a Python number to a tensor, which takes longer."""
    with torch.inference_mode(False):  # autograd cannot use a tensor that was created in inference mode
        return torch.tensor(math.sqrt(n), device=device), torch.tensor(math.sqrt(n * eps), device=device)
