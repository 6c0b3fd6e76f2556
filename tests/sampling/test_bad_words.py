"""Bad words: equal to a search of the whole output, whatever the batch, and nothing is rebuilt from step to step."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.core.plan import RowAdmission
from minivllm.sampling import bad_words
from minivllm.sampling.sampler import Sampler
from minivllm.sampling_params import SamplingParams

VOCAB, LONGEST, ROWS = 5, 40, 4
CPU = torch.device("cpu")
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
WORDS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6).map(tuple), max_size=6).map(tuple)


def banned(words: tuple[tuple[int, ...], ...], output: list[int]) -> set[int]:
    """The specification."""
    return {word[-1] for word in words if len(word) - 1 <= len(output) and tuple(output[len(output) - len(word) + 1:]) == word[:-1]}


def admit(sampler: Sampler, table: torch.Tensor, row: int, words: Any, tokens: list[int], prompt: int) -> None:
    table[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    params = SamplingParams(temperature=0, bad_words_token_ids=words)
    sampler.admit(RowAdmission(row, f"r{row}", tuple(tokens), prompt, ((),), params, 0, 0))


def bans(
    sampler: Sampler, table: torch.Tensor, rows: list[int], positions: list[int], dtype: torch.dtype = torch.float32,
) -> list[set[int]]:
    logits = torch.zeros(len(rows), VOCAB, dtype=dtype)
    sampler.sample(logits, np.array(rows), np.array(positions), table)
    return [set(torch.isinf(row).nonzero().flatten().tolist()) for row in logits]


@settings(max_examples=200)
@given(rows=st.lists(st.tuples(WORDS, TOKENS, st.integers(1, 30)), min_size=1, max_size=ROWS), drafts=st.integers(0, 3),
       half=st.booleans())
def test_exactly_the_last_tokens_of_words_are_banned(rows: list[tuple[Any, list[int], int]], drafts: int, half: bool) -> None:
    """Rows of any lengths, each with its own words, decoding with drafts; all rows are admitted with some output, as after a preemption."""
    sampler, table = Sampler(ROWS, VOCAB, CPU), torch.full((ROWS, LONGEST), 3, dtype=torch.int32)
    for row, (words, tokens, prompt) in enumerate(rows):
        admit(sampler, table, row, words, tokens, min(prompt, len(tokens)))
    found = bans(sampler, table, [r for r in range(len(rows)) for _ in range(1 + drafts)],
                 [len(tokens) + d for _, tokens, _ in rows for d in range(1 + drafts)], torch.bfloat16 if half else torch.float32)
    for i, ids in enumerate(found):
        words, tokens, prompt = rows[i // (1 + drafts)]
        output = table[i // (1 + drafts), min(prompt, len(tokens)): len(tokens) + i % (1 + drafts)].tolist()
        assert ids == banned(words, output)


@settings(max_examples=100)
@given(words=WORDS, output=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30))
def test_a_growing_output_is_searched_step_by_step_and_beside_changing_rows(words: Any, output: list[int]) -> None:
    sampler, table = Sampler(ROWS, VOCAB, CPU), torch.zeros((ROWS, LONGEST), dtype=torch.int32)
    admit(sampler, table, 2, words, [1, 1], 2)
    for step, token in enumerate(output):
        other = ((step % VOCAB, 0),)
        if step % 3 == 0:
            admit(sampler, table, 0, other, [1, step % VOCAB], 1)
        rows = [0, 2] if step % 2 else [2]
        assert bans(sampler, table, rows, [2] * (len(rows) - 1) + [2 + step])[-1] == banned(words, output[:step])
        table[2, 2 + step] = token


def test_words_that_are_longer_than_the_output_or_the_table_ban_nothing() -> None:
    sampler, table = Sampler(ROWS, VOCAB, CPU), torch.zeros((ROWS, LONGEST), dtype=torch.int32)
    admit(sampler, table, 0, ((0,) * 200, (1, 0)), [0, 0, 0], 1)
    assert bans(sampler, table, [0, 0], [3, LONGEST - 1]) == [set(), set()]


def test_nothing_is_rebuilt_while_the_batch_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    built, uploaded = [], []
    upload_pairs, upload = bad_words.BadWords._upload, bad_words.upload
    monkeypatch.setattr(bad_words.BadWords, "_upload", lambda *a: built.append(1) or upload_pairs(*a))
    monkeypatch.setattr(bad_words, "upload", lambda arrays, device: uploaded.append(sum(map(len, arrays))) or upload(arrays, device))
    words = tuple((i % VOCAB, i // VOCAB % VOCAB, i // VOCAB**2) for i in range(VOCAB**3))
    sampler, table = Sampler(ROWS, VOCAB, CPU), torch.zeros((ROWS, LONGEST), dtype=torch.int32)
    for row in range(ROWS):
        admit(sampler, table, row, words, [1, 1], 1)
    for step in range(20):
        bans(sampler, table, list(range(ROWS)), [2 + step] * ROWS)
    assert len(built) == 1 and uploaded[0] > len(words) and max(uploaded[1:]) <= 3 * ROWS
    admit(sampler, table, 0, (), [1, 1], 1)
    bans(sampler, table, list(range(ROWS)), [2] * ROWS)
    assert len(built) == 2, "a row without bad words is left out"
    assert bad_words.word_set(words) is bad_words.word_set(tuple(words)), "equal sets are prepared once"
