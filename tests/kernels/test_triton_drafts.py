"""The Triton kernels for drafts against the reference, and n-gram lookup against the index of the host: equal results."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels import tuning
from minivllm.kernels.reference import drafts as reference
from minivllm.speculative.ngram import NgramIndex

pytest.importorskip("triton", reason="Triton is not installed")

from minivllm.kernels.triton import drafts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, ROWS, BLOCKS, BLOCK_SIZE = 40, 5, 10, 4


def integers(low: int, high: int, *size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, size, dtype=dtype).to(DEVICE)


def equal(got: object, want: object) -> None:
    for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (a, b)


def index_drafts(text: list[int], low: int, high: int, count: int) -> list[int]:
    index = NgramIndex(low, high)
    index.extend(text)
    return list(index.propose(count)) or [-1] * count


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=LENGTH), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 3),
       st.integers(1, 8))
def test_the_reference_finds_the_drafts_of_the_index(texts: list[list[int]], low: int, more: int, count: int) -> None:
    table = torch.full((len(texts) + 1, LENGTH), 2, dtype=torch.int32)
    for row, text in enumerate(texts):
        table[row + 1, : len(text)] = torch.tensor(text, dtype=torch.int32)
    rows, lengths = torch.arange(len(texts)) + 1, torch.tensor([len(text) for text in texts])
    found = reference.find_ngrams(table, rows, lengths, low, low + more, count)
    assert found.tolist() == [index_drafts(text, low, low + more, count) for text in texts]


@pytest.mark.parametrize("block", [8, 64])
def test_the_kernel_finds_the_drafts_of_the_reference(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 positions: several per text, more than CANDIDATES occurrences, and matches in the last or in an earlier block."""
    monkeypatch.setattr(tuning, "NGRAM_BLOCK", block)
    torch.manual_seed(block)
    for low, high, count, kinds in ((1, 1, 3, 3), (2, 4, 5, 2), (3, 3, 8, 2), (1, 6, 1, 4), (5, 5, 4, 50)):
        text, lengths = integers(0, kinds, 8, LENGTH, dtype=torch.int32), torch.tensor([0, 1, 2, 7, 30, 39, LENGTH]).to(DEVICE)
        rows = torch.tensor([7, 3, 2, 6, 0, 1, 4]).to(DEVICE)
        got = drafts.find_ngrams(text, rows, lengths, low, high, count)
        equal(got, reference.find_ngrams(text, rows, lengths, low, high, count))
        assert kinds == 50 or bool((got[3:] >= 0).any())


@pytest.mark.parametrize("width", [0, 1, 3])
def test_exact_steps_equal_the_reference(width: int) -> None:
    """width 0: a mixed step, in which only the last token of a sequence has a logits row. The last sequence is padding."""
    torch.manual_seed(width)
    counts = [width] * 4 if width else [5, 1, 3, 1]
    source = torch.arange(4).repeat_interleave(torch.tensor(counts)).to(DEVICE)
    tokens, samples = len(source), len(source) if width else 4
    is_token = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    is_token[-max(width, 1):] = is_token[1] = False
    lengths, null_index = integers(8, 12, ROWS), (ROWS - 1) * LENGTH + 1
    rows = torch.tensor([2, 0, 3, 4]).to(DEVICE)
    known_ends = lengths[rows] + torch.tensor([0, 3, 2, 0]).to(DEVICE)
    known_ends[3] = -1
    sample_index = integers(LENGTH, LENGTH * (ROWS - 1), samples)
    sample_index[-1] = null_index
    plan = reference.PlannedStep(
        rows, known_ends, integers(12, 30, 4, dtype=torch.int32), source, is_token, integers(4, 30, tokens),
        integers(4, 4 * LENGTH, tokens), sample_index, integers(-2**63, 2**63 - 1, samples))
    text, tables = integers(0, 300, ROWS, LENGTH, dtype=torch.int32), integers(1, 90, 2, ROWS, BLOCKS, dtype=torch.int32)
    args = (plan, text, lengths, tables, BLOCK_SIZE, null_index, width > 0)
    equal(drafts.exact_step(*args), reference.exact_step(*args))


@pytest.mark.parametrize("width", [1, 2, 6])
def test_acceptance_equals_the_reference(width: int) -> None:
    torch.manual_seed(width)
    rows, known_ends = torch.tensor([3, 1, 0, 4]).to(DEVICE), torch.tensor([5, -1, 7, 9]).to(DEVICE)
    starts = torch.tensor([10, 11, 5, 20]).to(DEVICE)
    index = (rows[:, None] * LENGTH + starts[:, None] + 1 + torch.arange(width, device=DEVICE)).view(-1)
    text = integers(0, 300, ROWS, LENGTH, dtype=torch.int32)
    sampled = text.view(-1)[index].long()
    sampled[width - 1] += 1
    if width > 2:
        sampled[width + 1] += 1
    has_draft = torch.ones(4 * (width - 1), dtype=torch.bool, device=DEVICE)
    has_draft[2 * (width - 1) :][: width // 2] = False
    results = []
    for module in (drafts, reference):
        changed, lengths = text.clone(), torch.arange(ROWS, device=DEVICE)
        kept, before = module.accept_drafts(changed, lengths, rows, known_ends, (starts + width).int(), index, sampled, has_draft)
        results.append((kept, before, changed, lengths))
    equal(*results)
    assert results[0][0].tolist() == [width, min(width, 2), 1, width]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_steps_of_single_tokens_equal_the_reference(count: int) -> None:
    table = integers(1, 90, 3, 4, dtype=torch.int32)
    args = (table, torch.tensor([0, 5, 14]).to(DEVICE), count, BLOCK_SIZE)
    got = drafts.single_tokens(*args)
    equal(got, reference.single_tokens(*args))
    assert count < 4 or (got[1][3, 2] == 1 and got[2][:, 2].tolist() == [15, 16, 16, 16])


def test_the_inputs_of_a_proposer_and_written_drafts_equal_the_reference() -> None:
    torch.manual_seed(0)
    text = integers(0, 300, ROWS, LENGTH, dtype=torch.int32)
    rows, source = torch.tensor([3, 4, 0]).to(DEVICE), torch.tensor([0, 0, 0, 1, 2, 2]).to(DEVICE)
    args = (text, rows, source, torch.tensor([3, 4, 5, LENGTH - 1, 0, 1]).to(DEVICE), torch.tensor([1, 3, 5]).to(DEVICE))
    got = drafts.proposer_inputs(*args)
    equal(got, reference.proposer_inputs(*args))
    written = torch.tensor([[7, 8, 9], [5, 6, 7], [4, -1, -1]]).to(DEVICE)
    tables = [text.clone(), text.clone()]
    for module, table in zip((drafts, reference), tables, strict=True):
        module.write_drafts(table, rows, torch.tensor([5, -1, 4]).to(DEVICE), torch.tensor([LENGTH - 2, 3, 6]).to(DEVICE), written, LENGTH)
    tables[1][-1, 1] = tables[0][-1, 1]  # the place that nothing reads
    equal(*tables)
    assert tables[0][3, -2:].tolist() == [7, 8] and (tables[0] != text).sum() <= 3
