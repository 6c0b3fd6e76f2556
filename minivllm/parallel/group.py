"""The ranks of one model, and the two operations between them.

    all_reduce   rank 0: a   rank 1: b    ->  both: a + b        after a row-parallel layer, and after the embedding
    all_gather   rank 0: a   rank 1: b    ->  both: | a | b |    of the logits

On GPUs NCCL does both, on CPUs gloo. All ranks get bitwise equal results, so they go on to sample equal tokens.
"""
from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLLECTIVE_SECONDS = 300.0  # a rank that waits longer for the others fails


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    """One rank's view of the group. With one rank, nothing is exchanged and `torch.distributed` is not used."""

    rank: int = 0
    size: int = 1
    backend: Any = None  # a process group of torch.distributed, not the default one: a process may have several engines

    @classmethod
    def connect(cls, store: Any, rank: int, size: int, device: torch.device, seconds: float = COLLECTIVE_SECONDS) -> ParallelGroup:
        """Meet the other ranks at `store`, a torch.distributed.Store. Raises `RuntimeError` if one of them does not come in time."""
        import torch.distributed as dist

        timeout = timedelta(seconds=seconds)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return cls(rank, size, dist.ProcessGroupNCCL(store, rank, size, options))
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._timeout, gloo._devices, gloo._threads = timeout, [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")], 1
        return cls(rank, size, dist.ProcessGroupGloo(store, rank, size, gloo))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, of any shape and contiguous, in place of it."""
        if self.size > 1:
            import torch.distributed as dist

            options = dist.AllreduceOptions()
            options.asyncOp = False  # on a GPU: on the computing stream, so it is captured like any kernel
            _wait(self.backend.allreduce([x], options))
        return x

    def all_gather(self, x: Tensor, columns: int) -> Tensor:
        """All ranks' x [T, n] side by side, without the padding that follows the last of `columns` columns: [T, columns]."""
        if self.size == 1:
            return x
        from torch.distributed.distributed_c10d import AllgatherOptions

        options = AllgatherOptions()
        options.asyncOp = False
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        _wait(self.backend.allgather([parts], [x], options))
        return torch.cat(parts, dim=1) if columns == self.size * x.shape[1] else torch.cat(
            [part[:, : max(0, columns - i * x.shape[1])] for i, part in enumerate(parts)], dim=1)

    def abort(self) -> None:
        """End operations that wait for a rank that is gone. The group cannot be used afterwards."""
        if self.backend is not None:
            self.backend.abort()


SINGLE = ParallelGroup()


def file_store(path: Path, size: int) -> Any:
    """A store for ranks of one machine: a file, so that no port is open."""
    import torch.distributed as dist

    return dist.FileStore(str(path), size)


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
