"""The life cycle of replicas: each has a numbered slot with one of these states. `RoutedClient` changes them, under its lock.

    stopped ──▶ starting ──▶ live ◀──▶ draining ──▶ stopping ──▶ stopped     autoscaling; a failed start: starting ──▶ stopping
                             live ◀──▶ restarting ──▶ dead                   the process has ended (`--restart-engine`)

A draining replica gets no new request, and is ended when it has none left. If the load returns before, it is live again. With a fixed
number of replicas no slot is ever stopped. A live replica that has requests and sends no message for SILENT_SECONDS is shown as silent.
"""
from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum

from minivllm.config import SILENT_SECONDS


class ReplicaState(StrEnum):
    """Of one slot."""

    STOPPED = "stopped"  # it has no process
    STARTING = "starting"  # it loads the model, and adapters
    LIVE = "live"  # it gets requests
    DRAINING = "draining"  # it finishes those it has
    STOPPING = "stopping"  # its process is being ended
    RESTARTING = "restarting"  # its process has ended, and is started again
    DEAD = "dead"  # its process has ended for good
    SILENT = "silent"  # only shown: it is live or draining, and has sent nothing for a while


class ReplicaSlots:
    """The states, and since when replicas with requests have sent no message."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        """clock: seconds."""
        self._states = [ReplicaState.STOPPED] * size
        self._clock = clock
        self._quiet_since: dict[int, float] = {}  # of replicas with requests: the last message, or else the first request
        self._started_at: dict[int, float] = {}  # of those that are being started

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, number: int) -> ReplicaState:
        return self._states[number]

    def __setitem__(self, number: int, state: ReplicaState) -> None:
        self._states[number] = state
        self._started_at.pop(number, None)
        if state is ReplicaState.STARTING:
            self._started_at[number] = self._clock()
        elif state not in (ReplicaState.LIVE, ReplicaState.DRAINING):
            self._quiet_since.pop(number, None)

    def having(self, *states: ReplicaState) -> set[int]:
        """Numbers of the slots with one of these states."""
        return {number for number, state in enumerate(self._states) if state in states}

    @property
    def live(self) -> set[int]:
        """The replicas that get requests."""
        return self.having(ReplicaState.LIVE)

    @property
    def serving(self) -> set[int]:
        """The replicas that obey commands."""
        return self.having(ReplicaState.LIVE, ReplicaState.DRAINING)

    def shown(self) -> tuple[str, ...]:
        """The states as `/health` has them."""
        return tuple(ReplicaState.SILENT.value if self.quiet_for(number) > SILENT_SECONDS else state.value
                     for number, state in enumerate(self._states))

    # -- silence ------------------------------------------------------------------------------------------------------

    def sent_to(self, number: int) -> None:
        """A replica has got a request."""
        self._quiet_since.setdefault(number, self._clock())

    def heard(self, number: int, busy: bool) -> None:
        """A replica has sent a message. busy: it still has requests."""
        if busy:
            self._quiet_since[number] = self._clock()
        else:
            self._quiet_since.pop(number, None)

    def quiet_for(self, number: int) -> float:
        """Seconds without a message from a replica that has requests; 0 without requests."""
        since = self._quiet_since.get(number)
        return 0.0 if since is None else self._clock() - since

    def answering(self, numbers: Collection[int]) -> set[int]:
        """Those of these replicas that are not silent."""
        return {number for number in numbers if self.quiet_for(number) <= SILENT_SECONDS}

    def starting_for(self, number: int) -> float:
        """Seconds since the start of a replica that is being started; 0 for others."""
        at = self._started_at.get(number)
        return 0.0 if at is None else self._clock() - at
