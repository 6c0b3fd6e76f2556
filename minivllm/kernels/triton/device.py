"""What kernels ask of the GPU they run on.

Programmatic dependent launch (Hopper and later) lets a kernel start while the one before it ends. Its programs are placed as
soon as those of the one before have all begun, do what depends on nobody (fetch weights, say), and wait for that one's
results with `gdc_wait`. Every kernel launched so must wait before it reads or writes what others write or read: then each
kernel's end implies that of all before it.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=8)
def capability(device: torch.device) -> int:
    """90 for Hopper, 89 for Ada (RTX 40xx); 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=8)
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors: how many programs run side by side, at least. 16 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@lru_cache(maxsize=8)
def early_start(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel with a parameter PDL: whether it may start early."""
    return {"PDL": True, "launch_pdl": True} if capability(device) >= 90 else {"PDL": False}
