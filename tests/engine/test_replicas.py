"""Several replicas behind one client. Most are scripted: the test sends their messages itself, so every order of events is exact."""
from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from minivllm.core.admission import QueueFull
from minivllm.engine import replicas, restarts
from minivllm.engine.messages import (
    AbortCommand,
    DeadMessage,
    EngineInfo,
    LoadAdapterCommand,
    ObeyedMessage,
    ReadyMessage,
    RefusedMessage,
    ResetPrefixCacheCommand,
    StepMessage,
    UnloadAdapterCommand,
    WatchCommand,
)
from minivllm.engine.metrics import EngineStats
from minivllm.engine.replica import PipeSender, Replica
from minivllm.engine.replica_slots import SILENT_SECONDS
from minivllm.engine.replicas import MAX_ATTEMPTS, RoutedClient
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import EngineDead, EngineRestarting, InvalidInput, ReplicaLost
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams
from tests.engine.fake import FakeExecutor, make_engine

INFO = EngineInfo(model="fake", model_folder="", tokenizer_folder=None, max_model_len=64, vocab_size=99, eos_token_ids=(1,), device="cpu",
                  dtype="float32", num_blocks=64, block_size=4, generation_config={}, max_requests=7, max_queue=3)


class ScriptedReplica(Replica):
    """Records commands. The test sends the messages."""

    def __init__(self, restarts: int) -> None:
        super().__init__()
        self.sent: list[Any] = []
        self.restarts = restarts
        self.on_send: Callable[[Any], None] = lambda command: None

    def _start(self, build: Any) -> None:
        self._receive(ReadyMessage(INFO))

    def _send(self, command: Any) -> None:
        self.sent.append(command)
        self.on_send(command)

    def _may_restart(self) -> bool:
        self.restarts -= 1
        return self.restarts >= 0

    def close(self) -> None:
        self._closing = True
        self._die(DeadMessage("the engine was closed"))

    def kill(self) -> None:
        self.end("killed")

    def requests(self) -> list[str]:
        return [command.request_id for command in self.sent if isinstance(command, EngineRequest)]

    def end(self, reason: str = "lost") -> None:
        self._receive(DeadMessage(reason))

    def start_again(self) -> None:
        self._ended = False
        self._receive(ReadyMessage(INFO))

    def deltas(self, request_id: str, finish: Any = None, running: int = 0) -> None:
        self._receive(StepMessage((OutputDelta(request_id, 0, (5,), "a", finish_reason=finish),), EngineStats(num_running=running)))


def routed(
    number: int = 2, restarts: int = 0, clock: Callable[[], float] = lambda: 0.0,
) -> tuple[RoutedClient, list[ScriptedReplica]]:
    client = RoutedClient.start_with(
        make_engine, replicas=number, restarts=restarts, make=ScriptedReplica, clock=clock)
    return client, client._replicas  # type: ignore[return-value]


def ask(name: str, prompt: tuple[int, ...] = (5, 6, 7), **params: Any) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**{"temperature": 0.0, **params}))


async def read(stream: AsyncGenerator[list[OutputDelta], None]) -> list[str | None]:
    """The finish reasons of all deltas."""
    return [delta.finish_reason async for deltas in stream for delta in deltas]


