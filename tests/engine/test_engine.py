"""`EngineCore` around a fake executor: requests, deltas, and failures."""
from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.core.plan import RowAdmission
from minivllm.engine.engine import EngineCore
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest
from minivllm.errors import EngineDead, InvalidInput
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams
from minivllm.splitmix64 import output
from tests.engine import tokenizers_for_tests as build
from tests.engine.fake import EOS, VOCAB, FakeExecutor, expected, make_engine

PROMPT = [5, 6, 7]
DEPTHS = pytest.mark.parametrize("depth", [0, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.save(build.byte_level(), tmp_path_factory.mktemp("tokenizer"))


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 5, **params})


def run(engine: EngineCore) -> list[OutputDelta]:
    deltas: list[OutputDelta] = []
    while engine.has_unfinished_requests():
        deltas += engine.step()
        engine.scheduler.check()
    return deltas


def tokens_of(deltas: Sequence[OutputDelta], request_id: str = "a", index: int = 0) -> list[int]:
    return [t for d in deltas if (d.request_id, d.index) == (request_id, index) for t in d.token_ids]


def last(deltas: Sequence[OutputDelta], request_id: str = "a", index: int = 0) -> OutputDelta:
    *earlier, final = [d for d in deltas if (d.request_id, d.index) == (request_id, index)]
    assert final.finish_reason is not None
    assert all(d.finish_reason is None and d.metrics is None for d in earlier)
    return final


# -- tokens -----------------------------------------------------------------------------------------------------------


@DEPTHS
def test_a_request_gets_its_tokens_one_delta_a_step(depth: int) -> None:
    engine = make_engine(planning_depth=depth)
    engine.add_request("a", PROMPT, greedy())
    deltas = run(engine)
    assert [d.token_ids for d in deltas] == [(t,) for t in expected(PROMPT, 5)]
    assert last(deltas).finish_reason == "length"


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=30), min_size=1, max_size=8),
    lengths=st.lists(st.integers(1, 20), min_size=8, max_size=8), depth=st.integers(0, 1), budget=st.integers(1, 40),
    rows=st.integers(1, 8), block_size=st.sampled_from([1, 3, 16]), caching=st.booleans(),
)
def test_tokens_do_not_depend_on_how_steps_are_planned(
    prompts: list[list[int]], lengths: list[int], depth: int, budget: int, rows: int, block_size: int, caching: bool,
) -> None:
    executor = FakeExecutor(num_blocks=2 + -(-50 // block_size))  # little more than one request needs
    engine = make_engine(
        executor, planning_depth=depth, max_num_batched_tokens=budget, max_num_seqs=rows, block_size=block_size,
        enable_prefix_caching=caching, max_model_len=50,
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(max_tokens=lengths[i]))
    deltas = run(engine)
    for i, prompt in enumerate(prompts):
        assert tokens_of(deltas, str(i)) == expected(prompt, lengths[i])
    assert engine.stats().used_blocks == 0


def test_with_depth_one_the_next_step_is_launched_before_the_first_is_waited_for() -> None:
    for depth in (0, 1):
        executor = FakeExecutor()
        engine = make_engine(executor, planning_depth=depth)
        engine.add_request("a", PROMPT, greedy(max_tokens=4))
        launched = []
        while engine.has_unfinished_requests():
            engine.step()
            launched.append(executor.launched)
        assert launched == ([1, 2, 3, 4] if depth == 0 else [2, 3, 4, 4])


def test_children_differ_from_each_other_and_repeat_with_the_seed() -> None:
    found = []
    for _ in range(2):
        engine = make_engine()
        engine.add_request("a", PROMPT, SamplingParams(n=3, seed=11, max_tokens=6))
        deltas = run(engine)
        found.append([tokens_of(deltas, "a", i) for i in range(3)])
    assert found[0] == found[1] == [expected(PROMPT, 6, 11, i) for i in range(3)]
    assert len({tuple(tokens) for tokens in found[0]}) == 3


def test_a_request_without_a_seed_gets_one_from_the_engines_seed_and_its_number() -> None:
    def seeds(engine_seed: int) -> list[list[int]]:
        engine = make_engine(seed=engine_seed)
        for name in "ab":
            engine.add_request(name, PROMPT, SamplingParams(max_tokens=5))
        deltas = run(engine)
        return [tokens_of(deltas, name) for name in "ab"]

    assert seeds(1) == seeds(1) == [expected(PROMPT, 5, output(1, 0)), expected(PROMPT, 5, output(1, 1))]
    assert seeds(1)[0] != seeds(1)[1]
    assert seeds(1) != seeds(2)
    assert output(0, 0) == 0xE220A8397B1DCDAF  # SplitMix64's published first output for seed 0


def test_a_refused_request_does_not_shift_the_seeds_of_later_ones() -> None:
    engine = make_engine()
    with pytest.raises(InvalidInput):
        engine.add_request("bad", [], SamplingParams())
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=5))
    assert tokens_of(run(engine)) == expected(PROMPT, 5, output(0, 0))


