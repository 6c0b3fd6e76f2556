"""`--max-replicas`: the decision alone, and replicas that start and end behind one client. Clocks and replicas are scripted."""
from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.engine import replica_keeper
from minivllm.engine.autoscaling import FILLED, FIRST_PAUSE, LONGEST_PAUSE, ReplicaScaler, ScalingPolicy
from minivllm.engine.messages import LoadAdapterCommand, ObeyedMessage, StepMessage, WatchCommand
from minivllm.engine.metrics import EngineStats
from minivllm.engine.replica_slots import SILENT_SECONDS
from minivllm.engine.replicas import RoutedClient
from minivllm.engine_request import LoRARequest
from minivllm.errors import EngineDead, EngineRestarting, ReplicaLost
from tests.engine.fake import make_engine
from tests.engine.test_replicas import ScriptedReplica, ask, read, run, settle

UP, DOWN = 30.0, 600.0


def policy(least: int = 1, most: int = 4, target: float = 5.0, up: float = UP, down: float = DOWN) -> ScalingPolicy:
    return ScalingPolicy(least=least, most=most, target_queue=target, upscale_delay=up, downscale_delay=down)


# -- the decision -----------------------------------------------------------------------------------------------------


def decide(scaler: ReplicaScaler, now: float, replicas: int, queued: int, busy: float | None = None, starting: bool = False) -> int:
    """busy: None: all replicas are full."""
    return scaler.decide(now, queued=queued, busy=replicas if busy is None else busy, live=replicas, replicas=replicas, starting=starting)


def test_a_queue_above_the_target_must_last_before_the_number_grows() -> None:
    scaler = ReplicaScaler(policy())
    assert decide(scaler, 0.0, 1, 6) == decide(scaler, UP - 0.1, 1, 6) == 1
    assert decide(scaler, UP, 1, 6) == 2
    scaler = ReplicaScaler(policy())
    decide(scaler, 0.0, 1, 6)
    decide(scaler, 20.0, 1, 5)  # at the target: the delay begins again
    assert decide(scaler, UP, 1, 6) == 1


@pytest.mark.parametrize(("replicas", "queued", "expected"), [(1, 6, 2), (1, 10, 2), (1, 500, 2), (2, 16, 4), (2, 11, 3), (3, 500, 4)])
def test_it_grows_to_what_the_queue_needs_at_most_to_twice_as_many(replicas: int, queued: int, expected: int) -> None:
    scaler = ReplicaScaler(policy())
    decide(scaler, 0.0, replicas, queued)
    assert decide(scaler, UP, replicas, queued) == expected


def test_while_a_replica_starts_nothing_is_decided_and_the_delays_begin_again_after_it() -> None:
    scaler = ReplicaScaler(policy())
    decide(scaler, 0.0, 1, 100)
    assert decide(scaler, UP, 1, 100) == 2
    assert decide(scaler, 10 * UP, 1, 100, starting=True) == 2
    assert decide(scaler, 10 * UP + 1, 2, 100) == 2
    assert decide(scaler, 11 * UP + 1, 2, 100) == 4
    scaler = ReplicaScaler(policy())
    decide(scaler, 0.0, 2, 0, 0.0)
    decide(scaler, 1.0, 2, 0, 0.0, starting=True)  # in the place of one that is gone
    assert decide(scaler, DOWN, 3, 0, 0.0) == decide(scaler, 2 * DOWN - 1, 3, 0, 0.0) == 3
    assert decide(scaler, 2 * DOWN, 3, 0, 0.0) == 2


def test_it_shrinks_one_at_a_time_and_only_if_the_others_have_room_for_the_queue_and_the_running_requests() -> None:
    for queued, busy, shrinks in ((0, 0.0, True), (7, 0.0, True), (8, 0.0, False), (0, 3 * FILLED, True), (0, 3 * FILLED + 0.01, False)):
        scaler = ReplicaScaler(policy())
        assert decide(scaler, 0.0, 4, queued, busy) == decide(scaler, DOWN - 1, 4, queued, busy) == 4
        assert decide(scaler, DOWN, 4, queued, busy) == (3 if shrinks else 4)
        assert decide(scaler, DOWN + 1, 3, 0, 0.0) == 3


