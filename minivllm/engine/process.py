"""`ProcessClient`: the engine in a process of its own, so that the server's Python work never delays a step.

    parent: event loop ─ add, abort ─▶ pipe ─▶ reader thread ─▶ inbox ─▶ engine loop   :child
            receiver thread ◀───────── pipe ◀─────────────────────────── one message a step

Who ends whom. The parent ends the child: `close` asks, waits, and kills if it must. Ctrl-C and SIGTERM are for the parent only (the
child ignores them), which then closes, at once or when its requests are done. If the parent vanishes the child sees the pipe's end
and leaves at once, in the middle of a step if need be: nobody is left to answer. If the child vanishes the parent sees the same and
every request gets `EngineDead`.
"""
from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from minivllm.config import EngineConfig
from minivllm.engine.client import EngineClient
from minivllm.engine.loop import Command, Dead, Shutdown, run_engine

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from minivllm.engine.engine import LLMEngine

# Terminals send Ctrl-C to a whole group of processes, and service managers SIGTERM; the parent decides what they mean for the engine.
PARENTS_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
CLOSE_SECONDS = 10.0  # a step in progress is waited for this long, then the process is killed


def _read_commands(connection: Connection, inbox: queue.SimpleQueue[Command]) -> None:
    """The child's reader: commands to the inbox, and the watch over the parent's life."""
    while True:
        try:
            command = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone
        inbox.put(command)
        if isinstance(command, Shutdown):
            return


def freeze_heap() -> None:
    """For a process that has started up: what exists now lives to the end, so the garbage collector need not walk it again.

    A step makes some objects per stream and drops them soon; with Python's own threshold they would be looked at every few steps.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _build_frozen(build: Callable[[], LLMEngine]) -> LLMEngine:
    engine = build()
    freeze_heap()
    return engine


def engine_process(build: Callable[[], LLMEngine], connection: Connection) -> None:
    """Main function of the child."""
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)  # the parent blocked them until we could ignore them
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(connection, inbox), name="minivllm-reader", daemon=True).start()
    run_engine(partial(_build_frozen, build), inbox, connection.send)
    # The pipe closes with the process: closing it here would pull it from under the reader, which may be inside recv().


class ProcessClient(EngineClient):
    """The engine in a spawned process."""

    def __init__(self) -> None:
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self._connection, self._child_end = context.Pipe()
        self._sending = threading.Lock()
        self._process: SpawnProcess | None = None
        self._receiver: threading.Thread | None = None

    @classmethod
    def start(cls, config: EngineConfig) -> ProcessClient:
        """Load the model in the child and return when requests can be accepted."""
        from minivllm.engine.engine import LLMEngine

        return cls.start_with(partial(LLMEngine.from_config, config))

    @classmethod
    def start_with(cls, build: Callable[[], LLMEngine]) -> ProcessClient:
        client = cls()
        context = multiprocessing.get_context("spawn")
        process = context.Process(
            target=engine_process, args=(build, client._child_end), name="minivllm-engine", daemon=True,
        )
        client._process = process
        try:
            _start_without_signals(process)
            client._child_end.close()  # from here on only the child holds its end, so its death is seen as an end of file
            client._receiver = threading.Thread(target=client._read_answers, name="minivllm-answers", daemon=True)
            client._receiver.start()
            client._started.result()
        except BaseException:
            client.close()
            raise
        return client

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def _send(self, command: Command) -> None:
        # An OSError means that the child is gone; the receiver thread notices too and tells the streams.
        with contextlib.suppress(OSError), self._sending:
            self._connection.send(command)

    def _read_answers(self) -> None:
        assert self._process is not None
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            self._receive(message)
        self._process.join(CLOSE_SECONDS)  # its pipe is closed, so it is gone or about to be
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._die(Dead(f"the engine process ended unexpectedly (exit code {self._process.exitcode})"))

    def close(self) -> None:
        if self._receiver is None:  # never started, or failed to
            return
        self._send(Shutdown())
        self._receiver.join(CLOSE_SECONDS)  # only that thread reaps the process: two would race for its exit code
        if self._receiver.is_alive() and self._process is not None:
            self._process.kill()
            self._receiver.join()
        self._connection.close()


def _start_without_signals(process: SpawnProcess) -> None:
    """Start the child with its signals blocked: a Ctrl-C before its first line must not reach it."""
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
