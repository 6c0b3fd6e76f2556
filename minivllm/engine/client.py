"""`EngineClient`: how a server or `AsyncLLM` talks to its engine, and `ThreadClient`, whose engine runs in a thread of this process.

A client sends commands to the engine loop (see `loop.py`) and hands the deltas that come back to the streams that wait for them:

    generate(request) ──▶ add ──▶ [ loop: engine ] ──▶ one message a step ──▶ deltas sorted into streams ──▶ async for

Clients differ only in their transport: a queue and a callback here, a pipe in `process.py`. A stream belongs to the event loop on which
it was added. Messages arrive on another thread, and each step makes at most one call per event loop.
"""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Self

from minivllm.config import EngineConfig
from minivllm.engine.loop import Engine, InboxItem, run_engine
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
from minivllm.engine.metrics import EngineMetrics, EngineStats
from minivllm.engine.watch import EngineView
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import EngineDead, EngineRestarting, InvalidInput
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams

log = logging.getLogger(__name__)
# Consumes deltas on the event loop, without waking the task that reads the stream. See `EngineClient.outputs`.
Shortcut = Callable[[list[OutputDelta]], bool]


def build_engine(config: EngineConfig) -> Engine:
    """Build the engine where it will run. Imported late: a server whose engine is in another process never loads torch."""
    from minivllm.engine import compose

    return compose.build_engine(config)


