"""`LLMEngine`: loops written for vLLM, and outputs that end at the context's limit."""
from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minivllm import AsyncLLM, LLMEngine, PoolingParams, RequestOutput, SamplingParams
from minivllm.config import EngineConfig
from minivllm.engine.beam_search import BeamSearchParams
from minivllm.engine.client import EngineClient, ThreadClient
from minivllm.engine.engine import EngineCore
from minivllm.engine.llm import LLM
from minivllm.errors import InvalidInput, NotSupportedYet
from tests.engine import tokenizers_for_tests as build
from tests.engine.fake import FakeExecutor, expected, make_engine

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.save(build.byte_level(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine(folder: Path) -> Iterator[LLMEngine]:
    engine = LLMEngine(make_engine(folder=folder, planning_depth=1))
    yield engine
    assert engine.stats().used_blocks == 0
    engine.close()


@pytest.fixture
def llm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    def build_engine(config: EngineConfig) -> EngineCore:
        return make_engine(FakeExecutor(), folder=folder, max_queue=config.max_queue, max_num_seqs=2)

    monkeypatch.setattr("minivllm.engine.llm.build_engine", build_engine)
    with LLM(max_queue=1) as llm:
        yield llm


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, **fields})


def test_a_loop_written_for_vllm_runs(engine: LLMEngine) -> None:
    waiting = [("a", PROMPT, greedy()), ("b", "the fox", SamplingParams(n=2, seed=3, max_tokens=9, logprobs=1)),
               ("c", PROMPT, greedy(max_tokens=40)), ("d", {"prompt_token_ids": PROMPT}, greedy(max_tokens=40)),
               ("e", PROMPT, greedy(max_tokens=40))]
    outputs: dict[str, list[RequestOutput]] = {name: [] for name, _, _ in waiting}
    steps = 0
    while waiting or engine.has_unfinished_requests():
        if waiting:
            request_id, prompt, params = waiting.pop(0)
            assert engine.add_request(request_id, prompt, params) == request_id
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            outputs[output.request_id].append(output)
        steps += 1
        if steps == 8:
            assert engine.get_num_unfinished_requests() == 4
            engine.abort_request("c")
            engine.abort_request(["d", "e", "unknown"])
    assert engine.get_num_unfinished_requests() == 0
    for name, found in outputs.items():
        lengths = [[len(c.token_ids) for c in o.outputs] for o in found]
        assert lengths == sorted(lengths) and len(lengths) > 1, "each output is cumulative, and a later one does not change it"
        assert [o.finished for o in found] == [False] * (len(found) - 1) + [name in "ab"]
        assert all(later.outputs[0].text.startswith(earlier.outputs[0].text) for earlier, later in itertools.pairwise(found))
    last = outputs["a"][-1]
    assert (last.prompt_token_ids, last.outputs[0].token_ids) == (PROMPT, expected(PROMPT, 6))
    assert last.outputs[0].finish_reason == "length" and last.outputs[0].finished() and last.metrics is not None
    both = outputs["b"][-1]
    assert both.prompt == "the fox" and [c.index for c in both.outputs] == [0, 1]
    assert [len(c.token_ids) for c in both.outputs] == [len(c.logprobs or ()) for c in both.outputs] == [9, 9]
    assert both.outputs[0].token_ids != both.outputs[1].token_ids


def test_requests_of_a_loop_lose_nothing_while_generate_runs(llm: LLM) -> None:
    llm.llm_engine.add_request("0", PROMPT, greedy(max_tokens=30))
    (first,) = llm.generate([PROMPT[::-1]], greedy(), use_tqdm=False)
    assert first.outputs[0].token_ids == expected(PROMPT[::-1], 6) and first.request_id != "0"
    final = {}
    while llm.llm_engine.has_unfinished_requests():
        final |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
    assert final["0"].outputs[0].token_ids == expected(PROMPT, 30)


def test_an_output_that_was_complete_before_the_next_step_call_is_still_returned(engine: LLMEngine) -> None:
    engine.add_request("mine", PROMPT, greedy(max_tokens=1))
    while engine.core.has_unfinished_requests():
        engine.advance()  # as `LLM.generate` does
    assert engine.has_unfinished_requests()
    (output,) = engine.step()
    assert output.finished and not engine.has_unfinished_requests() and engine.step() == []


