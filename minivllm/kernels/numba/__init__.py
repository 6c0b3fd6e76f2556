"""Compiled kernels for a CPU: the functions of `kernels/reference` for which compiling pays off, in Numba. Importing this needs Numba.

    attention.py         divides the rows between the kernel (decodes) and PyTorch (prompt chunks)
    decode_attention.py  the kernel: one call for all decodes of a layer
    rows.py              RMSNorm and the middle of a gated MLP
    grouped.py           packs quantized weights, and divides products between the kernels (few rows) and PyTorch (many rows)
    grouped_kernels.py   the kernels for packed weights
    grouped_tiles.py     the layout of packed weights, and the loops that read it
    vectors.py           vectors of float32 inside Numba functions
    threads.py           runs the kernels on the threads of PyTorch's own operations
"""
from __future__ import annotations

import torch

from minivllm.kernels.numba import attention as attention
from minivllm.kernels.numba import grouped as grouped
from minivllm.kernels.numba import rows as rows


def warm_up(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None) -> None:
    """Compile the kernels of a model of this shape, or load them from Numba's cache on disk, before a request waits for them.

    cache_dtype: of the KV cache; None: the model's."""
    if attention.covers(head_dim, dtype):
        attention.kernel_for(num_heads, num_kv_heads, head_dim, dtype, cache_dtype or dtype)
    if dtype in (torch.float32, torch.bfloat16):
        rows.norm_kernel(int(dtype == torch.bfloat16))
        rows.silu_kernel(int(dtype == torch.bfloat16))
