"""Clients: an engine in a thread, one in its own process, and several in their own processes pass the same tests."""
from __future__ import annotations

import asyncio
import functools
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from minivllm.core.plan import TokenLogprobs
from minivllm.engine import process
from minivllm.engine.client import EngineClient, ThreadClient
from minivllm.engine.engine import EngineCore
from minivllm.engine.loop import EngineLoop
from minivllm.engine.messages import RefusedMessage, ShutdownCommand, StepMessage
from minivllm.engine.metrics import EngineStats
from minivllm.engine.process import ProcessClient
from minivllm.engine.replicas import RoutedClient
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import EngineDead, InvalidInput, ModelError
from minivllm.outputs import OutputDelta, RequestMetrics
from minivllm.sampling_params import SamplingParams
from tests.engine import tokenizers_for_tests as build
from tests.engine.fake import FakeExecutor, expected, make_engine

CLIENTS: dict[str, type[EngineClient]] = {"thread": ThreadClient, "process": ProcessClient, "replicas": RoutedClient}


# Builders of engines. They are module-level functions, since they are pickled for the child process.


def build_plain(folder: str) -> EngineCore:
    return make_engine(FakeExecutor(1 << 15), folder=folder, planning_depth=1, max_model_len=1 << 16)


def build_failing(folder: str) -> EngineCore:
    raise ModelError("model.safetensors is truncated", "model")


def build_exploding(folder: str) -> EngineCore:
    raise MemoryError("no memory for weights")


def build_vanishing(folder: str) -> EngineCore:
    os._exit(3)


def build_dying(folder: str) -> EngineCore:
    """The device is lost in the fourth step."""
    return make_engine(FakeExecutor(fail_waiting_at={i: RuntimeError("CUDA error: lost") for i in range(3, 100)}), folder=folder)


def build_buggy(folder: str) -> EngineCore:
    engine = make_engine(folder=folder)

    def update(*arguments: Any) -> None:
        raise AssertionError("a bug of ours")

    engine.scheduler.update = update  # type: ignore[method-assign,assignment]
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build.save(build.byte_level(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest, folder: str) -> Iterator[EngineClient]:
    client = CLIENTS[request.param].start_with(functools.partial(build_plain, folder))
    yield client
    client.close()


@pytest.fixture
def no_children_left() -> Iterator[None]:
    """The test leaves no child processes: neither running ones nor zombies. (multiprocessing's resource tracker does not count.)"""
    def ours() -> set[psutil.Process]:
        return {p for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE or "spawn_main" in " ".join(p.cmdline())}

    before = ours()
    yield
    assert ours() <= before


def start(kind: str, builder: Callable[[str], EngineCore], folder: str) -> EngineClient:
    return CLIENTS[kind].start_with(functools.partial(builder, folder))


def ask(name: str, prompt: tuple[int, ...] = (5, 6, 7), **params: Any) -> EngineRequest:
    params = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, **params}
    return EngineRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params))


async def collect(client: EngineClient, request: EngineRequest) -> dict[int, list[int]]:
    """The token ids of each child."""
    found: dict[int, list[int]] = {}
    async for deltas in client.generate(request):
        for delta in deltas:
            found.setdefault(delta.index, []).extend(delta.token_ids)
    return found


# -- streams ----------------------------------------------------------------------------------------------------------


def test_many_streams_at_once_each_get_their_own_tokens(client: EngineClient) -> None:
    async def main() -> None:
        prompts = [tuple(range(3, 4 + i)) for i in range(24)]
        every = await asyncio.gather(*(collect(client, ask(f"r{i}", p, max_tokens=3 + i)) for i, p in enumerate(prompts)))
        for i, (prompt, found) in enumerate(zip(prompts, every, strict=True)):
            assert found == {0: expected(prompt, 3 + i)}

    asyncio.run(main())
    assert client._streams == {}


def test_the_children_of_a_request_share_a_stream_that_ends_with_the_last(client: EngineClient) -> None:
    found = asyncio.run(collect(client, ask("n", n=3, temperature=1.0, seed=7)))
    assert found == {i: expected((5, 6, 7), 5, 7, i) for i in range(3)}


def test_the_id_of_a_stream_left_early_is_free_once_its_request_has_ended_and_not_before(client: EngineClient) -> None:
    async def main() -> None:
        stream = client.generate(ask("again", max_tokens=10_000))
        await anext(stream)
        await stream.aclose()
        with pytest.raises(InvalidInput, match="in use"):
            client.add(ask("again"))
        for _ in range(1000):  # each reply follows all commands before it, and the abort's delta comes after one of the next steps
            if "again" not in client._streams:
                break
            await client.reset_prefix_cache()
        assert await collect(client, ask("again")) == {0: expected((5, 6, 7), 5)}

    asyncio.run(main())
    assert client._streams == {}


