"""`RoutedClient`: several engines with one model behind one `EngineClient` (`--data-parallel-size`).

    server ─▶ RoutedClient ─┬─▶ replica 0 (a client with its engine in a process)
              streams       ├─▶ replica 1
              placements    └─▶ ...

A replica is a client without streams: it passes its messages on. The streams belong to the `RoutedClient` alone, and are handled by the
code of every client. Beside them is one placement for each unfinished request: which replica has it, and whether its output has begun.

    request            goes to the replica that the router chooses. While no replica lives it waits for one
    abort              goes to the replica that has the request
    watch              one replica sends views, for the server's page
    other commands     prefix cache and adapters: to all replicas that live
    a replica ends     a request whose output has not begun goes to another replica, at most MAX_ATTEMPTS in all, since the request could
                       be what ends them. One whose output has begun gets `ReplicaLost`: another replica might not repeat its tokens
    it starts again    its adapters are loaded first, then it gets requests
    a full queue       the request goes to a replica that has not refused it. It is refused when all that live have
    silence            a replica that has requests and has sent no message for SILENT_SECONDS gets none as long as another one answers

Two locks: the streams' lock (see `EngineClient`) may be held when the placements' lock is taken, and not the other way round.
"""
from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from minivllm.core.admission import QueueFull
from minivllm.engine.client import EngineClient
from minivllm.engine.loop import Engine
from minivllm.engine.messages import (
    AbortCommand,
    DeadMessage,
    EngineCommand,
    RefusedMessage,
    ResetPrefixCacheCommand,
    StepMessage,
    WatchCommand,
)
from minivllm.engine.metrics import EngineMetrics, EngineStats
from minivllm.engine.replica import Replica, ReplicaProcess, build_replica
from minivllm.engine.routing import Router
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import EngineDead, EngineRestarting, ReplicaLost
from minivllm.outputs import OutputDelta
from minivllm.splitmix64 import output

MAX_ATTEMPTS = 3  # replicas that a request is sent to, one after the other
# A step takes milliseconds, but a long prompt on a CPU, or a first step that compiles kernels, takes seconds.
SILENT_SECONDS = 10.0


@dataclass(slots=True)
class _Placement:
    """Where an unfinished request is."""

    request: EngineRequest
    open_children: int
    replica: int | None = None  # None: it waits for a replica that lives
    begun: bool = False  # the reader has some of its output
    aborted: bool = False
    attempts: int = 0
    full: set[int] = field(default_factory=set)  # replicas whose queue had no room for it


