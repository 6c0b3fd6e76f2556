"""A bug that shows in one request ends that request alone: others lose nothing, and its blocks are freed."""
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minivllm.core.plan import StepPlan, TokenLogprobs
from minivllm.engine import grammar
from minivllm.engine.client import ThreadClient
from minivllm.engine.detokenizer import SequenceText
from minivllm.engine.engine import EngineCore
from minivllm.engine.grammar import SequenceGrammar
from minivllm.engine.metrics import EngineMetrics
from minivllm.engine.output_processor import OutputProcessor
from minivllm.engine.watch import Watch
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta
from minivllm.sampling.logits_processors import Constraints
from minivllm.sampling_params import SamplingParams
from tests.engine import tokenizers_for_tests as build
from tests.engine.fake import FakeExecutor, FakePending, make_engine

VICTIM = "victim"
Plant = Callable[[pytest.MonkeyPatch, EngineCore], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.save(build.byte_level(), tmp_path_factory.mktemp("tokenizer"))


class Masked(FakeExecutor):
    """Samples the lowest token that a mask allows, if there is one."""

    def sample(self, plan: StepPlan, masks: Any = None) -> FakePending:
        pending = super().sample(plan, masks)
        if masks is not None:
            tokens = list(pending.result.token_ids)
            for row, words in zip(masks.rows.tolist(), masks.words.tolist(), strict=True):
                token = next(32 * w + bit for w, word in enumerate(words) for bit in range(32) if word >> bit & 1)
                tokens[row] = (token,)
                self._rows[plan.sample_rows[row]].tokens[-1] = token
            pending.result = replace(pending.result, token_ids=tuple(tokens))
        return pending


def _once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, chosen: Callable[..., bool], after: int = 2) -> None:
    """From the `after`-th chosen call on, the function raises."""
    original, calls = getattr(owner, name), [0]

    def planted(*args: Any, **kwargs: Any) -> Any:
        if chosen(*args, **kwargs):
            calls[0] += 1
            if calls[0] >= after:
                raise KeyError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, planted)


def _victims(engine: EngineCore, name: str) -> Callable[[Any], bool]:
    """Whether an object is the `name` of a sequence of the victim."""
    return lambda found, *_, **__: any(
        getattr(s, name) is found for s in engine._outputs._sequences.values() if s.request.id == VICTIM)


def plant_in_mask(monkeypatch: pytest.MonkeyPatch, engine: EngineCore) -> None:
    matchers = _victims(engine, "grammar")
    getter, calls = SequenceGrammar.matcher.fget, [0]  # type: ignore[attr-defined]

    def matcher(self: SequenceGrammar) -> Any:
        if matchers(self):
            calls[0] += 1
            if calls[0] > 4:
                raise KeyError("planted")
        return getter(self)

    monkeypatch.setattr(SequenceGrammar, "matcher", property(matcher))


def plant_in_grammar(monkeypatch: pytest.MonkeyPatch, engine: EngineCore) -> None:
    _once(monkeypatch, SequenceGrammar, "advance", _victims(engine, "grammar"))


def plant_in_text(monkeypatch: pytest.MonkeyPatch, engine: EngineCore) -> None:
    _once(monkeypatch, SequenceText, "push", _victims(engine, "text"))


def plant_in_take(monkeypatch: pytest.MonkeyPatch, engine: EngineCore) -> None:
    _once(monkeypatch, SequenceText, "take", _victims(engine, "text"))


def plant_in_last_take(monkeypatch: pytest.MonkeyPatch, engine: EngineCore) -> None:
    victims = _victims(engine, "text")
    _once(monkeypatch, SequenceText, "take", lambda text, finished: finished and victims(text), 1)


def plant_in_delta(monkeypatch: pytest.MonkeyPatch, engine: EngineCore) -> None:
    _once(monkeypatch, OutputProcessor, "_delta", lambda _, sequence, *rest: sequence.request.id == VICTIM)