class _DeltaStream:
    """The unread deltas of one request. Only its own event loop uses it, except for `unfinished` and `left`."""

    __slots__ = ("bug", "deltas", "error", "left", "loop", "open_children", "shortcut", "unfinished", "waiting", "wake")

    def __init__(self, n: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.shortcut: Shortcut | None = None
        self.waiting = False  # the reader has handled everything so far
        self.wake = asyncio.Event()
        self.deltas: list[OutputDelta] = []
        self.error: Exception | None = None  # from the engine, which has ended the request
        self.bug: Exception | None = None  # from the reader's shortcut
        self.open_children = n
        self.unfinished = n  # children whose end has not arrived; guarded by the client's lock
        self.left = False  # the reader has gone; guarded by the client's lock

    def notify(self) -> None:
        """Deltas were added to `deltas`, which was empty before."""
        try:
            consumed = self.shortcut is not None and self.waiting and self.shortcut(self.deltas)
        except Exception as bug:  # the other streams of the step must still be notified
            consumed, self.bug, self.shortcut = False, bug, None
        if consumed:
            self.deltas = []
        else:
            self.wake.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.wake.set()


class EngineClient(ABC):
    """Add, abort, outputs, stats; and `generate`, which combines them. Created by `start`, ended by `close`."""

    _label = "the engine"  # in log messages

    def __init__(self) -> None:
        # Guards _streams, _arrived, _replies, _dead, _adapters and _unseen: event loops add streams, another thread receives messages.
        self._lock = threading.Lock()
        self._streams: dict[str, _DeltaStream] = {}
        self._arrived: dict[asyncio.AbstractEventLoop, list[tuple[_DeltaStream, OutputDelta]]] = {}  # not yet in their streams
        self._replies: dict[int, Future[None]] = {}  # by number of the command
        self._dead: str | None = None  # None: it accepts requests
        self._ended = False  # the engine that was started last
        self._restarting = False  # it is dead, and will be started again
        self._adapters: dict[str, LoRARequest] = {}  # by name: loaded now, and to be loaded by the next engine
        self._info: EngineInfo | None = None
        self._closing = False
        self._on_death: Callable[[], None] | None = None
        self._unseen: dict[object, EngineView | None] = {}  # watcher -> what it has not yet looked at
        self._stats: dict[int, EngineStats] = {}  # by number of the engine: 0, or the replica's
        self._view: EngineView | None = None
        self._command_numbers = itertools.count()
        self._started: Future[None] = Future()
        self._metrics: EngineMetrics | None = None

    @classmethod
    def start(cls, config: EngineConfig) -> Self:
        """Load the model and return when requests can be accepted. Raises the engine's own error if it cannot start."""
        return cls.start_with(partial(build_engine, config))

    @classmethod
    def start_with(cls, build: Callable[[], Engine], **settings: Any) -> Self:
        """Like `start`, with the engine that `build` returns, and settings of this kind of client."""
        client = cls(**settings)
        try:
            client._start(build)
            client._started.result()
        except BaseException:
            client.close()
            raise
        return client

    @abstractmethod
    def _start(self, build: Callable[[], Engine]) -> None:
        """Start the thread or process in which `build` is called and the loop runs."""

    @abstractmethod
    def close(self) -> None:
        """End the engine and free everything. Pending streams get `EngineDead`. Safe to call twice."""

    @abstractmethod
    def _send(self, command: EngineCommand) -> None:
        """Pass a command to the loop. Never waits for the engine."""

    # -- for servers ----------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Constants of the engine: model, limits, device, sampling defaults."""
        assert self._info is not None, "a client is returned only after the engine has started"
        return self._info

    @property
    def dead(self) -> str | None:
        """Why the engine ended; None while it runs."""
        return self._dead

    @property
    def restarting(self) -> bool:
        """Whether a dead engine is being started again."""
        return self._restarting

    def on_death(self, call: Callable[[], None]) -> None:
        """Call this once, on any thread, if the engine ends for good without `close`: at once if it has ended already."""
        with self._lock:
            self._on_death = call
            dead = self._dead is not None and not self._restarting
        if dead:
            call()

    @property
    def num_engines(self) -> int:
        """How many replicas of the engine there are, living or not: with autoscaling the largest number."""
        return 1

    @property
    def num_live(self) -> int:
        """How many of them accept requests."""
        return int(self._dead is None)

    @property
    def num_wanted(self) -> int:
        """How many there should be now."""
        return 1

    @property
    def replica_states(self) -> tuple[str, ...]:
        """The state of each replica, by its number; empty for an engine without replicas."""
        return ()

    @property
    def watched(self) -> int:
        """Number of the engine whose views `watching` gives."""
        return 0

    def stats(self, engine: int | None = None) -> EngineStats:
        """The state of an engine after its last step. None: of all engines, as sums."""
        with self._lock:
            return EngineStats.total(self._stats.values()) if engine is None else self._stats.get(engine, EngineStats())

    @property
    def metrics(self) -> EngineMetrics:
        """Counters and histograms; `metrics.render()` is the text of `/metrics`."""
        assert self._metrics is not None, "a client is returned only after the engine has started"
        return self._metrics

    def add(self, request: EngineRequest) -> None:
        """Send a request to the engine. Must be called on the event loop that will read its `outputs`."""
        if not isinstance(request.params, SamplingParams):
            raise InvalidInput(f"params must be SamplingParams, got {type(request.params).__name__}", "params")
        if request.beam_search:
            raise InvalidInput("beam_search needs a choice after each token, which no client can send: use LLM.beam_search", "beam_search")
        stream = _DeltaStream(request.params.n)
        with self._lock:
            self._check_alive()
            if request.request_id in self._streams:
                raise InvalidInput(f"request id {request.request_id!r} is in use: choose another", "request_id")
            self._streams[request.request_id] = stream
            self.metrics.added(request.request_id, request.arrival_time, len(request.prompt_token_ids), request.params.n)
        try:
            self._send(request)
        except BaseException:
            with self._lock:
                del self._streams[request.request_id]
                self.metrics.refused(request.request_id)
            raise

    def abort(self, request_id: str) -> None:
        """End a request with all its children; its stream ends with finish reason "abort". Unknown ids are ignored."""
        if self._dead is None:
            self._send(AbortCommand(request_id))

    async def outputs(self, request_id: str, shortcut: Shortcut | None = None) -> AsyncGenerator[list[OutputDelta], None]:
        """Yield the new deltas of one request each time there are some. Ends when all its children have ended.

        Raises `InvalidInput` if the engine refused the request and `EngineDead` if the engine ended. Leaving early aborts the request.

        `shortcut` avoids waking a task for each token. While the reader waits, it is called on the event loop with the new deltas. Deltas
        for which it returns True are consumed and not yielded. It must return False if a child ends.
        An exception from it fails this stream alone.
        """
        stream = self._streams[request_id]
        stream.shortcut = shortcut
        try:
            while True:
                stream.waiting = True
                await stream.wake.wait()
                stream.waiting = False
                stream.wake.clear()
                if stream.bug is not None:
                    raise stream.bug
                if stream.deltas:
                    new, stream.deltas = stream.deltas, []
                    stream.open_children -= sum(delta.finish_reason is not None for delta in new)
                    yield new
                if stream.error is not None:
                    raise stream.error
                if stream.open_children == 0 and not stream.deltas:
                    return
        finally:
            stream.shortcut = None
            with self._lock:
                stream.left = True
                if stream.unfinished == 0 or stream.error is not None:
                    self._streams.pop(request_id, None)  # otherwise the id stays in use until the engine has ended the request
            if stream.open_children and stream.error is None:
                self.abort(request_id)

    async def generate(self, request: EngineRequest, shortcut: Shortcut | None = None) -> AsyncGenerator[list[OutputDelta], None]:
        """`add`, then `outputs`. Closing the generator aborts the request."""
        self.add(request)
        async with contextlib.aclosing(self.outputs(request.request_id, shortcut)) as stream:
            async for deltas in stream:
                yield deltas

    async def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Returns when the engine has done so, after every command that was sent before."""
        await asyncio.wrap_future(self._command(ResetPrefixCacheCommand))

    def load_adapter(self, request: LoRARequest) -> Future[None]:
        """Load a LoRA adapter, which requests may then have by its name. Fails with `InvalidInput` if it cannot be loaded."""
        future = self._command(partial(LoadAdapterCommand, request=request))
        future.add_done_callback(lambda done: self._remember(request) if not done.cancelled() and done.exception() is None else None)
        return future

    def _remember(self, request: LoRARequest) -> None:
        with self._lock:
            self._adapters[request.lora_name] = request

    def unload_adapter(self, lora_name: str) -> Future[None]:
        """Forget a LoRA adapter. Running requests finish with it. Fails with `InvalidInput` for an unknown name."""
        with self._lock:
            self._adapters.pop(lora_name, None)
        return self._command(partial(UnloadAdapterCommand, lora_name=lora_name))

    def _command(self, make: Callable[[int], EngineCommand], *, reviving: bool = False) -> Future[None]:
        """Send the command that `make` returns for a number. The future is done when the engine has obeyed."""
        future: Future[None] = Future()
        number = next(self._command_numbers)
        with self._lock:
            if not reviving:
                self._check_alive()
            self._replies[number] = future
        self._send(make(number))
        return future

    @contextlib.contextmanager
    def watching(self) -> Iterator[Callable[[], EngineView | None]]:
        """Make the engine send views of itself as long as the context is open.

        Gives a function that returns the latest view with all steps since its last call, or None if there is no new view.
        """
        watcher = object()

        def take() -> EngineView | None:
            with self._lock:
                view, self._unseen[watcher] = self._unseen[watcher], None
            return view

        with self._lock:
            self._check_alive()
            if not self._unseen:
                self._view = None
                self._send(WatchCommand(True))
            self._unseen[watcher] = None if self._view is None else replace(self._view, steps=(), num_skipped=0)
        try:
            yield take
        finally:
            with self._lock:
                del self._unseen[watcher]
                if not self._unseen and self._dead is None:
                    self._send(WatchCommand(False))

    # -- messages, on the thread on which they arrive -------------------------------------------------------------------

    def _receive(self, message: EngineMessage) -> None:
        if isinstance(message, StepMessage):
            self._deliver(message)
        elif isinstance(message, RefusedMessage):
            self._refuse(message)
        elif isinstance(message, ObeyedMessage):
            with self._lock:
                future = self._replies.pop(message.number)
            if not future.set_running_or_notify_cancel():  # the caller has been cancelled
                return
            if message.error is None:
                future.set_result(None)
            else:
                future.set_exception(message.error)
        elif isinstance(message, ReadyMessage):
            self._info = message.info
            if self._metrics is None:
                self._metrics = EngineMetrics(message.info.model)
            if self._dead is None:
                self._started.set_result(None)
            else:
                self._reload()
        else:
            self._die(message)

    def _deliver(self, message: StepMessage, engine: int = 0) -> None:
        """Sort a step's deltas by event loop. If an event loop has not yet handled an earlier step, one call handles both."""
        to_call: list[asyncio.AbstractEventLoop] = []
        with self._lock:
            self._stats[engine] = message.stats
            if message.view is not None:
                self._view = message.view
                for watcher, unseen in self._unseen.items():
                    self._unseen[watcher] = message.view if unseen is None else message.view.after(unseen)
            self.metrics.observe(message.deltas, message.stats, engine)
            for delta in message.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is None:
                    continue
                stream.unfinished -= delta.finish_reason is not None
                if not stream.left:
                    arrived = self._arrived.get(stream.loop)
                    if arrived is None:
                        arrived = self._arrived[stream.loop] = []
                        to_call.append(stream.loop)
                    arrived.append((stream, delta))
                elif stream.unfinished == 0:
                    del self._streams[delta.request_id]
        for loop in to_call:
            if not _call(loop, partial(self._sort_into_streams, loop)):
                with self._lock:
                    del self._arrived[loop]

    def _sort_into_streams(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs on the event loop."""
        with self._lock:
            arrived = self._arrived.pop(loop)
        to_notify = []
        for stream, delta in arrived:
            if not stream.deltas:
                to_notify.append(stream)
            stream.deltas.append(delta)
        for stream in to_notify:
            stream.notify()

    def _refuse(self, message: RefusedMessage) -> None:
        with self._lock:
            self.metrics.refused(message.request_id)
        self._fail([message.request_id], message.error)

    def _fail(self, request_ids: Iterable[str] | None, error: Exception) -> None:
        """End the streams of these requests, or all, with an error: no delta will arrive for them any more."""
        waiting = []
        with self._lock:
            for request_id in list(self._streams) if request_ids is None else request_ids:
                if self._metrics is not None:
                    self._metrics.failed(request_id)
                stream = self._streams.get(request_id)
                if stream is None:
                    continue
                stream.unfinished = 0  # if the reader leaves before the error reaches its event loop, it removes the stream
                if stream.left:
                    del self._streams[request_id]
                else:
                    waiting.append(stream)
        for stream in waiting:
            _call(stream.loop, partial(stream.fail, error))

    def _may_restart(self) -> bool:
        """Whether an engine that has just ended will be started again."""
        return False

    def _die(self, message: DeadMessage) -> None:
        """The engine has ended: fail everything that waits for it."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._restarting = self._started.done() and not self._closing and self._may_restart()
            self._dead = message.reason
            replies = list(self._replies.values())
            self._replies.clear()
            self._stats.clear()
            if self._metrics is not None:
                self._metrics.engine_ended()
            call = None if self._closing or self._restarting else self._on_death
        if self._started.done() and not self._closing:
            log.error("%s has stopped: %s", self._label, message.reason)
        error = (EngineRestarting if self._restarting else EngineDead)(message.reason)
        self._fail(None, error)
        for future in replies:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        if not self._started.done():
            self._started.set_exception(message.error or EngineDead(message.reason))
        if call is not None:
            call()

    def _reload(self) -> None:
        """A new engine is ready. It accepts requests when it has the adapters of the one before."""
        with self._lock:
            adapters = list(self._adapters.values())
        remaining = [self._command(partial(LoadAdapterCommand, request=request), reviving=True) for request in adapters]

        def loaded(done: Future[None]) -> None:
            remaining.remove(done)
            if (error := done.exception()) is not None:
                log.error("an adapter could not be loaded again: %s", error)
            if not remaining:
                self._revive()

        for future in list(remaining):
            future.add_done_callback(loaded)
        if not adapters:
            self._revive()

    def _revive(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._dead, self._restarting = None, False
            if self._unseen:
                self._send(WatchCommand(True))
        if self._started.done():
            log.warning("%s runs again", self._label)
        else:
            log.info("%s runs", self._label)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise (EngineRestarting if self._restarting else EngineDead)(self._dead)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> bool:
    """Call a function on an event loop. False: the loop was closed, so its streams have no readers."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return False
    return True


class ThreadClient(EngineClient):
    """The engine in a thread of this process: nothing is copied, but engine and server share Python's global lock."""

    def __init__(self) -> None:
        super().__init__()
        self._inbox: queue.SimpleQueue[InboxItem] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def _start(self, build: Callable[[], Engine]) -> None:
        self._thread = threading.Thread(
            target=run_engine, args=(build, self._inbox, self._receive), name="minivllm-engine", daemon=True)
        self._thread.start()

    def _send(self, command: EngineCommand) -> None:
        self._inbox.put(command)

    def close(self) -> None:
        self._closing = True
        self._inbox.put(ShutdownCommand())
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
