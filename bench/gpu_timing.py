"""How time is taken on a GPU, and what the GPU can do at best.

Kernels are timed by replaying a CUDA graph of many calls, so that no launch from Python is in the figure. Each call works on its own
copy of the weights or the cache, and all copies together are several times the L2 cache, so that every call reads from memory, as it
does in a model. On Hopper the next call starts while one ends (programmatic dependent launch), which is also how a model runs them:
a figure is the time by which one more call makes the chain longer.
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

CARD, CARD_BYTES, CARD_FLOPS = "RTX 4060", 272e9, 15.1e12  # bytes/s and fp32 FLOP/s of the card that predictions are for (its data sheet)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What this GPU reaches on the simplest work there is."""

    copy: float  # bytes/s, read and written, of one large copy
    matmul: float  # FLOP/s of one large product in bfloat16

    def __str__(self) -> str:
        return f"ceiling: copy {self.copy / 1e9:,.0f} GB/s, bf16 matmul {self.matmul / 1e12:,.0f} TFLOP/s"


def ceiling(device: torch.device) -> Ceiling:
    """Measured: a copy that moves 2 GiB, and a product of two 8192 x 8192 matrices."""
    size = 1 << 30
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    copy = 2 * size / seconds([partial(torch.neg, source, out=target)] * 4)  # a kernel: the copy engine behind `copy_` is slower
    del source, target
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    matmul = 2 * n**3 / seconds([partial(torch.mm, a, b, out=out)] * 4)
    return Ceiling(copy, matmul)


def seconds(calls: Sequence[Callable[[], Any]], rounds: int = 5) -> float:
    """Of one call: the median over `rounds` replays of a graph of all of them, the same order each time."""
    for call in calls[:2]:
        call()  # compiles, and fills caches, which a capture must not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return replay_seconds(graph.replay, rounds) / len(calls)


def replay_seconds(replay: Callable[[], Any], rounds: int) -> float:
    """Of one replay (or of whatever else puts work on the stream): the median, each round between two events of its own."""
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
    """How many copies of some data are three times the L2 cache: at least 2, and not more than make a graph of reasonable length."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(256, max(2, -(-3 * l2 // max(num_bytes, 1))))


def save(path: str | None, record: dict[str, Any]) -> None:
    """One JSON line, and the same in a file if one was named."""
    print(json.dumps(record))
    if path:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