# -- how outputs end --------------------------------------------------------------------------------------------------


def script(*tokens: int) -> Any:
    """A model that generates these tokens after any prompt."""
    return lambda history, admission: tokens[len(history) - admission.num_prompt_tokens]


@DEPTHS
def test_eos_and_stop_tokens_end_an_output_and_are_told_apart(depth: int, folder: Path) -> None:
    spell = Tokenizer(folder).encode(" fox")[0]
    for params, reason, kept in (
        (greedy(), None, 2), (greedy(ignore_eos=True, max_tokens=4), "length", 4), (greedy(stop_token_ids=[spell]), spell, 1),
    ):
        engine = make_engine(FakeExecutor(choose=script(spell, EOS, 9, 9, 9, 9)), folder=folder, planning_depth=depth)
        engine.add_request("a", PROMPT, params)
        deltas = run(engine)
        assert len(tokens_of(deltas)) == kept
        if reason == "length":
            assert (last(deltas).finish_reason, last(deltas).stop_reason) == ("length", None)
        else:
            assert (last(deltas).finish_reason, last(deltas).stop_reason) == ("stop", reason)
        assert "".join(d.text for d in deltas).startswith("" if reason == spell else " fox"[:2])


@DEPTHS
def test_a_stop_string_ends_an_output_wherever_token_boundaries_are(depth: int, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    said = tokenizer.encode("the quick brown fox jumps over")
    engine = make_engine(FakeExecutor(choose=script(*said)), folder=folder, planning_depth=depth)
    engine.add_request("a", "the", greedy(stop=["own f", "jum"], max_tokens=len(said)))
    engine.add_request("b", "the", greedy(stop="own f", include_stop_str_in_output=True, max_tokens=len(said)))
    engine.add_request("c", "the", greedy(max_tokens=len(said)))
    deltas = run(engine)
    text = {name: "".join(d.text for d in deltas if d.request_id == name) for name in "abc"}
    assert text == {"a": "the quick br", "b": "the quick brown f", "c": "the quick brown fox jumps over"}
    assert (last(deltas).finish_reason, last(deltas).stop_reason) == ("stop", "own f")
    assert tokenizer.decode(tokens_of(deltas)).startswith("the quick brown f")
    assert last(deltas, "c").finish_reason == "length"
    assert len(engine._outputs) == 0


def test_the_context_length_ends_an_output_without_a_token_limit() -> None:
    engine = make_engine(max_model_len=10)
    engine.add_request("a", PROMPT, greedy(max_tokens=None))
    deltas = run(engine)
    assert tokens_of(deltas) == expected(PROMPT, 7)
    assert last(deltas).finish_reason == "length"


@DEPTHS
def test_an_aborted_request_ends_at_once_and_frees_its_blocks(depth: int, folder: Path) -> None:
    engine = make_engine(folder=folder, planning_depth=depth)
    engine.add_request("a", PROMPT, SamplingParams(n=2, max_tokens=50))
    engine.add_request("b", PROMPT, greedy())
    deltas = engine.step() + engine.step()
    ends = engine.abort_request("a")
    assert [(d.index, d.finish_reason, d.token_ids) for d in ends] == [(0, "abort", ()), (1, "abort", ())]
    assert all(d.metrics is not None for d in ends)
    assert engine.abort_request("a") == []
    deltas += run(engine)
    assert tokens_of(deltas, "b") == expected(PROMPT, 5)
    assert not [d for d in deltas if d.request_id == "a" and d.finish_reason]
    assert engine.stats().used_blocks == 0
    assert len(engine._outputs) == 0
    engine.add_request("a", PROMPT, greedy())  # the id is free again
    assert tokens_of(run(engine)) == expected(PROMPT, 5)


@DEPTHS
@pytest.mark.parametrize("how", ["abort", "stop"])
def test_an_id_can_be_reused_while_a_launched_plan_still_names_the_earlier_request(depth: int, how: str, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("the quick brown fox")
    executor = FakeExecutor(choose=lambda history, admission: ids[len(history) % len(ids)])
    engine = make_engine(executor, folder=folder, planning_depth=depth)
    prompt = [5] * len(ids)
    engine.add_request("a", prompt, greedy(prompt_logprobs=0, max_tokens=50, stop_token_ids=[ids[2]] if how == "stop" else None))
    while not any(d.finish_reason for d in engine.step()):
        if how == "abort":
            engine.abort_request("a")
            break
    engine.add_request("a", prompt, greedy(max_tokens=len(ids), prompt_logprobs=0))
    deltas = run(engine)
    assert tokens_of(deltas) == ids
    assert "".join(d.text for d in deltas) == "the quick brown fox"


@DEPTHS
def test_prompt_logprobs_of_an_earlier_request_with_the_same_id_are_not_mixed_in(depth: int) -> None:
    engine = make_engine(planning_depth=depth, max_num_batched_tokens=7, max_num_seqs=3, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    engine.add_request("a", list(range(100, 130)), params)
    engine.step()
    engine.abort_request("a")
    engine.add_request("a", list(range(3, 12)), params)
    (delta,) = run(engine)
    assert [e and e.token_id for e in delta.prompt_logprobs or ()] == [None, *range(4, 12)]


def test_a_waiting_request_can_be_aborted_before_its_first_step() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request("a", PROMPT, greedy())
    engine.add_request("b", PROMPT, SamplingParams(n=2))
    engine.step()
    assert [d.finish_reason for d in engine.abort_request("b")] == ["abort", "abort"]
    assert tokens_of(run(engine)) == expected(PROMPT, 5)[1:]


# -- logprobs ---------------------------------------------------------------------------------------------------------


@DEPTHS
def test_logprobs_come_with_their_tokens(depth: int) -> None:
    engine = make_engine(planning_depth=depth)
    engine.add_request("a", PROMPT, greedy(logprobs=2))
    engine.add_request("b", PROMPT, greedy())
    deltas = run(engine)
    for position, delta in enumerate((d for d in deltas if d.request_id == "a"), start=len(PROMPT)):
        (entry,) = delta.logprobs or ()
        assert (entry.token_id,) == delta.token_ids
        assert entry.logprob == -float(position)
        assert len(entry.top_ids) == 2
    assert all(d.logprobs is None for d in deltas if d.request_id == "b")


@DEPTHS
@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_are_assembled_from_chunks(depth: int, n: int) -> None:
    prompt = list(range(3, 33))
    engine = make_engine(planning_depth=depth, max_num_batched_tokens=7, max_num_seqs=3)
    params = SamplingParams(n=n, seed=1, prompt_logprobs=0, max_tokens=3)
    engine.add_request("first", prompt, params)
    run(engine)
    engine.add_request("a", prompt, params)  # the prompt is in the prefix cache now
    engine.add_request("b", prompt[:9], greedy())
    deltas = [d for d in run(engine) if d.request_id == "a"]
    entries = deltas[0].prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    assert [(e.token_id, e.logprob) for e in entries[1:] if e] == [(t, -float(p)) for p, t in enumerate(prompt) if p]
    assert all(d.prompt_logprobs is None for d in deltas[1:])


@DEPTHS
def test_a_prompt_can_be_scored_without_generating(depth: int) -> None:
    engine = make_engine(planning_depth=depth, max_num_batched_tokens=7, max_num_seqs=3)
    engine.add_request("a", list(range(3, 33)), SamplingParams(max_tokens=0, prompt_logprobs=0))
    (delta,) = run(engine)
    assert (delta.token_ids, delta.finish_reason) == ((), "length")
    assert [e and e.token_id for e in delta.prompt_logprobs or ()] == [None, *range(4, 33)]


# -- cached tokens, times, order --------------------------------------------------------------------------------------


def test_cached_tokens_are_reported_and_salt_keeps_prefixes_apart() -> None:
    engine = make_engine()
    prompt = list(range(3, 24))  # 21 tokens, 5 full blocks of 4
    cached = []
    for name, salt in (("a", None), ("b", None), ("c", "secret"), ("d", "secret")):
        engine.add_request(name, prompt, greedy(), cache_salt=salt)
        cached.append(last(run(engine), name).num_cached_tokens)
    assert cached == [0, 20, 0, 20]
    stats = engine.stats()
    assert stats.prefix_cache_hits == 40
    engine.reset_prefix_cache()
    engine.add_request("e", prompt, greedy())
    assert last(run(engine), "e").num_cached_tokens == 0


def test_times_come_from_the_engines_clock() -> None:
    ticks = iter(range(1000))
    engine = make_engine(clock=lambda: float(next(ticks)))
    engine.add_request("a", PROMPT, greedy(max_tokens=3), arrival_time=-5.0)
    metrics = last(run(engine)).metrics
    assert metrics is not None
    assert metrics.arrival_time == -5.0
    times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert times == sorted(times)  # type: ignore[type-var]
    assert len(set(times)) == 4


def test_under_the_priority_policy_lower_numbers_go_first() -> None:
    engine = make_engine(max_num_seqs=1, policy="priority")
    for name, priority in (("a", 2), ("b", 1), ("c", 0)):
        engine.add_request(name, PROMPT, greedy(max_tokens=1), priority=priority)
    assert [d.request_id for d in run(engine)] == ["c", "b", "a"]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "params", "message", "param"), [
    ([], greedy(), "prompt is empty", "prompt"),
    ("", greedy(), "prompt is empty", "prompt"),
    ([VOCAB], greedy(), r"token id 400 .* \(0 to 399\)", "prompt"),
    ([-1], greedy(), "token id -1", "prompt"),
    ([1.5], greedy(), "whole numbers", "prompt"),
    ([True], greedy(), "whole numbers", "prompt"),
    (7, greedy(), "text or a list of token ids", "prompt"),
    ({"promt": "x"}, greedy(), "did you mean 'prompt'", "prompt"),
    ({}, greedy(), "needs", "prompt"),
    ([5] * 128, greedy(), "prompt has 128 tokens, but the context length is 128", "prompt"),
    ([5], greedy(stop_token_ids=[VOCAB]), "stop_token_ids", "stop_token_ids"),
    ([5], greedy(allowed_token_ids=[9999]), "allowed_token_ids", "allowed_token_ids"),
    ([5], greedy(logit_bias={VOCAB: 1.0}), "logit_bias", "logit_bias"),
    ([5], {"temperature": 0}, "must be SamplingParams", "params"),
])
def test_requests_that_can_never_be_answered_are_refused(prompt: Any, params: Any, message: str, param: str, folder: Path) -> None:
    engine = make_engine(folder=folder)
    with pytest.raises(InvalidInput, match=message) as error:
        engine.add_request("a", prompt, params)
    assert error.value.param == param
    assert not engine.has_unfinished_requests()


def test_an_id_in_use_is_refused_even_if_it_is_a_childs() -> None:
    engine = make_engine()
    engine.add_request("a", PROMPT, SamplingParams(n=2))
    for name in ("a", "a#1"):
        with pytest.raises(InvalidInput, match="in use"):
            engine.add_request(name, PROMPT, greedy())
    engine.add_request("b#1", PROMPT, greedy(prompt_logprobs=0))
    with pytest.raises(InvalidInput, match="in use"):
        engine.add_request("b", PROMPT, SamplingParams(n=2))
    deltas = run(engine)
    assert next(d.prompt_logprobs for d in deltas if d.request_id == "b#1") is not None


def test_priority_without_its_policy_is_refused() -> None:
    with pytest.raises(InvalidInput, match="scheduling_policy='priority'"):
        make_engine().add_request("a", PROMPT, greedy(), priority=1)


def test_a_full_queue_refuses_one_more_request() -> None:
    engine = make_engine(max_queue=2, max_num_seqs=1)
    for name in "ab":
        engine.add_request(name, PROMPT, greedy())
    with pytest.raises(InvalidInput, match="queue"):
        engine.add_request("c", PROMPT, greedy())
    engine.step()
    engine.add_request("c", PROMPT, greedy())
    assert {d.request_id for d in run(engine)} == {"a", "b", "c"}


def test_without_a_tokenizer_prompts_are_ids_and_strings_are_refused() -> None:
    engine = make_engine()
    with pytest.raises(InvalidInput, match="prompt_token_ids"):
        engine.add_request("a", "text", greedy())
    for name in ("stop", "bad_words"):
        with pytest.raises(InvalidInput, match="use token ids") as error:
            engine.add_request("a", PROMPT, greedy(**{name: ["x"]}))
        assert error.value.param == name
    engine.add_request("a", {"prompt_token_ids": PROMPT}, greedy())
    assert {d.text for d in run(engine)} == {""}


def test_prompts_may_be_text_or_ids_in_any_form(folder: Path) -> None:
    ids = Tokenizer(folder).encode("the fox")
    for prompt in ("the fox", ids, tuple(ids), {"prompt": "the fox"}, {"prompt_token_ids": ids}, {"prompt": "?", "prompt_token_ids": ids}):
        engine = make_engine(folder=folder)
        engine.add_request("a", prompt, greedy())
        assert tokens_of(run(engine)) == expected(ids, 5)


def test_bad_words_reach_the_worker_as_tokens_with_and_without_a_space(folder: Path) -> None:
    seen: list[RowAdmission] = []

    def choose(history: Sequence[int], admission: RowAdmission) -> int:
        seen.append(admission)
        return 9

    tokenizer = Tokenizer(folder)
    engine = make_engine(FakeExecutor(choose=choose), folder=folder)
    engine.add_request("a", PROMPT, greedy(bad_words=["fox", " the"], max_tokens=1))
    run(engine)
    assert set(seen[0].params.bad_words_token_ids) == {
        tuple(tokenizer.encode(spelling, add_special_tokens=False)) for spelling in ("fox", " fox", " the")
    }


# -- failures --------------------------------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("where", ["fail_at", "fail_waiting_at"])
def test_a_failed_step_ends_only_its_own_requests_with_an_error(depth: int, where: str, folder: Path) -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, folder=folder, planning_depth=depth, max_num_seqs=3)
    engine.add_request("a", PROMPT, SamplingParams(n=2, max_tokens=20))
    engine.add_request("b", PROMPT, greedy(max_tokens=20))
    engine.add_request("c", PROMPT, greedy())  # has no row yet
    deltas = engine.step() + engine.step()
    failing = max(p.step_id for p in executor.plans) + 1
    getattr(executor, where)[failing] = RuntimeError("out of memory")
    deltas += run(engine)
    for name, index in (("a", 0), ("a", 1), ("b", 0)):
        end = last(deltas, name, index)
        assert (end.finish_reason, end.token_ids) == ("error", ())
        assert end.error == "RuntimeError: out of memory"
    assert tokens_of(deltas, "c") == expected(PROMPT, 5)
    assert last(deltas, "c").error is None
    stats = engine.stats()
    assert (stats.used_blocks, stats.num_failed_steps) == (0, 1)
    assert len(engine._outputs) == 0


