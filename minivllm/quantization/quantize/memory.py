"""How much memory the process used at most."""
from __future__ import annotations

import resource
import sys

import torch


def memory_report(device: torch.device) -> str:
    """One line: the peak of the resident set, and of the GPU's memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = f", {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of GPU memory" if device.type == "cuda" else ""
    return f"peak memory: {peak / 2**20:,.0f} MiB resident{gpu}"
