"""Beam search on the scheduler's forks gives the result of a search that recomputes everything, and of HF's search."""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import LLM, BeamSearchParams, SamplingParams
from minivllm.core.plan import TokenLogprobs
from minivllm.engine.beam_search import _Search
from minivllm.errors import InvalidInput
from tests.engine.oracle import Oracle

pytest.importorskip("transformers")

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [i % 29 + 2 for i in range(33)]]
Found = list[tuple[tuple[int, ...], float]]


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    """A model with few tokens and flat logits, so that the ranks of beams change and EOS is often among the best tokens."""
    return tiny_llama(seed=3, vocab_size=32, initializer_range=0.12)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with LLM(str(folder), dtype="float32", device="cpu", max_model_len=128, block_size=4) as llm:
        yield llm
    torch.set_num_threads(before)


def naive(best: Callable[[tuple[int, ...]], list[tuple[int, float]]], params: BeamSearchParams, eos: int = 1) -> Found:
    """The specification: every beam is computed from its first token, and the search never stops early.

    `best` returns at least beam_width + 1 of the most probable next tokens, with their log-probabilities.
    """
    live: Found = [((), 0.0)]
    done: list[tuple[float, tuple[int, ...], float]] = []

    def complete(tokens: tuple[int, ...], total: float) -> None:
        done.append((total / len(tokens) ** params.length_penalty, tokens, total))

    for _ in range(params.max_tokens):
        ranked = []
        for tokens, total in live:
            ranked += [((*tokens, i), total + v) for i, v in best(tokens)]
        ranked.sort(key=lambda item: -item[1])
        live = []
        for tokens, total in ranked:
            if tokens[-1] == eos and not params.ignore_eos:
                complete(tokens, total)
            elif len(live) < params.beam_width:
                live.append((tokens, total))
    for tokens, total in live:
        complete(tokens, total)
    done.sort(key=lambda item: -item[0])
    return [(tokens, total) for _, tokens, total in done[: params.beam_width]]


def best_by(oracle: Oracle, prompt: list[int], count: int) -> Callable[[tuple[int, ...]], list[tuple[int, float]]]:
    def best(tokens: tuple[int, ...]) -> list[tuple[int, float]]:
        values, ids = oracle.logits([*prompt, *tokens])[-1].log_softmax(-1).topk(count)
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    return best


def search(llm: LLM, prompts: list[list[int]], params: BeamSearchParams) -> list[Found]:
    outputs = llm.beam_search(prompts, params)  # type: ignore[arg-type]
    while llm.llm_engine.core.has_unfinished_requests():  # a step that was launched for a beam that has ended
        assert llm.llm_engine.core.step() == []
    stats = llm.llm_engine.core.stats()
    assert (stats.used_blocks, stats.num_running) == (0, 0)
    llm.llm_engine.core.scheduler.check()
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        for sequence in output.sequences:
            assert sequence.tokens[: len(prompt)] == prompt
            assert sequence.finish_reason == ("stop" if sequence.tokens[-1] == 1 and not params.ignore_eos else "length")
            assert sequence.text == llm.llm_engine.core.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        found.append([(tuple(s.tokens[len(prompt):]), s.cum_logprob) for s in output.sequences])
    return found


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6), width=st.integers(1, 4), length=st.integers(1, 9), eos_share=st.sampled_from([0.05, 0.3, 0.9]),
    penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 4.0]),
)
def test_stopping_early_never_changes_the_result(seed: int, width: int, length: int, eos_share: float, penalty: float) -> None:
    """Checked on a function with eight tokens whose probabilities depend on all earlier tokens."""
    params = BeamSearchParams(beam_width=width, max_tokens=length, length_penalty=penalty)

    def best(tokens: tuple[int, ...]) -> list[tuple[int, float]]:
        rng = random.Random(f"{seed} {tokens}")
        weights = [rng.random() ** 4 + 1e-3 for _ in range(8)]
        weights[1] = eos_share * rng.random() * sum(weights)
        ranked = sorted(((i, math.log(w / sum(weights))) for i, w in enumerate(weights)), key=lambda item: -item[1])
        return ranked[: width + 1]

    state = _Search("r", (5,), params, length, frozenset({1}))
    chosen = [(0, -1)]
    while chosen:
        for index, beam in enumerate(state.beams):
            beam.index = index
        entries = {}
        for beam in state.beams:
            ids, logprobs = zip(*best(beam.tokens), strict=True)
            entries[beam.index] = TokenLogprobs(ids[0], logprobs[0], 1, ids, logprobs)
        chosen = state.advance(entries)
    found = [(beam.tokens, beam.logprob) for _, _, beam, _ in sorted(state.completed, reverse=True)]
    assert found == naive(best, params)


@pytest.mark.parametrize("params", [
    BeamSearchParams(beam_width=1, max_tokens=6),
    BeamSearchParams(beam_width=2, max_tokens=12),
    BeamSearchParams(beam_width=4, max_tokens=10),
    BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True),
    BeamSearchParams(beam_width=3, max_tokens=14, length_penalty=0.0),
    BeamSearchParams(beam_width=3, max_tokens=14, length_penalty=-1.0),
    BeamSearchParams(beam_width=8, max_tokens=1),
    BeamSearchParams(beam_width=3, max_tokens=14, length_penalty=2.5),
], ids=lambda p: f"{p.beam_width}x{p.max_tokens}{'-no-eos' if p.ignore_eos else ''}-penalty{p.length_penalty:g}")
def test_the_result_equals_a_search_that_recomputes_everything(llm: LLM, oracle: Oracle, params: BeamSearchParams) -> None:
    for prompt, found in zip(PROMPTS, search(llm, PROMPTS, params), strict=True):
        expected = naive(best_by(oracle, prompt, params.beam_width + 1), params)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        assert [total for _, total in found] == pytest.approx([total for _, total in expected], abs=1e-3)