async def settle() -> None:
    """Let the event loop run what is ready."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(main: Callable[[], Coroutine[Any, Any, None]], client: RoutedClient) -> None:
    """Run, and check that nothing is left of any request."""
    asyncio.run(main())
    assert client._streams == {} and client._placements == {}
    assert client._router is not None and not client._router._requests
    assert not client.metrics._tracked


def test_a_request_without_output_continues_on_another_replica() -> None:
    client, (first, second) = routed()

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("r"))))
        await settle()
        assert (first.requests(), second.requests()) == (["r"], [])
        first.end()
        assert second.requests() == ["r"]
        assert (client.num_live, client.num_engines, client.dead) == (1, 2, None)
        second.deltas("r")
        second.deltas("r", "length")
        assert await reading == [None, "length"]

    run(main, client)
    assert client.metrics.finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_a_request_with_output_ends_with_an_error_that_names_the_replica() -> None:
    client, (first, _) = routed()

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("r"))))
        await settle()
        first.deltas("r")
        first.end("CUDA error")
        with pytest.raises(ReplicaLost, match="replica 0 has stopped: CUDA error"):
            await reading

    run(main, client)
    assert client.metrics.finished["error"] == 1


def test_a_request_that_ends_its_replicas_is_not_sent_to_all() -> None:
    client, every = routed(MAX_ATTEMPTS + 2)

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("poison"))))
        await settle()
        for _ in range(MAX_ATTEMPTS):
            next(replica for replica in every if replica.requests() and replica.dead is None).end()
        with pytest.raises(ReplicaLost):
            await reading

    run(main, client)
    assert client.num_live == 2


def test_while_no_replica_lives_new_requests_are_refused_and_earlier_ones_wait() -> None:
    client, (first, second) = routed(restarts=1)

    async def main() -> None:
        waiting = asyncio.create_task(read(client.generate(ask("r"))))
        await settle()
        second.end()
        first.end()
        assert client.restarting and client.num_live == 0
        with pytest.raises(EngineRestarting):
            client.add(ask("new"))
        second.start_again()
        assert client.dead is None and not client.restarting
        assert second.requests() == ["r"]
        second.deltas("r", "stop")
        assert await waiting == ["stop"]

    run(main, client)


def test_aborting_a_request_that_waits_for_a_replica_ends_it_at_once() -> None:
    client, (first, second) = routed(restarts=1)

    async def main() -> None:
        waiting = asyncio.create_task(read(client.generate(ask("r", n=2, temperature=1.0))))
        left = asyncio.create_task(read(client.generate(ask("left"))))
        await settle()
        second.end()
        first.end()
        client.abort("r")
        assert await waiting == ["abort", "abort"]
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)

    run(main, client)


def test_an_abort_that_a_replica_takes_to_its_end_still_ends_the_request() -> None:
    client, (first, second) = routed()

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("r"))))
        left = asyncio.create_task(read(client.generate(ask("left", prompt=(9,) * 40))))
        await settle()
        client.abort("r")
        assert first.sent[-1] == AbortCommand("r")
        holder = second if "left" in second.requests() else first
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert holder.sent[-1] == AbortCommand("left")
        first.end()
        assert await reading == ["abort"]
        second.end()
        assert first.requests() + second.requests() == ["r", "left"], "neither is sent again"

    run(main, client)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("leaves", ["before", "meanwhile", "after"])
def test_a_reader_that_leaves_as_its_replica_ends_leaves_nothing_behind(begun: bool, leaves: str) -> None:
    client, (first, second) = routed()

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("r"))))
        await settle()
        if begun:
            first.deltas("r")
        if leaves == "before":
            reading.cancel()
            await settle()
            first.end()
        elif leaves == "meanwhile":
            reading.cancel()
            first.end()  # before the reader has run and left
        else:
            first.end()  # the error is on its way to the event loop when the reader leaves
            reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        if "r" in second.requests():
            assert second.sent[-1] == AbortCommand("r")
            second.deltas("r", "abort")

    run(main, client)


def test_a_refused_request_leaves_nothing_behind_and_its_replica_continues() -> None:
    client, (first, _) = routed()

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("bad"))))
        await settle()
        first._receive(RefusedMessage("bad", InvalidInput("no")))
        with pytest.raises(InvalidInput, match="no"):
            await reading

    run(main, client)


FULL = QueueFull("Rate limit reached: max_queue (3) requests wait already: try again later", "max_queue")


def test_a_full_queue_is_an_answer_only_if_all_replicas_that_live_are_full() -> None:
    client, every = routed(3)

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("r"))))
        refused = asyncio.create_task(read(client.generate(ask("s", prompt=(9,) * 40))))
        await settle()
        every[2].end()
        holder, other = sorted(every[:2], key=lambda replica: "r" not in replica.requests())
        holder._receive(RefusedMessage("r", FULL))
        assert other.requests()[-1] == "r" and not reading.done()
        other.deltas("r", "stop")
        assert await reading == ["stop"]
        for _ in range(2):
            replica = next(replica for number, replica in enumerate(every) if number == client._placements["s"].replica)
            await settle()
            assert not refused.done()
            replica._receive(RefusedMessage("s", FULL))
        with pytest.raises(QueueFull):
            await refused

    run(main, client)
    assert every[0].requests().count("s") == every[1].requests().count("s") == 1


def test_other_refusals_and_aborted_requests_are_not_sent_to_another_replica() -> None:
    client, (first, second) = routed()

    async def main() -> None:
        for name, error in (("grammar", QueueFull("too much time", "structured_outputs")), ("aborted", FULL)):
            reading = asyncio.create_task(read(client.generate(ask(name))))
            await settle()
            if name == "aborted":
                client.abort(name)
            holder = first if name in first.requests() else second
            holder._receive(RefusedMessage(name, error))
            with pytest.raises(QueueFull):
                await reading
        assert sorted(first.requests() + second.requests()) == ["aborted", "grammar"]

    run(main, client)


def test_a_replica_that_does_not_answer_gets_no_request_as_long_as_another_one_does() -> None:
    now = 0.0
    client, (first, second) = routed(clock=lambda: now)

    async def main() -> None:
        nonlocal now
        tasks = [asyncio.create_task(read(client.generate(ask("stuck"))))]
        await settle()
        assert first.requests() == ["stuck"]
        now = SILENT_SECONDS + 1  # `first` holds the prefix, and has sent nothing. `second` is idle, so its silence means nothing
        tasks.append(asyncio.create_task(read(client.generate(ask("a", prompt=(5, 6, 7))))))
        tasks += [asyncio.create_task(read(client.generate(ask(name, prompt=(8,) * 50)))) for name in "bc"]
        await settle()
        assert first.requests() == ["stuck"] and second.requests() == ["a", "b", "c"]
        now *= 2  # both are silent: one is as good as the other
        tasks.append(asyncio.create_task(read(client.generate(ask("d")))))
        await settle()
        assert first.requests() == ["stuck", "d"]
        first.deltas("stuck")
        second.deltas("a")  # both answer again
        tasks.append(asyncio.create_task(read(client.generate(ask("e")))))
        await settle()
        assert first.requests()[-1] == "e"
        for replica, names in ((first, ("stuck", "d", "e")), (second, "abc")):
            for name in names:
                replica.deltas(name, "stop")
        await asyncio.gather(*tasks)
        assert not client._slots._quiet_since

    run(main, client)


def test_a_pipe_that_is_not_read_delays_no_caller_and_a_closed_one_ends_the_thread() -> None:
    ours, theirs = multiprocessing.Pipe()
    sender = PipeSender(ours)
    commands = [AbortCommand("x" * 2**22), AbortCommand("last")]  # the first one is larger than the pipe's buffer
    for command in commands:
        sender.send(command)
    assert [theirs.recv(), theirs.recv()] == commands
    sender.send(commands[0])
    theirs.close()
    sender.end()
    ours.close()


def test_a_request_that_cannot_be_sent_leaves_nothing_behind() -> None:
    client, every = routed()

    def fail(command: Any) -> None:
        raise MemoryError

    for replica in every:
        replica.on_send = fail
    with pytest.raises(MemoryError):
        asyncio.run(read(client.generate(ask("r"))))
    assert client._streams == {} and not client.metrics._tracked


def test_when_the_last_replica_is_gone_every_request_ends_and_the_server_is_told_once() -> None:
    client, (first, second) = routed(restarts=1)
    calls: list[str] = []
    client.on_death(lambda: calls.append("gone"))

    async def main() -> None:
        waiting = asyncio.create_task(read(client.generate(ask("r"))))
        await settle()
        first.end()
        second.end()
        first._ended = False  # its next start fails
        first.end("no memory")
        assert client.restarting and not calls
        second._ended = False
        second.end("no memory")
        with pytest.raises(EngineDead, match="no memory"):
            await waiting
        with pytest.raises(EngineDead, match="no memory"):
            client.add(ask("late"))

    run(main, client)
    assert calls == ["gone"] and not client.restarting


def test_a_closed_client_sends_nothing_again() -> None:
    client, every = routed()

    async def main() -> None:
        reading = asyncio.create_task(read(client.generate(ask("r"))))
        await settle()
        await asyncio.to_thread(client.close)
        with pytest.raises(EngineDead, match="closed"):
            await reading

    run(main, client)
    assert sum(len(replica.requests()) for replica in every) == 1


def test_commands_reach_all_replicas_and_are_done_when_all_have_obeyed() -> None:
    client, every = routed(3)

    async def main() -> None:
        reset = asyncio.create_task(client.reset_prefix_cache())
        await settle()
        numbers = [replica.sent[-1].number for replica in every if isinstance(replica.sent[-1], ResetPrefixCacheCommand)]
        every[0]._receive(ObeyedMessage(numbers[0]))
        every[1]._receive(ObeyedMessage(numbers[1]))
        await settle()
        assert not reset.done()
        every[2].end()  # the next engine's cache is empty
        await reset

    run(main, client)


def test_an_adapter_that_one_replica_cannot_load_is_taken_from_the_others() -> None:
    client, (first, second) = routed()
    future = client.load_adapter(LoRARequest("sql", 1, "folder"))
    assert isinstance(first.sent[-1], LoadAdapterCommand)
    first._receive(ObeyedMessage(first.sent[-1].number))
    second._receive(ObeyedMessage(second.sent[-1].number, InvalidInput("no memory", "lora_path")))
    with pytest.raises(InvalidInput, match="no memory"):
        future.result(0)
    assert isinstance(first.sent[-1], UnloadAdapterCommand) and not first._adapters
    assert not isinstance(second.sent[-1], UnloadAdapterCommand)


def test_a_replica_that_starts_again_gets_its_adapters_before_requests_and_none_are_loaded_meanwhile() -> None:
    client, (first, second) = routed(restarts=1)
    loading = client.load_adapter(LoRARequest("sql", 1, "folder"))
    for replica in (first, second):
        replica._receive(ObeyedMessage(replica.sent[-1].number))
    loading.result(0)
    second.end()
    for call in (partial(client.load_adapter, LoRARequest("two", 2, "folder")), partial(client.unload_adapter, "sql")):
        with pytest.raises(EngineRestarting, match="replica 1 is being started again"):
            call()
    second.start_again()
    assert second.sent[-1].request.lora_name == "sql" and client.num_live == 1
    second._receive(ObeyedMessage(second.sent[-1].number))
    assert client.num_live == 2


def test_one_replica_is_watched_and_another_when_it_ends() -> None:
    client, (first, second) = routed()
    with client.watching():
        assert first.sent == [WatchCommand(True)] and second.sent == []
        first.end()
        assert second.sent == [WatchCommand(True)] and client.watched == 1
    assert second.sent == [WatchCommand(True), WatchCommand(False)]


def test_stats_are_sums_metrics_have_the_replicas_number_and_limits_are_those_of_all() -> None:
    client, (first, second) = routed()
    for replica, running in ((first, 2), (second, 3)):
        replica._receive(StepMessage((), EngineStats(num_running=running, num_blocks=10, used_blocks=running)))
    assert (client.stats().num_running, client.stats().kv_cache_usage, client.stats(1).num_running) == (5, 0.25, 3)
    text = client.metrics.render().decode()
    assert 'minivllm:num_requests_running{engine="1",model_name="fake"} 3.0' in text
    assert 'minivllm:generation_tokens_total{model_name="fake"} 0.0' in text
    assert (client.info.data_parallel_size, client.info.max_requests, client.info.max_queue, client.info.num_blocks) == (2, 14, 6, 64)
    first.end()
    assert client.stats().num_running == 3
    assert 'minivllm:num_requests_running{engine="0",model_name="fake"} 0.0' in client.metrics.render().decode()
    assert (client.info.data_parallel_size, client.info.max_requests, client.info.max_queue) == (1, 7, 3)


def test_requests_without_a_seed_get_different_ones_and_a_repeated_request_its_first() -> None:
    client, (first, second) = routed()

    async def main() -> None:
        streams = [asyncio.create_task(read(client.generate(ask(name, prompt, temperature=1.0))))
                   for name, prompt in (("a", (5, 6, 7)), ("b", (5, 6, 7, 8)))]
        await settle()
        seeds = [replica.sent[0].params.seed for replica in (first, second)]
        assert None not in seeds and seeds[0] != seeds[1]
        first.end()
        assert second.sent[-1].params.seed == seeds[0]
        for name in "ab":
            second.deltas(name, "stop")
        await asyncio.gather(*streams)

    run(main, client)


# -- real processes ---------------------------------------------------------------------------------------------------


def build_slow() -> Any:
    return make_engine(FakeExecutor(1 << 12), max_model_len=1 << 14)


def test_a_killed_replica_loses_no_request_without_output_and_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.1)
    client = RoutedClient.start_with(build_slow, replicas=2, restarts=1)
    first = client._replicas[0]
    assert isinstance(first, replicas.ReplicaProcess) and first.pid is not None
    pid = first.pid
    os.kill(pid, signal.SIGSTOP)  # it takes requests and does not compute them
    first.send(AbortCommand("x" * 2**22))  # nor does it read: the rest of this waits

    async def main() -> None:
        streams = [asyncio.create_task(read(client.generate(ask(str(i), (i + 3,) * 8, max_tokens=4, ignore_eos=True)))) for i in range(6)]
        await settle()
        assert {placement.replica for placement in client._placements.values()} == {0, 1}
        os.kill(pid, signal.SIGKILL)
        assert [reasons[-1] for reasons in await asyncio.gather(*streams)] == ["length"] * 6
        while client.num_live < 2:
            await asyncio.sleep(0.01)
        assert await read(client.generate(ask("after", max_tokens=2, ignore_eos=True))) == [None, "length"]

    try:
        run(main, client)
    finally:
        client.close()
