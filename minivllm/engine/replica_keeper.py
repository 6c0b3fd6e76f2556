"""`ReplicaKeeper`: starts, drains and ends replicas while the server runs, on its own thread.

About once a second:

    silence      a replica that has sent no message for the user's timeout is killed. It then ends and starts again like any other
    number       `autoscaling.py` says how many replicas there should be. Too many: the one with the least work is drained. Too few: one
                 that is being drained is taken back, else a stopped one is started
    drained      a replica without requests is closed: its process has then ended, and its memory is free

Starting and closing take long, so the lock is not held meanwhile. A replica that cannot be started leaves the others as they are. It is
tried again after a pause, if it is still needed.
"""
from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from minivllm.engine.autoscaling import ReplicaScaler, ScalingPolicy
from minivllm.engine.messages import EngineInfo
from minivllm.engine.metrics import EngineStats
from minivllm.engine.replica import Replica
from minivllm.engine.replica_slots import ReplicaSlots, ReplicaState

# Default of `--silent-timeout`: a prefill step of a large model on a CPU takes minutes, and so does a first step that compiles kernels.
SILENT_TIMEOUT = 600.0
START_SECONDS = 1800.0  # for the start of a replica while others serve; then it has failed

log = logging.getLogger(__name__)


class KeptClient(Protocol):
    """The `RoutedClient`, as the keeper sees it."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def changing_adapters(self) -> bool: ...
    def observe(self) -> Mapping[int, EngineStats]: ...
    def load(self, number: int) -> int: ...
    def replica(self, number: int) -> Replica: ...
    def renew(self, number: int) -> Callable[[], None]: ...
    def drain(self, number: int) -> None: ...
    def take(self, number: int) -> None: ...
    def update(self) -> None: ...
    def replica_ended(self, number: int, reason: str) -> None: ...


class ReplicaKeeper:
    """What changes the replicas of a client with time. Only one thread calls `tick`."""

    def __init__(
        self, client: KeptClient, slots: ReplicaSlots, lock: threading.Lock, clock: Callable[[], float],
        scaling: ScalingPolicy | None, silent_timeout: float | None,
    ) -> None:
        """lock: guards the slots. scaling: None for a fixed number. silent_timeout: seconds; None: silent replicas are not killed."""
        self._client, self._slots, self._lock, self._clock = client, slots, lock, clock
        self._scaler = None if scaling is None else ReplicaScaler(scaling)
        self._silent_timeout = silent_timeout
        self._killed: set[int] = set()  # silent replicas whose end is awaited
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return self._scaler is not None or self._silent_timeout is not None

    @property
    def num_wanted(self) -> int:
        """Replicas that there should be."""
        return len(self._slots) if self._scaler is None else self._scaler.wanted

    def start(self, period: float) -> None:
        """Call `tick` every `period` seconds."""

        def run() -> None:
            while not self._over.wait(period):
                try:
                    self.tick()
                except Exception:  # a bug: the replicas stay as they are
                    log.exception("the number of replicas could not be changed")

        self._thread = threading.Thread(target=run, name="minivllm-keeper", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Return when nothing is being started or ended any more."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def tick(self) -> None:
        """Look once, and do what is needed."""
        observed = self._client.observe()
        with self._lock:
            hung = self._hung()
            starts = {} if self._scaler is None or self._client.changing_adapters else self._scale(self._scaler, observed)
            to_close = self._slots.having(ReplicaState.STOPPING)
        for number, reason in hung.items():
            log.error("replica %d %s: it is killed", number, reason)
            self._client.replica(number).kill()
        for number, begin in starts.items():
            try:
                begin()
            except Exception as error:
                self._client.replica_ended(number, f"{type(error).__name__}: {error}")
        for number in to_close:
            self._client.replica(number).close()
            with self._lock:
                self._slots[number] = ReplicaState.STOPPED
        self._client.update()

    def _hung(self) -> dict[int, str]:
        """Replicas to kill, and why. Each is killed once. The caller holds the lock."""
        limit, slots = self._silent_timeout, self._slots
        found = {number: f"could not be started within {START_SECONDS:g} s"
                 for number in range(len(slots)) if slots.starting_for(number) > START_SECONDS}
        if limit is not None:
            found |= {number: f"has requests and has sent nothing for {limit:g} s"
                      for number in range(len(slots)) if slots.quiet_for(number) > limit}
        new = {number: reason for number, reason in found.items() if number not in self._killed}
        self._killed = set(found)
        return new

    def _scale(self, scaler: ReplicaScaler, observed: Mapping[int, EngineStats]) -> dict[int, Callable[[], None]]:
        """Change states, and return the calls that start replicas, by number. The caller holds the lock."""
        now, slots = self._clock(), self._slots
        live, restarting, starting = slots.live, slots.having(ReplicaState.RESTARTING), slots.having(ReplicaState.STARTING)
        if not (live or restarting or starting):
            return {}  # the server ends
        stats = [observed[number] for number in live if number in observed]
        queued, before = sum(s.num_waiting for s in stats), len(live) + len(restarting)
        wanted = scaler.decide(now, queued=queued, busy=sum(map(self._filled, stats)), live=len(live), replicas=before,
                               starting=bool(starting))
        missing = wanted - before - len(starting)
        if missing < 0 and len(live) > 1:
            number = min(live, key=lambda number: (self._client.load(number), -number))
            log.info("replica %d gets no more requests, and ends without any: %d requests wait, %d replicas are enough", number, queued,
                     wanted)
            self._client.drain(number)
        for number in sorted(slots.having(ReplicaState.DRAINING)):
            if missing > 0:
                log.info("replica %d gets requests again: %d requests wait, %d replicas should take them", number, queued, wanted)
                self._client.take(number)
                missing -= 1
            elif not self._client.load(number):
                slots[number] = ReplicaState.STOPPING
        starts: dict[int, Callable[[], None]] = {}
        if missing > 0 and scaler.may_start(now):
            for number in sorted(slots.having(ReplicaState.STOPPED))[:missing]:
                log.info("replica %d is started: %d requests wait, %d replicas should take them", number, queued, wanted)
                slots[number] = ReplicaState.STARTING
                starts[number] = self._client.renew(number)
        return starts

    def _filled(self, stats: EngineStats) -> float:
        """Part of a replica that its running requests fill, from 0 to 1."""
        return max(stats.num_running / (self._client.info.max_running or max(stats.num_running, 1)), stats.kv_cache_usage)

    # -- ends of starts, which the client reports. It holds the lock ----------------------------------------------------

    def start_succeeded(self) -> None:
        if self._scaler is not None:
            self._scaler.start_succeeded()

    def start_failed(self, number: int, reason: str) -> None:
        slots = self._slots
        slots[number] = ReplicaState.STOPPING
        if self._scaler is None:
            return
        remaining = len(slots.having(ReplicaState.LIVE, ReplicaState.RESTARTING, ReplicaState.STARTING))
        pause = self._scaler.start_failed(self._clock(), remaining)
        log.error("replica %d could not be started, and is tried again after %g s at the earliest: %s", number, pause, reason)