def test_some_searches_end_with_eos_and_some_change_the_ranks_of_beams(oracle: Oracle) -> None:
    """The cases above would test little on a model that never does either."""
    results = [naive(best_by(oracle, prompt, 5), BeamSearchParams(beam_width=4, max_tokens=10)) for prompt in PROMPTS]
    assert any(tokens[-1] == 1 and len(tokens) < 10 for found in results for tokens, _ in found)
    assert any(found[0][0][:3] != found[1][0][:3] for found in results)


def test_without_eos_the_result_equals_hf(llm: LLM, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, found in zip(PROMPTS, search(llm, PROMPTS, BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True)), strict=True):
        ids = model.generate(
            torch.tensor([prompt]), num_beams=4, num_return_sequences=4, max_new_tokens=10, do_sample=False, eos_token_id=None,
            pad_token_id=0, attention_mask=torch.ones(1, len(prompt)),
        )
        assert [list(tokens) for tokens, _ in found] == ids[:, len(prompt):].tolist()


@pytest.mark.parametrize("ahead", [False, True], ids=["plain", "ahead"])
@pytest.mark.parametrize(("rows", "blocks", "queue", "budget"), [(2, 400, None, 64), (64, 16, None, 64), (64, 400, 1, 7), (3, 16, 1, 5)])
def test_rows_blocks_queue_and_budget_do_not_change_the_result(
    llm: LLM, folder: Path, rows: int, blocks: int, queue: int | None, budget: int, ahead: bool,
) -> None:
    """Settings with fewer rows than beams, with blocks for little more than one beam, and with a queue of one request."""
    params = BeamSearchParams(beam_width=3, max_tokens=10)
    expected = search(llm, PROMPTS, params)
    with LLM(
        str(folder), dtype="float32", device="cpu", max_model_len=48, block_size=4, max_num_seqs=rows, num_gpu_blocks_override=blocks,
        max_queue=queue, max_num_batched_tokens=budget, async_scheduling=ahead,
    ) as small:
        found = search(small, PROMPTS, params)
    assert [[tokens for tokens, _ in one] for one in found] == [[tokens for tokens, _ in one] for one in expected]


def test_other_requests_may_run_during_a_search(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=10)
    expected = search(llm, PROMPTS, params)
    llm.llm_engine.core.add_request("other", PROMPTS[1], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    outputs = llm.beam_search(PROMPTS, params)  # type: ignore[arg-type]
    assert [[tuple(s.tokens[len(p):]) for s in o.sequences] for p, o in zip(PROMPTS, outputs, strict=True)] == [
        [tokens for tokens, _ in one] for one in expected
    ]
    assert llm.llm_engine.core.has_unfinished_requests()
    llm.llm_engine.core.abort_request("other")
    while llm.llm_engine.core.has_unfinished_requests():
        llm.llm_engine.core.step()


def test_an_interrupted_search_leaves_no_request_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = llm.llm_engine.core.step
    calls = iter([step, step, step])

    def interrupted() -> object:
        try:
            return next(calls)()
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(llm.llm_engine.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.beam_search(PROMPTS, BeamSearchParams(beam_width=3, max_tokens=10))  # type: ignore[arg-type]
    monkeypatch.undo()
    while llm.llm_engine.core.has_unfinished_requests():
        llm.llm_engine.core.step()
    assert llm.llm_engine.core.stats().used_blocks == 0
    llm.llm_engine.core.scheduler.check()


def test_forks_share_the_prompts_blocks(llm: LLM) -> None:
    """Eight beams on a long prompt need few more blocks than one."""
    most = 0
    step = llm.llm_engine.core.step

    def watched() -> object:
        nonlocal most
        found = step()
        most = max(most, llm.llm_engine.core.stats().used_blocks)
        return found

    llm.llm_engine.core.step = watched  # type: ignore[method-assign,assignment]
    try:
        llm.beam_search([[i % 30 + 2 for i in range(100)]], BeamSearchParams(beam_width=8, max_tokens=4, ignore_eos=True))  # type: ignore[list-item]
    finally:
        del llm.llm_engine.core.step
    assert 25 < most <= 25 + 8 * 2


def test_impossible_searches_are_refused(llm: LLM) -> None:
    for arguments, message in (
        ({"beam_width": 0, "max_tokens": 1}, "beam_width must be"), ({"beam_width": 2, "max_tokens": 0}, "max_tokens must be"),
        ({"beam_width": 2, "max_tokens": 2, "length_penalty": "x"}, "length_penalty must be"),
    ):
        with pytest.raises(InvalidInput, match=message):
            BeamSearchParams(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="at most 19"):
        llm.beam_search(PROMPTS, BeamSearchParams(beam_width=20, max_tokens=2))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="prompt has 128 tokens, but the context length is 128"):
        llm.beam_search([[5] * 128], BeamSearchParams(beam_width=2, max_tokens=5))  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="outside the vocabulary"):
        llm.beam_search([[5], [900]], BeamSearchParams(beam_width=2, max_tokens=3))  # type: ignore[list-item]
    while llm.llm_engine.core.has_unfinished_requests():
        llm.llm_engine.core.step()
    assert llm.llm_engine.core.stats().used_blocks == 0
