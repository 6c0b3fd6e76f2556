"""Normalisation. RMSNorm (Zhang and Sennrich 2019) is x / rms(x) * weight; LayerNorm also subtracts the mean."""
from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 1 << 16  # elements up to which `_by_layer_norm` is the faster way


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., N] / sqrt(mean(x^2) + eps) * weight, over the last dimension; weight: [N] or [heads, N]. Statistics are in fp32."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() <= _FEW:
        return _by_layer_norm(x, weight, eps)
    return _step_by_step(x, weight, eps)


def _step_by_step(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Few and small operations, for a decode step on a CPU calls this twice a layer on one row: with |x| the length of a row,
    1 / sqrt(|x|^2 / N + eps) = sqrt(N) / hypot(|x|, sqrt(N eps))."""
    root, root_eps = _constants(x.shape[-1], eps, x.device)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * (root / length.hypot_(root_eps))).to(x.dtype).mul_(weight)


def _by_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Fewer operations still, for bfloat16, which each of the above widens and rounds again.

    A row followed by its own negative has mean 0 and variance mean(x^2), so LayerNorm of [x, -x], which is one fused kernel,
    is RMSNorm of x and of -x. For long prompts the doubled row costs more than it saves (`python -m bench.cpu_kernels`).
    """
    n = x.shape[-1]
    both = (x.unsqueeze(-2) * _signs(x.dtype)).flatten(-2)  # [..., 2N]
    return F.layer_norm(both, (2 * n,), None, None, eps)[..., :n] * weight


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension of x: [T, N]."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@lru_cache(maxsize=64)
def _constants(n: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """sqrt(n), sqrt(n * eps): a Python number in a tensor operation costs 2 us, a tensor nothing."""
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used outside of it
        return torch.tensor(math.sqrt(n), device=device), torch.tensor(math.sqrt(n * eps), device=device)


@lru_cache(maxsize=8)
def _signs(dtype: torch.dtype) -> Tensor:
    """[2, 1]: 1 and -1."""
    with torch.inference_mode(False):
        return torch.tensor([[1.0], [-1.0]], dtype=dtype)