class RoutedClient(EngineClient):
    """Replicas of one engine, each in its own process."""

    def __init__(
        self, replicas: int = 2, restarts: int = 0, seed: int = 0, prepare: Callable[[int, int], None] | None = None,
        make: Callable[[int], Replica] = ReplicaProcess, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """restarts: of each replica, in a row. seed: of the seeds of requests without one. prepare: called in the process of each replica
        before its engine is built, with its number and their number. make: a replica's client, from its number of restarts. clock: seconds.
        """
        super().__init__()
        self._replicas = [make(restarts) for _ in range(replicas)]
        for number, replica in enumerate(self._replicas):
            replica.join(self, number)
        self._prepare = prepare
        self._seed, self._seeds = seed, count()
        # Guards what follows, and that commands reach a replica in the order of the placements.
        self._placing = threading.Lock()
        self._placements: dict[str, _Placement] = {}
        self._live: set[int] = set()
        self._clock = clock
        self._silent_since: dict[int, float] = {}  # of replicas with requests: the last message, or else the first request
        self._router: Router | None = None
        self._watched: int | None = None  # the replica that sends views
        self._watch = False
        self._over = False  # no replica lives or is being started again

    def _start(self, build: Callable[[], Engine]) -> None:
        for number, replica in enumerate(self._replicas):
            replica._start(partial(build_replica, self._prepare, number, len(self._replicas), build))
        started = [replica.started for replica in self._replicas]
        for future in sorted(wait(started, return_when=FIRST_EXCEPTION).done, key=lambda future: future.exception() is None):
            future.result()
        info, size = self._replicas[0].info, len(self._replicas)
        with self._placing:
            self._metrics = EngineMetrics(info.model, num_engines=size)
            self._info = replace(info, data_parallel_size=size, **{
                name: limit * size for name in ("max_requests", "max_queue") if (limit := getattr(info, name)) is not None})
            self._router = Router(size, info.block_size, info.num_blocks)
            self._live = {number for number, replica in enumerate(self._replicas) if replica.dead is None}
            if not self._live and not any(replica.restarting for replica in self._replicas):
                raise EngineDead(self._replicas[0].dead)
        self._update()
        self._started.set_result(None)

    def close(self) -> None:
        self._closing = True
        with ThreadPoolExecutor(max(1, len(self._replicas)), thread_name_prefix="closing") as pool:
            list(pool.map(lambda replica: replica.close(), self._replicas))

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def num_engines(self) -> int:
        return len(self._replicas)

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def watched(self) -> int:
        return self._watched or 0

    def _update(self) -> None:
        """Set what the client says of itself. Two threads may call this at once: the later call finds the newer state."""
        with self._lock, self._placing:
            if self._live:
                self._dead, self._restarting = None, False
            elif not self._over:
                self._dead, self._restarting = "all replicas have stopped", True

    # -- commands -----------------------------------------------------------------------------------------------------

    def _send(self, command: EngineCommand) -> None:
        deltas: tuple[OutputDelta, ...] = ()
        if isinstance(command, EngineRequest):
            command = self._seeded(command)
        with self._placing:
            if isinstance(command, EngineRequest):
                if not self._over:
                    self._place(_Placement(command, command.params.n))
            elif isinstance(command, AbortCommand):
                deltas = self._abort(command)
            elif isinstance(command, WatchCommand):
                self._watch = command.on
                self._choose_watched()
        if deltas:
            self._deliver(StepMessage(deltas, EngineStats()))  # no replica lives, so no stats are replaced

    def _seeded(self, request: EngineRequest) -> EngineRequest:
        """Each replica would give its first request without a seed the same one."""
        if request.params.seed is not None or request.params.greedy:
            return request
        return replace(request, params=replace(request.params, seed=output(self._seed, next(self._seeds)) >> 1))

    def _place(self, placement: _Placement) -> None:
        """Send a request to the best replica. The caller holds the lock."""
        request = placement.request
        self._placements[request.request_id] = placement
        placement.replica = None
        if not self._live:
            return
        assert self._router is not None
        with_room = self._live - placement.full or self._live
        adapter = None if request.lora_request is None else request.lora_request.lora_name
        placement.replica = self._router.choose(
            request.request_id, request.prompt_token_ids, self._answering(with_room) or with_room,
            namespace=(adapter, request.cache_salt))
        placement.attempts += 1
        self._silent_since.setdefault(placement.replica, self._clock())
        self._replicas[placement.replica].send(request)

    def _answering(self, numbers: set[int]) -> set[int]:
        """Those of these replicas that are not silent. The caller holds the lock."""
        since = self._clock() - SILENT_SECONDS
        return {number for number in numbers if self._silent_since.get(number, since) >= since}

    def _heard(self, number: int) -> None:
        """A replica has sent a message. The caller holds the lock, and has removed the requests that the message ends."""
        assert self._router is not None
        if self._router.load(number):
            self._silent_since[number] = self._clock()
        else:
            self._silent_since.pop(number, None)

    def _take(self, placement: _Placement) -> None:
        """Forget a request that has left its replica. The caller holds the lock."""
        del self._placements[placement.request.request_id]
        if placement.replica is not None:
            assert self._router is not None
            self._router.ended(placement.request.request_id)

    def _abort(self, command: AbortCommand) -> tuple[OutputDelta, ...]:
        """Pass an abort on, or give the deltas that end a request which waits for a replica. The caller holds the lock."""
        placement = self._placements.get(command.request_id)
        if placement is None:
            return ()
        placement.aborted = True
        if placement.replica is not None:
            self._replicas[placement.replica].send(command)
            return ()
        self._take(placement)
        return _abort_deltas(placement)

    def abort(self, request_id: str) -> None:
        self._send(AbortCommand(request_id))  # also while no replica lives: the request may wait for one

    def _choose_watched(self) -> None:
        """Let one replica send views, if they are wanted. The caller holds the lock."""
        wanted = min(self._live, default=None) if self._watch else None
        if wanted == self._watched:
            return
        if self._watched is not None:
            self._replicas[self._watched].send(WatchCommand(False))
        if wanted is not None:
            self._replicas[wanted].send(WatchCommand(True))
        self._watched = wanted

    async def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes of all replicas."""
        with self._placing:
            replicas = self._living()
            assert self._router is not None
            self._router.forget()
            futures = [replica.command(ResetPrefixCacheCommand) for replica in replicas]
        await asyncio.wrap_future(_all_done(futures, _unless_dead))

    def load_adapter(self, request: LoRARequest) -> Future[None]:
        """Load a LoRA adapter into all replicas. If one of them cannot load it, none has it."""
        with self._placing:
            replicas = self._living(all_of_them=True)
            futures = [replica.load_adapter(request) for replica in replicas]

        def finish(errors: list[BaseException | None]) -> BaseException | None:
            error = next((error for error in errors if error is not None), None)
            for replica, failure in zip(replicas, errors, strict=True):
                if error is not None and failure is None:
                    with contextlib.suppress(EngineDead):
                        replica.unload_adapter(request.lora_name)
            return error

        return _all_done(futures, finish)

    def unload_adapter(self, lora_name: str) -> Future[None]:
        """Forget a LoRA adapter in all replicas."""
        with self._placing:
            return _all_done([replica.unload_adapter(lora_name) for replica in self._living(all_of_them=True)], _unless_dead)

    def _living(self, all_of_them: bool = False) -> list[Replica]:
        """The replicas that take commands. all_of_them: not while one is being started again. The caller holds the lock."""
        if all_of_them and (starting := [str(number) for number, replica in enumerate(self._replicas) if replica.restarting]):
            raise EngineRestarting(f"replica {', '.join(starting)} is being started again")
        self._check_alive()
        replicas = [self._replicas[number] for number in sorted(self._live) if self._replicas[number].dead is None]
        if not replicas:
            raise EngineRestarting("all replicas have stopped")
        return replicas

    # -- messages of the replicas, on their threads -------------------------------------------------------------------

    def stepped(self, number: int, message: StepMessage) -> None:
        with self._placing:
            for delta in message.deltas:
                placement = self._placements.get(delta.request_id)
                if placement is None:
                    continue
                if not placement.begun:
                    assert self._router is not None
                    placement.begun = True
                    self._router.begun(delta.request_id)
                if delta.finish_reason is not None:
                    placement.open_children -= 1
                    if not placement.open_children:
                        self._take(placement)
            if self._router is not None:
                self._heard(number)
        self._deliver(message, number)

    def refused(self, number: int, message: RefusedMessage) -> None:
        """A replica does not take a request. One that has no room in its queue is not the last word if another has."""
        with self._placing:
            if (placement := self._placements.get(message.request_id)) is not None:
                self._take(placement)
                self._heard(number)
                placement.full.add(number)
                queue_full = isinstance(message.error, QueueFull) and message.error.param == "max_queue"
                if queue_full and not placement.aborted and self._live - placement.full:
                    placement.attempts -= 1  # those count replicas that ended
                    self._place(placement)
                    return
        self._refuse(message)

    def replica_started(self, number: int) -> None:
        """A replica accepts requests again."""
        with self._placing:
            if self._router is None:  # the others are still being started
                return
            self._live.add(number)
            for placement in list(self._placements.values()):
                if placement.replica is None:
                    self._place(placement)
            self._choose_watched()
        self._update()

    def replica_ended(self, number: int, reason: str) -> None:
        """A replica has stopped: its requests go to others, if their outputs have not begun."""
        lost: list[str] = []
        deltas: list[OutputDelta] = []
        with self._placing:
            if self._router is None:
                return
            self._live.discard(number)
            self._silent_since.pop(number, None)
            self._router.forget(number)
            if self._watched == number:
                self._watched = None
                self._choose_watched()
            self._over = not self._live and not any(replica.restarting for replica in self._replicas)
            for placement in [p for p in self._placements.values() if p.replica == number or self._over]:
                self._take(placement)
                if placement.aborted and not placement.begun:
                    deltas += _abort_deltas(placement)
                elif placement.begun or placement.attempts >= MAX_ATTEMPTS or self._over or self._closing:
                    lost.append(placement.request.request_id)
                else:
                    self._place(placement)
            over = self._over
        self._deliver(StepMessage(tuple(deltas), EngineStats()), number)
        self._fail(lost, EngineDead(reason) if over or self._closing else ReplicaLost(f"replica {number} has stopped: {reason}"))
        if over:
            self._die(DeadMessage(reason))
        else:
            self._update()


def _abort_deltas(placement: _Placement) -> tuple[OutputDelta, ...]:
    """The end of a request without output."""
    return tuple(OutputDelta(placement.request.request_id, index, (), "", finish_reason="abort")
                 for index in range(placement.request.params.n))


def _unless_dead(errors: list[BaseException | None]) -> BaseException | None:
    """The error of a command that a replica need not obey if it has stopped: the next one has an empty cache and its own adapters."""
    serious = [error for error in errors if error is not None and not isinstance(error, EngineDead)]
    return serious[0] if serious else errors[0] if all(errors) else None


def _all_done(futures: Sequence[Future[None]], finish: Callable[[list[BaseException | None]], BaseException | None]) -> Future[None]:
    """A future that is done when all are. finish: its error, from theirs."""
    combined: Future[None] = Future()
    lock, remaining = threading.Lock(), len(futures)

    def done(_: Future[None]) -> None:
        nonlocal remaining
        with lock:
            remaining -= 1
            if remaining:
                return
        error = finish([future.exception() for future in futures])
        if not combined.set_running_or_notify_cancel():
            return
        if error is None:
            combined.set_result(None)
        else:
            combined.set_exception(error)

    for future in futures:
        future.add_done_callback(done)
    return combined
