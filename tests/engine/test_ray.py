"""Replicas in a real Ray cluster: two nodes of one machine. Skipped without Ray (`pip install minivllm[ray]`)."""
from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest

from minivllm.engine import restarts
from minivllm.engine.autoscaling import ScalingPolicy
from minivllm.engine.messages import StepMessage
from minivllm.engine.metrics import EngineStats
from minivllm.engine.ray_replicas import EngineActor, RayReplica, boot_time, by_clock_of_server, connect
from minivllm.engine.replicas import RoutedClient
from minivllm.errors import InvalidInput, ReplicaLost
from minivllm.outputs import OutputDelta, RequestMetrics
from tests.engine.fake import FakeExecutor, expected, make_engine
from tests.engine.test_client import ask, collect
from tests.engine.test_replicas import read


def build() -> Any:
    return make_engine(FakeExecutor(1 << 14), max_model_len=1 << 16)


def test_times_of_another_machine_are_readings_of_the_servers_clock() -> None:
    actor = EngineActor(build, boot_time() - 1000.0)  # the server was started 1000 s earlier, so its clock is ahead
    sent = dataclasses.replace(ask("r", max_tokens=2), arrival_time=time.monotonic() + 1000.0)
    actor.send(sent)
    times = None
    for batch in actor.messages():
        for message in batch:
            if isinstance(message, StepMessage) and message.deltas and message.deltas[-1].finish_reason:
                times = message.deltas[-1].metrics
        if times is not None:
            break
    assert times is not None and times.first_scheduled_time is not None and times.finished_time is not None
    assert times.arrival_time == pytest.approx(sent.arrival_time, abs=1e-3)
    assert 0 <= times.first_scheduled_time - times.arrival_time < 100 and times.finished_time > times.first_scheduled_time
    message = StepMessage((OutputDelta("r", 0, (5,), "a", metrics=RequestMetrics(5.0, finished_time=7.0)),), EngineStats())
    assert by_clock_of_server(message, 0.0) is message


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'minivllm[ray]'")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def where(replica: Any) -> str:
    """The node of a replica's actor."""
    from ray.util.state import get_actor

    return str(get_actor(replica._actor._actor_id.hex()).node_id)


def test_replicas_on_two_nodes_serve_and_one_that_is_killed_loses_only_streams(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.1)
    with pytest.raises(InvalidInput, match="data_parallel_size=3 needs 3 CPUs in the Ray cluster, 1 for each replica, and there are 2"):
        connect(3, 1, "cpu")
    with pytest.raises(InvalidInput, match="needs 2 GPUs"):
        connect(1, 2, "cuda")
    client = RoutedClient.start_with(build, replicas=2, restarts=3, make=connect(2, 1, "cpu"))
    first, second = client._replicas
    assert isinstance(first, RayReplica) and isinstance(second, RayReplica)

    async def main() -> None:
        every = await asyncio.gather(*(collect(client, ask(f"r{i}", (i + 3,) * 9, max_tokens=20)) for i in range(8)))
        assert every == [{0: expected((i + 3,) * 9, 20)} for i in range(8)]
        stream = client.generate(ask("begun", max_tokens=None))
        await anext(stream)
        holder = client._placements["begun"].replica
        assert holder is not None
        ray.kill(client._replicas[holder]._actor)  # type: ignore[attr-defined]
        waiting = [asyncio.create_task(collect(client, ask(f"w{i}", (i + 50,) * 9, max_tokens=20))) for i in range(6)]
        with pytest.raises(ReplicaLost, match="Ray actor ended unexpectedly"):
            await read(stream)
        assert await asyncio.gather(*waiting) == [{0: expected((i + 50,) * 9, 20)} for i in range(6)]
        while client.num_live < 2:
            await asyncio.sleep(0.01)

    try:
        asyncio.run(main())
        assert client._streams == {} and client._placements == {}
    finally:
        client.close()
    assert not ray._private.state.actors() or all(a["State"] == "DEAD" for a in ray._private.state.actors().values())


def test_load_starts_an_actor_and_its_end_ends_it_and_without_a_free_cpu_nothing_changes(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    import ray

    now, waiting = 0.0, 100
    scaling = ScalingPolicy(least=1, most=3, target_queue=1.0, upscale_delay=0.0, downscale_delay=0.0)
    client = RoutedClient.start_with(
        build, make=connect(1, 1, "cpu"), scaling=scaling, clock=lambda: now, keeper_period=None)
    monkeypatch.setattr(client, "observe", lambda: {0: EngineStats(num_running=waiting, num_waiting=waiting)})

    def look() -> tuple[str, ...]:
        nonlocal now
        if "starting" not in client.replica_states:
            now += 1000.0  # the pause after a failed start is over: CPUs of ended actors are free a little later
        client.keeper.tick()
        return client.replica_states

    async def main() -> None:
        nonlocal waiting
        while client.num_live < 2:
            await asyncio.to_thread(look)
            await asyncio.sleep(0.01)
        every = await asyncio.gather(*(collect(client, ask(f"r{i}", (i + 3,) * 9, max_tokens=20)) for i in range(8)))
        assert every == [{0: expected((i + 3,) * 9, 20)} for i in range(8)]
        while "a replica needs 1 CPU of the Ray cluster, and 0 are free" not in caplog.text:
            await asyncio.to_thread(look)
            await asyncio.sleep(0.01)
        assert client.num_live == 2 and client.num_wanted == 2
        waiting = 0
        while client.replica_states != ("live", "stopped", "stopped"):
            await asyncio.to_thread(look)
        assert await collect(client, ask("last", max_tokens=20)) == {0: expected((5, 6, 7), 20)}

    try:
        asyncio.run(main())
        assert client._streams == {} and client._placements == {}
        assert sum(actor["State"] == "ALIVE" for actor in ray._private.state.actors().values()) == 1
    finally:
        client.close()
