"""Reference attention over the paged cache, against a dense computation: one query at a time in float64."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels import tuning
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference import attention as module
from minivllm.kernels.reference.attention import Gather, InPlace, ReferenceAttentionMeta, attention, prepare_attention
from tests.kernels.paged import Case, make_case, naive_attention


def prepare(case: Case, window: int | None = None) -> ReferenceAttentionMeta:
    return prepare_attention(
        case.batch, 0, block_size=case.block_size, num_heads=case.q.shape[1], num_kv_heads=case.kv.k.shape[2],
        head_dim=case.q.shape[2], window=window, dtype=case.q.dtype,
    )


def gathers_of(case: Case) -> list[Gather]:
    return [gather for gather in prepare(case).gathers if isinstance(gather, Gather)]


def check(case: Case, *, window: int | None = None, softcap: float | None = None, tolerance: float = 2e-5) -> None:
    scale = case.q.shape[2] ** -0.5
    got = attention(case.q, case.kv, prepare(case, window), scale=scale, softcap=softcap)
    want = naive_attention(case, scale=scale, window=window, softcap=softcap)
    assert got.shape == case.q.shape and got.dtype == case.q.dtype
    torch.testing.assert_close(got.cpu().double(), want, atol=tolerance, rtol=tolerance)


sequences = st.lists(
    st.one_of(
        st.integers(1, 60).map(lambda n: (1, n)),  # a decode
        st.integers(1, 40).map(lambda n: (n, n)),  # a whole prompt
        st.tuples(st.integers(2, 20), st.integers(1, 40)).map(lambda t: (t[0], t[0] + t[1])),  # a later chunk
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=120, deadline=None)
@given(
    shape=sequences,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (9, 3), (8, 1)]),
    head_dim=st.sampled_from([4, 8, 12, 64]),
    block_size=st.integers(1, 256) | st.sampled_from([1, 2, 16, 256]),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
    limits=st.tuples(st.sampled_from([1, 5000, 10**7]), st.sampled_from([0, 10, 400]), st.sampled_from([50, 10**7])),
    seed=st.integers(0, 1000),
)
def test_any_mix_of_prompts_chunks_and_decodes_over_scattered_blocks_equals_a_dense_computation(
    shape: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, block_size: int, window: int | None,
    softcap: float | None, limits: tuple[int, int, int], seed: int,
) -> None:
    case = make_case(shape, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, block_size=block_size, window=window, seed=seed)
    with pytest.MonkeyPatch.context() as patch:  # with small limits, small batches are divided
        patch.setitem(tuning.GATHER_BYTES, "cpu", limits[0])
        patch.setitem(tuning.FREE_PADDING, "cpu", limits[1])
        patch.setattr(tuning, "MAX_SCORES", limits[2])
        check(case, window=window, softcap=softcap)


@pytest.mark.parametrize("window", [None, 7])
def test_slots_that_no_query_may_see_do_not_influence_the_output(window: int | None) -> None:
    case = make_case([(1, 33), (1, 2), (1, 17), (5, 5), (3, 21)], window=window, seed=1)
    assert case.kv.k.isnan().any() and case.kv.v.isnan().any()
    out = attention(case.q, case.kv, prepare(case, window), scale=0.5)
    assert not out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_one_sequence_does_not_influence_other_sequences(dtype: torch.dtype) -> None:
    case = make_case([(1, 33), (1, 21), (1, 40), (1, 2), (1, 30)], dtype=dtype, seed=1)
    own = [set(row[: -(-n // 4)].tolist()) for row, n in zip(case.batch.block_tables[0], case.batch.seq_lens_host, strict=True)]
    before = attention(case.q, case.kv, prepare(case), scale=0.5)
    for i, blocks in enumerate(own):
        kv = KVLayer(case.kv.k.clone(), case.kv.v.clone())
        kv.k[list(blocks)] = kv.v[list(blocks)] = torch.nan
        after = attention(case.q, kv, prepare(case), scale=0.5)
        others = [j for j in range(len(own)) if j != i]
        assert after[i].isnan().all() and torch.equal(after[others], before[others])


@settings(max_examples=60, deadline=None)
@given(
    shape=sequences, heads=st.sampled_from([(4, 2), (9, 3), (8, 8), (16, 2), (20, 4)]), head_dim=st.sampled_from([2, 8, 12, 64]),
    block_size=st.sampled_from([1, 4, 16, 24, 256]), window=st.none() | st.integers(1, 50), softcap=st.none() | st.just(5.0),
    limits=st.tuples(st.sampled_from([1, 5000, 10**7]), st.sampled_from([0, 10, 400])), seed=st.integers(0, 1000),
)
def test_bfloat16_decodes_equal_a_dense_computation(
    shape: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, block_size: int, window: int | None, softcap: float | None,
    limits: tuple[int, int], seed: int,
) -> None:
    case = make_case(shape, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, block_size=block_size, window=window,
                     dtype=torch.bfloat16, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tuning.GATHER_BYTES, "cpu", limits[0])
        patch.setitem(tuning.FREE_PADDING, "cpu", limits[1])
        check(case, window=window, softcap=softcap, tolerance=3e-2)


def test_short_decodes_are_not_padded_to_the_length_of_a_long_one() -> None:
    case = make_case([(1, 1000)] + [(1, 10 + i) for i in range(20)], seed=2)
    gathered = sum(len(gather.pages) * case.block_size for gather in gathers_of(case))
    last_pages = case.block_size * case.batch.num_seqs
    assert gathered <= sum(case.batch.seq_lens_host) + last_pages + tuning.FREE_PADDING["cpu"]
    check(case)


def test_decodes_are_gathered_in_pieces_if_one_gather_would_need_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.GATHER_BYTES, "cpu", 50 * 2 * 2 * 8 * 4)  # fifty keys
    case = make_case([(1, n) for n in (20, 21, 22, 23, 24, 90, 19)], seed=3)
    gathers = gathers_of(case)
    assert [[len(bucket.keys) for bucket in gather.buckets] for gather in gathers] == [[1], [2], [2], [2]]
    assert all(len(gather.pages) * case.block_size <= 50 for gather in gathers[1:])
    check(case)


def test_batches_of_different_lengths_share_a_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.FREE_PADDING, "cpu", 4)
    case = make_case([(1, n) for n in (20, 21, 52, 51, 2)], seed=3)
    (gather,) = gathers_of(case)
    assert [(bucket.keys.shape[0], bucket.keys.shape[2]) for bucket in gather.buckets] == [(2, 52), (2, 21), (1, 2)]
    assert len(gather.pages) == (2 * 52 + 2 * 24 + 4) // case.block_size
    check(case)


@given(lens=st.lists(st.integers(1, 50), max_size=30), limit=st.integers(1, 300), free=st.integers(0, 30))
def test_every_decode_is_in_exactly_one_batch_and_neither_padding_nor_memory_exceeds_its_limit(
    lens: list[int], limit: int, free: int
) -> None:
    order, gathers = module._cut(lens, limit, free)
    assert sorted(order) == list(range(len(lens)))
    assert [i for spans in gathers for a, b in spans for i in range(a, b)] == list(range(len(lens)))
    for spans in gathers:
        padded = [(b - a) * max(lens[i] for i in order[a:b]) for a, b in spans]
        assert sum(padded) <= limit or spans[-1][1] - spans[0][0] == 1
        assert all(p - sum(lens[i] for i in order[a:b]) <= free for p, (a, b) in zip(padded, spans, strict=True))


@pytest.mark.parametrize("window", [None, 9])
def test_a_long_chunk_is_computed_in_pieces_if_its_mask_would_need_too_much_memory(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr(tuning, "MAX_SCORES", 200)
    case = make_case([(30, 50), (4, 4), (2, 300)], window=window, seed=4)
    masks = [chunk.mask for chunk in prepare(case, window).chunks if chunk.mask is not None]
    assert len(masks) > 2 and all(m.numel() <= 300 for m in masks)
    check(case, window=window)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("shape", [(1, 30), (30, 30), (6, 30)])
def test_a_sequence_in_consecutive_blocks_is_read_without_a_copy(shape: tuple[int, int], window: int | None) -> None:
    case = make_case([shape], window=window, seed=9)
    table = case.batch.block_tables[0]
    kv = KVLayer(torch.full_like(case.kv.k, torch.nan), torch.full_like(case.kv.v, torch.nan))
    for logical in range(-(-30 // case.block_size)):  # move the sequence's blocks to 1, 2, 3 ...
        block = int(table[0, logical])
        kv.k[logical + 1], kv.v[logical + 1] = case.kv.k[block], case.kv.v[block]
        table[0, logical] = logical + 1 if block else 0
    case = dataclasses.replace(case, kv=kv)
    meta = prepare(case, window)
    assert all(isinstance(gather, InPlace) for gather in meta.gathers) and all(isinstance(chunk.slots, slice) for chunk in meta.chunks)
    check(case, window=window)


def test_equal_decodes_need_neither_mask_nor_reordering() -> None:
    case = make_case([(1, 13)] * 5)
    (gather,) = gathers_of(case)
    assert prepare(case).order is None and [bucket.mask for bucket in gather.buckets] == [None] and gather.hidden is None


def test_rows_past_the_last_sequence_are_zero() -> None:
    case = make_case([(1, 5), (3, 3)], seed=5)
    padded = dataclasses.replace(case, q=torch.cat([case.q, torch.full((2, *case.q.shape[1:]), torch.nan)]))
    out = attention(padded.q, padded.kv, prepare(padded), scale=1.0)
    assert torch.equal(out[:4], attention(case.q, case.kv, prepare(case), scale=1.0))
    assert not out[4:].any()


def test_a_sequence_gets_the_same_output_alone_and_in_a_batch() -> None:
    shape = [(1, 40), (1, 3), (6, 6), (4, 30)]
    case = make_case(shape, seed=6)
    together = attention(case.q, case.kv, prepare(case), scale=0.3)
    row = 0
    for i, (query_len, seq_len) in enumerate(zip(case.batch.query_lens_host, case.batch.seq_lens_host, strict=True)):
        alone = dataclasses.replace(
            case.batch, block_tables=(case.batch.block_tables[0][i : i + 1],), num_decodes=int(query_len == 1),
            query_lens_host=(query_len,), seq_lens_host=(seq_len,),
        )
        part = dataclasses.replace(case, batch=alone, q=case.q[row : row + query_len])
        torch.testing.assert_close(attention(part.q, case.kv, prepare(part), scale=0.3), together[row : row + query_len])
        row += query_len


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bfloat16_stays_within_its_rounding(softcap: float | None) -> None:
    case = make_case([(1, 70), (1, 5), (20, 20), (5, 44)], dtype=torch.bfloat16, head_dim=64, heads=9, kv_heads=3, seed=7)
    check(case, softcap=softcap, tolerance=2e-2)


def test_one_preparation_serves_all_layers_of_a_step() -> None:
    case = make_case([(1, 20), (1, 9), (6, 6)], seed=8)
    meta = prepare(case)
    other = make_case([(1, 20), (1, 9), (6, 6)], seed=8)
    other.kv.v.mul_(2.0)
    first, second = (attention(c.q, c.kv, meta, scale=0.3) for c in (case, other))
    torch.testing.assert_close(second, 2.0 * first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_reference_runs_on_a_gpu(window: int | None, softcap: float | None) -> None:
    shape = [(1, 33), (1, 2), (1, 170), (5, 5), (30, 44)]
    case = make_case(shape, window=window, device="cuda", heads=9, kv_heads=3, head_dim=64, block_size=16, seed=9)
    check(case, window=window, softcap=softcap, tolerance=1e-4)
