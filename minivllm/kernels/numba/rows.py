"""RMSNorm and the middle of a gated MLP, row by row, in one compiled call each.

PyTorch needs five operations for RMSNorm and two for the gated MLP. Each takes some microseconds, which for the few rows of a decode step
is longer than the arithmetic. PyTorch computes long batches, and rows whose length is not a multiple of a vector's.
"""
from __future__ import annotations

import math
import struct
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels.numba.threads import DTYPE_NAMES, Arguments, Kernel, vector_shape
from minivllm.kernels.numba.vectors import address_of, exp2, fetch_add, fma, get_f64, load, rounded, splat, store, total
from minivllm.kernels.reference import activation, linear, norm
from minivllm.kernels.tuning import CPU_MAX_ROWS, CPU_SERIAL_ELEMENTS

LOG2_E = 1.4426950408889634
ARGS = struct.Struct("7qd")
COUNTER, OUT, X, WEIGHT, ROWS, STRIDE, LENGTH, EPS = range(8)  # STRIDE: bytes of a row of X; LENGTH: elements of a row of OUT


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.args = Arguments(8)


_scratch = _Scratch()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., N], weight: [N] or [heads, N]. See the reference."""
    n = x.shape[-1]
    if weight.shape != (n,) or weight.dtype != x.dtype or not weight.is_contiguous() or not _covers(x, n):
        return norm.rms_norm(x, weight, eps)
    return _run(norm_kernel(int(x.dtype == torch.bfloat16)), x, weight.data_ptr(), n, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """x = [gate | up]: [T, 2 * I] -> silu(gate) * up: [T, I]. See the reference."""
    n = x.shape[-1] // 2
    if not _covers(x, n):
        return activation.silu_and_mul(x)
    return _run(silu_kernel(int(x.dtype == torch.bfloat16)), x, 0, n, 0.0)


def fused_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None, gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer with the operations before and after it: x: [T, K] -> [T, N]. See the reference."""
    if norm is not None:
        x = rms_norm(x, *norm)
    if not gated:
        return linear.fused_linear(x, packed, bias, residual=residual)
    y = silu_and_mul(linear.linear(x, packed, bias))
    return y if residual is None else residual.add_(y)


def _covers(x: Tensor, n: int) -> bool:
    return x.ndim == 2 and n % 16 == 0 and 0 < len(x) <= CPU_MAX_ROWS and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()


def _run(kernel: Kernel, x: Tensor, weight: int, n: int, eps: float) -> Tensor:
    rows, width = x.shape
    out = x.new_empty((rows, n))
    args = _scratch.args
    ARGS.pack_into(args.memory, 0, 0, out.data_ptr(), x.data_ptr(), weight, rows, width * x.itemsize, n, eps)
    kernel.run(args.address, 1 if rows * n <= CPU_SERIAL_ELEMENTS else rows)
    return out


@lru_cache(maxsize=2)
def norm_kernel(half: int) -> Kernel:
    """x * weight / sqrt(mean(x^2) + eps); a task is a row."""
    HALF, LANES, ITEM = half, vector_shape()[0], 2 if half else 4

    def normalize(p: Any) -> None:
        args = address_of(p)
        n, eps = p[LENGTH], np.float32(get_f64(args + 8 * EPS))
        while True:
            row = fetch_add(args + 8 * COUNTER, 1)
            if row >= p[ROWS]:
                break
            x, out = p[X] + row * p[STRIDE], p[OUT] + row * n * ITEM
            squares = splat(np.float32(0.0), LANES)
            for c in range(0, n, LANES):
                v = load(x + c * ITEM, LANES, HALF)
                squares = fma(v, v, squares)
            scale = splat(np.float32(1.0 / math.sqrt(total(squares) / np.float32(n) + eps)), LANES)
            for c in range(0, n, LANES):
                v = rounded(load(x + c * ITEM, LANES, HALF) * scale, HALF)
                store(out + c * ITEM, v * load(p[WEIGHT] + c * ITEM, LANES, HALF), HALF)

    return Kernel(normalize, f"RMSNorm in {DTYPE_NAMES[half]}")


@lru_cache(maxsize=2)
def silu_kernel(half: int) -> Kernel:
    """silu(gate) * up = gate / (1 + e^-gate) * up; a task is a row."""
    HALF, LANES, ITEM = half, vector_shape()[0], 2 if half else 4

    def gate_rows(p: Any) -> None:
        args = address_of(p)
        n = p[LENGTH]
        one, factor = splat(np.float32(1.0), LANES), splat(np.float32(-LOG2_E), LANES)
        while True:
            row = fetch_add(args + 8 * COUNTER, 1)
            if row >= p[ROWS]:
                break
            gate, out = p[X] + row * p[STRIDE], p[OUT] + row * n * ITEM
            up = gate + n * ITEM
            for c in range(0, n, LANES):
                v = load(gate + c * ITEM, LANES, HALF)
                v = rounded(v / (one + exp2(v * factor)), HALF)
                store(out + c * ITEM, v * load(up + c * ITEM, LANES, HALF), HALF)

    return Kernel(gate_rows, f"the middle of a gated MLP in {DTYPE_NAMES[half]}")
