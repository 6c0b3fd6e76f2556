"""Compiled kernels for a CPU: the functions of `kernels/reference` that are worth it, in Numba. Importing this needs Numba.

    attention.py         which rows the kernel computes, and which PyTorch does
    decode_attention.py  the kernel: one call for all decodes of a layer
    rows.py              RMSNorm and the gated MLP's middle
    vectors.py           vectors of float32 inside Numba functions
    threads.py           running all of these on the threads of PyTorch's own operations
"""
from __future__ import annotations

import torch

from minivllm.kernels.numba import attention as attention
from minivllm.kernels.numba import rows as rows


def warm_up(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Compile what a model of this shape needs, or load it from Numba's cache on disk, before a request waits for it."""
    if attention.covers(head_dim, dtype):
        attention.kernel_for(num_heads, num_kv_heads, head_dim, dtype)
    if dtype in (torch.float32, torch.bfloat16):
        rows.norm_kernel(int(dtype == torch.bfloat16))
        rows.silu_kernel(int(dtype == torch.bfloat16))
