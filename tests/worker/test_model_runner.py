"""The runner on a tiny real model: any plan of the same work gives the tokens that Transformers gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.core.plan import BlockCopy, BlockMove, StepResult
from minivllm.families import kv_groups
from minivllm.kernels import select, tuning
from minivllm.layers.build import BuildContext
from minivllm.models.loader import load_model
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.sampling_params import SamplingParams
from minivllm.worker import model_runner
from minivllm.worker.kv_cache import KVCache, KVLayout
from minivllm.worker.model_runner import ModelRunner
from tests.models.tiny import hf_logits, make_hf, read_spec
from tests.worker.plans import GREEDY, Planner, Sequence

NUM_BLOCKS, ROWS, LENGTH, VOCAB = 120, 6, 64, 97
TOKENS = 10


class Tiny:
    """A tiny model and the tokens that Transformers generates with it. `windows`: two KV groups, one with a window of 6.

    layers: of each group.
    """

    def __init__(self, folder: Path, windows: bool, device: str = "cpu", layers: int = 2) -> None:
        extra: dict[str, Any] = {"num_hidden_layers": layers}
        if windows:
            extra = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": layers, "num_hidden_layers": 2 * layers}
        self.hf = make_hf("Qwen2", num_key_value_heads=2, **extra)
        self.hf.save_pretrained(folder)
        self.device = torch.device(device)
        build = BuildContext(self.device, torch.float32, select(self.device))
        self.model = load_model(read_spec(folder), folder, "auto", build)
        assert len(kv_groups(self.model.spec)) == (2 if windows else 1)
        rng = random.Random(0)
        self.prompts = [tuple(rng.randrange(VOCAB) for _ in range(n)) for n in (1, 5, 23, 2, 11)]
        self.expected = [self._generate(list(p)) for p in self.prompts]

    def _generate(self, tokens: list[int]) -> list[int]:
        out = []
        for _ in range(TOKENS):
            out.append(int(hf_logits(self.hf, tokens + out)[-1].argmax()))
        return out

    def runner(self, block_size: int = 4, host_blocks: int = 0) -> ModelRunner:
        shape = KVLayout.of(self.model.spec, block_size, torch.float32)
        kv = KVCache(shape, NUM_BLOCKS, host_blocks, self.device, self.model.build.ops)
        for layer in kv.layers:  # reading a slot that was never written gives NaN
            layer.k.fill_(torch.nan), layer.v.fill_(torch.nan)
        return ModelRunner(self.model, kv, max_num_seqs=ROWS, max_model_len=LENGTH, eos_token_ids=(3,))

    def planner(self, block_size: int = 4, seed: int = 0) -> Planner:
        blocks = list(range(1, NUM_BLOCKS))
        random.Random(seed).shuffle(blocks)
        return Planner(block_size, blocks, tuple(g.window for g in kv_groups(self.model.spec)))


@pytest.fixture(scope="module", autouse=True)
def steps_of_both_kinds():
    """Short steps in which the last layer computes all tokens, and longer ones in which it computes last tokens only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MIN_SKIPPED_TOKENS", 6)
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["full attention", "two KV groups"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("plain"), False)


def take(result: StepResult, plan: Any, by_name: dict[str, Sequence]) -> None:
    assert result.error is None and len(result.token_ids) == len(plan.sample_ids)
    for name, tokens in zip(plan.sample_ids, result.token_ids, strict=True):
        by_name[name].outputs += tokens


def run(
    runner: ModelRunner,
    planner: Planner,
    sequences: list[Sequence],
    rng: random.Random,
    depth: int = 0,
    drop_after: int = -1,
    most: int = 100,
) -> list[StepResult]:
    """Random batches, order and chunks until all are done; results are waited for `depth` steps late."""
    by_name, flying, results = {s.name: s for s in sequences}, [], []
    for step in range(10_000):
        ready = [s for s in sequences if s.left]
        if step == drop_after:  # the row table is a cache: a sequence that is admitted again continues
            while flying:
                plan, pending = flying.pop(0)
                results.append(pending.wait())
                take(results[-1], plan, by_name)
            runner.drop_rows()
            for s in sequences:
                s.admitted = False
        if ready:
            some = rng.sample(ready, rng.randint(1, len(ready)))
            plan = planner.plan([(s, rng.randint(1, min(s.left, most))) for s in some])
            flying.append((plan, runner.sample(runner.launch(plan))))
        while flying and (len(flying) > depth or not ready):
            plan, pending = flying.pop(0)
            results.append(pending.wait())
            take(results[-1], plan, by_name)
        if not ready and not flying:
            return results
    raise AssertionError("the planner never ended")


