"""Host arrays to the device in one copy.

A step needs a dozen small integer columns on the device. Each copy of its own costs about 10 us and, from ordinary memory,
makes the host wait; one copy from pinned memory does neither. PyTorch keeps a pinned buffer out of reuse until the copy
that reads it has run, so a fresh one per step costs nothing and planning ahead is safe.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 16  # bytes, so that every column may be viewed as its own dtype


def upload(arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> list[Tensor]:
    """Tensors on `device` with the arrays' shapes and dtypes. On a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    arrays = [np.ascontiguousarray(a) for a in arrays]
    offsets, total = [], 0
    for a in arrays:
        offsets.append(total)
        total += -(-a.nbytes // _ALIGN) * _ALIGN
    staging = torch.empty(max(total, 1), dtype=torch.uint8, pin_memory=True)
    host = staging.numpy()
    for a, offset in zip(arrays, offsets, strict=True):
        host[offset : offset + a.nbytes] = a.view(np.uint8).reshape(-1)
    packed = staging.to(device, non_blocking=True)
    return [packed[offset : offset + a.nbytes].view(torch.from_numpy(a[:0]).dtype).view(a.shape)
            for a, offset in zip(arrays, offsets, strict=True)]
