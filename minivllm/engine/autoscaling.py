"""How many replicas there should be, from the length of their queues (`--max-replicas`).

    queued     requests that wait in the queues of the live replicas
    busy       how many replicas their running requests fill: per replica the larger of batch / largest batch and KV blocks held / KV blocks

    grow       queued > target_queue * live, without a break for `upscale_delay`:     as many as make each queue at most the target,
                                                                                      and at most twice as many as now
    shrink     with one replica fewer, the queues would have at most half the target  one fewer
               and the running requests at most FILLED, for `downscale_delay`

A queue alone cannot tell that a replica is superfluous: with an empty queue, all replicas may still be nearly full. Without the second
condition, a constant load would make the number go up and down for ever. While a replica is being started nothing is decided, since it
will change the queues. Plain Python: no torch, no clock, no randomness.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

FILLED = 0.7  # largest part of the remaining replicas that running requests may fill after one is ended
FIRST_PAUSE = 30.0  # seconds after a failed start; each further pause is twice as long ...
LONGEST_PAUSE = 600.0  # ... up to this


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPolicy:
    """The user's settings; `ServerConfig` has checked them."""

    least: int  # replicas
    most: int
    target_queue: float  # requests that wait, per replica
    upscale_delay: float  # seconds
    downscale_delay: float  # seconds


class ReplicaScaler:
    """Decides the number of replicas. Times are seconds of any one clock. One thread at a time calls its methods."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self.policy = policy
        self.wanted = policy.least
        self._above_since: float | None = None
        self._below_since: float | None = None
        self._failures = 0  # starts that failed in a row
        self._not_before = -math.inf  # the next start

    def decide(self, now: float, *, queued: int, busy: float, live: int, replicas: int, starting: bool) -> int:
        """The number that should take requests from now on. Called about once a second.

        live: replicas that take requests. replicas: those, and those that are being started again. starting: another one is being started.
        """
        if starting or not live:
            self._above_since = self._below_since = None
            return self.wanted
        policy, fewer = self.policy, replicas - 1
        above = queued > policy.target_queue * live
        below = queued <= policy.target_queue / 2 * fewer and busy <= FILLED * fewer
        self._above_since = (now if self._above_since is None else self._above_since) if above else None
        self._below_since = (now if self._below_since is None else self._below_since) if below else None
        self.wanted = max(policy.least, min(replicas, policy.most))
        if self._above_since is not None and now - self._above_since >= policy.upscale_delay and self.may_start(now):
            enough = math.ceil(queued / policy.target_queue)
            self.wanted = min(policy.most, max(self.wanted, min(max(enough, replicas + 1), 2 * replicas)))
            self._above_since = None
        elif self._below_since is not None and now - self._below_since >= policy.downscale_delay and replicas > policy.least:
            self.wanted = max(policy.least, fewer)
            self._below_since = None
        return self.wanted

    def may_start(self, now: float) -> bool:
        """Whether the pause after a failed start is over."""
        return now >= self._not_before

    def start_failed(self, now: float, replicas: int) -> float:
        """A replica could not be started, and `replicas` remain. Returns the seconds before the next attempt."""
        self._failures += 1
        pause = min(FIRST_PAUSE * 2.0 ** (self._failures - 1), LONGEST_PAUSE)
        self._not_before = now + pause
        self.wanted = max(self.policy.least, min(replicas, self.policy.most))
        return pause

    def start_succeeded(self) -> None:
        self._failures = 0
