"""The server's door to the engine: `EngineClient`, with the engine in a thread or in a process of its own.

A client sends small messages to the engine's loop (see `loop.py`) and hands its answers to the streams that wait for them:

    generate(request) ──▶ add ──▶ [ loop: engine ] ──▶ one message a step ──▶ deltas sorted into streams ──▶ async for

Both clients share everything but the transport: a queue and a callback, or a pipe. A stream belongs to the event loop that
asked for it; answers come in on another thread and are passed over with one call per step and event loop.
"""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from minivllm.config import EngineConfig
from minivllm.engine.loop import (
    Abort,
    Answer,
    Command,
    Dead,
    EngineInfo,
    Message,
    Ready,
    Refused,
    ResetPrefixCache,
    Shutdown,
    StepMessage,
    WatchEngine,
    run_engine,
)
from minivllm.engine.metrics import EngineMetrics, EngineStats
from minivllm.engine.watch import EngineView
from minivllm.engine_request import EngineRequest
from minivllm.errors import EngineDead, InvalidInput
from minivllm.outputs import OutputDelta

if TYPE_CHECKING:
    from minivllm.engine.engine import LLMEngine

__all__ = ["EngineClient", "EngineInfo", "EngineStats", "ThreadClient", "start_client"]


Shortcut = Callable[[list[OutputDelta]], bool]