def sequences_of(tiny: Tiny, params: SamplingParams = GREEDY, rows: list[int] | None = None) -> list[Sequence]:
    rows = rows or list(range(len(tiny.prompts)))
    return [Sequence(f"s{i}", rows[i], p, TOKENS, params, seed=i) for i, p in enumerate(tiny.prompts)]


def run_from_one_prefix(runner: ModelRunner, tiny: Tiny) -> list[Sequence]:
    """Four sequences whose first 16 tokens are in the same blocks of 4: a prefix cache would find these."""
    planner, prefix = tiny.planner(4), tiny.prompts[2][:18]
    first = Sequence("first", 0, prefix[:16], 1)
    run(runner, planner, [first], random.Random(0))
    sequences = [Sequence(f"s{i}", i, (*prefix, *own), TOKENS) for i, own in enumerate([(), (5, 6), (7,), (8, 9, 10)])]
    for s in sequences:
        s.blocks, s.num_planned = [first.blocks[0][:4]], 16
    run(runner, planner, sequences, random.Random(1), depth=1)
    return sequences


# --- tokens --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 3, 4, 16]),
    st.integers(0, 3),
    st.sampled_from([-1, 3, 7]),
    st.sampled_from([2, 7, 100]),
)
@settings(max_examples=15, deadline=None)
def test_greedy_tokens_equal_transformers_for_any_mix_chunking_block_size_and_planning_depth(
    tiny, seed, block_size, depth, drop_after, most
):
    rng = random.Random(seed)
    sequences = sequences_of(tiny, rows=rng.sample(range(ROWS), len(tiny.prompts)))
    run(tiny.runner(block_size), tiny.planner(block_size, seed), sequences, rng, depth, drop_after, most)
    assert [s.outputs for s in sequences] == tiny.expected


@given(st.integers(0, 10**6), st.integers(0, 2), st.sampled_from([-1, 4]))
@settings(max_examples=8, deadline=None)
def test_seeded_samples_do_not_depend_on_the_plan(plain, seed, depth, drop_after):
    params = SamplingParams(
        temperature=0.8,
        top_p=0.95,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        min_tokens=4,
        logit_bias={5: 1.5},
        bad_words_token_ids=((6,), (7, 8)),
        ignore_eos=True,
    )
    alone = []
    for s in sequences_of(plain, params):
        run(plain.runner(), plain.planner(), [s], random.Random(0))
        alone.append(s.outputs)
    together = sequences_of(plain, params)
    run(plain.runner(), plain.planner(seed=seed), together, random.Random(seed), depth, drop_after)
    assert [s.outputs for s in together] == alone


def test_more_samples_than_logits_rows_are_computed_in_parts(plain, monkeypatch):
    expected = sequences_of(plain, SamplingParams(logprobs=2, temperature=0.9))
    whole = run(plain.runner(), plain.planner(), expected, random.Random(5))
    monkeypatch.setattr(model_runner, "MAX_LOGITS_ROWS", 2)
    parts = sequences_of(plain, SamplingParams(logprobs=2, temperature=0.9))
    held = []
    original = plain.model.logits
    monkeypatch.setattr(plain.model, "logits", lambda hidden, **how: held.append(len(hidden)) or original(hidden, **how))
    assert [r.token_ids for r in run(plain.runner(), plain.planner(), parts, random.Random(5))] == [
        r.token_ids for r in whole
    ]
    assert max(held) == 2