def test_a_refused_request_raises_and_leaves_no_stream_behind(client: EngineClient) -> None:
    async def main() -> None:
        with pytest.raises(InvalidInput, match="outside the vocabulary") as error:
            await collect(client, ask("bad", (10**6,)))
        assert error.value.param == "prompt"
        with pytest.raises(InvalidInput, match="scheduling_policy"):
            async for _ in client.generate(EngineRequest(
                request_id="p", prompt_token_ids=(5,), params=SamplingParams(), priority=3,
            )):
                pass
        assert await collect(client, ask("bad")) == {0: expected((5, 6, 7), 5)}  # the id is free again

    asyncio.run(main())


@pytest.mark.parametrize(("options", "param"), [
    ({"beam_search": True}, "beam_search"), ({"lora_request": LoRARequest("sql", 1, "/a")}, "lora_request"),
    ({"params": SamplingParams(truncate_prompt_tokens=1)}, "truncate_prompt_tokens"), ({"params": {"max_tokens": 3}}, "params"),
])
def test_what_a_client_cannot_send_is_refused_by_name_and_other_requests_continue(
    client: EngineClient, options: dict[str, Any], param: str,
) -> None:
    async def main() -> None:
        request = EngineRequest(**{"request_id": "odd", "prompt_token_ids": (5, 6), "params": SamplingParams(), **options})
        other = asyncio.create_task(collect(client, ask("other")))
        with pytest.raises(InvalidInput) as error:
            await collect(client, request)
        assert error.value.param == param
        assert await other == {0: expected((5, 6, 7), 5)}

    asyncio.run(main())


def test_a_reader_that_leaves_while_its_request_is_refused_leaves_no_stream_behind(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_send", lambda command: None)  # the test sends the reply itself

    async def main() -> None:
        reading = asyncio.ensure_future(collect(client, ask("bad")))
        await asyncio.sleep(0)  # until it waits
        reading.cancel()
        client._receive(RefusedMessage("bad", InvalidInput("no")))  # arrives before the reader has left, and reaches its stream afterwards
        await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(main())
    assert client._streams == {}


def test_an_id_in_use_is_refused_and_the_first_request_continues(client: EngineClient) -> None:
    async def main() -> None:
        first = client.generate(ask("same", max_tokens=60))
        got = list(await anext(first))
        with pytest.raises(InvalidInput, match="in use"):
            client.add(ask("same"))
        async for deltas in first:
            got += deltas
        assert [t for d in got for t in d.token_ids] == expected((5, 6, 7), 60)

    asyncio.run(main())


def test_aborting_ends_the_stream_with_reason_abort(client: EngineClient) -> None:
    async def main() -> None:
        reasons = []
        async for deltas in client.generate(ask("long", n=2, temperature=1.0, max_tokens=None)):
            client.abort("long")
            reasons += [d.finish_reason for d in deltas if d.finish_reason]
        assert reasons == ["abort", "abort"]
        client.abort("unknown")
        await _idle(client)

    asyncio.run(main())
    assert client.stats().used_blocks == 0


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_reader_that_goes_away_aborts_its_request_and_frees_its_blocks(client: EngineClient, how: str) -> None:
    async def main() -> None:
        if how == "close":
            stream = client.generate(ask(how, max_tokens=None))
            await anext(stream)
            assert client.stats().num_running == 1
            await stream.aclose()
        else:
            started = asyncio.Event()

            async def read() -> None:
                async for _ in client.generate(ask(how, max_tokens=None)):
                    started.set()

            task = asyncio.create_task(read())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await _idle(client)
        assert (client.stats().num_running, client.stats().used_blocks) == (0, 0)

    asyncio.run(main())
    assert client._streams == {}


async def _idle(client: EngineClient) -> None:
    """Wait until the loop has handled every earlier command (it replies in order) and the results of launched steps."""
    await client.reset_prefix_cache()
    while client.stats().used_blocks:
        await client.reset_prefix_cache()


def test_a_slow_reader_finds_everything_in_one_batch(client: EngineClient) -> None:
    async def main() -> None:
        client.add(ask("slow", max_tokens=30))
        await collect(client, ask("other", max_tokens=60))  # the loop runs for longer than the slow request needs
        batches = [deltas async for deltas in client.outputs("slow")]
        assert [t for deltas in batches for d in deltas for t in d.token_ids] == expected((5, 6, 7), 30)
        assert len(batches) == 1

    asyncio.run(main())


def test_one_client_serves_one_event_loop_after_another(client: EngineClient) -> None:
    for i in range(3):
        assert asyncio.run(collect(client, ask(f"loop{i}"))) == {0: expected((5, 6, 7), 5)}


def test_two_event_loops_may_share_a_client(client: EngineClient) -> None:
    found: list[dict[int, list[int]]] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(asyncio.run(collect(client, ask(f"t{i}", max_tokens=40))))) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{0: expected((5, 6, 7), 40)}] * 2