def test_failed_starts_are_repeated_after_growing_pauses_and_the_wanted_number_is_what_there_is() -> None:
    scaler = ReplicaScaler(policy(least=2))
    decide(scaler, 0.0, 2, 100)
    assert decide(scaler, UP, 2, 100) == 4
    now, pauses = UP, []
    for _ in range(7):
        pauses.append(scaler.start_failed(now, 2))
        assert scaler.wanted == 2
        decide(scaler, now, 2, 100)
        assert decide(scaler, now + pauses[-1] - 0.1, 2, 100) == 2 and not scaler.may_start(now + pauses[-1] - 0.1)
        now += max(pauses[-1], UP)
        assert decide(scaler, now, 2, 100) == 4
    assert pauses == [FIRST_PAUSE, 60.0, 120.0, 240.0, 480.0, LONGEST_PAUSE, LONGEST_PAUSE]
    scaler.start_succeeded()
    assert scaler.start_failed(now, 1) == FIRST_PAUSE and scaler.wanted == 2, "never below the smallest number"


LIMITS = st.tuples(st.integers(1, 5), st.integers(0, 5)).map(lambda pair: (pair[0], sum(pair)))
LOOK = st.tuples(st.floats(0, 900), st.integers(0, 200), st.floats(0, 1), st.integers(0, 6), st.booleans(), st.booleans())


@given(limits=LIMITS, target=st.floats(0.1, 50), looks=st.lists(LOOK, max_size=20))
def test_the_number_is_always_within_its_limits_and_changes_only_when_nothing_starts(
    limits: tuple[int, int], target: float, looks: list[tuple[float, int, float, int, bool, bool]],
) -> None:
    scaler, now = ReplicaScaler(policy(*limits, target=target)), 0.0
    for seconds, queued, filled, live, starting, fails in looks:
        now += seconds
        before = scaler.wanted
        replicas = min(live + 1, limits[1])
        wanted = scaler.decide(now, queued=queued, busy=filled * replicas, live=live, replicas=replicas, starting=starting)
        assert limits[0] <= wanted <= limits[1]
        if starting or not live:
            assert wanted == before
        else:
            assert replicas - 1 <= wanted <= max(2 * replicas, limits[0])
        if fails:
            scaler.start_failed(now, live)


@given(limits=LIMITS, looks=st.lists(LOOK, max_size=20), last=LOOK, more=st.integers(0, 100), fuller=st.floats(0, 1))
def test_more_load_never_gives_fewer_replicas(
    limits: tuple[int, int], looks: list[tuple[float, int, float, int, bool, bool]], last: tuple[float, int, float, int, bool, bool],
    more: int, fuller: float,
) -> None:
    def outcome(extra: int, extra_busy: float) -> int:
        scaler, now = ReplicaScaler(policy(*limits)), 0.0
        for seconds, queued, filled, *_ in looks:
            now += seconds
            decide(scaler, now, limits[1], queued, filled * limits[1])
        seconds, queued, filled, *_ = last
        return decide(scaler, now + seconds, limits[1], queued + extra, filled * limits[1] + extra_busy)

    assert outcome(more, fuller) >= outcome(0, 0.0)


def simulated(scaler: ReplicaScaler, load: float, seconds: int = 20_000, start: int = 50, begin: int | None = None) -> list[int]:
    """The number of replicas at each change, under a constant load in replicas. Each serves two requests per second, and is ready `start`
    seconds after its start. What they cannot serve waits. A look every 5 s."""
    replicas, queue, ready_at, history = begin or scaler.policy.least, 0.0, math.inf, [begin or scaler.policy.least]
    for now in range(0, seconds, 5):
        if now >= ready_at:
            replicas, ready_at = scaler.wanted, math.inf
            history.append(replicas)
        queue = max(0.0, queue + 10 * (load - replicas))
        busy = min(load, replicas) if not queue else replicas
        wanted = decide(scaler, now, replicas, math.ceil(queue), busy, starting=ready_at < math.inf)
        if wanted < replicas:
            replicas = wanted
            history.append(replicas)
        elif wanted > replicas and ready_at == math.inf:
            ready_at = now + start
    return history


@given(load=st.floats(0, 8), begin=st.integers(1, 8), target=st.floats(0.5, 30))
def test_under_a_constant_load_the_number_never_grows_again_after_it_has_shrunk(load: float, begin: int, target: float) -> None:
    history = simulated(ReplicaScaler(policy(most=8, target=target)), load, begin=begin)
    lowest = next((i for i in range(1, len(history)) if history[i] < history[i - 1]), len(history))
    assert history[:lowest] == sorted(history[:lowest]) and history[lowest:] == sorted(history[lowest:], reverse=True)
    assert history[-1] >= math.floor(load), "what is left serves the load"
    assert history[-1] <= load / FILLED + 1


# -- the life of a replica ---------------------------------------------------------------------------------------------


