"""Hostile grammars: compilation and masks have limits, the request that exceeds one ends, and others do not notice."""
from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from minivllm import LLM, InvalidInput, SamplingParams, StructuredOutputs
from minivllm.config import EngineConfig
from minivllm.core.admission import QueueFull
from minivllm.engine import mask_budget, stop_strings
from minivllm.engine.client import ThreadClient
from minivllm.engine.grammar_compiler import GrammarCompiler, GrammarPreparation
from minivllm.engine.grammar_trial import TrialCanceled, TrialLimits, TrialReply
from minivllm.engine.mask_budget import MaskAccount, MaskBudget
from minivllm.engine.preparation import RequestPreparation
from minivllm.engine.preparation_queue import THREADS, PreparationQueue
from minivllm.engine.prompts import bad_word_ids, check_params
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta

pytestmark = pytest.mark.usefixtures("one_torch_thread")
pytest.importorskip("llguidance")


def hostile(count: int) -> StructuredOutputs:
    """Compiling it takes about three times as long for each further pattern: 9 s for 14, hours for 20."""
    return StructuredOutputs(json={"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(count)]})


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="module")
def compiler(folder: Path) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(Tokenizer(folder), (1,), max_seconds=0.2)
    yield compiler
    compiler.close()


# -- compilation -------------------------------------------------------------------------------------------------------


def test_a_compilation_that_takes_too_long_is_killed_and_refused_at_once_the_next_time(
        compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"structured_outputs.json is too complex.*more than 0.2 s.*max_grammar_seconds"):
        GrammarPreparation(compiler, hostile(20)).run()
    monkeypatch.setattr(compiler, "_run_trial", lambda *args: pytest.fail("a second trial"))
    with pytest.raises(InvalidInput, match=r"more than 0\.2 s"):
        GrammarPreparation(compiler, hostile(20)).run()
    monkeypatch.undo()
    GrammarPreparation(compiler, StructuredOutputs(regex="after it")).run()
    assert compiler.is_cached(StructuredOutputs(regex="after it"))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the limit needs /proc")
def test_a_compilation_that_needs_too_much_memory_is_killed(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_limits", TrialLimits(seconds=5, num_bytes=4 << 20))
    with pytest.raises(InvalidInput, match="more than 4 MiB of memory"):
        GrammarPreparation(compiler, StructuredOutputs(choice=[f"choice number {i}" for i in range(4000)])).run()
    GrammarPreparation(compiler, StructuredOutputs(regex="after memory")).run()


def test_an_aborted_request_ends_its_trial(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_limits", TrialLimits(seconds=60))
    work = GrammarPreparation(compiler, hostile(19))
    threading.Timer(0.1, work.cancel).start()
    with pytest.raises(TrialCanceled):
        work.run()
    late = GrammarPreparation(compiler, hostile(18))
    late.cancel()
    with pytest.raises(TrialCanceled):
        late.run()
    GrammarPreparation(compiler, StructuredOutputs(regex="after the abort")).run()


def test_a_trial_process_that_was_killed_is_started_again(compiler: GrammarCompiler) -> None:
    GrammarPreparation(compiler, StructuredOutputs(regex="first")).run()
    process = compiler._idle[0]._process
    assert process is not None
    process.kill()
    process.wait()
    GrammarPreparation(compiler, StructuredOutputs(regex="second")).run()
    assert compiler.is_cached(StructuredOutputs(regex="second"))


def test_the_memory_of_cached_grammars_is_limited(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [StructuredOutputs(regex=f"large {name}") for name in "abc"]
    monkeypatch.setattr("minivllm.engine.grammar_compiler.MAX_CACHED_BYTES", 100)
    for one in wanted:
        compiler.compile(one, TrialReply(compiler.try_out(one, GrammarPreparation(compiler, one)).grammar, num_bytes=45))
    assert [compiler.is_cached(one) for one in wanted] == [False, True, True]


def request(name: str, **params: Any) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=(5, 6), params=SamplingParams(**params))


class Gated:
    """Work that waits for a gate."""

    gate = threading.Event()

    def run(self) -> None:
        self.gate.wait()

    def cancel(self) -> None:
        pass


def test_work_on_which_a_library_panics_is_reported_and_the_queue_goes_on() -> None:
    class PanicException(BaseException):
        """As libraries in Rust raise it."""

    class Panics:
        def run(self) -> None:
            raise PanicException("index out of bounds")

        def cancel(self) -> None:
            pass

    done: SimpleQueue[Exception | None] = SimpleQueue()
    queue = PreparationQueue(lambda command, error: done.put(error))
    for i in range(THREADS + 1):
        queue.add(request(f"r{i}"), "", Panics())
        error = done.get(timeout=60)
        assert isinstance(error, RuntimeError) and str(error) == "PanicException: index out of bounds"
    queue.close()


def test_owners_take_turns_in_the_queue_of_preparations() -> None:
    order: list[str] = []
    finished = threading.Semaphore(0)
    queue = PreparationQueue(lambda command, error: (order.append(command.request_id), finished.release()))  # type: ignore[func-returns-value, union-attr]
    started = threading.Semaphore(0)

    class First(Gated):
        def run(self) -> None:
            started.release()
            super().run()

    class Then:
        def run(self) -> None:
            pass

        def cancel(self) -> None:
            pass

    for i in range(2):
        queue.add(request(f"blocker {i}"), "b", First())
        started.acquire()
    for i in range(20):
        queue.add(request(f"many {i}"), "m", Then())
    queue.add(request("one"), "o", Then())
    Gated.gate.set()
    for _ in range(23):
        finished.acquire()
    queue.close()
    assert [name for name in order if "blocker" not in name].index("one") <= 3


def test_requests_whose_grammar_is_being_compiled_count_as_waiting(folder: Path) -> None:
    config = EngineConfig(model=str(folder), dtype="float32", device="cpu", max_model_len=64, num_gpu_blocks_override=40, max_queue=2,
                          max_grammar_seconds=60)
    client = ThreadClient.start(config)

    async def ends(name: str, **params: Any) -> str | None:
        deltas: list[OutputDelta] = []
        async for new in client.generate(request(name, **params)):
            deltas += new
        return deltas[-1].finish_reason

    async def scenario() -> None:
        hostiles = [asyncio.create_task(ends(f"h{i}", structured_outputs=hostile(20 + i))) for i in range(2)]
        await asyncio.sleep(0)
        for more in ({}, {"structured_outputs": {"regex": "a"}}):
            with pytest.raises(QueueFull):
                await ends("refused", **more)
        for i in range(2):
            client.abort(f"h{i}")
        assert await asyncio.gather(*hostiles) == ["abort", "abort"]
        assert await ends("fine", structured_outputs={"regex": "fine"}) == "stop", "the threads are free again"

    try:
        asyncio.run(scenario())
    finally:
        client.close()


# -- masks -------------------------------------------------------------------------------------------------------------


class Clock:
    """Each filled row takes so many seconds of wall-clock and CPU time."""

    def __init__(self, wall: float, cpu: float) -> None:
        self.wall, self.cpu, self.now, self.filled = wall, cpu, (0.0, 0.0), 0

    def __call__(self) -> tuple[float, float]:
        return self.now

    def fill(self, part: slice) -> None:
        count = part.stop - part.start
        self.filled += count
        self.now = self.now[0] + count * self.wall, self.now[1] + count * self.cpu


@pytest.mark.parametrize("wall, cpu", [(0.0001, 0.0001), (10.0, 0.0001), (0.0001, 10.0)], ids=["fast", "busy machine", "other threads"])
def test_usual_masks_are_filled_together_in_few_slices(wall: float, cpu: float) -> None:
    clock = Clock(wall, cpu)
    accounts = [MaskAccount() for _ in range(240)]
    slices: list[slice] = []
    budget = MaskBudget(clock)
    assert budget.together(accounts, lambda part: (slices.append(part), clock.fill(part))) == 240  # type: ignore[func-returns-value]
    assert len(slices) == 4 and clock.filled == 240 and not any(account.watched for account in accounts)


def test_slow_masks_are_found_after_one_slice_and_their_request_ends_within_its_budget() -> None:
    clock, account = Clock(0.02, 0.02), MaskAccount()
    budget = MaskBudget(clock)
    budget.begin_step()
    assert budget.together([account] * 256, clock.fill) == 16 and account.watched
    assert not budget.alone(account, 240, clock.fill)
    assert clock.now[0] < 1.0, "256 masks would take 5 s"


def test_a_request_may_be_slow_for_some_steps_but_not_for_good() -> None:
    clock, account, steps = Clock(0.05, 0.05), MaskAccount(watched=1000), 0
    budget = MaskBudget(clock)
    while budget.alone(account, 1, clock.fill):
        budget.begin_step()
        steps += 1
    assert 3 < steps < 20
    fast = MaskAccount(watched=1)
    clock.wall = clock.cpu = 0.001
    for _ in range(1000):
        budget.begin_step()
        assert budget.alone(fast, 8, clock.fill)
    assert not fast.watched


def test_many_slow_requests_end_and_a_fast_one_beside_them_does_not() -> None:
    clock = Clock(0.02, 0.02)
    budget = MaskBudget(clock)
    budget.begin_step()
    slow = [budget.alone(MaskAccount(), 1, clock.fill) for _ in range(100)]
    clock.wall = clock.cpu = 0.001
    assert sum(slow) < 40 and not slow[-1] and budget.alone(MaskAccount(), 1, clock.fill)


def attack(budget: MaskBudget, clock: Clock, owner: str, num_requests: int) -> tuple[int, int]:
    """A step in which each of some new requests has a slow mask. Returns how many of them were admitted, and how many ended."""
    budget.begin_step()
    admitted = [MaskAccount(owner) for _ in range(num_requests) if not budget.exhausted(owner)]
    return len(admitted), sum(not budget.alone(account, 1, clock.fill) for account in admitted)


def test_an_owner_that_sends_new_slow_requests_again_and_again_is_refused_for_a_while() -> None:
    clock, slow = Clock(0.02, 0.02), 0
    budget = MaskBudget(clock)
    for _ in range(100):
        slow += attack(budget, clock, "hostile", 16)[0]
        clock.now = clock.now[0] + 0.01, clock.now[1]  # the rest of the step
    step = 16 * 0.02
    assert slow * 0.02 < mask_budget.OWNER_DEBT + step + mask_budget.OWNER_RATE * clock.now[0]
    assert budget.exhausted("hostile") and not budget.exhausted("good")
    clock.wall = clock.cpu = 0.001
    assert budget.alone(MaskAccount("good"), 1, clock.fill)
    assert budget.alone(MaskAccount("hostile"), 1, clock.fill), "a mask that is not slow is still computed"
    clock.now = clock.now[0] + 60, clock.now[1]
    assert not budget.exhausted("hostile")


def test_many_ordinary_grammars_of_one_owner_are_no_debt() -> None:
    clock = Clock(0.0004, 0.0004)
    budget = MaskBudget(clock)
    accounts = [MaskAccount("busy") for _ in range(200)]
    for _ in range(200):
        budget.begin_step()
        assert all(budget.alone(account, 1, clock.fill) for account in accounts)
        assert not budget.exhausted("busy")


def test_a_request_whose_masks_take_too_long_ends_with_an_error_and_others_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLOW_SLICE": -1.0, "LARGEST_DEBT": 0.0, "ALLOWANCE": 0.0, "ALLOWANCE_PER_ROW": 0.0}.items():
        monkeypatch.setattr(mask_budget, name, value)
    with LLM(str(folder), dtype="float32", device="cpu", max_model_len=200, num_gpu_blocks_override=100) as llm:
        core = llm.llm_engine.core
        core.add_request("slow", [5, 6], SamplingParams(structured_outputs={"regex": "[a-f]{60}"}, n=20, max_tokens=70))
        core.add_request("plain", [5, 6], SamplingParams(temperature=0, ignore_eos=True, max_tokens=40))
        ends: dict[tuple[str, int], OutputDelta] = {}
        while core.has_unfinished_requests():
            ends |= {(d.request_id, d.index): d for d in core.step() if d.finish_reason is not None}
            core.scheduler.check()
        assert ends.pop(("plain", 0)).finish_reason == "length"
        assert len(ends) == 20
        for end in ends.values():
            assert end.finish_reason == "error" and "takes too long" in str(end.error) and end.error_param == "structured_outputs.regex"
        assert core.stats().used_blocks == 0 and core._outputs._num_grammars == 0
        monkeypatch.setattr(mask_budget, "OWNER_DEBT", 0.0)
        again = EngineRequest("again", (5, 6), SamplingParams(structured_outputs=StructuredOutputs(regex="[a-f]{60}")))
        with pytest.raises(QueueFull, match="have taken too much time"):
            core.preparation(again)
        assert core.preparation(replace(again, owner="another")) is None
        assert core.preparation(replace(again, params=SamplingParams())) is None


# -- lists -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field, value", [
    ("bad_words", [f"w{i}" for i in range(700)]), ("logit_bias", dict.fromkeys(range(4096), 1.0)),
    ("allowed_token_ids", list(range(5000))), ("stop_token_ids", list(range(4096))),
])
def test_long_lists_times_many_children_are_refused(field: str, value: Any, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert check_params(SamplingParams(n=1, **{field: value}), tokenizer, 5000, 20).n == 1
    with pytest.raises(InvalidInput, match=rf"{field} has .* for each of n = 600 completions.* lower n") as error:
        check_params(SamplingParams(n=600, **{field: value}), tokenizer, 5000, 20)
    assert error.value.param == field


def test_only_long_lists_and_new_grammars_are_prepared_on_another_thread(compiler: GrammarCompiler, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    few = SamplingParams(stop=["a", "b"], bad_words=["c"])
    assert RequestPreparation.of(few, tokenizer, compiler) is None
    many = SamplingParams(stop=[f"stop {i}" for i in range(200)], bad_words=[f"bad {i}" for i in range(40)])
    work = RequestPreparation.of(many, tokenizer, compiler)
    assert work is not None
    work.run()
    hits = stop_strings.compiled.cache_info().hits, bad_word_ids.cache_info().hits
    check_params(many, tokenizer, 5000, 20)
    stop_strings.compiled(tuple(many.stop or ()))
    assert (stop_strings.compiled.cache_info().hits, bad_word_ids.cache_info().hits) == (hits[0] + 1, hits[1] + 1)
