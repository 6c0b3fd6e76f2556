"""Timing on a GPU, and the GPU's highest measured bandwidth and arithmetic.

Kernels are timed by replaying a CUDA graph of many calls, so that no launch from Python is included. Each call uses its own copy of the
weights or the cache. All copies together are several times the L2 cache, so that every call reads from memory, as in a model. On Hopper a
call starts before the call ahead of it has ended (programmatic dependent launch), as in a model. So a figure is the time that one more
call adds to the chain.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from minivllm.benchmarks.statistics import median

CARD, CARD_BYTES, CARD_FLOPS = "RTX 4060", 272e9, 15.1e12  # bytes/s and fp32 FLOP/s in the data sheet of the card that predictions are for


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What this GPU reaches with the simplest work."""

    copy: float  # bytes/s, read and written, of one large copy
    matmul: float  # FLOP/s of one large product in bfloat16

    def __str__(self) -> str:
        return f"ceiling: copy {self.copy / 1e9:,.0f} GB/s, bf16 matmul {self.matmul / 1e12:,.0f} TFLOP/s"


def ceiling(device: torch.device) -> Ceiling:
    """Measured with a copy that moves 2 GiB and a product of two 8192 x 8192 matrices."""
    size = 1 << 30
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    copy = 2 * size / seconds([partial(torch.neg, source, out=target)] * 4)  # a kernel, because the copy engine that `copy_` uses is slower
    del source, target
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    matmul = 2 * n**3 / seconds([partial(torch.mm, a, b, out=out)] * 4)
    return Ceiling(copy, matmul)


def seconds(calls: Sequence[Callable[[], Any]], rounds: int = 5) -> float:
    """Seconds per call: the median over `rounds` replays of a graph of all calls."""
    for call in calls[:2]:
        call()  # compiles kernels and fills caches, which must not happen during a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return replay_seconds(graph.replay, rounds) / len(calls)


def replay_seconds(replay: Callable[[], Any], rounds: int) -> float:
    """Seconds per replay, or per other call that enqueues work: the median over `rounds`, each measured with CUDA events."""
    replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    return median([a.elapsed_time(b) for a, b in pairwise(marks)]) / 1e3


def copies_beyond_l2(num_bytes: int, device: torch.device) -> int:
    """The number of copies of some data that together are three times the L2 cache: at least 2, and at most 256, which limits the graph."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(256, max(2, -(-3 * l2 // max(num_bytes, 1))))


def save(path: str | None, record: dict[str, Any]) -> None:
    """Print the record as one JSON line, and write it to the file at `path`, if there is one."""
    print(json.dumps(record))
    if path:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
