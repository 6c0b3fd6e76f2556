"""Views of a running engine: a few times a second while a client watches, otherwise none."""
from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator

import pytest

from minivllm.engine import watch
from minivllm.engine.client import EngineClient
from minivllm.engine.engine import EngineCore
from minivllm.engine.loop import StepMessage
from minivllm.engine.metrics import EngineStats
from minivllm.engine.watch import EngineView, Watch
from minivllm.sampling_params import SamplingParams
from tests.engine.fake import FakeExecutor, make_engine
from tests.engine.test_client import CLIENTS, ask


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def busy_engine(requests: int, clock: Callable[[], float] | None = None) -> EngineCore:
    engine = make_engine(clock=clock)
    for i in range(requests):
        params = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0)
        engine.add_request(f"r{i}", {"prompt_token_ids": (5, 6, 7, i + 3)}, params)
    return engine


def test_a_view_has_the_steps_since_the_last_one_and_is_made_when_it_is_due() -> None:
    clock = Clock()
    engine = busy_engine(2, clock)
    engine._watch = looking = Watch(engine.scheduler, clock)
    assert looking.view(at_rest=False) is not None
    for _ in range(3):
        engine.step()
        clock.now += watch.INTERVAL / 4
        assert looking.view(at_rest=False) is None
    clock.now += watch.INTERVAL
    view = looking.view(at_rest=False)
    assert view is not None
    assert [recorded.step.work for recorded in view.steps] == [((1, 4, True), (2, 4, True)), *[((1, 1, False), (2, 1, False))] * 2]
    assert view.num_skipped == 0
    clock.now += 1
    assert (again := looking.view(at_rest=False)) is not None and again.steps == ()


def test_a_step_has_the_time_since_the_last_one_but_no_idle_time_and_the_blocks_in_use() -> None:
    clock = Clock()
    engine = busy_engine(2, clock)
    engine._watch = looking = Watch(engine.scheduler, clock)
    for _ in range(3):
        engine.step()
        clock.now += 0.25
    assert (view := looking.view(at_rest=True)) is not None
    assert [(recorded.seconds, recorded.used_blocks) for recorded in view.steps] == [(0.0, 2), (0.25, 4), (0.25, 4)]
    clock.now += 100
    engine.step()
    assert (view := looking.view(at_rest=True)) is not None and [recorded.seconds for recorded in view.steps] == [0.0]


def test_the_last_view_before_the_engine_is_idle_is_always_due() -> None:
    engine, clock = busy_engine(1), Clock()
    looking = Watch(engine.scheduler, clock)
    assert looking.view(at_rest=False) is not None
    assert looking.view(at_rest=True) is not None


def test_a_view_has_the_newest_of_many_steps_and_the_number_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_WORK", 7)
    engine = busy_engine(3)
    engine.watch(True)
    for _ in range(10):
        engine.step()
    view = engine.view()
    assert view is not None
    assert ([recorded.step.step_id for recorded in view.steps], view.num_skipped) == ([8, 9], 8)


def test_an_expensive_view_is_made_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock = busy_engine(1), Clock()
    looking = Watch(engine.scheduler, clock)
    take = watch.take_snapshot

    def slowly(scheduler: object) -> object:
        clock.now += 1.0
        return take(engine.scheduler)

    monkeypatch.setattr(watch, "take_snapshot", slowly)
    assert looking.view(at_rest=False) is not None
    clock.now += 0.9 * watch.TIME_SHARE
    assert looking.view(at_rest=False) is None
    clock.now += 0.2 * watch.TIME_SHARE
    assert looking.view(at_rest=False) is not None


def test_a_view_crosses_a_pipe_unchanged() -> None:
    engine = busy_engine(2)
    engine.watch(True)
    engine.step()
    message = StepMessage((), EngineStats(), engine.view())
    assert isinstance(message.view, EngineView)
    assert pickle.loads(pickle.dumps(message)) == message


def long_engine() -> EngineCore:
    """With blocks for requests that run as long as a test needs them."""
    return make_engine(FakeExecutor(1 << 15), max_model_len=1 << 16)


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Iterator[EngineClient]:
    client = CLIENTS[request.param].start_with(long_engine)
    yield client
    client.close()


async def until(latest: Callable[[], EngineView | None], condition: Callable[[EngineView], bool]) -> EngineView:
    while True:
        view = latest()
        if view is not None and condition(view):
            return view
        await asyncio.sleep(0)


def test_an_idle_engine_sends_a_view_and_then_its_steps(client: EngineClient) -> None:
    async def main() -> None:
        with client.watching() as latest:
            assert (await until(latest, lambda view: True)).snapshot.num_running == 0
            stream = client.generate(ask("seen", max_tokens=50_000))
            await anext(stream)
            view = await until(latest, lambda view: view.snapshot.num_running == 1)
            assert "seen" not in repr(view), "owners are numbers"
            await stream.aclose()
            await until(latest, lambda view: view.snapshot.num_running == 0)

    asyncio.run(main())


def test_without_watchers_the_engine_makes_no_views(client: EngineClient) -> None:
    async def main() -> None:
        with client.watching() as latest:
            with client.watching() as other:
                await until(other, lambda view: True)
            async for _ in client.generate(ask("first", max_tokens=20)):
                pass
            await until(latest, lambda view: view.snapshot.num_running == 0 and bool(view.steps))
        await client.reset_prefix_cache()  # the engine has handled the command
        before = client._view
        async for _ in client.generate(ask("second", max_tokens=20)):
            pass
        await client.reset_prefix_cache()
        assert client._view is before

    asyncio.run(main())


def test_a_watcher_that_looks_rarely_gets_every_step_and_a_second_one_gets_a_view_of_the_idle_engine(client: EngineClient) -> None:
    async def main() -> None:
        with client.watching() as first:
            for name in ("a", "b"):
                async for _ in client.generate(ask(name, max_tokens=20)):
                    pass
            await client.reset_prefix_cache()  # the engine has sent its last view
            seen: list[EngineView] = []
            await until(first, lambda view: seen.append(view) or len(view.snapshot.running) == 0)  # type: ignore[func-returns-value]
            ids = [recorded.step.step_id for view in seen for recorded in view.steps]
            assert ids == list(range(len(ids))) and len(ids) == 40
            with client.watching() as second:
                late = await until(second, lambda view: True)
                assert late.snapshot == seen[-1].snapshot and late.steps == ()

    asyncio.run(main())


def test_joined_views_keep_the_newest_steps_and_count_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_WORK", 5)
    engine = busy_engine(2)
    engine._watch = looking = Watch(engine.scheduler)
    views = []
    for _ in range(4):
        engine.step()
        views.append(looking.view(at_rest=True))
    joined = views[0]
    for view in views[1:]:
        assert joined is not None and view is not None
        joined = view.after(joined)
    assert joined is not None and views[-1] is not None
    assert [recorded.step.step_id for recorded in joined.steps] == [2, 3] and joined.num_skipped == 2
    assert (joined.time, joined.snapshot) == (views[-1].time, views[-1].snapshot)