def test_children_sample_their_own_tokens_from_the_prompts_last_logits_row(plain):
    runner, planner = plain.runner(), plain.planner()
    parent = Sequence("p", 0, plain.prompts[2], TOKENS, SamplingParams(temperature=3.0), seed=9)
    plan = planner.plan([(parent, parent.left)])
    children = tuple(replace(planner.admission(parent), row=c, request_id=f"p#{c}", child_index=c) for c in range(1, 4))
    plan = replace(
        plan,
        admitted=(*plan.admitted, *children),
        sample_from=(0,) * 4,
        sample_rows=(0, 1, 2, 3),
        sample_ids=("p", "p#1", "p#2", "p#3"),
    )
    tokens = runner.sample(runner.launch(plan)).wait().token_ids
    assert len(set(tokens)) > 1
    again = plain.runner()
    assert again.sample(again.launch(plan)).wait().token_ids == tokens
    assert [runner.rows.tokens[c, len(parent.prompt)].item() for c in range(4)] == [t for (t,) in tokens]


# --- log-probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_once", [256, 3])
def test_logprobs_and_prompt_logprobs_equal_log_softmax_of_transformers(plain, monkeypatch, rows_at_once):
    monkeypatch.setattr(model_runner, "MAX_LOGITS_ROWS", rows_at_once)
    params = SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2)
    sequences = sequences_of(plain, params)
    for s in sequences:
        s.owed_from = 0 if s.name != "s4" else 6  # as after a preemption: the first ones were told already
    sequences[1].params, sequences[1].owed_from = GREEDY, None
    names, results, seen = {s.name: s for s in sequences}, [], {s.name: {} for s in sequences}
    runner, planner, rng = plain.runner(), plain.planner(), random.Random(1)
    while ready := [s for s in sequences if s.left]:
        plan = planner.plan(
            [(s, rng.randint(1, min(s.left, 9))) for s in rng.sample(ready, rng.randint(1, len(ready)))]
        )
        result = runner.sample(runner.launch(plan)).wait()
        take(result, plan, names)
        results.append((plan, result))
        for column, first, entries in result.prompt_logprobs:
            for j, entry in enumerate(entries):
                assert first + j not in seen[plan.request_ids[column]]
                seen[plan.request_ids[column]][first + j] = entry
    reference = {
        s.name: torch.log_softmax(hf_logits(plain.hf, [*s.prompt, *s.outputs]).double(), -1) for s in sequences
    }
    for s in sequences:
        expected = [] if s.owed_from is None else range(max(1, s.owed_from), len(s.prompt))
        assert sorted(seen[s.name]) == list(expected)
        for position, entry in seen[s.name].items():
            check_entry(entry, reference[s.name][position - 1], s.prompt[position], 2)
    at = {s.name: len(s.prompt) for s in sequences}
    for plan, result in results:
        for i, name in enumerate(plan.sample_ids):
            if names[name].params.logprobs is None:
                assert not result.logprobs or result.logprobs[i] is None
            else:
                (entry,) = result.logprobs[i]
                check_entry(entry, reference[name][at[name] - 1], result.token_ids[i][0], 3)
            at[name] += 1


def check_entry(entry, reference: torch.Tensor, token: int, k: int) -> None:
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(reference[token].item(), abs=1e-3)
    assert entry.rank == 1 + int((reference > reference[token] + 1e-9).sum())
    assert list(entry.top_ids) == reference.topk(k).indices.tolist()
    assert list(entry.top_logprobs) == pytest.approx(reference.topk(k).values.tolist(), abs=1e-3)


# --- blocks --------------------------------------------------------------------------------------------------------


