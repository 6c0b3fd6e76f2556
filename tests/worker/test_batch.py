"""The row table and the packer, against a naive version that handles one token at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivllm.core.plan import BlockCopy, RowAdmission, StepPlan
from minivllm.kernels import tuning
from minivllm.sampling_params import PoolingParams, SamplingParams
from minivllm.worker.batch import Packed, RowTable

CPU = torch.device("cpu")
LENGTH = 48  # max_model_len
ROWS = 8


@dataclass
class NaiveRow:
    tokens: list[int]
    tables: list[list[int]]
    num_prompt: int


def admission(
    row: int,
    tokens: list[int],
    tables: list[list[int]],
    num_prompt: int | None = None,
    owed: int | None = None,
    k: int = 0,
) -> RowAdmission:
    params = SamplingParams(prompt_logprobs=None if owed is None else k)
    return RowAdmission(
        row=row,
        request_id=f"r{row}",
        token_ids=tuple(tokens),
        num_prompt_tokens=len(tokens) if num_prompt is None else num_prompt,
        block_ids=tuple(tuple(t) for t in tables),
        params=params,
        seed=0,
        child_index=0,
        prompt_logprobs_from=owed,
    )


def plan(rows, starts, counts, samples=(), sample_rows=None, new_blocks=None, groups=1, **extra) -> StepPlan:
    n = len(rows)
    return StepPlan(
        step_id=0,
        request_ids=tuple(f"r{r}" for r in rows),
        rows=tuple(rows),
        starts=tuple(starts),
        num_tokens=tuple(counts),
        new_blocks=tuple(new_blocks) if new_blocks else (((),) * groups,) * n,
        drafts=((),) * n,
        sample_from=tuple(samples),
        sample_rows=tuple(sample_rows if sample_rows is not None else [rows[i] for i in samples]),
        sample_ids=tuple("x" for _ in samples),
        **extra,
    )


@st.composite
def situations(draw):
    """Rows with random tokens and blocks, and a plan over some of them in random order."""
    block_size, groups = draw(st.sampled_from([1, 3, 4, 16])), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    rows = draw(st.permutations(range(ROWS)))[: draw(st.integers(1, ROWS))]
    naive, columns = {}, []
    for row in rows:
        known = draw(st.integers(1, LENGTH - 1))
        start = draw(st.one_of(st.just(known - 1), st.integers(0, known - 1)))
        count = known - start if draw(st.booleans()) else draw(st.integers(1, known - start))
        tables = [rng.integers(1, 500, -(-known // block_size)).tolist() for _ in range(groups)]
        naive[row] = NaiveRow(rng.integers(0, 1000, known).tolist(), tables, draw(st.integers(1, known)))
        columns.append((row, start, count))
    return block_size, groups, naive, columns


def check_batch(
    packed: Packed, naive: dict[int, NaiveRow], columns: list[tuple[int, int, int]], block_size: int, groups: int
) -> None:
    """Compare a packed batch with what its plan means."""
    batch = packed.batch
    starts_in_batch = batch.query_start.tolist()
    assert starts_in_batch[0] == 0 and starts_in_batch[-1] == batch.num_tokens == sum(c for _, _, c in columns)
    ordered = sorted(columns, key=lambda c: (c[2] != 1, -(c[1] + c[2])))  # single queries first, longest first
    assert batch.num_decodes == sum(c == 1 for _, _, c in columns)
    assert batch.query_lens_host == tuple(c for _, _, c in ordered)
    assert batch.seq_lens_host == tuple(batch.seq_lens.tolist()) == tuple(s + c for _, s, c in ordered)
    for i, (row, start, count) in enumerate(ordered):
        here = slice(starts_in_batch[i], starts_in_batch[i + 1])
        positions = list(range(start, start + count))
        assert batch.positions[here].tolist() == positions
        assert batch.tokens[here].tolist() == [naive[row].tokens[p] for p in positions]
        for g in range(groups):
            table = naive[row].tables[g]
            assert batch.slots[g][here].tolist() == [
                table[p // block_size] * block_size + p % block_size for p in positions
            ]
            seen = -(-(start + count) // block_size)
            assert batch.block_tables[g][i, :seen].tolist() == table[:seen]


@given(situations())
def test_packing_places_every_token_where_the_plan_says(situation):
    block_size, groups, naive, columns = situation
    table = RowTable(ROWS, groups, LENGTH, block_size, CPU)
    samples = list(range(len(columns)))
    the_plan = plan(
        *zip(*columns, strict=True),
        samples=samples,
        groups=groups,
        admitted=tuple(admission(r, n.tokens, n.tables) for r, n in naive.items()),
    )
    table.apply(the_plan)
    packed = table.pack(the_plan)
    check_batch(packed, naive, columns, block_size, groups)
    # Results stand in the plan's order: sample i reads the last position of request i, and its token goes to the next position.
    assert packed.columns.sample_rows.tolist() == [r for r, _, _ in columns]
    for i, (row, start, count) in enumerate(columns):
        at = packed.batch.logit_rows[i]
        assert packed.batch.positions[at] == start + count - 1 == packed.columns.sample_positions[i] - 1
        assert packed.batch.tokens[at] == naive[row].tokens[start + count - 1]
        assert packed.sample_index[i] == row * LENGTH + start + count


@given(situations(), st.integers(1, 40))
def test_in_long_steps_the_last_layer_computes_each_sequences_last_token_only(situation, least):
    block_size, groups, naive, columns = situation
    table = RowTable(ROWS, groups, LENGTH, block_size, CPU)
    the_plan = plan(*zip(*columns, strict=True), samples=list(range(len(columns))), groups=groups,
                    admitted=tuple(admission(r, n.tokens, n.tables) for r, n in naive.items()))
    table.apply(the_plan)
    with patch.object(tuning, "MIN_SKIPPED_TOKENS", least):
        packed = table.pack(the_plan)
    counts = [count for _, _, count in columns]
    assert packed.batch.last_only == (sum(counts) - len(counts) >= least)
    if packed.batch.last_only:
        rows, tail = packed.batch.last_tokens()
        for i, (row, start, count) in enumerate(columns):
            at = int(packed.batch.logit_rows[i])  # of [B, hidden]
            assert packed.batch.positions[rows[at]] == tail.positions[at] == start + count - 1
            assert tail.tokens[at] == naive[row].tokens[start + count - 1]
            assert [s[at] for s in tail.slots] == [s[rows[at]] for s in packed.batch.slots]
        assert tail.num_decodes == tail.num_tokens == tail.num_seqs == len(columns)
        assert tail.query_start.tolist() == list(range(len(columns) + 1)) and set(tail.query_lens_host) == {1}


@given(
    count=st.integers(1, 5), sharers=st.integers(1, 4), run=st.integers(1, 8), block_size=st.integers(1, 5), groups=st.integers(1, 2),
    blocks=st.integers(1, 6), data=st.data(),
)
def test_shared_keys_are_the_leading_keys_that_all_sequences_have_in_the_same_blocks(count, sharers, run, block_size, groups, blocks, data):
    table = RowTable(ROWS, groups + 1, LENGTH, block_size, CPU, sharing=range(groups))
    common = data.draw(st.integers(0, blocks), label="common blocks")
    lengths = [data.draw(st.integers(1, blocks * block_size), label="tokens") for _ in range(count)]
    first = 1
    admitted = []
    for row, n in enumerate(lengths):
        needed = -(-n // block_size)
        own = [tuple(range(first, first + needed)) for _ in range(groups)]
        first += needed
        tables = (*((*range(1000, 1000 + min(common, needed)), *o[common:]) for o in own), (0,) * needed)  # the last: all left behind
        admitted.append(admission(row, list(range(n)), tables))
    the_plan = plan(list(range(count)), [n - 1 for n in lengths], [1] * count, samples=[], groups=groups + 1, admitted=tuple(admitted))
    table.apply(the_plan)
    with patch.multiple(tuning, MIN_SHARING_DECODES=sharers, SHARED_KEYS_MULTIPLE=run):
        found = table.columns(the_plan).shared_keys
    whole = min(common * block_size if count > 1 else LENGTH, *(n - 1 for n in lengths)) // block_size * block_size
    assert found == (whole // run * run if count >= sharers and min(lengths) - 1 >= run else 0)


@given(situations(), st.integers(0, 10**6))
def test_a_row_table_updated_step_by_step_equals_one_admitted_at_once(situation, seed):
    """Blocks appended, copied on write and freed over many plans leave what one admission with the final table would."""
    block_size, groups, naive, _ = situation
    rng = np.random.default_rng(seed)
    table = RowTable(ROWS, groups, LENGTH, block_size, CPU)
    for row, n in naive.items():
        before = rng.integers(1, 9, LENGTH // block_size).tolist()
        table.apply(
            plan([], [], [], groups=groups, admitted=(admission(row, [7] * LENGTH, [before] * groups),))
        )  # an earlier tenant
        cut = [int(rng.integers(0, len(t) + 1)) for t in n.tables]
        first = [t[:c] for t, c in zip(n.tables, cut, strict=True)]
        copies = tuple(
            BlockCopy(src=999, dst=t[-1], row=row, group=g, index=len(t) - 1) for g, t in enumerate(first) if t
        )
        table.apply(
            plan(
                [],
                [],
                [],
                groups=groups,
                copies=copies,
                admitted=(admission(row, n.tokens, [[*t[:-1], 999] if t else [] for t in first]),),
            )
        )
        table.apply(
            plan(
                [row],
                [0],
                [1],
                groups=groups,
                new_blocks=[tuple(tuple(t[c:]) for t, c in zip(n.tables, cut, strict=True))],
            )
        )
        freed = [(row, g, int(rng.integers(0, len(t)))) for g, t in enumerate(n.tables)]
        table.apply(plan([], [], [], groups=groups, freed_blocks=tuple(freed)))
        for _, g, index in freed:
            n.tables[g][index] = 0
    whole = RowTable(ROWS, groups, LENGTH, block_size, CPU)
    whole.apply(
        plan([], [], [], groups=groups, admitted=tuple(admission(r, n.tokens, n.tables) for r, n in naive.items()))
    )
    for g in range(groups):
        np.testing.assert_array_equal(table.block_tables[g], whole.block_tables[g])
    for row, n in naive.items():
        assert table.tokens[row, : len(n.tokens)].tolist() == whole.tokens[row, : len(n.tokens)].tolist() == n.tokens


def test_the_next_plan_reads_a_sampled_token_that_never_reached_the_host():
    table = RowTable(ROWS, 1, LENGTH, 4, CPU)
    first = plan(
        [5, 2], [0, 0], [3, 2], samples=[1, 0], admitted=(admission(5, [1, 2, 3], [[8]]), admission(2, [4, 5], [[9]]))
    )
    table.apply(first)
    packed = table.pack(first)
    table.write_tokens(packed.sample_index, torch.tensor([77, 88]))  # sample 0 is row 2's
    second = plan([5, 2], [3, 2], [1, 1])
    table.apply(second)
    assert table.pack(second).batch.tokens.tolist() == [88, 77]


def test_children_each_sample_a_token_from_the_same_logits_row():
    table = RowTable(ROWS, 1, LENGTH, 4, CPU)
    admitted = tuple(admission(r, [1, 2, 3], [[8]]) for r in (0, 1, 2))
    the_plan = plan([0], [0], [3], samples=[0, 0, 0], sample_rows=[0, 1, 2], admitted=admitted)
    table.apply(the_plan)
    packed = table.pack(the_plan)
    assert packed.batch.logit_rows.tolist() == [2, 2, 2]
    assert packed.sample_index.tolist() == [3, LENGTH + 3, 2 * LENGTH + 3]


@given(st.integers(2, LENGTH), st.integers(0, 5), st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_prompt_logprobs_cover_each_needed_position_exactly_once_for_any_chunks(num_prompt, owed_from, chunks):
    tokens = list(range(100, 100 + num_prompt))
    table = RowTable(ROWS, 1, LENGTH, 4, CPU)
    told, at = [], 0
    first = True
    for chunk in chunks:
        count = min(chunk, num_prompt - at)
        if not count:
            break
        the_plan = plan(
            [6, 3],
            [0, at],
            [2, count],
            admitted=(admission(6, [1, 2], [[1]]), admission(3, tokens, [list(range(1, 13))], owed=owed_from, k=2))
            if first
            else (),
        )
        table.apply(the_plan)
        packed = table.pack(the_plan)
        first = False
        rows = packed.batch.logit_rows.tolist()
        for piece in packed.columns.prompt_spans:
            assert piece.request == 1 and piece.k == 2
            for j in range(piece.count):
                predicting = rows.pop(0)
                assert packed.batch.positions[predicting] == piece.first + j - 1
                assert packed.batch.tokens[predicting] == tokens[piece.first + j - 1]
                told.append(piece.first + j)
        assert packed.prompt_index.tolist() == [
            3 * LENGTH + p for piece in packed.columns.prompt_spans for p in range(piece.first, piece.first + piece.count)
        ]
        at += count
    assert told == list(range(max(owed_from, 1), min(at + 1, num_prompt)))


@given(st.integers(1, LENGTH), st.sampled_from(["LAST", "MEAN"]), st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_pooling_gets_each_position_once_or_the_last_one_and_no_graph_computes_it(num_prompt, kind, chunks):
    table = RowTable(ROWS, 1, LENGTH, 4, CPU)
    pooled, at, tokens = [], 0, list(range(100, 100 + num_prompt))
    params = PoolingParams(pooling_type=kind).sampling()
    for chunk in chunks:
        count = min(chunk, num_prompt - at)
        if not count:
            break
        admitted = () if at else (admission(6, [1, 2], [[1]]), replace(admission(3, tokens, [list(range(1, 13))]), params=params))
        the_plan = plan([6, 3], [0, at], [2, count], admitted=admitted)
        table.apply(the_plan)
        packed = table.pack(the_plan)
        spans = packed.columns.pool_spans
        assert packed.columns.simple == (not spans)
        for span in spans:
            assert (span.request, span.every) == (1, kind == "MEAN")
            positions = packed.batch.positions[span.begin:span.end].tolist()
            assert packed.batch.tokens[span.begin:span.end].tolist() == [tokens[p] for p in positions]
            assert positions[0] == span.first and span.end <= packed.columns.query_start[span.index + 1]
            pooled += positions
        at += count
    assert pooled == (list(range(at)) if kind == "MEAN" else [num_prompt - 1] * (at == num_prompt))