def test_a_failed_prompt_ends_every_child_of_its_request() -> None:
    executor = FakeExecutor(fail_at={})
    engine = make_engine(executor, max_num_batched_tokens=4, max_num_seqs=4)
    engine.add_request("a", list(range(3, 20)), SamplingParams(n=3))
    engine.step()
    executor.fail_at[executor.plans[-1].step_id + 1] = RuntimeError("out of memory")
    deltas = run(engine)
    assert [(d.index, d.finish_reason) for d in sorted(deltas, key=lambda d: d.index)] == [(i, "error") for i in range(3)]


def test_blocks_of_a_failed_step_are_not_shared() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    executor.fail_waiting_at[0] = executor.fail_waiting_at[1] = RuntimeError("bad step")
    engine.add_request("a", list(range(3, 40)), greedy())
    run(engine)
    executor.fail_waiting_at.clear()
    engine.add_request("b", list(range(3, 40)), greedy())
    assert last(run(engine), "b").num_cached_tokens == 0


def test_a_lost_device_kills_the_engine() -> None:
    for error in (RuntimeError("CUDA error: an illegal memory access"), EngineDead("a rank is gone")):
        engine = make_engine(FakeExecutor(fail_waiting_at=dict.fromkeys(range(9), error)))
        engine.add_request("a", PROMPT, greedy())
        with pytest.raises(EngineDead, match=r"illegal memory|rank is gone"):
            run(engine)