def test_a_fork_that_copies_its_last_block_does_not_change_the_other_sequence(plain):
    """Two rows share the prompt's blocks; the second gets its own copy of the partly filled last one before it writes."""
    runner, planner = plain.runner(), plain.planner()
    first = Sequence("a", 0, plain.prompts[1], TOKENS)  # 5 tokens: the second block of 4 is partly filled
    second = Sequence("b", 1, plain.prompts[1], TOKENS)
    plan = planner.plan([(first, first.left)])
    second.blocks, second.num_planned, second.num_sampled, second.admitted = [list(first.blocks[0])], 5, 1, True
    fork = replace(planner.admission(second), token_ids=plain.prompts[1])
    plan = replace(plan, admitted=(*plan.admitted, fork), sample_from=(0, 0), sample_rows=(0, 1), sample_ids=("a", "b"))
    take(runner.sample(runner.launch(plan)).wait(), plan, {"a": first, "b": second})
    own = planner.free.popleft()
    copy = BlockCopy(src=second.blocks[0][1], dst=own, row=1, group=0, index=1)
    second.blocks[0][1] = own
    run_plan = planner.plan([(second, 1), (first, 1)], copies=(copy,))
    take(runner.sample(runner.launch(run_plan)).wait(), run_plan, {"a": first, "b": second})
    run(runner, planner, [first, second], random.Random(0))
    assert first.outputs == second.outputs == plain.expected[1]
    shared, mine = runner.kv.layers[0].k[first.blocks[0][1]], runner.kv.layers[0].k[own]
    assert torch.equal(shared, mine)


def test_a_sequence_continues_after_its_blocks_were_swapped_out_and_in(plain):
    runner, planner = plain.runner(host_blocks=20), plain.planner()
    s = Sequence("a", 2, plain.prompts[2], TOKENS)
    for count in (23, 1, 1):
        plan = planner.plan([(s, count)])
        take(runner.sample(runner.launch(plan)).wait(), plan, {"a": s})
    old = s.blocks[0]
    out = tuple(BlockMove(i, device, 1 + i) for i, device in enumerate(old))
    result = runner.sample(runner.launch(planner.plan([], moves_out=out))).wait()  # a plan of moves alone
    assert result.finished_moves == tuple(range(len(old))) and result.token_ids == () and result.error is None
    for layer in runner.kv.layers:
        layer.k.fill_(torch.nan), layer.v.fill_(torch.nan)
    new = [planner.free.popleft() for _ in old]
    back = tuple(BlockMove(50 + i, device, 1 + i) for i, device in enumerate(new))
    assert runner.sample(runner.launch(planner.plan([], moves_in=back))).wait().finished_moves == tuple(
        range(50, 50 + len(new))
    )
    s.blocks, s.row, s.admitted = [new], 5, False
    run(runner, planner, [s], random.Random(0))
    assert s.outputs == plain.expected[2]


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "logits"])
def test_out_of_memory_fails_only_its_own_step(plain, monkeypatch, where):
    runner, planner = plain.runner(), plain.planner()
    victim, others = Sequence("v", 5, plain.prompts[1], TOKENS), sequences_of(plain)[:3]
    by_name = {s.name: s for s in others}
    for s in others:
        plan = planner.plan([(s, s.left)])
        take(runner.sample(runner.launch(plan)).wait(), plan, by_name)
    with monkeypatch.context() as broken:
        broken.setattr(
            plain.model, where, failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"))
        )
        failed = runner.sample(runner.launch(planner.plan([(victim, victim.left)]))).wait()
    assert failed.error is not None and "out of memory" in failed.error and failed.token_ids == ()
    run(runner, planner, others, random.Random(0))
    assert [s.outputs for s in others] == plain.expected[:3]


def test_a_lost_device_raises_instead_of_failing_the_step(plain, monkeypatch):
    runner, planner = plain.runner(), plain.planner()
    monkeypatch.setattr(
        plain.model, "forward", failing(RuntimeError("CUDA error: an illegal memory access was encountered"))
    )
    with pytest.raises(RuntimeError, match="illegal memory"):
        runner.launch(planner.plan([(Sequence("v", 5, plain.prompts[1], TOKENS), 5)]))


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def test_grammar_masks_apply_to_their_own_samples(plain, monkeypatch):
    monkeypatch.setattr(model_runner, "MAX_LOGITS_ROWS", 2)
    runner, planner = plain.runner(), plain.planner()
    plan = planner.plan([(s, s.left) for s in sequences_of(plain)])
    only_40 = np.zeros((1, 4), np.int32)
    only_40[0, 40 // 32] = 1 << (40 % 32)
    tokens = runner.sample(runner.launch(plan), masks=TokenMasks(np.array([3]), only_40)).wait().token_ids
    assert [t for (t,) in tokens] == [*[e[0] for e in plain.expected[:3]], 40, plain.expected[4][0]]
