"""The engine loop: receives commands, runs the engine's steps, sends messages. It runs in a thread or in a separate process.

The inbox is drained before each step. While there is no work, the loop prepares what the start has left for later (CUDA graphs), piece by
piece until a command arrives. Then it sleeps in `inbox.get()`; it never polls.
"""
from __future__ import annotations

import logging
import queue
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

from minivllm.engine.messages import (
    AbortCommand,
    DeadMessage,
    EngineCommand,
    EngineInfo,
    EngineMessage,
    LoadAdapterCommand,
    ObeyedMessage,
    ReadyMessage,
    RefusedMessage,
    ResetPrefixCacheCommand,
    ShutdownCommand,
    StepMessage,
    UnloadAdapterCommand,
    WatchCommand,
)
from minivllm.engine.metrics import EngineStats
from minivllm.engine.preparation_queue import PreparationQueue, PreparationWork, QueuedWork
from minivllm.engine.watch import EngineView
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import EngineDead, InvalidInput
from minivllm.outputs import OutputDelta

COMMAND_SECONDS = 0.05  # for commands between two steps

log = logging.getLogger(__name__)


class Engine(Protocol):
    """The methods of an engine that the loop calls. `EngineCore` has them."""

    def info(self) -> EngineInfo: ...

    def stats(self) -> EngineStats: ...

    def warm_up(self) -> None: ...

    def prepare_ahead(self) -> bool: ...

    def check_room(self, owner: str, num_preparing: int) -> None: ...

    def preparation(self, request: EngineRequest | LoRARequest) -> PreparationWork | None: ...

    def add(self, request: EngineRequest) -> None: ...

    def abort_request(self, request_id: str) -> list[OutputDelta]: ...

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> list[OutputDelta]: ...

    def watch(self, on: bool) -> None: ...

    def view(self) -> EngineView | None: ...

    def reset_prefix_cache(self) -> None: ...

    def load_adapter(self, request: LoRARequest) -> None: ...

    def unload_adapter(self, lora_name: str) -> None: ...

    def when_failed(self, call: Callable[[Exception], None]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PreparedCommand:
    """From a thread to the loop: a request's grammar has been compiled, or an adapter been read, or that has failed."""

    command: EngineRequest | LoadAdapterCommand
    error: Exception | None


@dataclass(frozen=True, slots=True)
class ExecutorFailed:
    """To the loop: the executor cannot go on. It may have noticed this while no step ran."""

    error: Exception


InboxItem: TypeAlias = EngineCommand | PreparedCommand | ExecutorFailed


def run_engine(
    build: Callable[[], Engine], inbox: queue.SimpleQueue[InboxItem], send: Callable[[EngineMessage], None],
) -> None:
    """Build an engine and run its loop until `ShutdownCommand`. The last message is always `DeadMessage`; nothing is raised."""
    engine: Engine | None = None
    try:
        engine = build()
        engine.when_failed(lambda error: inbox.put(ExecutorFailed(error)))
        send(ReadyMessage(engine.info()))
        engine.warm_up()
        EngineLoop(engine, inbox, send).run()
        last_message = DeadMessage("the engine was closed")
    except InvalidInput as error:
        last_message = DeadMessage(str(error), error if engine is None else None)
    except BaseException as error:
        last_message = DeadMessage(_reason(error))
    if engine is not None:
        try:
            engine.close()
        except Exception:
            log.exception("closing the engine failed")
    send(last_message)


def _reason(error: BaseException) -> str:
    if isinstance(error, EngineDead):
        return str(error)
    log.error("the engine died:\n%s", "".join(traceback.format_exception(error)).rstrip())
    return f"{type(error).__name__}: {error}"


class EngineLoop:
    """Commands in, steps, messages out."""

    def __init__(self, engine: Engine, inbox: queue.SimpleQueue[InboxItem], send: Callable[[EngineMessage], None]) -> None:
        self.engine = engine
        self.inbox = inbox
        self.send = send
        self.rounds = 0  # passes of the loop; constant while the engine is idle
        self._watched = False
        self._preparing: dict[str, QueuedWork] = {}  # by id: requests whose grammar is compiled or adapter is read; they count as waiting
        self._queue = PreparationQueue(lambda command, error: self.inbox.put(PreparedCommand(command, error)))

    def run(self) -> None:
        try:
            self._run()
        finally:
            self._queue.close()
            for job in self._preparing.values():
                job.work.cancel()

    def _run(self) -> None:
        while True:
            self.rounds += 1
            deltas: list[OutputDelta] = []
            if not self._obey_commands(deltas):
                return
            if self.engine.has_unfinished_requests():
                deltas += self.engine.step()
            self.send(StepMessage(tuple(deltas), self.engine.stats(), self.engine.view() if self._watched else None))

    def _obey_commands(self, deltas: list[OutputDelta]) -> bool:
        """Obey every command that has arrived; without work, sleep until one arrives. False: shut down.

        A command that arrives meanwhile waits for the next round, and so do those that are left after `COMMAND_SECONDS`. So a flood of
        commands cannot delay a step for long.
        """
        wait = not self.engine.has_unfinished_requests()
        while wait and self.inbox.empty() and self.engine.prepare_ahead():
            pass
        end = None if wait else time.perf_counter() + COMMAND_SECONDS
        for _ in range(max(self.inbox.qsize(), int(wait))):
            try:
                command = self.inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if isinstance(command, ShutdownCommand):
                return False
            if isinstance(command, AbortCommand):
                deltas += self._abort(command.request_id)
            elif isinstance(command, ResetPrefixCacheCommand):
                self.engine.reset_prefix_cache()
                self.send(ObeyedMessage(command.number))
            elif isinstance(command, WatchCommand):
                self._watched = command.on
                self.engine.watch(command.on)
            elif isinstance(command, UnloadAdapterCommand):
                self._obey(command.number, partial(self.engine.unload_adapter, command.lora_name))
            elif isinstance(command, PreparedCommand):
                self._continue(command)
            elif isinstance(command, ExecutorFailed):
                raise command.error
            else:
                self._prepare(command)
            if end is not None and time.perf_counter() > end:
                return True
        return True

    def _abort(self, request_id: str) -> list[OutputDelta]:
        job = self._preparing.pop(request_id, None)
        if job is None:
            return self.engine.abort_request(request_id)
        job.work.cancel()
        request = job.command
        assert isinstance(request, EngineRequest)
        return [OutputDelta(request_id, index, (), "", finish_reason="abort") for index in range(request.params.n)]

    def _prepare(self, command: EngineRequest | LoadAdapterCommand) -> None:
        """Add a request or an adapter. What must be compiled or read first is left to a thread, while steps continue."""
        request = command if isinstance(command, EngineRequest) else command.request
        try:
            if isinstance(request, EngineRequest):
                self.engine.check_room(request.owner, len(self._preparing))
            work = self.engine.preparation(request)
        except Exception as error:
            self._finish(command, error)
            return
        if work is None:
            self._finish(command)
            return
        job = self._queue.add(command, request.owner if isinstance(request, EngineRequest) else "", work)
        if isinstance(request, EngineRequest):
            self._preparing[request.request_id] = job

    def _continue(self, prepared: PreparedCommand) -> None:
        if isinstance(command := prepared.command, EngineRequest):
            job = self._preparing.get(command.request_id)
            if job is None or job.command is not command:
                return  # aborted meanwhile
            del self._preparing[command.request_id]
        self._finish(command, prepared.error)

    def _finish(self, command: EngineRequest | LoadAdapterCommand, error: Exception | None = None) -> None:
        if isinstance(command, EngineRequest):
            self._add(command, error)
        else:
            self._obey(command.number, partial(self._load, command.request, error))

    def _load(self, request: LoRARequest, error: Exception | None) -> None:
        if error is not None:
            raise error
        self.engine.load_adapter(request)

    def _obey(self, number: int, work: Callable[[], None]) -> None:
        """Obey a command and reply to it."""
        refusal = None
        try:
            work()
        except InvalidInput as error:
            refusal = error
        except Exception as bug:
            log.exception("a command could not be obeyed because of a bug")
            refusal = InvalidInput(f"the command could not be obeyed because of a bug ({type(bug).__name__})")
        self.send(ObeyedMessage(number, refusal))

    def _add(self, request: EngineRequest, error: Exception | None = None) -> None:
        try:
            if error is not None:
                raise error
            self.engine.add(request)
        except InvalidInput as refusal:
            self.send(RefusedMessage(request.request_id, refusal))
        except Exception as bug:  # an error in this code while it adds one request must not end the others
            log.exception("request %s could not be added because of a bug", request.request_id)
            self.send(RefusedMessage(
                request.request_id, InvalidInput(f"the request could not be added because of a bug ({type(bug).__name__})")))