def test_text_logprobs_and_stop_strings_cross(client: EngineClient) -> None:
    async def main() -> list[Any]:
        return [d async for deltas in client.generate(ask("lp", logprobs=2, prompt_logprobs=0, max_tokens=3)) for d in deltas]

    deltas = asyncio.run(main())
    assert [len(d.logprobs) for d in deltas] == [1, 1, 1]
    assert [p and p.token_id for p in deltas[0].prompt_logprobs] == [None, 6, 7]
    assert deltas[-1].metrics.finished_time >= deltas[-1].metrics.arrival_time


def test_information_and_metrics_need_no_engine(client: EngineClient) -> None:
    assert (client.info.model, client.info.vocab_size, client.info.generation_config) == ("fake", 400, {"temperature": 0.5})
    assert client.dead is None
    before = client.metrics.generation_tokens
    asyncio.run(collect(client, ask("m", max_tokens=4)))
    assert client.metrics.generation_tokens == before + 4
    text = client.metrics.render().decode()
    assert 'minivllm:request_success_total{finished_reason="length",model_name="fake"}' in text
    assert 'minivllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="fake"}' in text


def test_the_prefix_cache_can_be_reset_at_any_time(client: EngineClient) -> None:
    async def main() -> None:
        prompt = tuple(range(3, 60))
        for name, cached in (("c1", 0), ("c2", 56)):
            deltas = [d async for ds in client.generate(ask(name, prompt)) for d in ds]
            assert deltas[-1].num_cached_tokens == cached
        stream = client.generate(ask("busy", max_tokens=None))
        await anext(stream)
        await client.reset_prefix_cache()
        await stream.aclose()
        deltas = [d async for ds in client.generate(ask("c3", prompt)) for d in ds]
        assert deltas[-1].num_cached_tokens == 0

    asyncio.run(main())


# -- starting and ending ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_children_left")
@pytest.mark.parametrize("kind", CLIENTS)
def test_a_failed_start_raises_the_engines_own_error(kind: str, folder: str) -> None:
    with pytest.raises(ModelError, match="truncated") as error:
        start(kind, build_failing, folder)
    assert error.value.param == "model"
    with pytest.raises(EngineDead, match="MemoryError: no memory for weights"):
        start(kind, build_exploding, folder)


@pytest.mark.usefixtures("no_children_left")
def test_a_process_that_ends_while_starting_is_reported(folder: str) -> None:
    with pytest.raises(EngineDead, match="exit code 3"):
        start("process", build_vanishing, folder)


@pytest.mark.usefixtures("no_children_left")
@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize(("builder", "reason"), [(build_dying, "CUDA error: lost"), (build_buggy, "AssertionError: a bug of ours")])
def test_a_dead_engine_answers_every_pending_and_every_new_request(
    kind: str, builder: Callable[[str], EngineCore], reason: str, folder: str,
) -> None:
    client = start(kind, builder, folder)

    async def main() -> None:
        every = await asyncio.gather(*(collect(client, ask(f"r{i}", max_tokens=50)) for i in range(5)), return_exceptions=True)
        assert all(isinstance(error, EngineDead) and reason in str(error) for error in every), every
        with pytest.raises(EngineDead, match=r"lost|bug"):
            await collect(client, ask("new"))
        with pytest.raises(EngineDead, match=r"lost|bug"):
            await client.reset_prefix_cache()

    asyncio.run(main())
    assert client.dead is not None and reason in client.dead
    client.close()


@pytest.mark.usefixtures("no_children_left")
@pytest.mark.parametrize("kind", CLIENTS)
def test_closing_fails_pending_streams_and_may_be_repeated(kind: str, folder: str) -> None:
    threads = set(threading.enumerate())
    client = start(kind, build_plain, folder)

    async def main() -> None:
        stream = client.generate(ask("r", max_tokens=None))
        await anext(stream)
        await asyncio.to_thread(client.close)
        with pytest.raises(EngineDead, match="closed"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead, match="closed"):
            client.add(ask("late"))

    asyncio.run(main())
    client.close()
    assert not [t for t in threading.enumerate() if t not in threads and t.name.startswith("minivllm")]


