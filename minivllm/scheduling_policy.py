"""Scheduling policies: the order in which requests are served.

A policy is a function that gives a request its rank, once, when it arrives. Lower ranks are served first, and requests with equal ranks in
the order of their arrival. The rank decides which waiting request starts next, which prompt gets the token budget first, and which
running request is preempted last. Between several owners the fair shares come first (`core/fair_share.py`).

A rank depends on the request only, and never changes. That is less restrictive than it sounds: if the rank is the arrival time plus a
bounded number of seconds, every request moves towards the front as time passes, so none waits forever. A rank without the arrival time
can let a request wait as long as new ones with lower ranks arrive.

To add a policy, write its function and a row of `POLICIES`. The setting `scheduling_policy`, its flag, `minivllm trace --compare
policy=NAME` and the tests of the scheduler take the names from there. `lessons/capstone_policy` is an exercise in it.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from minivllm.engine_request import EngineRequest

Policy: TypeAlias = Callable[[EngineRequest], float]  # the same request always has the same rank, which is not NaN


def fcfs(request: EngineRequest) -> float:
    """First come, first served: all ranks are equal."""
    return 0


def priority(request: EngineRequest) -> float:
    """The number that the client gave."""
    return request.priority


POLICIES: Mapping[str, Policy] = {"fcfs": fcfs, "priority": priority}
