"""What kernels ask of the GPU they run on.

Programmatic dependent launch (Hopper and later) lets a kernel start while the one before it ends. Its programs are placed as
soon as those of the one before have all begun, do what depends on nobody (fetch weights, say), and wait for that one's
results with `gdc_wait`. Every kernel launched so must wait before it reads or writes what others write or read: then each
kernel's end implies that of all before it.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

_compile_only: ContextVar[bool] = ContextVar("compile_only", default=False)  # other threads' kernels run meanwhile


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


@triton.jit
def _nothing(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def before_replays(device: torch.device) -> None:
    """To be called before the first replay of a CUDA graph that follows kernels launched one by one.

    Measured on an H200 (CUDA 13): after kernels that were all launched without the option of an early start, or all with it,
    every replay of a graph that mixes both takes 0.3 us longer at each border without, 6% of a step of 32 sequences, until
    two kernels in a row differ in it. So two that do nothing are launched, one of each kind.
    """
    if early_start(device)["PDL"]:
        _nothing[(1,)](PDL=False, num_warps=1)
        _nothing[(1,)](num_warps=1, **early_start(device))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; within `compiling_side_by_side` the kernel is compiled, but does not run."""
    if _compile_only.get():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


class _Loader:
    """What `AsyncCompileMode` needs of an executor. Loads each kernel too: older Tritons (3.6) have a C compiler make its launcher."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        def load() -> Any:
            kernel = compile_kernel()
            kernel.run  # noqa: B018  asking for it loads the kernel
            return kernel

        return self._pool.submit(load)


@contextmanager
def compiling_side_by_side() -> Iterator[None]:
    """No kernel that this thread launches within runs: all are compiled, as many at once as there are CPUs, and are there at the end.

    What they would have written is undefined, so nothing within may use it as an index.
    """
    from triton import AsyncCompileMode

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_this_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
    with ThreadPoolExecutor(cpus, initializer=on_this_device) as pool, AsyncCompileMode(_Loader(pool)):
        before = _compile_only.set(True)
        try:
            yield
        finally:
            _compile_only.reset(before)
