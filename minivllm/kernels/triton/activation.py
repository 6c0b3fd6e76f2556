"""The middle of a gated MLP, silu(gate) * up or gelu(gate) * up, in one pass over memory."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.device import early_start, launch


@triton.jit
def silu_mul(gate, up, dtype: tl.constexpr):
    """silu(gate) * up for float32 values. Rounds where the reference rounds: gate, up and the activation to dtype."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return silu * up.to(dtype).to(tl.float32)


@triton.jit
def gelu_tanh_mul(gate, up, dtype: tl.constexpr):
    """gelu_tanh(gate) * up for float32 values, rounded as `silu_mul` rounds."""
    gate = gate.to(dtype).to(tl.float32)
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    gelu = (gate * (1.0 - 1.0 / (tl.exp(2.0 * z) + 1.0))).to(dtype).to(tl.float32)  # (1 + tanh(z)) / 2
    return gelu * up.to(dtype).to(tl.float32)


@triton.jit
def _act_and_mul(out, x, size, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < size
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(x + row * 2 * size + columns, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + columns, mask=live, other=0.0).to(tl.float32)
    if GELU:
        y = gelu_tanh_mul(gate, up, out.dtype.element_ty)
    else:
        y = silu_mul(gate, up, out.dtype.element_ty)
    tl.store(out + row * size + columns, y.to(out.dtype.element_ty), mask=live)


def silu_and_mul(x: Tensor) -> Tensor:
    """x = [gate | up]: [T, 2 * I] -> [T, I]."""
    return _gated(x, False)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """x = [gate | up]: [T, 2 * I] -> [T, I]."""
    return _gated(x, True)


def _gated(x: Tensor, gelu: bool) -> Tensor:
    rows, double = x.shape
    out = torch.empty(rows, double // 2, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(double // 2))
    launch(_act_and_mul, (rows, triton.cdiv(double // 2, block)), out, x, double // 2, GELU=gelu, BLOCK=block, num_warps=4,
           **early_start(x.device))
    return out
