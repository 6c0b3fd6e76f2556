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
    offsets, total = _layout(arrays)
    return _views(_stage(arrays, offsets, total).to(device, non_blocking=True), arrays, offsets)


class StaticColumns:
    """Device tensors that stay where they are and are filled again and again: the inputs of a captured graph."""

    def __init__(self, arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> None:
        """arrays: the first contents; shapes and dtypes stay the same."""
        self._offsets, total = _layout(arrays)
        self._memory = torch.empty(total, dtype=torch.uint8, device=device)
        self.tensors = _views(self._memory, arrays, self._offsets)
        self.fill(arrays)

    def fill(self, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        """One copy, which the host does not wait for."""
        self._memory.copy_(_stage(arrays, self._offsets, len(self._memory)), non_blocking=True)


def _layout(arrays: Sequence[np.ndarray[Any, Any]]) -> tuple[list[int], int]:
    """Where each array begins, and the length of all, in bytes."""
    offsets, total = [], 0
    for a in arrays:
        offsets.append(total)
        total += -(-a.nbytes // _ALIGN) * _ALIGN
    return offsets, max(total, 1)


def _stage(arrays: Sequence[np.ndarray[Any, Any]], offsets: Sequence[int], total: int) -> Tensor:
    """All arrays in fresh pinned memory."""
    staging = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    host = staging.numpy()
    for a, offset in zip(arrays, offsets, strict=True):
        host[offset : offset + a.nbytes] = np.ascontiguousarray(a).view(np.uint8).reshape(-1)
    return staging


def _views(packed: Tensor, arrays: Sequence[np.ndarray[Any, Any]], offsets: Sequence[int]) -> list[Tensor]:
    return [packed[offset : offset + a.nbytes].view(torch.from_numpy(a[:0]).dtype).view(a.shape)
            for a, offset in zip(arrays, offsets, strict=True)]
