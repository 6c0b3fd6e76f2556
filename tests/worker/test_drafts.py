"""Drafts: a decode of 1 + k tokens gives the tokens of plain decoding, however many drafts are right, whatever the parameters."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from minivllm.core.plan import StepPlan, StepResult
from minivllm.sampling_params import SamplingParams
from minivllm.worker import model_runner
from minivllm.worker.batch import Columns
from minivllm.worker.model_runner import ModelRunner
from tests.worker.plans import GREEDY, Planner, Sequence
from tests.worker.test_model_runner import TOKENS, VOCAB, Tiny, run, sequences_of
from tests.worker.test_model_runner import plain as plain
from tests.worker.test_model_runner import tiny as tiny

SAMPLED = SamplingParams(temperature=1.3, seed=0, ignore_eos=True)
PARAMS: dict[str, list[SamplingParams]] = {
    "greedy": [GREEDY],
    "sampled": [SAMPLED, replace(SAMPLED, top_k=9), GREEDY, replace(SAMPLED, top_p=0.8, min_p=0.02)],
    "penalties": [replace(SAMPLED, presence_penalty=1.5), replace(SAMPLED, repetition_penalty=1.7), replace(GREEDY, frequency_penalty=1.0)],
    "constraints": [replace(SAMPLED, min_tokens=6, stop_token_ids=[5, 9, 13]), replace(SAMPLED, logit_bias={4: 3.0, 8: -50.0}),
                    replace(GREEDY, allowed_token_ids=list(range(3, 60))), replace(SAMPLED, logprobs=3)],
}  # fmt: skip


def decode(sequences: list[Sequence], params: list[SamplingParams]) -> list[Sequence]:
    for i, s in enumerate(sequences):
        s.params, s.seed = params[i % len(params)], i
    return sequences


def run_with_drafts(
    runner: ModelRunner, planner: Planner, sequences: list[Sequence], answers: list[list[int]], right: Callable[[int], int],
    rng: random.Random, k: Callable[[], int],
) -> tuple[list[StepResult], list[StepPlan]]:
    """Sequences in random company; a sequence at its end carries k() drafts, of which the first right(k) are the true tokens."""
    results, plans = [], []
    while ready := [s for s in sequences if s.left]:
        some = rng.sample(ready, rng.randint(1, len(ready)))
        work, drafts = [], []
        for s in some:
            count = rng.randint(1, s.left)
            true = answers[sequences.index(s)][len(s.outputs) :]
            n = min(k(), len(true) - 1) if count == s.left else 0
            good = right(n)
            work.append((s, count))
            drafts.append([*true[:good], *((token + 1 + rng.randrange(VOCAB - 1)) % VOCAB for token in true[good:n])])
        plan = planner.plan(work, drafts=drafts)
        result = runner.sample(runner.launch(plan)).wait()
        assert result.error is None
        for column, tokens in zip(plan.sample_from, result.token_ids, strict=True):
            s, guesses = some[column], drafts[column]
            assert len(tokens) == 1 + right(len(guesses))
            s.outputs += tokens
            s.num_planned -= len(guesses) - (len(tokens) - 1)
            s.num_sampled += len(tokens) - 1
        results.append(result)
        plans.append(plan)
    return results, plans


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("right", ["all", "none", "some"])
def test_tokens_equal_those_of_plain_decoding(tiny: Tiny, kind: str, right: str) -> None:
    rng = random.Random(4)
    expected = decode(sequences_of(tiny), PARAMS[kind])
    without = run(tiny.runner(), tiny.planner(), expected, random.Random(1))
    answers = [s.outputs for s in expected]
    if kind == "greedy":
        assert answers == tiny.expected
    accept: dict[str, Callable[[int], int]] = {"all": lambda n: n, "none": lambda n: 0, "some": lambda n: n // 2}
    got = decode(sequences_of(tiny), PARAMS[kind])
    planner, k = tiny.planner(seed=2), lambda: rng.choice((0, 1, 3, 3, 3))
    results, plans = run_with_drafts(tiny.runner(), planner, got, answers, accept[right], rng, k)
    assert [s.outputs for s in got] == answers and all(len(answer) == TOKENS for answer in answers)
    assert any(any(plan.drafts) for plan in plans)
    entries = [sorted((e.token_id, round(e.logprob, 3)) for r in rs for es in r.logprobs if es for e in es) for rs in (without, results)]
    assert entries[0] == entries[1] and bool(entries[0]) == (kind == "constraints")


def test_logits_rows_of_one_sample_are_never_computed_in_two_parts(plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "MAX_LOGITS_ROWS", 5)
    params = [replace(SAMPLED, presence_penalty=1.5)]
    expected = decode(sequences_of(plain), params)
    run(plain.runner(), plain.planner(), expected, random.Random(1))
    got, rng = decode(sequences_of(plain), params), random.Random(3)
    run_with_drafts(plain.runner(), plain.planner(), got, [s.outputs for s in expected], lambda n: n, rng, lambda: 3)
    assert [s.outputs for s in got] == [s.outputs for s in expected]


def test_the_width_that_most_decodes_have_is_the_batchs_and_the_others_are_computed_like_prompts(plain: Tiny) -> None:
    runner, planner = plain.runner(), plain.planner()
    sequences = sequences_of(plain)
    runner.sample(runner.launch(planner.plan([(s, s.left) for s in sequences]))).wait()
    for s in sequences:
        s.outputs.append(1)
    plan = planner.plan([(s, 1) for s in sequences], drafts=[(7, 8), (), (9, 6), (5,), (1, 2)])
    runner.rows.apply(plan)
    columns = runner.rows.columns(plan)
    assert (columns.query_width, columns.num_decodes) == (3, 3) and sorted(columns.query_lens[3:].tolist()) == [1, 2]
    packed = runner.rows.send(columns)
    for s, drafts in zip(sequences, plan.drafts, strict=True):
        end = len(s.prompt) + 1 + len(drafts)
        assert runner.rows.tokens[s.row, end - len(drafts) : end].tolist() == list(drafts)
    positions = packed.batch.positions[packed.batch.logit_rows].tolist()
    assert positions == [len(s.prompt) + j for s, drafts in zip(sequences, plan.drafts, strict=True) for j in range(1 + len(drafts))]
    assert columns.sample_positions.tolist() == [position + 1 for position in positions]


@pytest.mark.parametrize(("drafts", "simple"), [
    ([(), ()], True), ([(1,), (2,)], True), ([(1,), ()], False), ([(1, 2), (3,)], False),
])  # fmt: skip
def test_a_graph_can_compute_drafts_only_if_all_decodes_have_one_width(plain: Tiny, drafts: Any, simple: bool) -> None:
    runner, planner = plain.runner(), plain.planner()
    sequences = sequences_of(plain)[:2]
    runner.sample(runner.launch(planner.plan([(s, s.left) for s in sequences]))).wait()
    plan = planner.plan([(s, 1) for s in sequences], drafts=drafts)
    runner.rows.apply(plan)
    columns: Columns = runner.rows.columns(plan)
    assert columns.simple == simple
