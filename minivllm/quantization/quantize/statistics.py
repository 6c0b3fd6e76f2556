"""What calibration measures of the inputs of linear layers, while a decoder layer runs."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class InputStatistics:
    """Of the inputs x: [T, K] of a linear layer. Layers with the same input share one object."""

    hessian: Tensor  # [K, K] sum of x^T x. The squared error of outputs is that of W in this metric: trace(dW H dW^T)
    magnitude: Tensor  # [K] sum of |x|
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """x: [.., K]"""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.hessian.addmm_(x.t(), x)
        self.magnitude += x.abs().sum(0)
        self.tokens += len(x)

    def divide_inputs(self, scales: Tensor) -> None:
        """The statistics of x / scales. scales: [K]"""
        self.hessian /= scales[:, None] * scales
        self.magnitude /= scales


@contextmanager
def observed(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, InputStatistics]]:
    """Inside the block, each call of a linear layer adds to its statistics. The dict is filled by the first calls."""
    found: dict[str, InputStatistics] = {}
    latest: list[Any] = [None, None]  # the latest input, and its statistics in this pass

    def observe(name: str, x: Tensor) -> None:
        if x is latest[0]:  # q, k and v are called with the same tensor, as are gate and up
            found.setdefault(name, latest[1])
            return
        if name not in found:
            k = x.shape[-1]
            found[name] = InputStatistics(torch.zeros(k, k, device=x.device), torch.zeros(k, device=x.device))
        found[name].add(x)
        latest[:] = x, found[name]

    def hook(name: str) -> Any:
        return lambda module, args: observe(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def output_error(change: Tensor, hessian: Tensor) -> Tensor:
    """The summed squared error of a layer's outputs if its weight changes by `change`: [N, K]. -> scalar"""
    return torch.einsum("nk,nk->", change @ hessian, change)