def plant_in_row(monkeypatch: pytest.MonkeyPatch, engine: EngineCore) -> None:
    executor = engine.executor
    original = executor.sample

    def sample(plan: StepPlan, masks: Any = None) -> FakePending:
        pending = original(plan, masks)
        failed = tuple((a.request_id, "planted") for a in plan.admitted if a.request_id.startswith(VICTIM))
        pending.result = replace(pending.result, failed=failed)
        return pending

    monkeypatch.setattr(executor, "sample", sample)


def plant_in_logprobs(monkeypatch: pytest.MonkeyPatch, engine: EngineCore) -> None:
    """Prompt logprobs of the victim that cannot be stored."""
    class Bad(tuple[TokenLogprobs, ...]):
        def __iter__(self) -> Iterator[TokenLogprobs]:
            raise KeyError("planted")

    executor = engine.executor
    sample = executor.sample

    def planted(plan: StepPlan, masks: Any = None) -> FakePending:
        pending = sample(plan, masks)
        entries = tuple((c, f, Bad(e) if plan.request_ids[c].startswith(VICTIM) else e) for c, f, e in pending.result.prompt_logprobs)
        pending.result = replace(pending.result, prompt_logprobs=entries)
        return pending

    monkeypatch.setattr(executor, "sample", planted)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("plant", [
    plant_in_mask, plant_in_grammar, plant_in_text, plant_in_take, plant_in_last_take, plant_in_delta, plant_in_row, plant_in_logprobs])
def test_a_bug_in_one_requests_work_ends_that_request_alone(
    plant: Plant, n: int, depth: int, folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    structured = {"structured_outputs": {"regex": "[ab]{40}"}} if plant in (plant_in_mask, plant_in_grammar) else {}

    def run(planted: bool) -> dict[tuple[str, int], list[OutputDelta]]:
        engine = make_engine(Masked(), folder=folder, planning_depth=depth)
        found: dict[tuple[str, int], list[OutputDelta]] = {}
        for name in ("before", VICTIM, "after"):
            engine.add_request(name, list(range(5, 25)), SamplingParams(
                temperature=0, max_tokens=14, logprobs=1, prompt_logprobs=0, stop="never", n=n, **structured))
        with monkeypatch.context() as patch:
            if planted:
                plant(patch, engine)
            while engine.has_unfinished_requests():
                for delta in engine.step():
                    found.setdefault((delta.request_id, delta.index), []).append(delta)
                engine.scheduler.check()
        assert engine.stats().used_blocks == 0 and engine.stats().num_failed_steps == 0
        assert not len(engine._outputs) and engine._outputs._num_grammars == 0
        engine.add_request(VICTIM, [5], SamplingParams(max_tokens=1))  # the id and its blocks are free again
        while engine.has_unfinished_requests():
            engine.step()
        engine.close()
        return found

    right, found = run(False), run(True)
    assert set(found) == set(right)
    for (name, index), deltas in found.items():
        if name == VICTIM:
            assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
            end = deltas[-1]
            if plant is plant_in_last_take and end.finish_reason == "length":
                continue  # a child that ended before its sibling's failure
            assert end.finish_reason == "error" and end.error, (name, index)
            assert "KeyError" in end.error or end.error == "planted"
        else:
            assert [d._replace(metrics=None) for d in deltas] == [d._replace(metrics=None) for d in right[name, index]]


def test_a_failing_mask_leaves_the_masks_of_the_others_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = grammar.fill_masks

    def failing(pool: Any, work: Any, words: Any) -> None:
        calls.append(len(work))
        if len(work) > 1:
            raise RuntimeError("together")  # the executor of masks itself
        original(pool, work, words)

    monkeypatch.setattr(grammar, "fill_masks", failing)
    engine = make_engine(Masked(), folder=folder)
    for i in range(3):
        engine.add_request(str(i), [5, i + 6], SamplingParams(temperature=0, max_tokens=9, structured_outputs={"regex": "abc"}))
    texts = dict.fromkeys("012", "")
    while engine.has_unfinished_requests():
        for delta in engine.step():
            texts[delta.request_id] += delta.text
            assert delta.finish_reason in (None, "stop")
    assert set(texts.values()) == {"abc"} and calls[0] == 3


def test_constraints_that_cannot_be_built_end_their_request_alone(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from minivllm.engine.llm import LLM

    of = Constraints.of
    with LLM(str(tiny_llama()), device="cpu", dtype="float32", num_gpu_blocks_override=64, max_model_len=64) as llm:
        params = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={i: 1.0}) for i in range(3)]
        right = llm.generate([[5, 6]] * 3, params, use_tqdm=False)

        def planted(given: SamplingParams, *rest: Any) -> Any:
            if given.logit_bias == {1: 1.0}:
                raise KeyError("planted")
            return of(given, *rest)

        monkeypatch.setattr(Constraints, "of", planted)
        found = llm.generate([[5, 6]] * 3, params, use_tqdm=False)
        assert [o.outputs[0].finish_reason for o in found] == ["length", "error", "length"]
        assert [found[i].outputs[0].token_ids for i in (0, 2)] == [right[i].outputs[0].token_ids for i in (0, 2)]
        assert llm.llm_engine.stats().used_blocks == 0


