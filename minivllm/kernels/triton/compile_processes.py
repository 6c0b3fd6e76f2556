"""Processes that compile kernels into Triton's cache, where this process then finds them.

Triton's front end is Python, which runs in one thread at a time; only its back end runs in parallel. The processes are forked, since a new
one would import PyTorch for seconds. They never use the GPU. Every failure of a process is ignored: its kernel is then compiled here.
"""
from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import triton
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.cache import get_cache_key, get_cache_manager

KERNEL_SECONDS = 60.0  # a process that takes longer for one kernel is ended: a fork can copy a lock that another thread held


class CompileProcess:
    """A forked process that compiles one kernel at a time."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():  # Python warns of other threads. They hold no lock that compiling needs
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if not self._pid:
            try:
                self._connection.close()
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def compile(self, job: bytes) -> None:
        """Compile a kernel into the cache. It does nothing if that fails or takes longer than KERNEL_SECONDS."""
        with contextlib.suppress(OSError, EOFError):
            self._connection.send_bytes(job)
            if not self._connection.poll(KERNEL_SECONDS):
                os.kill(self._pid, signal.SIGKILL)  # later calls find the connection closed
            self._connection.recv_bytes()

    def close(self) -> None:
        """End the process, and wait for that."""
        self._connection.close()  # a process that was forked later has a copy, and ends earlier
        os.waitpid(self._pid, 0)


def may_fork() -> bool:
    """Whether this thread may start processes. In a program with other busy threads a fork can copy a lock that is held forever."""
    return hasattr(os, "fork") and threading.current_thread() is threading.main_thread()


def job_of(compile_kernel: Callable[[], Any]) -> bytes | None:
    """For `CompileProcess.compile`. compile_kernel: from `AsyncCompileMode`. None: the kernel is in the cache, or it cannot be described to
    another process."""
    parts = inspect.getclosurevars(compile_kernel).nonlocals
    if not {"src", "target", "options", "env_vars"} <= parts.keys():
        return None
    source, target, options = parts["src"], parts["target"], parts["options"]
    key = hashlib.sha256(get_cache_key(source, make_backend(target), options, parts["env_vars"]).encode()).hexdigest()
    if get_cache_manager(key).get_group(f"{source.name[:150]}.json"):
        return None
    kernel = source.fn
    job = (kernel.module, kernel.fn.__qualname__, type(source), source.signature, source.constants, source.attrs, target, options.__dict__)
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


def _serve(connection: Connection) -> None:
    """Compile until the connection is closed. Triton 3.6 also compiles a C launcher for each kernel."""
    while True:
        job = connection.recv_bytes()
        with contextlib.suppress(Exception):  # the other process finds the same error, and raises it
            module, name, kind, signature, constants, attrs, target, options = pickle.loads(job)
            source = kind(getattr(importlib.import_module(module), name), signature, constants, attrs)  # of Triton or Gluon
            kernel = triton.compile(source, target=target, options=options)
            driver.active.launcher_cls(kernel.src, kernel.metadata)
        connection.send_bytes(b"done")
