"""Running compiled functions on the threads that PyTorch's own operations use.

A second pool of threads would compete with PyTorch's: after each operation OpenMP's threads spin for a while and wait for the next one.
If there are as many threads as cores, Numba's own threads (`prange`) would wait for them to stop. So a kernel is started as a compiler
starts `#pragma omp parallel`: by `GOMP_parallel` of the OpenMP library that PyTorch is linked with, found through PyTorch's own library.
Without a function of that name (macOS), the calling thread runs all tasks.

A kernel is `void kernel(int64_t *args)`. All threads run it with the same arguments. args[0] is a counter, 0 at the start, from which
threads take their tasks.
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

from minivllm.kernels import tuning

logger = logging.getLogger(__name__)
SIGNATURE = types.void(types.CPointer(types.int64))
DTYPE_NAMES = ("float32", "bfloat16", "int8", "fp8")  # of the numbers in memory; index: `kind` in vectors.py


class Kernel:
    """A function as machine code, from Numba's cache on disk if it is there."""

    __slots__ = ("_address", "_code", "_serial")

    def __init__(self, function: Callable[..., None], what: str) -> None:
        """function: its closure holds the sizes that the code is specialized for. what: a description of them for the log."""
        # Numba numbers the cache files of functions with one name. Two processes that compile two such functions at the same time may
        # choose the same number, and a third process would load the wrong code. So each specialization gets a unique name.
        function.__qualname__ = f"{function.__name__}_{_identity(function):08x}"
        try:
            self._code = _compiled(function, f"{what} for this CPU: once, since the code is kept on disk for the next start", cache=True)
        except Exception as error:  # no writable folder, a full disk, a damaged file; another error occurs again without the cache
            logger.info("compiled kernels cannot be kept on disk, so each start compiles them again: %s", error)
            self._code = _compiled(function, f"{what} for this CPU", cache=False)
        self._address = ctypes.c_void_p(self._code.address)
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._code.address)

    def run(self, args: int, tasks: int) -> None:
        """Run with the arguments at address `args`, on all of PyTorch's threads or, if there is one task, on the calling thread."""
        threads = torch.get_num_threads()
        parallel = _gomp_parallel()
        if tasks > 1 and threads > 1 and parallel is not None:
            parallel(self._address, args, threads, 0)
        else:
            self._serial(args)


class Arguments:
    """Memory for a kernel's arguments, 8 bytes each, filled by `struct.pack_into`."""

    __slots__ = ("address", "checked", "memory")

    def __init__(self, count: int) -> None:
        self.checked = False  # whether the caller has checked the tensors at the addresses
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
    """(floats in a vector, number of vectors used for sums) on this CPU: about three quarters of its registers."""
    return (16, 24) if llvmlite.binding.get_host_cpu_features().get("avx512f") else (8, 12)


@lru_cache(maxsize=1)
def converts_float16() -> bool:
    """Whether this CPU has instructions for float16. Without them LLVM calls a function that Numba's code is not linked with."""
    return llvmlite.binding.get_host_cpu_features().get("f16c", True)  # a feature of x86; all 64-bit ARM CPUs have them


@lru_cache(maxsize=1)
def version() -> int:
    """A hash of the CPU and of all source files that a kernel may depend on. Numba's cache notices changes of one file only."""
    cpu = f"{llvmlite.binding.get_host_cpu_name()} {llvmlite.binding.get_host_cpu_features().flatten()}"
    sources = (*sorted(Path(__file__).parent.glob("*.py")), Path(tuning.__file__))
    return zlib.crc32(b"".join(path.read_bytes() for path in sources) + cpu.encode())


def _identity(function: Callable[..., None]) -> int:
    """A hash of everything that the machine code of a function depends on."""
    return zlib.crc32(repr([version(), *(cell.cell_contents for cell in function.__closure__ or ())]).encode())


def _compiled(function: Callable[..., None], what: str, *, cache: bool) -> Any:
    class Announcing(Compiler):
        """Numba's compiler with a message at its start, since it takes seconds. It does not run for code that is on disk.

        `pipeline_class` and `define_pipelines` are documented in Numba's manual ("Customizing the Compiler")."""

        def define_pipelines(self) -> Any:
            logger.info("compiling %s", what)
            return super().define_pipelines()

    return cfunc(SIGNATURE, cache=cache, pipeline_class=Announcing, error_model="numpy")(function)
