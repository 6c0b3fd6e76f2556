"""Tensor-parallel ranks as threads of one process: each has a gloo process group, and they meet at a store in memory."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

from minivllm.parallel.group import ParallelGroup

Result = TypeVar("Result")


def on_ranks(size: int, work: Callable[[ParallelGroup], Result]) -> list[Result]:
    """`work` of each rank at the same time. Returns the ranks' results; an error of one rank fails the others and is raised."""
    store = dist.HashStore()

    def run(rank: int) -> Result:
        group = ParallelGroup.connect(store, rank, size, torch.device("cpu"), seconds=30)
        try:
            with torch.inference_mode():
                return work(group)
        finally:
            del group  # closes its connections, so that no other rank waits

    with ThreadPoolExecutor(size) as threads:
        return [future.result() for future in [threads.submit(run, rank) for rank in range(size)]]
