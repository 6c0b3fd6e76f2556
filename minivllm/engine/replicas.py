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

The states of the replicas are in `replica_slots.py`. `replica_keeper.py` starts and ends some while the server runs.

Two locks: the streams' lock (see `EngineClient`) may be held when the placements' lock is taken, and not the other way round.
"""
from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from minivllm.core.admission import QueueFull
from minivllm.engine.autoscaling import ScalingPolicy
from minivllm.engine.client import EngineClient
from minivllm.engine.futures import all_done, unless_dead
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
from minivllm.engine.replica_keeper import SILENT_TIMEOUT, ReplicaKeeper
from minivllm.engine.replica_slots import ReplicaSlots, ReplicaState
from minivllm.engine.routing import Router
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import EngineDead, EngineRestarting, ReplicaLost
from minivllm.outputs import OutputDelta
from minivllm.splitmix64 import output

MAX_ATTEMPTS = 3  # replicas that a request is sent to, one after the other


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
        scaling: ScalingPolicy | None = None, silent_timeout: float = SILENT_TIMEOUT, keeper_period: float | None = 1.0,
    ) -> None:
        """restarts: of each replica, in a row. seed: of the seeds of requests without one. prepare: called in the process of each replica
        before its engine is built, with its number and the largest number of replicas. make: a replica's client, from its number of
        restarts. clock: seconds. scaling: how many replicas there are; None: always `replicas`. silent_timeout: seconds after which a
        replica that does not answer is started again, if `restarts` are allowed. keeper_period: seconds between two looks; None: the
        caller calls `keeper.tick`.
        """
        super().__init__()
        self._make, self._restarts = make, restarts
        self._first = replicas if scaling is None else scaling.least  # replicas at the start
        size = replicas if scaling is None else scaling.most
        self._replicas = [self._new_replica(number) for number in range(size)]
        self._prepare = prepare
        self._build: Callable[[], Engine] | None = None
        self._seed, self._seeds = seed, count()
        # Guards what follows, and that commands reach a replica in the order of the placements.
        self._placing = threading.Lock()
        self._placements: dict[str, _Placement] = {}
        self._slots = ReplicaSlots(size, clock)
        self._router: Router | None = None
        self._watched: int | None = None  # the replica that sends views
        self._watch = False
        self._over = False  # no replica lives or is being started again
        self._adapter_commands = 0  # that not all replicas have obeyed
        self.keeper = ReplicaKeeper(self, self._slots, self._placing, clock, scaling, silent_timeout if restarts else None)
        self._keeper_period = keeper_period

    def _new_replica(self, number: int) -> Replica:
        replica = self._make(self._restarts)
        replica.join(self, number)
        return replica

    def _built(self, number: int) -> Callable[[], Engine]:
        """What builds the engine of a replica, in its process."""
        assert self._build is not None
        return partial(build_replica, self._prepare, number, len(self._replicas), self._build)

    def _start(self, build: Callable[[], Engine]) -> None:
        self._build = build
        first = self._replicas[:self._first]
        for number, replica in enumerate(first):
            replica.fresh = False
            replica._start(self._built(number))
        started = [replica.started for replica in first]
        for future in sorted(wait(started, return_when=FIRST_EXCEPTION).done, key=lambda future: future.exception() is None):
            future.result()
        self._info = self._info_of_one = info = first[0].info
        with self._placing:
            self._metrics = EngineMetrics(info.model, num_engines=len(self._replicas))
            self._router = Router(len(self._replicas), info.block_size, info.num_blocks)
            for number, replica in enumerate(first):
                self._slots[number] = ReplicaState.LIVE if replica.dead is None else _ended_state(replica)
            if not self._slots.having(ReplicaState.LIVE, ReplicaState.RESTARTING):
                raise EngineDead(first[0].dead)
        self.update()
        self._started.set_result(None)
        if self._keeper_period is not None and self.keeper.needed:
            self.keeper.start(self._keeper_period)

    def close(self) -> None:
        self._closing = True
        self.keeper.end()
        for number in self._slots.having(ReplicaState.STARTING):
            self._replicas[number].kill()  # it would read no command before it has loaded the model
        with ThreadPoolExecutor(max(1, len(self._replicas)), thread_name_prefix="closing") as pool:
            list(pool.map(lambda replica: replica.close(), self._replicas))

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def num_engines(self) -> int:
        return len(self._replicas)

    @property
    def num_live(self) -> int:
        return len(self._slots.live)

    @property
    def num_wanted(self) -> int:
        return self.keeper.num_wanted

    @property
    def replica_states(self) -> tuple[str, ...]:
        return self._slots.shown()

    @property
    def watched(self) -> int:
        return self._watched or 0

    def update(self) -> None:
        """Set what the client says of itself. Several threads may call this at once: the later call finds the newer state."""
        with self._lock, self._placing:
            live = self.num_live
            if live:
                self._dead, self._restarting = None, False
            elif not self._over:
                self._dead, self._restarting = "all replicas have stopped", True
            info = self._info_of_one
            self._info = replace(info, data_parallel_size=max(1, live), **{
                name: limit * max(1, live) for name in ("max_requests", "max_queue") if (limit := getattr(info, name)) is not None})
            self.metrics.replicas = (self.num_wanted, live)

    # -- for the keeper -----------------------------------------------------------------------------------------------

    def observe(self) -> dict[int, EngineStats]:
        """The state of each replica after its last step."""
        with self._lock:
            return dict(self._stats)

    def load(self, number: int) -> int:
        """Work of a replica's unfinished requests, in tokens; 0 without requests. The caller holds the lock."""
        assert self._router is not None
        return self._router.load(number)

    @property
    def changing_adapters(self) -> bool:
        """Whether replicas are loading or forgetting an adapter."""
        return bool(self._adapter_commands)

    def replica(self, number: int) -> Replica:
        return self._replicas[number]

    def renew(self, number: int) -> Callable[[], None]:
        """Replace a replica that was closed. Returns a call that starts the new one. The caller holds the lock."""
        if not self._replicas[number].fresh:
            self._replicas[number] = self._new_replica(number)
        return partial(self._replicas[number].start_late, self._built(number), dict(self._adapters))

    def drain(self, number: int) -> None:
        """Send a replica no more requests. The caller holds the lock."""
        self._slots[number] = ReplicaState.DRAINING
        self._choose_watched()

    def take(self, number: int) -> None:
        """Let a replica have requests. The caller holds the lock."""
        self._slots[number] = ReplicaState.LIVE
        for placement in list(self._placements.values()):
            if placement.replica is None:
                self._place(placement)
        self._choose_watched()

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
        if not (live := self._slots.live):
            return
        assert self._router is not None
        with_room = live - placement.full or live
        adapter = None if request.lora_request is None else request.lora_request.lora_name
        placement.replica = self._router.choose(
            request.request_id, request.prompt_token_ids, self._slots.answering(with_room) or with_room,
            namespace=(adapter, request.cache_salt))
        placement.attempts += 1
        self._slots.sent_to(placement.replica)
        self._replicas[placement.replica].send(request)

    def _remove(self, placement: _Placement) -> None:
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
        self._remove(placement)
        return _abort_deltas(placement)

    def abort(self, request_id: str) -> None:
        self._send(AbortCommand(request_id))  # also while no replica lives: the request may wait for one

    def _choose_watched(self) -> None:
        """Let one replica send views, if they are wanted. The caller holds the lock."""
        wanted = min(self._slots.live, default=None) if self._watch else None
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
        await asyncio.wrap_future(all_done(futures, unless_dead))

    def load_adapter(self, request: LoRARequest) -> Future[None]:
        """Load a LoRA adapter into all replicas. If one of them cannot load it, none has it."""
        replicas, futures = self._command_adapters(lambda replica: replica.load_adapter(request))

        def finish(errors: list[BaseException | None]) -> BaseException | None:
            error = next((error for error in errors if error is not None), None)
            for replica, failure in zip(replicas, errors, strict=True):
                if error is not None and failure is None:
                    with contextlib.suppress(EngineDead):
                        replica.unload_adapter(request.lora_name)
            if error is None:
                self._remember(request)
            self._adapters_changed()
            return error

        return all_done(futures, finish)

    def unload_adapter(self, lora_name: str) -> Future[None]:
        """Forget a LoRA adapter in all replicas."""
        _, futures = self._command_adapters(lambda replica: replica.unload_adapter(lora_name))
        with self._lock:
            self._adapters.pop(lora_name, None)

        def finish(errors: list[BaseException | None]) -> BaseException | None:
            self._adapters_changed()
            return unless_dead(errors)

        return all_done(futures, finish)

    def _command_adapters(self, command: Callable[[Replica], Future[None]]) -> tuple[list[Replica], list[Future[None]]]:
        """Commands to all replicas. Until `_adapters_changed` no replica is started, whose adapters would be those of before."""
        with self._placing:
            replicas = self._living(all_of_them=True)
            futures = [command(replica) for replica in replicas]
            self._adapter_commands += 1
        return replicas, futures

    def _adapters_changed(self) -> None:
        with self._placing:
            self._adapter_commands -= 1

    def _living(self, all_of_them: bool = False) -> list[Replica]:
        """The replicas that take commands. all_of_them: not while one is being started. The caller holds the lock."""
        slots = self._slots
        if all_of_them and (starting := sorted(slots.having(ReplicaState.STARTING, ReplicaState.RESTARTING))):
            again = "again" if slots[starting[0]] is ReplicaState.RESTARTING else "because of the load"
            raise EngineRestarting(f"replica {', '.join(map(str, starting))} is being started {again}")
        self._check_alive()
        replicas = [self._replicas[number] for number in sorted(slots.serving) if self._replicas[number].dead is None]
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
                        self._remove(placement)
            self._heard(number)
        self._deliver(message, number)

    def _heard(self, number: int) -> None:
        """A replica has sent a message. The caller holds the lock, and has removed the requests that the message ends."""
        if self._router is not None:
            self._slots.heard(number, busy=bool(self._router.load(number)))

    def refused(self, number: int, message: RefusedMessage) -> None:
        """A replica does not take a request. One that has no room in its queue is not the last word if another has."""
        with self._placing:
            if (placement := self._placements.get(message.request_id)) is not None:
                self._remove(placement)
                self._heard(number)
                placement.full.add(number)
                queue_full = isinstance(message.error, QueueFull) and message.error.param == "max_queue"
                if queue_full and not placement.aborted and self._slots.live - placement.full:
                    placement.attempts -= 1  # those count replicas that ended
                    self._place(placement)
                    return
        self._refuse(message)

    def replica_started(self, number: int) -> None:
        """A replica accepts requests, for the first time or again."""
        with self._placing:
            if self._router is None:  # the others are still being started
                return
            if self._slots[number] is ReplicaState.STARTING:
                self.keeper.start_succeeded()
            if self._slots[number] in (ReplicaState.STARTING, ReplicaState.RESTARTING):
                self.take(number)
        self.update()

    def replica_ended(self, number: int, reason: str) -> None:
        """A replica has stopped: its requests go to others, if their outputs have not begun."""
        lost: list[str] = []
        deltas: list[OutputDelta] = []
        with self._placing:
            if self._router is None:
                return
            self._mark_ended(number, reason)
            self._router.forget(number)
            if self._watched == number:
                self._watched = None
                self._choose_watched()
            self._over = not self._slots.having(ReplicaState.LIVE, ReplicaState.STARTING, ReplicaState.RESTARTING)
            for placement in [p for p in self._placements.values() if p.replica == number or self._over]:
                self._remove(placement)
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
            self.update()

    def _mark_ended(self, number: int, reason: str) -> None:
        """The next state of a replica whose process has ended. The caller holds the lock."""
        state = self._slots[number]
        if self._closing:
            self._slots[number] = ReplicaState.STOPPED
            return
        if state is ReplicaState.STARTING:
            self.keeper.start_failed(number, reason)
        elif state is ReplicaState.DRAINING:
            self._slots[number] = ReplicaState.STOPPING
            self._replicas[number].stay_ended()
        elif state is not ReplicaState.STOPPING:
            self._slots[number] = _ended_state(self._replicas[number])
        if not self._slots.live and (draining := self._slots.having(ReplicaState.DRAINING)):
            self.take(min(draining))


def _ended_state(replica: Replica) -> ReplicaState:
    return ReplicaState.RESTARTING if replica.restarting else ReplicaState.DEAD


def _abort_deltas(placement: _Placement) -> tuple[OutputDelta, ...]:
    """The end of a request without output."""
    return tuple(OutputDelta(placement.request.request_id, index, (), "", finish_reason="abort")
                 for index in range(placement.request.params.n))