@DEPTHS
def test_closing_waits_for_launched_steps_and_closes_the_executor(depth: int) -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, planning_depth=depth)
    engine.add_request("a", PROMPT, greedy())
    engine.step()
    engine.close()
    engine.close()
    assert executor.closed
    assert len(engine._pipeline) == 0
    with pytest.raises(EngineDead, match="closed"):
        engine.add_request("b", PROMPT, greedy())


def test_a_step_waits_only_for_its_own_result() -> None:
    """The gate represents a slow device. Launching does not wait for it; taking a result does."""
    gate = threading.Event()
    executor = FakeExecutor(gate=gate)
    engine = make_engine(executor, planning_depth=1)
    engine.add_request("a", PROMPT, greedy())
    stepping = threading.Thread(target=engine.step)
    stepping.start()
    gate.set()
    stepping.join()
    assert executor.launched == 2


def test_a_request_is_freed_when_it_ends_without_a_garbage_collection() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    found = []
    gc.disable()
    try:
        for name in ("finished", "aborted"):
            params = SamplingParams(n=3, max_tokens=3, stop_token_ids=list(range(100, 200)))
            found.append(weakref.ref(params))
            engine.add(EngineRequest(name, tuple(PROMPT), params))
            del params
            engine.step()
            engine.abort_request("aborted")
            run(engine)
            executor.plans.clear()
            executor._rows.clear()
        assert [ref() for ref in found] == [None, None]
    finally:
        gc.enable()
