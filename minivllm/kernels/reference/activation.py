"""Activation functions of MLPs."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """The middle of a gated MLP: x = [gate | up]: [T, 2 * I] -> silu(gate) * up: [T, I]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """The same with GELU's tanh approximation: x = [gate | up]: [T, 2 * I] -> gelu_tanh(gate) * up: [T, I]."""
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), the exact form."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation, as GPT-2 had it."""
    return F.gelu(x, approximate="tanh")
