"""Replicas on the machines of a Ray cluster (`--data-parallel-backend ray`): the engine of each runs in a Ray actor.

    server: RoutedClient ─▶ RayReplica ── send([command]) ──▶ EngineActor: inbox ─▶ engine loop     on any machine
                            its thread ◀── messages(): lists ─────────────────────── outbox

Only the transport differs from `ReplicaProcess`: routing, resubmission and restarts are those of `replicas.py`. Ray chooses the machines
and reserves the GPUs, and an actor that is started again may land on another machine. Ray ends the actors of a driver that is gone, so
they end with the server. Ray is imported only when a replica is started.
"""
from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from minivllm.engine.loop import Engine, InboxItem, run_engine
from minivllm.engine.messages import DeadMessage, EngineCommand, EngineMessage, ReadyMessage, ShutdownCommand, StepMessage
from minivllm.engine.replica import Replica
from minivllm.engine.restarts import RestartCounter
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import InvalidInput
from minivllm.outputs import OutputDelta, RequestMetrics

CLOSE_SECONDS = 10.0  # how long to wait for the step in progress before the actor is killed
CLOCK_NOISE = 0.01  # seconds; a smaller difference of two clocks is one of the measurement

log = logging.getLogger(__name__)


def boot_time() -> float:
    """The wall-clock time at which this machine's `time.monotonic` was 0, in seconds."""
    return time.time() - time.monotonic()


class EngineActor:
    """The engine in a Ray actor. `send` and `messages` each have a thread (concurrency groups)."""

    def __init__(self, build: Callable[[], Engine], server_boot_time: float) -> None:
        self._inbox: queue.SimpleQueue[InboxItem] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[EngineMessage] = queue.SimpleQueue()
        difference = server_boot_time - boot_time()
        self._clock_difference = 0.0 if abs(difference) < CLOCK_NOISE else difference  # this machine's clock less the server's
        threading.Thread(target=run_engine, args=(build, self._inbox, self._outbox.put), name="minivllm-engine", daemon=True).start()

    def send(self, command: EngineCommand) -> None:
        if isinstance(command, EngineRequest) and self._clock_difference:
            command = replace(command, arrival_time=command.arrival_time + self._clock_difference)
        self._inbox.put(command)

    def messages(self) -> Iterator[list[EngineMessage]]:
        """All messages since the last list, as soon as there is one. Ends with the engine."""
        while True:
            batch = [self._outbox.get()]
            while not self._outbox.empty():
                batch.append(self._outbox.get())
            yield [by_clock_of_server(message, self._clock_difference) for message in batch]
            if isinstance(batch[-1], DeadMessage):
                return


def by_clock_of_server(message: EngineMessage, difference: float) -> EngineMessage:
    """A message whose times are readings of the server's clock. difference: the replica's clock less the server's, in seconds."""
    if not difference or not isinstance(message, StepMessage):
        return message

    def shifted(value: float | None) -> float | None:
        return None if value is None else value - difference

    def delta_of(delta: OutputDelta) -> OutputDelta:
        if (times := delta.metrics) is None:
            return delta
        return delta._replace(metrics=RequestMetrics(
            times.arrival_time - difference, shifted(times.first_scheduled_time), shifted(times.first_token_time),
            shifted(times.finished_time), times.num_preemptions, times.drafts))

    return replace(message, deltas=tuple(map(delta_of, message.deltas)))