def test_a_bug_in_the_view_of_steps_ends_the_view_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("record", "view"):
        engine = make_engine()
        engine.watch(True)
        with monkeypatch.context() as patch:
            _once(patch, Watch, name, lambda *_, **__: True)
            engine.add_request("a", [5, 6], SamplingParams(max_tokens=8))
            ends = []
            while engine.has_unfinished_requests():
                ends += [delta.finish_reason for delta in engine.step()]
                engine.view()
        assert ends == [None] * 7 + ["length"] and engine.view() is None


# -- the client ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def client() -> Iterator[ThreadClient]:
    client = ThreadClient.start_with(lambda: make_engine(FakeExecutor(4096), max_model_len=512, planning_depth=1))
    yield client
    client.close()


async def _tokens(client: ThreadClient, name: str, shortcut: Any = None) -> int:
    from tests.engine.test_client import ask

    return sum([len(d.token_ids) async for deltas in client.generate(ask(name, max_tokens=200), shortcut) for d in deltas])


def test_a_bug_in_one_readers_shortcut_ends_its_stream_alone(client: ThreadClient) -> None:
    def shortcut(deltas: list[OutputDelta]) -> bool:
        raise KeyError("planted")

    async def main() -> None:
        results = await asyncio.gather(*(_tokens(client, f"r{i}", shortcut if i == 1 else None) for i in range(4)), return_exceptions=True)
        assert [isinstance(r, KeyError) if i == 1 else r == 200 for i, r in enumerate(results)] == [True] * 4
        assert await _tokens(client, "r1") == 200, "the engine has ended the request, so its id is free"

    asyncio.run(main())
    assert client._streams == {}


def test_a_bug_in_one_requests_metrics_loses_no_delta(client: ThreadClient, monkeypatch: pytest.MonkeyPatch) -> None:
    _once(monkeypatch, EngineMetrics, "_delta", lambda _, tracked, delta, now: delta.request_id == "r1", 1)

    async def main() -> None:
        assert await asyncio.gather(*(_tokens(client, f"r{i}") for i in range(3))) == [200] * 3

    asyncio.run(main())
    assert client.metrics.finished["length"] == 2 and not client.metrics._tracked


def test_a_request_whose_preparation_fails_is_refused_alone(client: ThreadClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from minivllm.errors import InvalidInput

    def preparation(self: EngineCore, request: EngineRequest) -> None:
        if request.params.max_tokens == 7:
            raise KeyError("planted")

    monkeypatch.setattr(EngineCore, "preparation", preparation)

    async def main() -> None:
        from tests.engine.test_client import ask, collect

        results = await asyncio.gather(collect(client, ask("bad", max_tokens=7)), _tokens(client, "good"), return_exceptions=True)
        assert isinstance(results[0], InvalidInput) and "bug (KeyError)" in str(results[0]) and results[1] == 200

    asyncio.run(main())
