"""One replica of a `RoutedClient` (`engine/replicas.py`): a client without streams, whose engine has its part of the machine."""
from __future__ import annotations

import contextlib
import os
import queue
import threading
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Protocol

from minivllm.engine.client import EngineClient
from minivllm.engine.loop import Engine
from minivllm.engine.messages import DeadMessage, EngineCommand, RefusedMessage, StepMessage
from minivllm.engine.process import ProcessClient
from minivllm.engine_request import LoRARequest
from minivllm.errors import InvalidInput


class ReplicaOwner(Protocol):
    """The `RoutedClient`, as its replicas see it. They call it on their threads, with their numbers."""

    def stepped(self, number: int, message: StepMessage) -> None: ...
    def refused(self, number: int, message: RefusedMessage) -> None: ...
    def replica_started(self, number: int) -> None: ...
    def replica_ended(self, number: int, reason: str) -> None: ...


class Replica(EngineClient):
    """What the client of each replica adds to its transport: messages about requests go to the `RoutedClient`."""

    _owner: ReplicaOwner
    _number: int
    fresh = True  # it was never started

    def join(self, owner: ReplicaOwner, number: int) -> None:
        self._owner, self._number, self._label = owner, number, f"replica {number}"

    def send(self, command: EngineCommand) -> None:
        self._send(command)

    def command(self, make: Callable[[int], EngineCommand]) -> Future[None]:
        return self._command(make)

    def start_late(self, build: Callable[[], Engine], adapters: dict[str, LoRARequest]) -> None:
        """Start while the server runs. When it has these adapters and accepts requests, the owner is told. Raises if nothing can start."""
        self.fresh = False
        self._adapters = adapters
        self._dead, self._restarting = "it is being started", True
        self._start(build)

    def stay_ended(self) -> None:
        """Do not start it again. Called while the owner is told of its end."""
        self._restarting = False

    @abstractmethod
    def kill(self) -> None:
        """End its process at once. It is then as if it had ended by itself."""

    @property
    def started(self) -> Future[None]:
        return self._started

    def _deliver(self, message: StepMessage, engine: int = 0) -> None:
        self._owner.stepped(self._number, message)

    def _refuse(self, message: RefusedMessage) -> None:
        self._owner.refused(self._number, message)

    def _die(self, message: DeadMessage) -> None:
        again = self._ended
        super()._die(message)
        if not again:
            self._owner.replica_ended(self._number, message.reason)

    def _revive(self) -> None:
        super()._revive()
        if self._dead is None:
            if not self._started.done():  # `start_late`
                self._started.set_result(None)
            self._owner.replica_started(self._number)


class ReplicaProcess(Replica, ProcessClient):
    """A replica in a process of this machine."""

    _sender: PipeSender | None = None

    def _spawn(self, build: Callable[[], Engine]) -> None:
        super()._spawn(build)
        self._sender = PipeSender(self._connection)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _send(self, command: EngineCommand) -> None:
        if self._sender is not None:
            self._sender.send(command)

    def _receive_from_one(self) -> None:
        super()._receive_from_one()
        assert self._sender is not None
        self._sender.end()  # before the connection is closed: the process is gone, so no write waits for it


class PipeSender:
    """Writes commands to a pipe on its own thread: a process that does not read its pipe delays no command to another one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()  # pickled; None: the end
        self._thread = threading.Thread(target=self._run, name="minivllm-sender", daemon=True)
        self._thread.start()

    def send(self, command: EngineCommand) -> None:
        """Write a command after those before it. It is dropped if the other end of the pipe is closed."""
        self._commands.put(ForkingPickler.dumps(command))  # here, so that a command that cannot be pickled fails its caller

    def end(self) -> None:
        """Return when nothing is being written any more."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            with contextlib.suppress(OSError):  # the process is gone; the receiver thread notices it too
                self._connection.send_bytes(command)


def build_replica(prepare: Callable[[int, int], None] | None, number: int, size: int, build: Callable[[], Engine]) -> Engine:
    """Runs in the replica's process."""
    if prepare is not None:
        prepare(number, size)
    return build()


def share_machine(device: str, gpus_each: int, name: str, number: int, size: int) -> None:
    """Give a replica its part of the machine: its GPUs, or its part of the CPU's threads. Called before PyTorch uses a device.

    name: the setting that `size`, the largest number of replicas, comes from.
    """
    import torch

    count = 0 if device == "cpu" else torch.cuda.device_count()
    if not count:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
        return
    if count < size * gpus_each:
        raise InvalidInput(f"{name}={size} needs {size * gpus_each} GPUs, {gpus_each} for each replica, and there are {count}: "
                           f"give at most {count // gpus_each}", name)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) >= size * gpus_each else [str(index) for index in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[number * gpus_each:(number + 1) * gpus_each])