@pytest.mark.usefixtures("no_children_left")
def test_a_bug_while_messages_are_received_ends_the_streams_instead_of_leaving_them_waiting(
    folder: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = start("process", build_plain, folder)

    def deliver(message: StepMessage) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(client, "_deliver", deliver)
    with pytest.raises(EngineDead, match="exit code -9"):
        asyncio.run(asyncio.wait_for(collect(client, ask("r")), 60))
    client.close()


@pytest.mark.usefixtures("no_children_left")
def test_a_killed_engine_process_is_noticed_and_reaped(folder: str) -> None:
    client = start("process", build_plain, folder)
    assert isinstance(client, ProcessClient) and client.pid is not None

    async def main() -> None:
        stream = client.generate(ask("r", max_tokens=None))
        await anext(stream)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="exit code -9"):
            async for _ in stream:
                pass

    asyncio.run(main())
    assert client.dead is not None
    client.close()


@pytest.mark.usefixtures("no_children_left")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_does_not_end_the_engine_process(folder: str, number: signal.Signals) -> None:
    client = start("process", build_plain, folder)
    assert isinstance(client, ProcessClient) and client.pid is not None
    os.kill(client.pid, number)
    assert asyncio.run(collect(client, ask("r"))) == {0: expected((5, 6, 7), 5)}
    client.close()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_an_engine_process_dies_with_its_parent(folder: str, busy: bool) -> None:
    """This holds in the middle of a step, and if the parent cannot clean up."""
    code = f"""
import asyncio, functools, os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.engine.test_client import ask, build_plain
from minivllm.engine.process import ProcessClient
if __name__ == "__main__":
    client = ProcessClient.start_with(functools.partial(build_plain, {folder!r}))
    if not {busy}:
        print(client.pid, flush=True)
        os._exit(9)
    async def main():
        async for _ in client.generate(ask("r", max_tokens=None)):
            print(client.pid, flush=True)
            os._exit(9)
    asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert not alive or child.status() == psutil.STATUS_ZOMBIE  # some containers do not reap orphans


# -- idleness ---------------------------------------------------------------------------------------------------------


def test_an_idle_loop_sleeps(folder: str) -> None:
    """Without work it makes one round per command, since it waits in a blocking call."""
    loops: list[EngineLoop] = []
    sent = threading.Semaphore(0)
    waiting = threading.Semaphore(0)

    class Watched(queue.SimpleQueue):  # type: ignore[type-arg]
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            assert timeout is None, "a wait with a timeout is polling"
            if block:
                waiting.release()
            return super().get(block)

    inbox = Watched()
    engine = make_engine(folder=folder)
    loop = EngineLoop(engine, inbox, lambda message: sent.release())
    loops.append(loop)
    thread = threading.Thread(target=loop.run)
    thread.start()
    waiting.acquire()
    assert loop.rounds == 1  # asleep in its first round
    inbox.put(ask("r", max_tokens=5))
    waiting.acquire()  # asleep again
    rounds = loop.rounds
    assert rounds <= 1 + 5 + 1
    inbox.put(ShutdownCommand())
    thread.join()
    assert loop.rounds == rounds


def test_an_idle_loop_prepares_piece_by_piece_and_a_request_waits_for_one_piece_at_most(folder: str) -> None:
    engine, inbox, sent = build_plain(folder), queue.SimpleQueue(), []
    events: list[str] = []
    step = engine.step

    def prepare_ahead() -> bool:
        events.append("piece")
        if len(events) == 2:
            inbox.put(ask("a", max_tokens=3))
        if events.count("piece") == 5:
            inbox.put(ShutdownCommand())
        return events.count("piece") < 5

    engine.prepare_ahead = prepare_ahead
    engine.step = lambda: events.append("step") or step()
    EngineLoop(engine, inbox, sent.append).run()
    engine.close()
    first, last = events.index("step"), len(events) - 1 - events[::-1].index("step")
    assert events[:first] == ["piece"] * 2 and set(events[first : last + 1]) == {"step"} and events[last + 1 :] == ["piece"] * 3
    assert any(delta.finish_reason for message in sent for delta in message.deltas)


def test_a_request_reaches_the_scheduler_unchanged(folder: str) -> None:
    engine = make_engine(folder=folder, policy="priority")
    request = EngineRequest("r", (5, 6), SamplingParams(stop="x", logit_bias={5: 1.0}), 2.5, priority=3, cache_salt="salt")
    seen: list[EngineRequest] = []
    add = engine.scheduler.add
    engine.scheduler.add = lambda new, seed: (seen.append(new), add(new, seed))[1]  # type: ignore[method-assign]
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for item in (pickle.loads(pickle.dumps(request)), ShutdownCommand()):
        inbox.put(item)
    EngineLoop(engine, inbox, lambda message: None).run()
    assert seen == [request]


def test_messages_are_plain_and_small(folder: str) -> None:
    """All deltas of a step are sent in one message, whose size does not depend on the length of the outputs."""
    sizes: list[int] = []
    engine = make_engine(FakeExecutor(1 << 13), folder=folder, max_num_seqs=64, planning_depth=1, max_model_len=1 << 12)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for i in range(32):
        inbox.put(pickle.loads(pickle.dumps(ask(f"r{i}", max_tokens=200))))

    def send(message: Any) -> None:
        sizes.append(len(pickle.dumps(message)))
        if len(sizes) == 150:
            inbox.put(ShutdownCommand())

    EngineLoop(engine, inbox, send).run()
    steady = sizes[100:150]
    assert max(steady) < 32 * 200
    assert max(steady) - min(steady) < 200  # does not grow with the outputs
    gc.collect()


# -- the shortcut, and the size of messages --------------------------------------------------------------------------


def test_deltas_that_a_shortcut_consumes_are_not_yielded_and_the_others_keep_their_order(client: EngineClient) -> None:
    async def main() -> None:
        taken: list[int] = []

        def take(deltas: list[OutputDelta]) -> bool:
            if any(delta.finish_reason is not None for delta in deltas) or len(taken) > 200:
                return False
            taken.extend(token for delta in deltas for token in delta.token_ids)
            return True

        yielded = [token async for deltas in client.generate(ask("short", max_tokens=400), take) for d in deltas for token in d.token_ids]
        assert len(taken) > 200
        assert taken + yielded == expected((5, 6, 7), 400)

    asyncio.run(main())


def test_a_step_message_crosses_a_pipe_unchanged_and_takes_less_than_eighty_bytes_a_token() -> None:
    metrics = RequestMetrics(1.0, 2.0, 3.0, 4.0, 1)
    logprobs = (TokenLogprobs(5, -0.5, 1, (5, 6), (-0.5, -1.0)),)
    odd = OutputDelta("a", 1, (5,), "é", logprobs, "stop", "</s>", 3, (None, *logprobs), metrics, None)
    for deltas in ((), (odd,), (OutputDelta("b", 0, (1, 2), "x"), odd)):
        message = StepMessage(deltas, EngineStats(num_running=3))
        again = pickle.loads(pickle.dumps(message))
        assert again == message
        assert [type(delta) for delta in again.deltas] == [OutputDelta] * len(deltas)
    many = StepMessage(tuple(OutputDelta(f"cmpl-{i:032x}", 0, (i,), " word") for i in range(256)), EngineStats())
    assert len(pickle.dumps(many)) < 80 * 256


# -- a start that fails early -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_children_left")
@pytest.mark.parametrize("where", ["pickling", "process", "thread"])
def test_a_start_that_fails_early_leaves_no_pipe_and_no_process(where: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("planted")

    if where == "process":
        monkeypatch.setattr(process, "_start_without_signals", fail)
    if where == "thread":
        monkeypatch.setattr(process.threading.Thread, "start", fail)
    build = (lambda: None) if where == "pickling" else functools.partial(build_plain, folder)
    clients, counts = [], []
    for _ in range(3):  # the first attempt may start multiprocessing's resource tracker, which keeps a pipe
        client = ProcessClient()
        clients.append(client)  # otherwise garbage collection would close what `close` has left open
        with pytest.raises(Exception, match=r"planted|pickle|local object"):
            client._start(build)  # type: ignore[arg-type]
        client.close()
        client.close()
        client._process = None
        gc.collect()
        counts.append(psutil.Process().num_fds())
    assert counts[1] == counts[2]
    assert all(client._connection.closed and client._child_end.closed for client in clients)


@pytest.mark.usefixtures("no_children_left")
def test_a_closed_client_leaves_no_pipe(folder: str) -> None:
    before = psutil.Process().num_fds()
    start("process", build_plain, folder).close()
    assert psutil.Process().num_fds() <= before + 1  # the resource tracker's pipe, if this was its first use