class SlowReplica(ScriptedReplica):
    """A late start waits for the test."""

    fail: str | None = None

    def _start(self, build: Any) -> None:
        if self.fail is not None:
            raise OSError(self.fail)
        if self._dead is None:
            super()._start(build)

    def ready(self) -> None:
        super()._start(None)

    def queue(self, waiting: int, running: int = 7) -> None:
        self._receive(StepMessage((), EngineStats(num_running=running, num_waiting=waiting)))


class Pool:
    """A client with its clock."""

    def __init__(self, least: int = 1, most: int = 3, restarts: int = 0) -> None:
        self.now = 0.0
        self.client = RoutedClient.start_with(
            make_engine, make=SlowReplica, scaling=policy(least, most), clock=lambda: self.now, keeper_period=None, restarts=restarts,
            silent_timeout=100.0)

    def __getitem__(self, number: int) -> SlowReplica:
        replica = self.client._replicas[number]
        assert isinstance(replica, SlowReplica)
        return replica

    def tick(self, seconds: float = 0.0, silent: bool = False) -> tuple[str, ...]:
        """silent: the replicas have sent nothing meanwhile."""
        self.now += seconds
        for number in () if silent else self.client._slots.serving:
            self[number]._receive(StepMessage((), self.client.observe().get(number, EngineStats())))
        self.client.keeper.tick()
        return self.client.replica_states

    def grow(self, number: int = 1) -> None:
        """Start replica `number`, because the queue of the first one is long."""
        self[0].queue(100)
        self.tick()
        assert self.tick(UP)[number] == "starting"
        self[number].ready()
        assert self.client.replica_states[number] == "live"

    def shrink(self) -> tuple[str, ...]:
        for number in self.client._slots.live:
            self[number].queue(0, 0)
        self.tick()
        return self.tick(DOWN)


def test_a_queue_starts_a_replica_and_its_end_ends_it_without_losing_a_request() -> None:
    pool = Pool()
    client = pool.client

    async def main() -> None:
        first = asyncio.create_task(read(client.generate(ask("a"))))
        await settle()
        assert client.replica_states == ("live", "stopped", "stopped") and client.info.max_requests == 7
        pool.grow()
        assert client.replica_states == ("live", "live", "stopped")
        assert (client.num_live, client.num_wanted, client.info.data_parallel_size, client.info.max_requests) == (2, 2, 2, 14)
        second = asyncio.create_task(read(client.generate(ask("b", prompt=(9,) * 9))))
        await settle()
        assert pool[1].requests() == ["b"]
        pool[0].deltas("a", "stop")
        assert await first == ["stop"]
        assert pool.shrink() == ("stopped", "live", "stopped"), "the one with the least work"
        assert (client.num_live, client.info.max_requests) == (1, 7)
        pool[1].deltas("b", "stop")
        assert await second == ["stop"]

    run(main, client)
    text = client.metrics.render().decode()
    assert 'minivllm:num_replicas_live{model_name="fake"} 1.0' in text and 'minivllm:num_replicas_wanted{model_name="fake"} 1.0' in text


def test_a_stopped_replica_is_started_again_as_a_new_one() -> None:
    pool = Pool(most=2)
    pool.grow()
    old = pool[1]
    assert pool.shrink() == ("live", "stopped") and old.dead == "the engine was closed"
    pool.grow()
    assert pool[1] is not old and pool[1].dead is None and old.dead is not None


def test_a_draining_replica_finishes_its_requests_and_gets_no_new_ones() -> None:
    pool = Pool(most=2)
    client = pool.client

    async def main() -> None:
        pool.grow()
        tasks = [asyncio.create_task(read(client.generate(ask(name, prompt=(5 + i,) * 9)))) for i, name in enumerate("abc")]
        await settle()
        assert (pool[0].requests(), pool[1].requests()) == (["a", "c"], ["b"])
        assert pool.shrink() == pool.tick() == ("live", "draining")
        tasks.append(asyncio.create_task(read(client.generate(ask("d", prompt=(6,) * 9)))))  # replica 1 has its prefix
        await settle()
        assert pool[0].requests() == ["a", "c", "d"]
        pool[1].deltas("b")
        assert pool.tick() == ("live", "draining")
        pool[1].deltas("b", "length")
        assert pool.tick() == ("live", "stopped")
        for name in "acd":
            pool[0].deltas(name, "stop")
        assert await asyncio.gather(*tasks) == [["stop"], [None, "length"], ["stop"], ["stop"]]

    run(main, client)


