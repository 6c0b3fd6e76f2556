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
from numba.core.compiler import Compiler

logger = logging.getLogger(__name__)
SIGNATURE = types.void(types.CPointer(types.int64))
DTYPE_NAMES = ("float32", "bfloat16")  # of the numbers in memory, by `half`


class Kernel:
    """A function as machine code, from Numba's cache on disk where there is one."""

    __slots__ = ("_address", "_alone", "_code")

    def __init__(self, function: Callable[..., None], what: str) -> None:
        """function: its closure holds the sizes that the code is for. what: their words for the log."""
        # Numba numbers the files of functions of one name, and processes that compile two of them at once would agree on a
        # number: whoever loads it later may get the other's code. So each name stands for one code.
        function.__qualname__ = f"{function.__name__}_{_identity(function):08x}"
        try:
            self._code = _compiled(function, f"{what} for this CPU: once, the code is kept on disk for the next start", cache=True)
        except Exception as error:  # no folder to write to, a full disk, a damaged file; what else fails does so again
            logger.info("compiled kernels cannot be kept on disk, so that each start compiles them anew: %s", error)
            self._code = _compiled(function, f"{what} for this CPU", cache=False)
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

    __slots__ = ("address", "checked", "memory")

    def __init__(self, count: int) -> None:
        self.checked = False  # for who uses them: whether what is behind the addresses was looked at
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
    """A number that changes with the code of this folder (Numba's cache notices changes of one file only) and with the CPU."""
    cpu = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))) + cpu.encode())


def _identity(function: Callable[..., None]) -> int:
    """A number for everything that the machine code of a function depends on."""
    return zlib.crc32(repr([version(), *(cell.cell_contents for cell in function.__closure__ or ())]).encode())


def _compiled(function: Callable[..., None], what: str, *, cache: bool) -> Any:
    class Announcing(Compiler):
        """Numba's compiler, which says that it begins, since it takes seconds. It is not asked for code that is on disk."""

        def define_pipelines(self) -> Any:
            logger.info("compiling %s", what)
            return super().define_pipelines()

    return cfunc(SIGNATURE, cache=cache, pipeline_class=Announcing, error_model="numpy")(function)
