"""RMSNorm in Triton, one program per row, in one pass over memory (PyTorch's operations make three)."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minivllm.kernels.triton.device import early_start, launch
from minivllm.kernels.tuning import norm_warps


@triton.jit
def _rms_norm(out, x, weight, eps, N: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    live = columns < N
    w = tl.load(weight + columns, mask=live, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * N + columns, mask=live, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / N + eps)
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)  # rounded where the reference rounds
    tl.store(out + row * N + columns, (normed * w.to(tl.float32)).to(out.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., N] -> the same shape; weight: [N]."""
    x = x.contiguous()
    n = x.shape[-1]
    out = torch.empty_like(x)
    early = early_start(x.device)
    launch(_rms_norm, (x.numel() // n,), out, x, weight, eps, N=n, PADDED=triton.next_power_of_2(n), num_warps=norm_warps(n), **early)
    return out