class _Stream:
    """What has arrived for one request and was not read yet. Touched only from its own event loop, but for the last two fields."""

    __slots__ = ("deltas", "error", "left", "loop", "open_children", "shortcut", "unfinished", "waiting", "wake")

    def __init__(self, n: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.shortcut: Shortcut | None = None
        self.waiting = False  # the reader has dealt with everything so far
        self.wake = asyncio.Event()
        self.deltas: list[OutputDelta] = []
        self.error: Exception | None = None
        self.open_children = n
        self.unfinished = n  # children whose end the engine has not told yet; guarded by the client's lock
        self.left = False  # nobody reads any more; likewise

    def tell(self) -> None:
        """Something was added to `deltas`, which were empty before."""
        if self.shortcut is not None and self.waiting and self.shortcut(self.deltas):
            self.deltas = []
        else:
            self.wake.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.wake.set()


class EngineClient(ABC):
    """Add, abort, outputs, stats; and `generate`, which is the four together. Made by `start`, ended by `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the five below: streams come and go on event loops, answers on another thread
        self._streams: dict[str, _Stream] = {}
        self._arrived: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, OutputDelta]]] = {}  # not sorted into streams yet
        self._tickets: dict[int, Future[None]] = {}
        self._dead: str | None = None
        self._stats = EngineStats()
        self._watchers = 0
        self._view: EngineView | None = None
        self._next_ticket = itertools.count()
        self._started: Future[EngineInfo] = Future()
        self._metrics: EngineMetrics | None = None

    # -- what a server uses -------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Constants of the engine: model, limits, device, sampling defaults."""
        return self._started.result()

    @property
    def dead(self) -> str | None:
        """Why the engine ended; None while it lives."""
        return self._dead

    def stats(self) -> EngineStats:
        """The engine's state after its last step."""
        return self._stats

    @property
    def metrics(self) -> EngineMetrics:
        """Counters and histograms; `metrics.render()` is the text of `/metrics`."""
        assert self._metrics is not None, "a client is handed out only after the engine has started"
        return self._metrics

    def add(self, request: EngineRequest) -> None:
        """Hand a request to the engine. Must be called on the event loop that will read its `outputs`."""
        stream = _Stream(request.params.n)
        with self._lock:
            self._check_alive()
            if request.request_id in self._streams:
                raise InvalidInput(f"request id {request.request_id!r} is in use: choose another", "request_id")
            self._streams[request.request_id] = stream
            self.metrics.added(
                request.request_id, request.arrival_time, len(request.prompt_token_ids), request.params.n,
            )
        self._send(request)

    def abort(self, request_id: str) -> None:
        """End a request, all its children; its stream ends with finish reason "abort". Unknown ids are ignored."""
        if self._dead is None:
            self._send(Abort(request_id))

    async def outputs(self, request_id: str, shortcut: Shortcut | None = None) -> AsyncGenerator[list[OutputDelta], None]:
        """Everything new of one request, each time there is something; ends when all its children have ended.

        Raises `InvalidInput` if the engine refused the request and `EngineDead` if it died. Leaving early aborts.

        `shortcut` saves waking a task for each token: while the reader waits for news it is called with what is new, on the event
        loop; what it returns True for is dealt with and is not yielded. It must return False if a child ends, and must not raise.
        """
        stream = self._streams[request_id]
        stream.shortcut = shortcut
        try:
            while True:
                stream.waiting = True
                await stream.wake.wait()
                stream.waiting = False
                stream.wake.clear()
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
                    self._streams.pop(request_id, None)  # else the id stays in use until the engine has ended the request
            if stream.open_children and stream.error is None:
                self.abort(request_id)

    async def generate(self, request: EngineRequest, shortcut: Shortcut | None = None) -> AsyncGenerator[list[OutputDelta], None]:
        """`add`, then `outputs`; closing the generator (a client that went away) aborts the request."""
        self.add(request)
        async with contextlib.aclosing(self.outputs(request.request_id, shortcut)) as stream:
            async for deltas in stream:
                yield deltas

    async def reset_prefix_cache(self) -> None:
        """Forget all shared prefixes. Returns once the engine has done so, and everything sent to it before."""
        future: Future[None] = Future()
        ticket = next(self._next_ticket)
        with self._lock:
            self._check_alive()
            self._tickets[ticket] = future
        self._send(ResetPrefixCache(ticket))
        await asyncio.wrap_future(future)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Callable[[], EngineView | None]]:
        """Make the engine show what it is doing, as long as anybody is inside; gives a function that tells the latest view."""
        with self._lock:
            self._check_alive()
            self._watchers += 1
            if self._watchers == 1:
                self._view = None
                self._send(WatchEngine(True))
        try:
            yield lambda: self._view
        finally:
            with self._lock:
                self._watchers -= 1
                if self._watchers == 0 and self._dead is None:
                    self._send(WatchEngine(False))

    @abstractmethod
    def close(self) -> None:
        """End the engine and give everything back. Pending streams get `EngineDead`. Safe to call twice."""

    # -- answers, on whichever thread they come in ----------------------------------------------------------------------

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Pass a command to the loop. Never waits for the engine."""

    def _receive(self, message: Message) -> None:
        if isinstance(message, StepMessage):
            self._deliver(message)
        elif isinstance(message, Refused):
            self._refuse(message)
        elif isinstance(message, Answer):
            with self._lock:
                future = self._tickets.pop(message.ticket)
            if future.set_running_or_notify_cancel():  # False: whoever asked has stopped waiting
                future.set_result(None)
        elif isinstance(message, Ready):
            self._metrics = EngineMetrics(message.info.model)
            self._started.set_result(message.info)
        else:
            self._die(message)

    def _deliver(self, message: StepMessage) -> None:
        """Sort a step's deltas by event loop. A loop that has not got round to the last step's gets both in one call."""
        called: list[asyncio.AbstractEventLoop] = []
        with self._lock:
            self._stats = message.stats
            self._view = message.view or self._view
            self.metrics.observe(message.deltas, message.stats)
            for delta in message.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is None:
                    continue
                stream.unfinished -= delta.finish_reason is not None
                if not stream.left:
                    arrived = self._arrived.get(stream.loop)
                    if arrived is None:
                        arrived = self._arrived[stream.loop] = []
                        called.append(stream.loop)
                    arrived.append((stream, delta))
                elif stream.unfinished == 0:
                    del self._streams[delta.request_id]
        for loop in called:
            if not _call(loop, partial(self._sort_into_streams, loop)):
                with self._lock:
                    del self._arrived[loop]

    def _sort_into_streams(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs on the event loop."""
        with self._lock:
            arrived = self._arrived.pop(loop)
        news = []
        for stream, delta in arrived:
            if not stream.deltas:
                news.append(stream)
            stream.deltas.append(delta)
        for stream in news:
            stream.tell()

    def _refuse(self, message: Refused) -> None:
        with self._lock:
            self.metrics.refused(message.request_id)
            stream = self._streams.get(message.request_id)
            if stream is not None:
                stream.unfinished = 0  # nothing more will come, even if its reader leaves before it hears of it
                if stream.left:
                    del self._streams[message.request_id]
        if stream is not None:
            _call(stream.loop, partial(stream.fail, message.error))

    def _die(self, message: Dead) -> None:
        with self._lock:
            if self._dead is not None:
                return
            self._dead = message.reason
            streams, tickets = list(self._streams.values()), list(self._tickets.values())
            self._tickets.clear()
        for stream in streams:
            _call(stream.loop, partial(stream.fail, EngineDead(message.reason)))
        for future in tickets:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineDead(message.reason))
        if not self._started.done():
            self._started.set_exception(message.error or EngineDead(message.reason))

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> bool:
    """False: that event loop was closed under its streams, and nobody is left to read them."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return False
    return True


class ThreadClient(EngineClient):
    """The engine in a thread of this process: no copies, but it shares Python's lock with the server."""

    def __init__(self) -> None:
        super().__init__()
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @classmethod
    def start(cls, config: EngineConfig) -> ThreadClient:
        """Load the model and return when requests can be accepted."""
        from minivllm.engine.engine import LLMEngine

        return cls.start_with(partial(LLMEngine.from_config, config))

    @classmethod
    def start_with(cls, build: Callable[[], LLMEngine]) -> ThreadClient:
        client = cls()
        thread = threading.Thread(
            target=run_engine, args=(build, client._inbox, client._receive), name="minivllm-engine", daemon=True,
        )
        client._thread = thread
        thread.start()
        try:
            client._started.result()
        except BaseException:
            client.close()
            raise
        return client

    def _send(self, command: Command) -> None:
        self._inbox.put(command)

    def close(self) -> None:
        self._inbox.put(Shutdown())
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def start_client(config: EngineConfig, *, process: bool) -> EngineClient:
    """An engine in its own process, or in a thread of this one."""
    from minivllm.engine.process import ProcessClient

    return ProcessClient.start(config) if process else ThreadClient.start(config)