class RayReplica(Replica):
    """A replica in a Ray actor. A dead one is started again up to `restarts` times in a row."""

    def __init__(self, restarts: int = 0, num_gpus: int = 0) -> None:
        super().__init__()
        self._restarts = RestartCounter(restarts)
        self._num_gpus = num_gpus
        self._actor: Any = None
        self._receiver: threading.Thread | None = None
        self._close_begun = threading.Event()

    def _start(self, build: Callable[[], Engine]) -> None:
        self._spawn(build)
        self._receiver = threading.Thread(target=self._receive_all, args=(build,), name="minivllm-receiver", daemon=True)
        self._receiver.start()

    def _spawn(self, build: Callable[[], Engine]) -> None:
        import ray

        actor = ray.remote(concurrency_groups={"commands": 1, "messages": 1})(_with_groups(ray))
        self._actor = actor.options(
            num_gpus=self._num_gpus, num_cpus=1, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD",
        ).remote(build, boot_time())

    def start_late(self, build: Callable[[], Engine], adapters: dict[str, LoRARequest]) -> None:
        """Raises `InvalidInput` if the cluster has no free GPUs or CPU: Ray would wait for them without an end."""
        import ray

        free = ray.available_resources()
        for resource, needed in (("GPU", self._num_gpus), ("CPU", 1)):
            if (there := free.get(resource, 0)) < needed:
                raise InvalidInput(f"a replica needs {needed} {resource} of the Ray cluster, and {there:g} are free")
        super().start_late(build, adapters)

    def kill(self) -> None:
        import ray

        if self._actor is not None:
            ray.kill(self._actor)

    def _send(self, command: EngineCommand) -> None:
        self._actor.send.remote(command)  # calls of one driver arrive in their order; the receiver thread notices that an actor is gone

    def _receive_all(self, build: Callable[[], Engine]) -> None:
        while True:
            self._receive_from_one()
            if not self._restarting:
                return
            counter = self._restarts
            log.warning("%s is started again in %g s (attempt %d of %d)", self._label, counter.pause, counter.failures, counter.most)
            if self._close_begun.wait(counter.pause):
                return
            self._ended = False
            self._spawn(build)

    def _receive_from_one(self) -> None:
        import ray

        try:
            for reference in self._actor.messages.remote():
                for message in ray.get(reference):
                    self._receive(message)
            reason = "the engine ended"
        except ray.exceptions.RayError as error:
            reason = f"its Ray actor ended unexpectedly ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        self._die(DeadMessage(reason))
        ray.kill(self._actor)  # its engine has ended, and its GPUs are free for the next one

    def _receive(self, message: EngineMessage) -> None:
        if isinstance(message, ReadyMessage):
            self._restarts.ready()
        super()._receive(message)

    def _may_restart(self) -> bool:
        return self._restarts.ended()

    def close(self) -> None:
        import ray

        self._closing = True
        self._close_begun.set()
        if self._actor is None:
            return
        self._send(ShutdownCommand())
        if self._receiver is not None:
            self._receiver.join(CLOSE_SECONDS)
        ray.kill(self._actor)
        if self._receiver is not None:
            self._receiver.join()


def _with_groups(ray: Any) -> type[EngineActor]:
    """`EngineActor` with a thread for commands and one for messages."""

    class GroupedActor(EngineActor):
        send = ray.method(concurrency_group="commands")(EngineActor.send)
        messages = ray.method(concurrency_group="messages")(EngineActor.messages)

    return GroupedActor


def connect(replicas: int, gpus_each: int, device: str) -> Callable[[int], RayReplica]:
    """Join the Ray cluster of this machine, or start one. Returns a maker of replicas, from their number of restarts.

    Raises `InvalidInput` if Ray is missing, or if the cluster has too few GPUs or CPUs, for which Ray would wait without an end.
    """
    try:
        import ray
    except ImportError:
        raise InvalidInput("data_parallel_backend=ray needs Ray: pip install 'minivllm[ray]'", "data_parallel_backend") from None
    if not ray.is_initialized():
        with _signals_kept():
            ray.init(log_to_driver=True)
    has = ray.cluster_resources()
    num_gpus = 0 if device == "cpu" or (device == "auto" and not has.get("GPU")) else gpus_each
    for resource, each in (("GPU", num_gpus), ("CPU", 1)):
        if (there := int(has.get(resource, 0))) < each * replicas:
            raise InvalidInput(f"data_parallel_size={replicas} needs {each * replicas} {resource}s in the Ray cluster, {each} for each "
                               f"replica, and there are {there}: give at most {there // each}, or add machines", "data_parallel_size")
    return lambda restarts: RayReplica(restarts, num_gpus)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
