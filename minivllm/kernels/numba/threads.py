"""Running compiled functions on the threads that PyTorch's own operations use.

A second pool of threads would fight the first: after each operation OpenMP's threads spin for a while, waiting for the next
one, and on a machine with as many threads as cores Numba's own threads (`prange`) would wait for theirs. So a kernel is
started as the compiler starts `#pragma omp parallel`: through `GOMP_parallel` of the very OpenMP library that PyTorch was
linked with, which is found through PyTorch's own library. Where there is none of that name (macOS), the calling thread does all.

A kernel is `void kernel(int64_t *args)`. All threads run it with the same arguments, of which args[0] is the counter that they
take tasks from: 0 at the start.
"""
from __future__ import annotations

import ctypes
import logging
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import torch
from numba import cfunc, types

logger = logging.getLogger(__name__)
SIGNATURE = types.void(types.CPointer(types.int64))


class Kernel:
    """A function as machine code, from Numba's cache on disk where there is one."""

    __slots__ = ("_address", "_alone", "_code")

    def __init__(self, function: Callable[..., None]) -> None:
        try:
            self._code = cfunc(SIGNATURE, cache=True, error_model="numpy")(function)
        except RuntimeError as error:  # no folder to write to
            logger.info("kernels are compiled anew at each start: %s", error)
            self._code = cfunc(SIGNATURE, error_model="numpy")(function)
        self._address = ctypes.c_void_p(self._code.address)
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._code.address)

    def run(self, args: int, tasks: int) -> None:
        """Run with the arguments at address `args` on all of PyTorch's threads, or on this one if there is one task."""
        threads = torch.get_num_threads()
        parallel = _gomp_parallel()
        if tasks > 1 and threads > 1 and parallel is not None:
            parallel(self._address, args, threads, 0)
        else:
            self._alone(args)


class Arguments:
    """Memory for a kernel's arguments, 8 bytes each, filled by `struct.pack_into`."""

    __slots__ = ("address", "memory")

    def __init__(self, count: int) -> None:
        self.memory = ctypes.create_string_buffer(8 * count)
        self.address = ctypes.addressof(self.memory)


@lru_cache(maxsize=1)
def _gomp_parallel() -> Any:
    """`void GOMP_parallel(void (*)(void *), void *, unsigned threads, unsigned flags)`, or None."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = ctypes.CDLL(str(folder / name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


@lru_cache(maxsize=1)
def vector_shape() -> tuple[int, int]:
    """(floats in a vector, vectors that sums may occupy) on this CPU: about three quarters of its registers."""
    return (16, 24) if llvmlite.binding.get_host_cpu_features().get("avx512f") else (8, 12)


@lru_cache(maxsize=1)
def version() -> int:
    """A number that changes with the code of this folder: Numba's cache notices changes of one file only."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
