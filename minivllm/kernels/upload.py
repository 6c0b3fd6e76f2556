"""Host arrays to the device in one copy.

A step needs a dozen small integer columns on the device. Separate copies would cost several microseconds each, and a copy from pageable
memory makes the host wait. So all columns are copied at once, from pinned memory. Each step uses a new pinned buffer: PyTorch reuses a
buffer only after the copy that reads it has run, so a buffer may still be in use while the next step is prepared.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 16  # bytes; a column can then be viewed in any dtype


def upload(arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> list[Tensor]:
    """Tensors on `device` with the arrays' shapes and dtypes. On a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    offsets, total = _layout(arrays)
    return _views(_stage(arrays, offsets, total).to(device, non_blocking=True), arrays, offsets)


class StaticColumns:
    """Device tensors at fixed addresses whose contents change: the inputs of a captured graph."""

    def __init__(self, arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> None:
        """arrays: the first contents. Later contents have the same shapes and dtypes."""
        self._offsets, total = _layout(arrays)
        self._memory = torch.empty(total, dtype=torch.uint8, device=device)
        self.tensors = _views(self._memory, arrays, self._offsets)
        self.fill(arrays)

    def fill(self, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        """Copy new contents to the device, without waiting for it."""
        self._memory.copy_(_stage(arrays, self._offsets, len(self._memory)), non_blocking=True)


def _layout(arrays: Sequence[np.ndarray[Any, Any]]) -> tuple[list[int], int]:
    """-> (offset of each array, total size), in bytes."""
    offsets, total = [], 0
    for a in arrays:
        offsets.append(total)
        total += -(-a.nbytes // _ALIGN) * _ALIGN
    return offsets, max(total, 1)


def _stage(arrays: Sequence[np.ndarray[Any, Any]], offsets: Sequence[int], total: int) -> Tensor:
    """All arrays in a new pinned buffer."""
    staging = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    host = staging.numpy()
    for a, offset in zip(arrays, offsets, strict=True):
        host[offset : offset + a.nbytes] = np.ascontiguousarray(a).view(np.uint8).reshape(-1)
    return staging


def _views(packed: Tensor, arrays: Sequence[np.ndarray[Any, Any]], offsets: Sequence[int]) -> list[Tensor]:
    return [packed[offset : offset + a.nbytes].view(torch.from_numpy(a[:0]).dtype).view(a.shape)
            for a, offset in zip(arrays, offsets, strict=True)]
