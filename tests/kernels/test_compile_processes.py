"""Kernels are compiled in forked processes, and this one finds them in Triton's cache. It needs no GPU.

It runs in its own process, because the tests of this folder interpret kernels.
"""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def add(x, n, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) + n)
"""
PROGRAM = """
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
import torch, triton, triton.backends.nvidia.driver
from triton import AsyncCompileMode, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from minivllm.kernels.triton import compile_processes, device
from kernel_of_this_test import add

class Hopper:
    get_current_device = get_current_stream = lambda self, *device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

def start(first):
    add.device_caches.clear()
    hits.clear()
    with ThreadPoolExecutor(2) as pool, closing(device._Loader(pool, 2)) as loader, AsyncCompileMode(loader):
        for n in (2, 16, first + 2**40):  # int32, a multiple of 16, int64
            add.warmup(torch.zeros(64), n, BLOCK=first, grid=(1,))
    print(len(loader._processes), sorted(hits))

driver.set_active(Hopper())
CompiledKernel.run = None  # loading needs a GPU
hits = []
knobs.compilation.listener = lambda cache_hit, **others: hits.append(cache_hit)
start(16)
start(16)
thread = threading.Thread(target=start, args=(32,))
thread.start(), thread.join()
compile_processes._serve, compile_processes.KERNEL_SECONDS = lambda connection: threading.Event().wait(), 0.1
start(64)
"""


def test_processes_compile_what_is_not_in_the_cache_and_only_the_main_thread_starts_them(tmp_path: Path) -> None:
    (tmp_path / "kernel_of_this_test.py").write_text(KERNEL)
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, in_a_thread, hanging = done.stdout.splitlines()
    assert first == "2 [True, True, True]", "this process found all kernels in the cache"
    assert second == "0 [True, True, True]", "no process was needed"
    assert in_a_thread == "0 [False, False, False]", "a thread must not fork"
    assert hanging == "2 [False, False, False]", "processes that hang are ended, and this one compiles"
    assert not done.stderr
