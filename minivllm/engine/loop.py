"""The engine's side of the client: one loop that owns an engine, wherever it runs, and the messages that cross.

    client                        loop (a thread, or a process of its own)
      EngineRequest, ... ──────▶  inbox: drained before each step; a blocking wait when there is nothing to do
      StepMessage        ◀──────  one message a step for all streams together
      Refused, Answer    ◀──────  one request was not accepted; the reply to a Reset
      Ready | Dead       ◀──────  the first message; the last one

Messages are plain picklable values. The loop never polls: it is either computing or asleep in `inbox.get()`.
"""
from __future__ import annotations

import logging
import queue
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from minivllm.engine.metrics import EngineStats
from minivllm.engine.watch import EngineView
from minivllm.engine_request import EngineRequest
from minivllm.errors import EngineDead, InvalidInput
from minivllm.outputs import OutputDelta

if TYPE_CHECKING:
    from minivllm.engine.engine import LLMEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a server must know about the engine behind a client. Constant for the engine's life."""

    model: str  # name of the model as found: hub id, folder or file name
    model_folder: str
    tokenizer_folder: str | None  # None: no tokenizer (prompts are token ids and no text comes out)
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    num_blocks: int
    block_size: int
    generation_config: dict[str, Any]  # the model's own sampling defaults: temperature, top_p ...
    scheduling_policy: str = "fcfs"


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    ticket: int


@dataclass(frozen=True, slots=True)
class WatchEngine:
    """Put views of the engine into the step messages, or no longer."""

    on: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """From the loop's own helper threads: what a request needed has been compiled, or is no good."""

    request: EngineRequest
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Shutdown:
    pass


@dataclass(frozen=True, slots=True)
class Ready:
    info: EngineInfo


@dataclass(frozen=True, slots=True)
class StepMessage:
    """All deltas of one step (or of the aborts before it), and the gauges after it."""

    deltas: tuple[OutputDelta, ...]
    stats: EngineStats
    view: EngineView | None = None  # some times a second, while somebody watches

    def __reduce__(self) -> tuple[Callable[..., StepMessage], tuple[object, ...]]:
        """Pickled as columns, for a fifth of the time: most columns hold one value over and over."""
        return _step_message, (tuple(zip(*self.deltas, strict=True)), self.stats, self.view)


def _step_message(columns: tuple[tuple[object, ...], ...], stats: EngineStats, view: EngineView | None) -> StepMessage:
    return StepMessage(tuple(map(_new_delta, zip(*columns, strict=True))), stats, view)


_new_delta = partial(tuple.__new__, OutputDelta)


@dataclass(frozen=True, slots=True)
class Refused:
    request_id: str
    error: InvalidInput


@dataclass(frozen=True, slots=True)
class Answer:
    ticket: int


@dataclass(frozen=True, slots=True)
class Dead:
    """The loop has ended. `error` is set when a user's mistake prevented the start."""

    reason: str
    error: InvalidInput | None = None


Command: TypeAlias = EngineRequest | Abort | ResetPrefixCache | WatchEngine | Prepared | Shutdown
Message: TypeAlias = Ready | StepMessage | Refused | Answer | Dead


def run_engine(
    build: Callable[[], LLMEngine], inbox: queue.SimpleQueue[Command], send: Callable[[Message], None],
) -> None:
    """Build an engine and serve it until `Shutdown`. Every way out ends with a `Dead` message; nothing is raised."""
    engine: LLMEngine | None = None
    try:
        engine = build()
        send(Ready(engine.info()))
        EngineLoop(engine, inbox, send).run()
        farewell = Dead("the engine was closed")
    except (InvalidInput, TypeError) as error:
        known = error if isinstance(error, InvalidInput) and engine is None else None
        farewell = Dead(_reason(error), known)
    except BaseException as error:
        farewell = Dead(_reason(error))
    if engine is not None:
        try:
            engine.close()
        except Exception:
            log.exception("closing the engine failed")
    send(farewell)


def _reason(error: BaseException) -> str:
    if isinstance(error, (EngineDead, InvalidInput)):
        return str(error)
    log.error("the engine died:\n%s", "".join(traceback.format_exception(error)).rstrip())
    return f"{type(error).__name__}: {error}"


class EngineLoop:
    """Commands in, steps, messages out. `rounds` counts passes of the loop: it stands still while the engine is idle."""

    def __init__(
        self, engine: LLMEngine, inbox: queue.SimpleQueue[Command], send: Callable[[Message], None],
    ) -> None:
        self.engine = engine
        self.inbox = inbox
        self.send = send
        self.rounds = 0
        self._watched = False
        self._helpers = ThreadPoolExecutor(2, "minivllm-compile")  # starts its threads when they are needed
        self._preparing: dict[str, EngineRequest] = {}

    def run(self) -> None:
        try:
            self._run()
        finally:
            self._helpers.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while True:
            self.rounds += 1
            deltas: list[OutputDelta] = []
            if not self._commands(deltas):
                return
            if self.engine.has_unfinished_requests():
                deltas += self.engine.step()
            self.send(StepMessage(tuple(deltas), self.engine.stats(), self.engine.view() if self._watched else None))

    def _commands(self, deltas: list[OutputDelta]) -> bool:
        """Obey every command that has arrived; sleep until one does if there is no work. False: shut down.

        Those that arrive meanwhile have their turn after the next step: a flood of commands cannot hold it up.
        """
        wait = not self.engine.has_unfinished_requests()
        for _ in range(max(self.inbox.qsize(), int(wait))):
            try:
                command = self.inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if isinstance(command, Shutdown):
                return False
            if isinstance(command, Abort):
                deltas += self._abort(command.request_id)
            elif isinstance(command, ResetPrefixCache):
                self.engine.reset_prefix_cache()
                self.send(Answer(command.ticket))
            elif isinstance(command, WatchEngine):
                self._watched = command.on
                self.engine.watch(command.on)
            elif isinstance(command, Prepared):
                self._prepared(command)
            else:
                self._prepare(command)
        return True

    def _abort(self, request_id: str) -> list[OutputDelta]:
        request = self._preparing.pop(request_id, None)
        if request is None:
            return self.engine.abort_request(request_id)
        return [OutputDelta(request_id, index, (), "", finish_reason="abort") for index in range(request.params.n)]

    def _prepare(self, request: EngineRequest) -> None:
        """Let a helper thread compile the request's grammar while steps go on; most requests have none, or a known one."""
        work = self.engine.preparation(request.params)
        if work is None:
            self._add(request)
            return

        def prepare() -> None:
            error = None
            try:
                work()
            except Exception as failure:
                error = failure
            self.inbox.put(Prepared(request, error))

        self._preparing[request.request_id] = request
        self._helpers.submit(prepare)

    def _prepared(self, command: Prepared) -> None:
        request = command.request
        if self._preparing.get(request.request_id) is not request:
            return  # aborted meanwhile
        del self._preparing[request.request_id]
        self._add(request, command.error)

    def _add(self, request: EngineRequest, error: Exception | None = None) -> None:
        try:
            if error is not None:
                raise error
            self.engine.add(request)
        except InvalidInput as error:
            self.send(Refused(request.request_id, error))
        except Exception as error:  # a bug of ours in reading one request must not end the others
            log.exception("request %s could not be read", request.request_id)
            self.send(Refused(request.request_id, InvalidInput(f"the request could not be read ({type(error).__name__})")))
