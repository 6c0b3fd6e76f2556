"""What a sum over tensor-parallel ranks costs: NCCL as the engine uses it, and PyTorch's one-shot all-reduce over peer memory.

    python -m bench.all_reduce                    two GPUs
    python -m bench.all_reduce --device cpu       gloo, between two processes

Microseconds per sum of [rows, 4096] numbers in bfloat16: the median of rounds of 64 sums, as many as a step of Mistral-7B has. graph: the
64 sums are one captured CUDA graph, as in the engine's small steps. one-shot: every rank reads the others' memory, without multicast.
"""
from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import machine
from minivllm.parallel.group import ParallelGroup, file_store

COLUMNS, SUMS, ROUNDS = 4096, 64, 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.all_reduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", default="1,32,256,8192", help="numbers of tokens")
    args = parser.parse_args()
    print(machine.one_line(machine.describe(args.device, 1)), flush=True)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        others = [context.Process(target=measure, args=(rank, args, Path(folder)), daemon=True) for rank in range(1, args.ranks)]
        for process in others:
            process.start()
        measure(0, args, Path(folder))
        for process in others:
            process.join()


def measure(rank: int, args: argparse.Namespace, folder: Path) -> None:
    """One rank's part; rank 0 prints."""
    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = ParallelGroup.connect(file_store(folder / "group", args.ranks), rank, args.ranks, device, seconds=120)
    one_shot = _one_shot(rank, args.ranks, folder, device) if device.type == "cuda" else None
    for rows in map(int, args.rows.split(",")):
        x = torch.zeros(rows, COLUMNS, dtype=torch.bfloat16, device=device)
        found = {"eager": _timed(lambda x=x: group.all_reduce(x), device)}
        if device.type == "cuda":
            found["graph"] = _timed(_captured(lambda x=x: group.all_reduce(x)), device, at_once=SUMS)
            if one_shot is not None and rows <= 256:
                found["one-shot in a graph"] = _timed(_captured(one_shot(rows)), device, at_once=SUMS)
        if rank == 0:
            figures = ", ".join(f"{name} {us:.1f} us" for name, us in found.items())
            print(f"{rows:>6} rows, {x.nbytes / 1024:>8.0f} KiB: {figures}", flush=True)


def _timed(run: Callable[[], Any], device: torch.device, at_once: int = 1) -> float:
    """Microseconds per sum; `run` makes `at_once` of them."""
    times = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(SUMS // at_once):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begin) / SUMS)
    return 1e6 * statistics.median(times)


def _captured(run: Callable[[], Any]) -> Callable[[], None]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(SUMS):
            run()
    return graph.replay


def _one_shot(rank: int, size: int, folder: Path, device: torch.device) -> Callable[[int], Callable[[], Any]] | None:
    """Makes a sum of so many rows; None: this PyTorch or machine has none."""
    import torch.distributed as dist

    try:
        import torch.distributed._symmetric_memory as symmetric

        dist.init_process_group("nccl", store=file_store(folder / "world", size), rank=rank, world_size=size, device_id=device)
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]

        def make(rows: int) -> Callable[[], Any]:
            x = symmetric.empty((rows, COLUMNS), dtype=torch.bfloat16, device=device)
            symmetric.rendezvous(x, name)
            return lambda: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", name)

        make(1)()
        return make
    except (ImportError, AttributeError, RuntimeError) as error:
        if rank == 0:
            print(f"no one-shot all-reduce: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return None


if __name__ == "__main__":
    main()
