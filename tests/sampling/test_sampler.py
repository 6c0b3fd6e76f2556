"""The sampler on whole batches: the parameters of each row apply, and no row changes the tokens of another row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.core.plan import RowAdmission
from minivllm.kernels import REFERENCE
from minivllm.sampling.logits_processors import PenaltyCounts, TokenMasks
from minivllm.sampling.sampler import Sampler
from minivllm.sampling_params import SamplingParams

VOCAB, EOS = 37, 2
CPU = torch.device("cpu")


class Bench:
    """A sampler with its token table."""

    def __init__(self, num_rows: int = 8, vocab: int = VOCAB) -> None:
        self.sampler = Sampler(num_rows, vocab, CPU, eos_token_ids=(EOS,))
        self.tokens = torch.zeros(num_rows, 64, dtype=torch.int32)

    def admit(
        self,
        row: int,
        params: SamplingParams,
        tokens: tuple[int, ...] = (5, 6, 7),
        prompt: int = 3,
        seed: int = 0,
        child: int = 0,
    ) -> None:
        self.tokens[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.sampler.admit(
            RowAdmission(
                row=row,
                request_id=f"r{row}",
                token_ids=tokens,
                num_prompt_tokens=prompt,
                block_ids=((1,),),
                params=params,
                seed=seed,
                child_index=child,
            )
        )

    def sample(self, logits: torch.Tensor, rows: list[int], positions: list[int], masks=None):
        sampled_tokens = self.sampler.sample(logits.clone(), np.array(rows), np.array(positions), self.tokens, masks)
        for row, position, token in zip(rows, positions, sampled_tokens.token_ids.tolist(), strict=True):
            self.tokens[row, position] = token
        return sampled_tokens

    def one(self, logits: torch.Tensor, row: int = 0, position: int = 3) -> int:
        return int(self.sample(logits[None], [row], [position]).token_ids[0])


def greedy(**kwargs) -> SamplingParams:
    return SamplingParams(temperature=0, **kwargs)


def ranked(*ids: int) -> torch.Tensor:
    """Logits whose order from the top is `ids`, then the rest."""
    logits = torch.full((VOCAB,), -5.0)
    for i, token in enumerate(ids):
        logits[token] = 10.0 - i
    return logits


# --- rows do not influence each other -------------------------------------------------------------------------------

any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.8, 0.1]),
    min_p=st.sampled_from([0.0, 0.2]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    min_tokens=st.sampled_from([0, 2]),
    logprobs=st.sampled_from([None, 0, 3]),
    logit_bias=st.sampled_from([None, {4: 8.0, EOS: 3.0}]),
    allowed_token_ids=st.sampled_from([None, [2, 4, 6, 8, 10]]),
    bad_words_token_ids=st.sampled_from([(), ((4,), (6, 8)), ((4, 4),)]),
)


def run(members: list[tuple[int, SamplingParams]], rows: list[int], logits: torch.Tensor, steps: int, wide: int = 100):
    """Sample `steps` tokens for each member (id, params) in its row -> id: its tokens and logprobs."""
    bench = Bench()
    bench.sampler.wide_rows = wide
    for (member, params), row in zip(members, rows, strict=True):
        bench.admit(row, params, tokens=(5, 6, 7, 8, 9, 10)[: 1 + member], prompt=1 + member, seed=member)
    history = {member: [] for member, _ in members}
    for step in range(steps):
        positions = [1 + member + step for member, _ in members]
        sampled_tokens = bench.sample(torch.stack([logits[step, member] for member, _ in members]), rows, positions)
        entries = {}
        if sampled_tokens.logprobs:
            entries = dict(
                zip(sampled_tokens.logprobs.index.tolist(), sampled_tokens.logprobs.entries(sampled_tokens.logprobs.tensors()), strict=True)
            )
        for i, (member, _) in enumerate(members):
            history[member].append((int(sampled_tokens.token_ids[i]), entries.get(i)))
    return history


wide_rows = st.sampled_from([1, 2, 100])  # logits rows that are copied to float32 at a time


@given(st.lists(any_params, min_size=2, max_size=6), st.randoms(use_true_random=False), wide_rows)
@settings(max_examples=60, deadline=None)
def test_a_request_gets_the_same_tokens_alone_and_in_any_batch_order_and_row(params, random, wide):
    members = list(enumerate(params))
    logits = torch.randn(4, len(members), VOCAB, generator=torch.Generator().manual_seed(random.randrange(10**6))) * 3
    together = run(members, list(range(len(members))), logits, 4, wide)
    shuffled = random.sample(members, len(members))
    assert run(shuffled, random.sample(range(8), len(members)), logits, 4) == together
    for member in members:
        assert run([member], [random.randrange(8)], logits, 4)[member[0]] == together[member[0]]


@given(any_params, st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_row_admitted_again_with_its_tokens_continues_with_the_same_tokens(params, dropped_after):
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    steady, dropped = Bench(), Bench()
    steady.admit(0, params, seed=3)
    dropped.admit(0, params, seed=3)
    for step in range(8):
        if step == dropped_after:
            known = tuple(dropped.tokens[0, : 3 + step].tolist())
            dropped = Bench()
            dropped.admit(
                6, greedy(repetition_penalty=3.0, logit_bias={4: 100}, min_tokens=16, logprobs=2)
            )  # an earlier request in the same row
            dropped.admit(6, params, tokens=known, seed=3)
        row = 6 if step >= dropped_after else 0
        assert dropped.one(logits[step], row, 3 + step) == steady.one(logits[step], 0, 3 + step)


# --- several logits rows per sequence: a new token and its drafts ---------------------------------------------------


@st.composite
def verification_steps(draw):
    """Per sequence: parameters, output tokens so far, number of drafts, and how many of the first drafts are right."""
    return [(draw(any_params), draw(st.lists(st.integers(0, VOCAB - 1), max_size=3)), draw(st.integers(0, 5)), draw(st.integers(0, 5)))
            for _ in range(draw(st.integers(1, 4)))]


@given(verification_steps(), st.integers(0, 10**6), wide_rows)
@settings(max_examples=150, deadline=None)
def test_logits_rows_after_drafts_are_sampled_as_in_plain_decoding_and_only_accepted_tokens_are_counted(sequences, seed, wide):
    generator = torch.Generator().manual_seed(seed)
    together, plain = Bench(), Bench()
    rows, positions, logits, drafts_of = [], [], [], []
    for row, (params, outputs, num_drafts, num_right) in enumerate(sequences):
        known = (5, 6, 7, *outputs)
        own_logits = torch.randn(1 + num_drafts, VOCAB, generator=generator) * 2
        drafts = draft_tokens(own_logits, params, known, row, num_drafts, num_right, generator)
        together.admit(row, params, known, seed=row)
        together.tokens[row, len(known) : len(known) + num_drafts] = torch.tensor(drafts, dtype=torch.int32)
        rows += [row] * len(own_logits)
        positions += range(len(known), len(known) + len(own_logits))
        logits += own_logits
        drafts_of.append(drafts)
    together.sampler.wide_rows = wide
    sampled_tokens = together.sampler.sample(torch.stack(logits), np.array(rows), np.array(positions), together.tokens)
    entries = iter(sampled_tokens.logprobs.entries(sampled_tokens.logprobs.tensors()) if sampled_tokens.logprobs else ())
    sampled, expected = iter(sampled_tokens.token_ids.tolist()), iter(logits)
    for row, ((params, outputs, _, _), drafts) in enumerate(zip(sequences, drafts_of, strict=True)):
        known, accepted = [5, 6, 7, *outputs], []
        for j in range(1 + len(drafts)):  # plain decoding, with the drafts before each token as output
            plain.admit(row, params, (*known, *drafts[:j]), seed=row)
            alone = plain.sample(next(expected)[None], [row], [len(known) + j])
            token = next(sampled)
            assert token == int(alone.token_ids[0])
            if alone.logprobs:
                assert next(entries) == alone.logprobs.entries(alone.logprobs.tensors())[0]
            if drafts[:j] == accepted[:j]:
                accepted.append(token)
        plain.admit(row, params, (*known, *accepted), seed=row)
        together.tokens[row, : len(known) + len(accepted)] = torch.tensor([*known, *accepted], dtype=torch.int32)
        following = torch.randn(VOCAB, generator=generator)
        position = len(known) + len(accepted)
        assert together.one(following, row, position) == plain.one(following, row, position), "the same tokens are counted"


def draft_tokens(logits, params, known, seed, num_drafts, num_right, generator):
    """`num_drafts` tokens, of which the first `num_right` are those that plain decoding samples."""
    bench, drafts = Bench(), []
    bench.admit(0, params, known, seed=seed)
    for j in range(num_drafts):
        token = bench.one(logits[j], 0, len(known) + j)
        drafts.append(token if j < num_right else int(torch.randint(VOCAB, (1,), generator=generator)))
    return drafts


def test_penalties_count_the_drafts_before_a_logits_row_and_no_rejected_token():
    bench = Bench()
    bench.admit(0, greedy(frequency_penalty=1.5))
    level = ranked(9, 8)  # 9 by a margin of 1
    bench.tokens[0, 3:5] = torch.tensor([9, 20])
    sampled_tokens = bench.sampler.sample(level.repeat(3, 1), np.array([0, 0, 0]), np.array([3, 4, 5]), bench.tokens)
    assert sampled_tokens.token_ids.tolist() == [9, 8, 8]  # the draft 20 is rejected, so the token after it is dropped
    bench.tokens[0, 3:5] = torch.tensor([9, 8])
    assert [bench.one(level, position=5 + s) for s in range(3)] == [9, 8, 9]


def test_minimum_length_and_bad_words_count_drafts_as_output():
    bench = Bench()
    bench.admit(0, greedy(min_tokens=2, bad_words_token_ids=((11, 12),)))
    bench.tokens[0, 3:5] = torch.tensor([11, 12])
    sampled_tokens = bench.sampler.sample(ranked(EOS, 12, 8).repeat(3, 1), np.array([0, 0, 0]), np.array([3, 4, 5]), bench.tokens)
    assert sampled_tokens.token_ids.tolist() == [12, 8, EOS]


def test_children_of_one_request_get_different_tokens_and_the_same_seed_repeats_them():
    bench = Bench()
    for child in range(8):
        bench.admit(child, SamplingParams(n=8, temperature=1.0), seed=77, child=child)
    flat = torch.zeros(8, VOCAB)
    first = [bench.sample(flat, list(range(8)), [3 + s] * 8).token_ids.tolist() for s in range(6)]
    again = [bench.sample(flat, list(range(8)), [3 + s] * 8).token_ids.tolist() for s in range(6)]
    assert first == again
    assert len({tuple(column) for column in zip(*first, strict=True)}) == 8


# --- parameters ----------------------------------------------------------------------------------------------------


def test_greedy_rows_ignore_filters_and_noise():
    bench = Bench()
    bench.admit(0, greedy(top_k=5, top_p=0.5, min_p=0.5, seed=1))
    bench.admit(1, SamplingParams(temperature=1.0, top_k=1))
    logits = torch.randn(2, VOCAB)
    assert bench.sample(logits, [0, 1], [3, 3]).token_ids.tolist() == logits.argmax(-1).tolist()


def test_a_temperature_near_zero_is_the_argmax():
    bench = Bench()
    bench.admit(0, SamplingParams(temperature=2e-5))
    for step in range(20):
        assert bench.one(ranked(9, 8), position=3 + step) == 9


def test_bias_is_added_and_can_ban_or_force():
    bench = Bench()
    bench.admit(0, greedy(logit_bias={9: -100, 30: 3.5}))
    assert bench.one(ranked(9, 8)) == 8
    bench.admit(0, greedy(logit_bias={30: 100}))
    assert bench.one(ranked(9, 8)) == 30


def test_only_allowed_tokens_are_sampled():
    bench = Bench()
    bench.admit(0, SamplingParams(temperature=50.0, allowed_token_ids=[3, 17]))
    assert {bench.one(torch.randn(VOCAB), position=3 + s) for s in range(40)} == {3, 17}


def test_stop_tokens_are_banned_until_min_tokens_are_output():
    bench = Bench()
    bench.admit(0, greedy(min_tokens=2, stop_token_ids=[9]))
    assert [bench.one(ranked(EOS, 9, 8), position=p) for p in (3, 4, 5)] == [8, 8, EOS]


def test_min_tokens_counts_outputs_across_a_preemption():
    bench = Bench()
    bench.admit(0, greedy(min_tokens=2), tokens=(5, 6, 7, 8), prompt=3)  # one output token so far
    assert [bench.one(ranked(EOS, 8), position=p) for p in (4, 5)] == [8, EOS]


def test_the_last_token_of_a_bad_word_is_banned_after_its_other_tokens():
    bench = Bench()
    bench.admit(0, greedy(bad_words_token_ids=((11, 12, 13), (14,), (12, 20))))
    want = [(14, 10), (11,), (12,), (13, 15), (13,), (12,), (20, 13), (13,)]
    got = [bench.one(ranked(*ids), position=3 + s) for s, ids in enumerate(want)]
    #      14 is banned; 11 12 are free; 13 would complete 11 12 13; now 13 is free; 12; 20 would complete 12 20; 13 is free
    assert got == [10, 11, 12, 15, 13, 12, 13, 13]


def test_bad_words_apply_to_the_output_only():
    bench = Bench()
    bench.admit(0, greedy(bad_words_token_ids=((7, 9),)))  # the prompt ends with 7
    assert bench.one(ranked(9, 8)) == 9
    assert bench.one(ranked(7, 8), position=4) == 7
    assert bench.one(ranked(9, 8), position=5) == 8


def test_grammar_masks_allow_exactly_the_tokens_whose_bits_are_set():
    bench = Bench()
    bench.admit(0, greedy())
    bench.admit(1, greedy(logprobs=1))
    words = np.zeros(2, np.uint32)
    words[0] = 1 << 31 | 1 << 4
    words[1] = 1 << 3  # token 35
    logits = torch.stack([ranked(9, 8), ranked(9, 31, 35)])
    sampled_tokens = bench.sample(logits, [0, 1], [3, 3], masks=TokenMasks(np.array([1]), words.view(np.int32)[None]))
    assert sampled_tokens.token_ids.tolist() == [9, 31]
    assert sampled_tokens.logprobs.entries(sampled_tokens.logprobs.tensors())[0].top_ids == (9,)  # logprobs are of the raw distribution


def test_tokens_beyond_a_mask_are_not_allowed_if_all_or_some_rows_have_masks():
    for index in ([0, 1, 2], [0, 2]):
        logits = torch.zeros(3, VOCAB)
        words = np.full((len(index), 1), -1, np.int32)  # the first 32 tokens
        TokenMasks(np.array(index), words).apply(logits)
        allowed = torch.isfinite(logits)
        assert [int(row.sum()) for row in allowed] == [32 if i in index else VOCAB for i in range(3)]
        assert allowed[:, :32].all()


def test_filters_apply_after_penalties_and_bias():
    bench = Bench()
    bench.admit(0, SamplingParams(temperature=1.0, top_k=1, logit_bias={8: 5.0}))
    assert bench.one(ranked(9, 8)) == 8


# --- penalties -----------------------------------------------------------------------------------------------------


def test_penalties_count_output_tokens_and_only_repetition_counts_the_prompt():
    bench = Bench()
    level = torch.zeros(VOCAB)
    level[[5, 20, 21]] = torch.tensor([1.0, 0.9, 0.8])  # 5 is in the prompt
    bench.admit(0, greedy(presence_penalty=0.15))
    assert [bench.one(level, position=3 + s) for s in range(5)] == [5, 20, 5, 5, 5]
    bench.admit(0, greedy(frequency_penalty=0.15))
    assert [bench.one(level, position=3 + s) for s in range(5)] == [5, 20, 5, 21, 20]
    bench.admit(0, greedy(repetition_penalty=1.2))
    assert [bench.one(level, position=3 + s) for s in range(2)] == [20, 5]


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_equals_huggingfaces_processor_over_a_whole_generation(penalty):
    transformers = pytest.importorskip("transformers")
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    bench, history = Bench(), [5, 6, 7]
    bench.admit(0, greedy(repetition_penalty=penalty))
    generator = torch.Generator().manual_seed(4)
    for _ in range(25):
        logits = torch.randn(VOCAB, generator=generator)
        expected = int(processor(torch.tensor([history]), logits[None].clone()).argmax())
        assert bench.one(logits, position=len(history)) == expected
        history.append(expected)


def test_counts_are_allocated_once_and_a_row_starts_with_empty_ones():
    counts = PenaltyCounts(4, VOCAB, CPU)
    before = counts.counts.data_ptr(), counts.seen.data_ptr()
    assert counts.counts.nbytes + counts.seen.nbytes == PenaltyCounts.num_bytes(4, VOCAB)
    for turn in range(20):
        counts.admit(turn % 4, True, (1, 2, 3, 3 + turn), 2)
        assert counts.counts[turn % 4].nonzero().flatten().tolist() == sorted({3, 3 + turn})
        assert counts.seen[turn % 4].nonzero().flatten().tolist() == sorted({1, 2, 3, 3 + turn})
        counts.admit((turn + 1) % 4, False, (1, 2), 2)
        assert counts.penalized[turn % 4] and not counts.penalized[(turn + 1) % 4]
    assert (counts.counts.data_ptr(), counts.seen.data_ptr()) == before


# --- log-probabilities ---------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_model_before_bias_penalties_and_temperature():
    bench = Bench()
    params = SamplingParams(temperature=0.1, logprobs=2, logit_bias={30: 100}, repetition_penalty=1.5)
    bench.admit(0, params)
    bench.admit(1, replace(params, logprobs=None))
    bench.admit(2, replace(params, logprobs=0))
    logits = torch.randn(3, VOCAB)
    sampled_tokens = bench.sample(logits, [0, 1, 2], [3, 3, 3])
    assert sampled_tokens.token_ids.tolist() == [30, 30, 30]
    assert sampled_tokens.logprobs.index.tolist() == [0, 2]
    reference = torch.log_softmax(logits.double(), -1)
    for i, k, entry in zip((0, 2), (2, 0), sampled_tokens.logprobs.entries(sampled_tokens.logprobs.tensors()), strict=True):
        assert entry.token_id == 30 and entry.logprob == pytest.approx(reference[i, 30].item(), abs=1e-5)
        assert entry.rank == 1 + int((logits[i] > logits[i, 30]).sum())
        assert list(entry.top_ids) == reference[i].topk(k).indices.tolist()
        assert list(entry.top_logprobs) == pytest.approx(reference[i].topk(k).values.tolist(), abs=1e-5)


def test_tokens_of_many_requests_follow_the_softmax():
    """Seeds 0..n-1, one token each: tokens of different requests are independent (chi-square, 5 degrees of freedom)."""
    n, logits = 3_000, torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -math.inf, 0.2])
    sampler, table = Sampler(n, 7, CPU), torch.zeros(n, 4, dtype=torch.int32)
    for row in range(n):
        sampler.admit(RowAdmission(row, str(row), (1,), 1, ((1,),), SamplingParams(), row, 0))
    tokens = sampler.sample(logits.repeat(n, 1), np.arange(n), np.ones(n, np.int64), table).token_ids
    counts = np.bincount(tokens.numpy(), minlength=7)
    alive = [0, 1, 2, 3, 4, 6]
    expected = n * torch.softmax(logits.double(), -1).numpy()[alive]
    assert counts[5] == 0 and ((counts[alive] - expected) ** 2 / expected).sum() < 20.5  # 99.9%


def test_plain_rows_get_the_same_tokens_beside_rows_that_need_float32():
    """Alone, plain rows are sampled in bfloat16. Beside rows with penalties or a bias, they are converted to float32."""
    rng = torch.Generator().manual_seed(5)
    logits = (torch.randn(4, VOCAB, generator=rng) * 0.02 + 3).to(torch.bfloat16)  # few distinct values: many ties
    plain = [greedy(), SamplingParams(temperature=0.8, top_p=0.9)]
    demanding = [greedy(frequency_penalty=0.5, logprobs=2), SamplingParams(logit_bias={7: 50.0}, temperature=0.5)]
    both, alone = Bench(), Bench()
    for row, params in enumerate([*plain, *demanding]):
        both.admit(row, params, seed=row)
        alone.admit(row, params, seed=row)
    for position in range(3, 9):
        together = both.sample(logits, [0, 1, 2, 3], [position] * 4)
        assert alone.sample(logits[:2], [0, 1], [position] * 2).token_ids.tolist() == together.token_ids.tolist()[:2]
        assert together.token_ids[3] == 7
        assert together.logprobs.logprob.dtype == torch.float32
    exact = torch.log_softmax(logits[2].double(), -1)
    assert together.logprobs.logprob[0].item() == pytest.approx(exact[together.token_ids[2]].item(), abs=1e-5)
    words = np.full((VOCAB + 31) // 32, 0, np.uint32)
    words[0] = 1 << 20
    assert both.sample(logits[:1], [0], [9], masks=TokenMasks(np.array([0]), words.view(np.int32)[None])).token_ids.tolist() == [20]


def test_greedy_and_random_rows_are_sampled_in_one_call_of_the_models_kernel():
    calls = []

    def choose(logits, temperature, keys, top_k=None, top_p=None, min_p=None):
        calls.append((temperature.tolist(), top_k is None, top_p is None, min_p is None))
        return REFERENCE.sample(logits, temperature, keys, top_k, top_p, min_p)

    sampler = Sampler(4, VOCAB, CPU, ops=replace(REFERENCE, sample=choose))
    for row, params in enumerate([greedy(top_p=0.5), SamplingParams(), greedy(), SamplingParams(temperature=2.0, top_k=3)]):
        sampler.admit(RowAdmission(row, str(row), (1,), 1, ((1,),), params, row, 0))
    table, logits = torch.zeros(4, 8, dtype=torch.int32), torch.randn(4, VOCAB)
    sampler.sample(logits, np.arange(4), np.ones(4, np.int64), table)
    tokens = sampler.sample(logits[[0, 2]], np.array([0, 2]), np.ones(2, np.int64), table).token_ids
    assert calls == [([0.0, 1.0, 0.0, 2.0], False, True, True), ([0.0, 0.0], True, True, True)]
    assert tokens.tolist() == logits[[0, 2]].argmax(-1).tolist()


def test_penalties_smaller_than_the_precision_of_bfloat16_apply():
    bench, logits = Bench(), torch.full((VOCAB,), -5.0)
    bench.admit(0, greedy(frequency_penalty=0.006))
    logits[[10, 20]] = torch.tensor([3.0, 2.984375])  # consecutive bfloat16 numbers
    assert [bench.one(logits.to(torch.bfloat16), position=3 + s) for s in range(4)] == [10, 10, 10, 20]


def test_rows_in_float32_are_bounded_and_rows_without_need_of_it_are_sampled_at_once():
    calls = []

    def choose(logits, *args):
        calls.append((logits.dtype, len(logits)))
        return REFERENCE.sample(logits, *args)

    bench, logits = Bench(), torch.randn(5, VOCAB).to(torch.bfloat16)
    bench.sampler._ops, bench.sampler.wide_rows = replace(REFERENCE, sample=choose), 2
    for row in range(5):
        bench.admit(row, SamplingParams(top_p=0.9, allowed_token_ids=[3, 4, 5, 6]), seed=row)
    bench.sample(logits, list(range(5)), [3] * 5)
    bench.admit(4, SamplingParams(logit_bias={7: 1.0}))
    bench.sample(logits, list(range(5)), [4] * 5)
    assert calls == [(torch.bfloat16, 5), (torch.bfloat16, 2), (torch.bfloat16, 2), (torch.float32, 1)]


def test_the_children_of_a_request_share_their_constraints() -> None:
    sampler = Sampler(4, VOCAB, CPU, eos_token_ids=(1,))
    params = SamplingParams(n=3, min_tokens=2, stop_token_ids=[2, 3], allowed_token_ids=[2, 4])
    for row in range(3):
        sampler.admit(RowAdmission(row, str(row), (1,), 1, ((1,),), params, 0, row))
    assert len({id(constraints) for constraints in sampler._constraints.values()}) == 1
    sampler.admit(RowAdmission(3, "other", (1,), 1, ((1,),), SamplingParams(allowed_token_ids=[5]), 0, 0))
    assert sampler._constraints[3].allowed is not None and sampler._constraints[3].allowed.tolist() == [5]