def test_a_draining_replica_is_taken_back_if_the_load_returns() -> None:
    pool = Pool(most=2)
    client = pool.client

    async def main() -> None:
        pool.grow()
        old = pool[1]
        tasks = [asyncio.create_task(read(client.generate(ask(name, prompt=(5 + i,) * 9)))) for i, name in enumerate("abc")]
        await settle()
        assert pool.shrink() == ("live", "draining")
        pool[0].queue(100)
        assert pool.tick() == ("live", "draining")
        assert pool.tick(UP) == ("live", "live")
        tasks.append(asyncio.create_task(read(client.generate(ask("d", prompt=(8,) * 9)))))
        await settle()
        assert pool[1] is old and old.requests() == ["b", "d"]
        for name in "abcd":
            pool[int(name in "bd")].deltas(name, "stop")
        await asyncio.gather(*tasks)

    run(main, client)


@pytest.mark.parametrize("restarts", [0, 3])
def test_a_draining_replica_that_is_killed_gives_its_requests_to_others_and_is_not_started_again(restarts: int) -> None:
    pool = Pool(most=2, restarts=restarts)
    client = pool.client

    async def main() -> None:
        pool.grow()
        tasks = [asyncio.create_task(read(client.generate(ask(name, prompt=(5 + i,) * 9)))) for i, name in enumerate("abcde")]
        await settle()
        assert (pool[0].requests(), pool[1].requests()) == (["a", "c", "e"], ["b", "d"])
        assert pool.shrink() == ("live", "draining")
        pool[1].deltas("b")
        pool[1].end("killed by SIGKILL")
        assert not pool[1].restarting and client.replica_states == ("live", "stopping")
        assert pool[0].requests() == ["a", "c", "e", "d"]
        assert pool.tick() == ("live", "stopped")
        for name in "aced":
            pool[0].deltas(name, "stop")
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(ends.pop(1), ReplicaLost) and ends == [["stop"]] * 4

    run(main, client)


def test_if_all_others_end_a_draining_replica_is_taken_back_at_once() -> None:
    pool = Pool(most=2)
    client = pool.client

    async def main() -> None:
        pool.grow()
        tasks = [asyncio.create_task(read(client.generate(ask(name, prompt=(5 + i,) * 9)))) for i, name in enumerate("abc")]
        await settle()
        assert pool.shrink() == ("live", "draining")
        pool[0].end()
        assert client.replica_states == ("dead", "live") and client.dead is None
        assert pool[1].requests() == ["b", "a", "c"]
        for name in "abc":
            pool[1].deltas(name, "stop")
        await asyncio.gather(*tasks)

    run(main, client)


def test_a_start_that_fails_leaves_the_server_as_it_is_and_is_repeated_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Pool()
    client = pool.client
    deaths: list[str] = []
    client.on_death(lambda: deaths.append("gone"))
    monkeypatch.setattr(SlowReplica, "fail", "no GPU is free")
    pool[0].queue(100)
    pool.tick()
    assert pool.tick(UP) == ("live", "stopping", "stopped") and client.num_wanted == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "replica 1 could not be started, and is tried again after 30 s at the earliest: OSError: no GPU is free"]
    assert pool.tick() == pool.tick(FIRST_PAUSE - 1) == ("live", "stopped", "stopped")
    monkeypatch.undo()
    assert pool.tick(UP) == ("live", "starting", "stopped")
    pool[1].end("exit code -9")  # killed while it loads the model
    assert client.replica_states == ("live", "stopping", "stopped") and client.num_wanted == 1
    assert pool.tick(2 * FIRST_PAUSE - 1) == ("live", "stopped", "stopped")
    assert pool.tick(UP) == ("live", "starting", "stopped")
    pool[1].ready()
    assert client.num_live == 2 and not deaths


def test_a_start_without_an_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_keeper, "START_SECONDS", 50.0)
    pool = Pool()
    pool[0].queue(100)
    pool.tick()
    pool.tick(UP)
    assert pool.tick(50.0) == ("live", "starting", "stopped")
    assert pool.tick(1.0) == ("live", "stopping", "stopped")
    assert pool.tick() == ("live", "stopped", "stopped")


def test_a_replica_that_is_gone_for_good_is_replaced_by_another_slot_if_there_are_too_few() -> None:
    pool = Pool(least=2, most=3)
    pool[0].end()
    assert pool.client.replica_states == ("dead", "live", "stopped")
    assert pool.tick() == ("dead", "live", "starting")
    pool[2].end("exit code -9")
    assert pool.tick() == pool.tick(FIRST_PAUSE - 1) == ("dead", "live", "stopped")
    assert pool.tick(1.0) == ("dead", "live", "starting")
    pool[2].ready()
    assert pool.tick(1e4) == ("dead", "live", "live")