def test_arguments_have_vllms_order_and_clock(engine: LLMEngine) -> None:
    engine.add_request("a", PROMPT, greedy(max_tokens=1), time.time() - 60, None, None, None, 0)
    output = None
    while engine.has_unfinished_requests():
        output = next(iter(engine.step()), output)
    assert output is not None and output.metrics is not None and output.metrics.finished_time is not None
    assert 59 < output.metrics.finished_time - output.metrics.arrival_time < 120


@pytest.mark.parametrize(("call", "message"), [
    (lambda e: e.add_request(5, PROMPT, greedy()), r"request_id must be a string, got 5: pass str\(5\)"),
    (lambda e: e.add_request("a", PROMPT, {"n": 1}), "params must be SamplingParams"),
    (lambda e: e.abort_request(7), "request_ids must be a request id or a list"),
    (lambda e: (e.add_request("a", PROMPT, greedy()), e.add_request("a", PROMPT, greedy())), "'a' is in use"),
])
def test_wrong_arguments_are_refused(engine: LLMEngine, call: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(engine)
    engine.abort_request("a")
    while engine.has_unfinished_requests():
        engine.step()


def test_what_is_not_built_is_refused_by_name(engine: LLMEngine) -> None:
    with pytest.raises(NotSupportedYet, match="trace_headers"):
        engine.add_request("a", PROMPT, greedy(), trace_headers={"a": "b"})


# -- the context's limit ------------------------------------------------------------------------------------------------


def test_an_output_ends_at_the_contexts_limit_with_reason_length(llm: LLM) -> None:
    for max_tokens in (126, 5000, 10**30, None):  # the context has 128 tokens
        (output,) = llm.generate([PROMPT], greedy(max_tokens=max_tokens, min_tokens=126), use_tqdm=False)
        assert output.outputs[0].token_ids == expected(PROMPT, 125)
        assert output.outputs[0].finish_reason == "length"
    (answer,) = llm.chat([{"role": "user", "content": "the fox"}], greedy(max_tokens=5000), use_tqdm=False)
    assert len(answer.prompt_token_ids) + len(answer.outputs[0].token_ids) == 128
    (last,) = llm.generate([[5] * 127], greedy(n=2), use_tqdm=False)
    assert [(len(c.token_ids), c.finish_reason) for c in last.outputs] == [(1, "length")] * 2
    (found,) = llm.beam_search([[5] * 124], BeamSearchParams(beam_width=2, max_tokens=5000, ignore_eos=True))  # type: ignore[list-item]
    assert [(len(s.tokens), s.finish_reason) for s in found.sequences] == [(128, "length")] * 2


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(llm: LLM) -> None:
    for call in (lambda p: llm.generate([p], greedy()), lambda p: llm.beam_search([p], BeamSearchParams(beam_width=2, max_tokens=3))):
        with pytest.raises(InvalidInput, match="prompt has 128 tokens, but the context length is 128"):
            call([5] * 128)


def test_prompts_may_be_numpy_arrays(llm: LLM) -> None:
    for prompt in (np.array(PROMPT), [np.array(PROMPT)], list(np.array(PROMPT)), {"prompt_token_ids": np.array(PROMPT)}):
        (output,) = llm.generate(prompt, greedy(), use_tqdm=False)  # type: ignore[arg-type]
        assert output.prompt_token_ids == PROMPT and output.outputs[0].token_ids == expected(PROMPT, 6)
        assert {type(t) for t in output.prompt_token_ids} == {int}


# -- what a full queue costs --------------------------------------------------------------------------------------------


def test_each_prompt_is_tokenized_once_however_long_the_queue_is_full(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = llm.llm_engine.core.tokenizer, []
    encode = tokenizer.encode

    def counting(text: str, *args: Any, **kwargs: Any) -> list[int]:
        calls.append(text)
        return encode(text, *args, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", counting)
    texts = [f"the fox {i}" for i in range(6)]  # the queue holds one
    llm.generate(texts, greedy(max_tokens=20, bad_words=["zebra"]), use_tqdm=False)
    assert sorted(t for t in calls if "fox" in t) == texts
    assert len([t for t in calls if "zebra" in t]) == 1  # the tokens of such a list are kept
    calls.clear()
    checked = []
    check = llm.llm_engine.core._checked
    monkeypatch.setattr(llm.llm_engine.core, "_checked", lambda request: checked.append(1) or check(request))
    llm.beam_search(texts, BeamSearchParams(beam_width=2, max_tokens=5))
    assert sorted(calls) == texts and len(checked) == len(texts)


def test_generate_waits_for_room_while_the_callers_own_requests_fill_the_queue(llm: LLM) -> None:
    for name in ("x", "y", "z"):
        if llm.llm_engine.core.has_room:
            llm.llm_engine.add_request(name, PROMPT, greedy(max_tokens=9))
    assert not llm.llm_engine.core.has_room
    (output,) = llm.generate([PROMPT], greedy(), use_tqdm=False)
    assert output.finished


# -- AsyncLLM -----------------------------------------------------------------------------------------------------------


class _Async(AsyncLLM):
    """`AsyncLLM` around the fake executor."""

    def __init__(self, client: EngineClient) -> None:
        self.client, self.tokenizer, self._numbers = client, None, iter(range(100))  # type: ignore[assignment]


async def _last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


class _FirstTokensAlone(threading.Event):
    """A gate before whose third step the first output must have been received."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.received = 0, threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.steps += 1
        if self.steps == 3:
            self.received.wait()
        return super().wait(timeout)


def test_async_calls_refuse_the_other_kind_of_parameters() -> None:
    async def main() -> None:
        async with _Async(ThreadClient.start_with(lambda: make_engine(FakeExecutor()))) as llm:
            with pytest.raises(InvalidInput, match="SamplingParams, got PoolingParams: `encode`") as error:
                await anext(llm.generate([3, 4], PoolingParams()))  # type: ignore[arg-type]
            assert error.value.param == "sampling_params"
            with pytest.raises(InvalidInput, match="PoolingParams, got SamplingParams: `generate`"):
                await anext(llm.encode([3, 4], SamplingParams()))  # type: ignore[arg-type]

    asyncio.run(main())


def test_async_and_list_outputs_agree_under_truncation_and_past_the_limit(llm: LLM) -> None:
    params = greedy(max_tokens=5000, truncate_prompt_tokens=20, n=2)
    prompt = list(range(3, 60))
    expected_output, again = llm.generate([prompt, prompt], params, use_tqdm=False)
    gate = _FirstTokensAlone()
    gate.set()

    async def main() -> None:
        async with _Async(ThreadClient.start_with(lambda: make_engine(FakeExecutor(gate=gate)))) as llm:
            outputs = []
            async for output in llm.generate(prompt, params):
                outputs.append(output)
                gate.received.set()
            assert all(output.prompt_token_ids == prompt[-20:] for output in outputs)
            assert [len(o.outputs[0].token_ids) for o in outputs] != [108] * len(outputs), "earlier outputs are not changed by later ones"
            last = outputs[-1]
            assert [c.token_ids for c in last.outputs] == [c.token_ids for c in expected_output.outputs]
            assert [c.finish_reason for c in last.outputs] == ["length", "length"]
            cached = [output async for output in llm.generate(prompt, params)][-1]
            assert last.num_cached_tokens == 0 and cached.num_cached_tokens == again.num_cached_tokens == 16
            assert last.metrics is not None and last.metrics.first_token_time is not None
            gate.clear()  # no step ends before the abort is sent
            reader = asyncio.create_task(_last(llm.generate(prompt, params, request_id="gone")))
            while not llm.client._streams:
                await asyncio.sleep(0)
            await llm.abort(["gone", "unknown"])
            gate.set()
            assert [c.finish_reason for c in (await reader).outputs] == ["abort", "abort"]

    asyncio.run(main())
    assert expected_output.prompt_token_ids == prompt[-20:]
