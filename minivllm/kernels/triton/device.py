"""Properties of the GPU, and how kernels are launched and compiled.

Programmatic dependent launch (Hopper and later) lets a kernel start before the kernel ahead of it has ended. Its programs start when all
programs of the kernel ahead have started. They do what does not depend on other kernels (fetch weights, for example), and then wait with
`gdc_wait` for the results. Every kernel launched in this way must wait before it reads or writes memory that other kernels use. Then the
end of a kernel implies the end of all kernels before it.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from importlib import import_module
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from minivllm.kernels.triton import compile_processes
from minivllm.kernels.triton.compile_processes import CompileProcess

log = logging.getLogger(__name__)
GLUON_TESTED = ("3.6.", "3.7.")  # versions of Triton. Gluon, the language of some kernels, changes from version to version
MAX_PROCESSES = 32  # that compile; a model has about as many kernels
_compile_only: ContextVar[bool] = ContextVar("compile_only", default=False)  # per thread: kernels of other threads still run


@lru_cache(maxsize=8)
def capability(device: torch.device) -> int:
    """90 for Hopper, 89 for Ada (RTX 40xx); 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=8)
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors: at least so many programs run at the same time. 16 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@lru_cache(maxsize=8)
def gluon_kernels(module: str) -> ModuleType | None:
    """The module of this package whose kernels are in Gluon. None, with one line in the log, if this version of Triton may not run them."""
    try:
        if not triton.__version__.startswith(GLUON_TESTED):
            raise ImportError(f"it was tested with {' and '.join(version + 'x' for version in GLUON_TESTED)}")
        return import_module(f"minivllm.kernels.triton.{module}")
    except (ImportError, AttributeError, TypeError) as error:
        log.warning("Slower kernels replace those of %s.py, which do not work with Triton %s (%s)", module, triton.__version__, error)
        return None


@lru_cache(maxsize=8)
def early_start(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel with a parameter PDL: programmatic dependent launch if the GPU has it."""
    return {"PDL": True, "launch_pdl": True} if capability(device) >= 90 else {"PDL": False}


@triton.jit
def _nothing(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def before_replays(device: torch.device) -> None:
    """Call this before the first replay of a CUDA graph that follows kernels launched one by one.

    A graph mixes kernels with and without programmatic dependent launch. Measured on an H200 (CUDA 13): if all kernels launched before
    the replays were of one kind, each change of the kind within a replay takes longer (docs/performance.md), until two consecutive
    launches differ in kind. So two kernels that do nothing are launched here, one of each kind.
    """
    if early_start(device)["PDL"]:
        _nothing[(1,)](PDL=False, num_warps=1)
        _nothing[(1,)](num_warps=1, **early_start(device))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`. Inside `compiling_in_parallel` the kernel is compiled and does not run."""
    if _compile_only.get():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


class _Loader:
    """An executor for `AsyncCompileMode` that also loads each kernel, because Triton 3.6 compiles a C launcher when a kernel is loaded."""

    def __init__(self, pool: ThreadPoolExecutor, num_processes: int) -> None:
        self._pool, self._num_processes = pool, num_processes if compile_processes.may_fork() else 0
        self._processes: list[CompileProcess] = []
        self._idle: SimpleQueue[CompileProcess] = SimpleQueue()

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        job = compile_processes.job_of(compile_kernel) if self._num_processes else None
        if job is not None and not self._processes:  # before the first thread
            driver.active.get_current_device()  # compiles what the processes need too
            for _ in range(self._num_processes):
                self._processes.append(CompileProcess())
                self._idle.put(self._processes[-1])
        if not self._processes:
            self._num_processes = 0

        def load() -> Any:
            if job is not None:
                process = self._idle.get()  # as many as threads
                process.compile(job)
                self._idle.put(process)
            kernel = compile_kernel()
            kernel.run  # noqa: B018  the property loads the kernel
            return kernel

        return self._pool.submit(load)

    def close(self) -> None:
        """End the processes, the last one first: see `CompileProcess.close`."""
        for process in reversed(self._processes):
            process.close()


@contextmanager
def compiling_in_parallel() -> Iterator[None]:
    """Compile the kernels that this thread launches, in parallel on all CPUs, without running them. At the end all are compiled.

    The kernels' outputs stay undefined, so code inside must not use them as an index.
    """
    from triton import AsyncCompileMode

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_this_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
    threads = ThreadPoolExecutor(cpus, initializer=on_this_device)
    with threads, closing(_Loader(threads, min(cpus, MAX_PROCESSES))) as loader, AsyncCompileMode(loader):
        before = _compile_only.set(True)
        try:
            yield
        finally:
            _compile_only.reset(before)