def test_when_no_replica_is_left_none_is_started() -> None:
    pool = Pool(least=2, most=3)
    deaths: list[str] = []
    pool.client.on_death(lambda: deaths.append("gone"))
    pool[0].end()
    pool[1].end()
    assert pool.tick(1e4) == ("dead", "dead", "stopped") and deaths == ["gone"]


def test_a_new_replica_gets_the_adapters_before_requests_and_none_are_loaded_meanwhile() -> None:
    pool = Pool(most=2)
    client = pool.client
    loading = client.load_adapter(LoRARequest("sql", 1, "folder"))
    pool[0].queue(100)
    pool.tick()
    assert pool.tick(UP) == ("live", "stopped"), "not while an adapter is being loaded"
    pool[0]._receive(ObeyedMessage(pool[0].sent[-1].number))
    loading.result(0)
    assert pool.tick() == ("live", "stopped")
    assert pool.tick(UP) == ("live", "starting")
    with pytest.raises(EngineRestarting, match="replica 1 is being started because of the load"):
        client.unload_adapter("sql")
    pool[1].ready()
    (command,) = pool[1].sent
    assert isinstance(command, LoadAdapterCommand) and command.request.lora_name == "sql" and client.num_live == 1
    pool[1]._receive(ObeyedMessage(command.number))
    assert client.num_live == 2
    unloading = client.unload_adapter("sql")
    for number in range(2):
        pool[number]._receive(ObeyedMessage(pool[number].sent[-1].number))
    unloading.result(0)
    assert not client._adapters


def test_views_come_from_a_live_replica() -> None:
    pool = Pool(most=2)
    with pool.client.watching():
        assert pool[0].sent == [WatchCommand(True)]
        pool.grow()
        pool.client._router.choose("x", (5,) * 40, {1})  # type: ignore[union-attr]  # so that the first one has the least work
        assert pool.shrink()[1] == "live" and pool.client.watched == 1
        assert pool[0].sent[-1] == WatchCommand(False) and pool[1].sent[-1] == WatchCommand(True)


def test_closing_while_replicas_start_and_drain_ends_all_of_them(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(most=3)
    client = pool.client

    async def main() -> None:
        pool.grow()
        tasks = [asyncio.create_task(read(client.generate(ask(name, prompt=(5 + i,) * 9)))) for i, name in enumerate("ab")]
        await settle()
        pool[0].queue(100)
        pool.tick()
        assert pool.tick(UP) == ("live", "live", "starting")
        await asyncio.to_thread(client.close)
        assert all(isinstance(end, EngineDead) for end in await asyncio.gather(*tasks, return_exceptions=True))
        assert [pool[number].dead for number in range(3)] == ["the engine was closed", "the engine was closed", "killed"]
        assert not [record for record in caplog.records if record.levelname == "ERROR"], "no start has failed"

    run(main, client)


# -- silence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_silent_replica_is_shown_and_with_restarts_ended_after_the_timeout(restarts: int) -> None:
    pool = Pool(least=2, most=2, restarts=restarts)
    client = pool.client

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("stuck"))))
        await settle()
        assert pool.tick(SILENT_SECONDS, silent=True) == ("live", "live")
        assert pool.tick(1.0, silent=True) == ("silent", "live") and client.num_live == 2
        assert pool.tick(100.0 - SILENT_SECONDS - 1, silent=True) == ("silent", "live")
        assert pool.tick(1.0, silent=True) == (("restarting", "live") if restarts else ("silent", "live"))
        assert pool.tick(1.0, silent=True)[0] == ("restarting" if restarts else "silent")
        holder = pool[1] if restarts else pool[0]
        assert holder.requests() == ["stuck"]
        holder.deltas("stuck", "stop")
        assert await reading == ["stop"]
        if restarts:
            pool[0].start_again()
        assert client.replica_states == ("live", "live")

    run(main, client)


def test_a_silent_process_is_killed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits inside its GPU's driver does not end at once."""
    pool = Pool(least=2, most=2, restarts=1)
    kills: list[int] = []
    kill: Callable[[SlowReplica], None] = lambda self: kills.append(self._number)  # noqa: E731
    monkeypatch.setattr(SlowReplica, "kill", kill)

    async def main() -> None:
        reading = asyncio.create_task(read(pool.client.generate(ask("stuck"))))
        await settle()
        for _ in range(4):
            pool.tick(60.0, silent=True)
        assert kills == [0]
        pool[0].deltas("stuck", "stop")
        await reading

    run(main, pool.client)
