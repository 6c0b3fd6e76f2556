"""`ProcessClient`: the engine in a separate process, so that the server's Python work never delays a step.

    parent: event loop ─ commands ─▶ pipe ─▶ reader thread ─▶ inbox ─▶ engine loop   :child
            receiver thread ◀─────── pipe ◀─────────────────────────── one message a step

How the two end:
- The parent ends the child. `close` sends a command, waits, and kills the child if it does not end in time.
- Ctrl-C and SIGTERM are for the parent. The child ignores them, and the parent closes at once or when its requests have finished.
- If the parent disappears, the child sees the end of the pipe and exits at once, even in the middle of a step.
- If the child disappears, the parent sees the end of the pipe, and every request gets `EngineDead`, or `EngineRestarting` if the
  receiver thread will start another child.
"""
from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from minivllm.config import EngineConfig
from minivllm.engine.client import EngineClient, ThreadClient
from minivllm.engine.loop import Engine, InboxItem, run_engine
from minivllm.engine.messages import DeadMessage, EngineCommand, EngineMessage, ReadyMessage, ShutdownCommand
from minivllm.engine.restarts import RestartCounter

# Terminals send Ctrl-C to a group of processes, and service managers SIGTERM. The parent decides what they mean for the engine.
PARENT_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
CLOSE_SECONDS = 10.0  # how long to wait for the step in progress before the process is killed

log = logging.getLogger(__name__)


def start_client(config: EngineConfig, *, process: bool) -> EngineClient:
    """Start an engine in its own process, or in a thread of this one."""
    return (ProcessClient if process else ThreadClient).start(config)


def _read_commands(connection: Connection, inbox: queue.SimpleQueue[InboxItem]) -> None:
    """The child's reader thread: passes commands to the inbox, and ends the child when the parent is gone."""
    while True:
        try:
            command = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone
        inbox.put(command)
        if isinstance(command, ShutdownCommand):
            return


def freeze_heap() -> None:
    """Exempt all objects that exist after the start from garbage collection: they live until the process ends.

    A step creates some objects per stream and soon drops them. With Python's default threshold, every few steps would trigger a collection.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _build_frozen(build: Callable[[], Engine]) -> Engine:
    engine = build()
    freeze_heap()
    return engine


def engine_process(build: Callable[[], Engine], connection: Connection) -> None:
    """Main function of the child."""
    for number in PARENT_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENT_SIGNALS)  # `_start_without_signals` blocked them
    inbox: queue.SimpleQueue[InboxItem] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(connection, inbox), name="minivllm-reader", daemon=True).start()
    run_engine(partial(_build_frozen, build), inbox, connection.send)
    # The pipe closes with the process: the reader thread may still be inside recv().


class ProcessClient(EngineClient):
    """The engine in a spawned process. A dead one is started again up to `restarts` times in a row."""

    def __init__(self, restarts: int = 0) -> None:
        super().__init__()
        self._context = multiprocessing.get_context("spawn")
        self._connection, self._child_end = self._context.Pipe()
        self._sending = threading.Lock()  # guards the connection, and the start of a process against `close`
        self._process: SpawnProcess | None = None
        self._receiver: threading.Thread | None = None
        self._restarts = RestartCounter(restarts)
        self._close_begun = threading.Event()

    def _start(self, build: Callable[[], Engine]) -> None:
        self._spawn(build)
        receiver = threading.Thread(target=self._receive_all, args=(build,), name="minivllm-receiver", daemon=True)
        receiver.start()
        self._receiver = receiver

    def _spawn(self, build: Callable[[], Engine]) -> None:
        process = self._context.Process(
            target=engine_process, args=(build, self._child_end), name="minivllm-engine", daemon=True)
        _start_without_signals(process)
        self._process = process
        self._child_end.close()  # now only the child holds its end, so the pipe ends when the child does

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def _send(self, command: EngineCommand) -> None:
        # An OSError means that the child is gone; the receiver thread notices it too and ends the streams.
        with contextlib.suppress(OSError), self._sending:
            self._connection.send(command)

    def _receive_all(self, build: Callable[[], Engine]) -> None:
        """The receiver thread: reads the messages of one process after the other."""
        while True:
            self._receive_from_one()
            if not (self._restarting and self._start_again(build)):
                return

    def _receive_from_one(self) -> None:
        assert self._process is not None
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            try:
                self._receive(message)
            except Exception:  # a bug: without this thread, every stream would wait for ever
                log.exception("a message of the engine could not be handled")
                self._process.kill()
                break
        self._process.join(CLOSE_SECONDS)  # its pipe is closed, so it has ended or is about to
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._die(DeadMessage(f"the engine process ended unexpectedly (exit code {self._process.exitcode})"))

    def _receive(self, message: EngineMessage) -> None:
        if isinstance(message, ReadyMessage):
            self._restarts.ready()
        super()._receive(message)

    def _may_restart(self) -> bool:
        again = self._restarts.ended()
        if not again and self._restarts.most:
            log.error("%s has ended %d times in a row: it is not started again", self._label, self._restarts.failures)
        return again

    def _start_again(self, build: Callable[[], Engine]) -> bool:
        """Wait, and start a process. False: the client was closed meanwhile."""
        counter = self._restarts
        log.warning("%s is started again in %g s (attempt %d of %d)", self._label, counter.pause, counter.failures, counter.most)
        if self._close_begun.wait(counter.pause):
            return False
        with self._sending:
            if self._closing:
                return False
            self._ended = False
            self._connection.close()
            self._connection, self._child_end = self._context.Pipe()
            try:
                self._spawn(build)
            except OSError as error:  # no memory or no files for a process
                self._child_end.close()
                self._die(DeadMessage(f"no process could be started: {error}"))
        return True

    def close(self) -> None:
        with self._sending:
            self._closing = True
        self._close_begun.set()
        if self._receiver is None:  # the start failed: nothing reads the pipe
            if self._process is not None:
                self._process.kill()
                self._process.join()
            self._child_end.close()
            self._connection.close()
            return
        self._send(ShutdownCommand())
        self._receiver.join(CLOSE_SECONDS)  # only the receiver thread joins the process: two threads would race for its exit code
        if self._receiver.is_alive() and self._process is not None:
            self._process.kill()
            self._receiver.join()
        self._connection.close()


def _start_without_signals(process: SpawnProcess) -> None:
    """Start the child with its signals blocked: a Ctrl-C before its first line must not end it."""
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
