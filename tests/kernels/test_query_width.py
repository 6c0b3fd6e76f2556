"""Decodes of several queries (a new token and its drafts): each backend against a plain dense computation in float64."""
from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference import norm, rope
from tests.kernels.paged import Case, forget_new, fused, make_case, naive_attention

WIDTHS = (1, 2, 3, 5, 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare(backend: ModuleType, case: Case, window: int | None = None) -> object:
    return backend.prepare_attention(
        case.batch, 0, block_size=case.block_size, num_heads=case.q.shape[1], num_kv_heads=case.kv.k.shape[2], head_dim=case.q.shape[2],
        window=window, dtype=case.q.dtype)


def decodes_of(width: int, context: list[int], **options: object) -> Case:
    return make_case([(width, n + width) for n in context], query_width=width, device=DEVICE, **options)


def same(kv: KVLayer, case: Case) -> bool:
    return all(torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)) for a, b in ((kv.k, case.kv.k), (kv.v, case.kv.v)))


HEADS = ((4, 2), (9, 3), (8, 1))  # query heads, KV heads
MASKS = ((None, None), (None, 4.0), (1, None), (6, None), (40, 4.0), (300, None))  # window, softcap
# All pairs of a width and a mask. Each width and each mask has all heads.
MIXES = [(width, *mask, HEADS[(i + j) % len(HEADS)]) for i, width in enumerate(WIDTHS) for j, mask in enumerate(MASKS)]


@pytest.mark.parametrize(("width", "window", "softcap", "heads"), MIXES)
def test_each_query_attends_to_the_cached_keys_and_the_new_keys_up_to_its_own(
    backend: ModuleType, width: int, window: int | None, softcap: float | None, heads: tuple[int, int],
) -> None:
    case = decodes_of(width, [0, 1, 30, 61, 127], heads=heads[0], kv_heads=heads[1], head_dim=16, block_size=4, window=window, seed=width)
    kv = forget_new(case)
    got = backend.self_attention(fused(case), kv, case.batch.slots[0], prepare(backend, case, window), scale=0.25, softcap=softcap)
    want = naive_attention(case, scale=0.25, window=window, softcap=softcap)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=1e-5, rtol=1e-5)
    assert same(kv, case), "all new keys and values are in the cache"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("window", [None, 280])
def test_long_sequences_whose_keys_are_shared_out_over_splits(backend: ModuleType, width: int, window: int | None) -> None:
    case = decodes_of(width, [700, 3, 130, 125, 520], heads=4, kv_heads=2, head_dim=16, block_size=16, window=window, seed=width)
    kv, meta = forget_new(case), prepare(backend, case, window)
    for _ in range(2):  # the second layer finds the counters at zero
        got = backend.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=0.25)
        want = naive_attention(case, scale=0.25, window=window)
        torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=1e-5, rtol=1e-5)
    assert same(kv, case)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("window", [None, 21])
def test_heads_are_normalized_and_rotated_before_they_attend(backend: ModuleType, width: int, window: int | None) -> None:
    case = decodes_of(width, [0, 9, 70], heads=4, kv_heads=2, head_dim=16, block_size=4, window=window, seed=width)
    qk_norm = torch.randn(6, 16, device=DEVICE), 1e-6
    angles = rope.rope_angles(case.batch.positions, torch.rand(8, device=DEVICE), 1.0, torch.float32)
    kv = forget_new(case)
    got = backend.self_attention(fused(case), kv, case.batch.slots[0], prepare(backend, case, window), scale=0.25, rope=angles,
                                 qk_norm=qk_norm)
    want = naive_attention(with_positioned_heads(case, qk_norm, angles), scale=0.25, window=window)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=2e-5, rtol=2e-5)


def with_positioned_heads(case: Case, qk_norm: tuple[Tensor, float], angles: tuple[Tensor, Tensor]) -> Case:
    """The case with normalized and rotated queries and new keys."""
    new = torch.cat([keys[-n:] for keys, n in zip(case.keys, case.batch.query_lens_host, strict=True)]).to(case.q.device)
    heads = rope.apply_rope(norm.rms_norm(torch.cat((case.q, new), 1), *qk_norm), *angles)
    q, new = heads[:, : case.q.shape[1]], heads[:, case.q.shape[1] :].cpu()
    keys = [torch.cat((old[:-n], part)) for old, part, n in
            zip(case.keys, new.split(case.batch.query_lens_host), case.batch.query_lens_host, strict=True)]
    return replace(case, q=q, keys=keys)


@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("window", [None, 11])
def test_decodes_of_several_queries_beside_prompt_chunks(backend: ModuleType, width: int, window: int | None) -> None:
    shape = [(width, 40), (width, width), (6, 6), (4, 33), (1, 20), (11, 50)]
    case = make_case(shape, query_width=width, heads=4, kv_heads=2, head_dim=16, window=window, seed=width, device=DEVICE)
    assert case.batch.num_decodes == 2
    kv = forget_new(case)
    got = backend.self_attention(fused(case), kv, case.batch.slots[0], prepare(backend, case, window), scale=0.25)
    want = naive_attention(case, scale=0.25, window=window)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=1e-5, rtol=1e-5)
    assert same(kv, case)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_the_prefix_that_all_decodes_share_is_read_for_all_their_queries(width: int) -> None:
    attention = pytest.importorskip("minivllm.kernels.triton.attention")
    with patch.multiple(tuning, SHARED_KEYS_MULTIPLE=16, MIN_KEYS_PER_SPLIT=16):
        case = decodes_of(width, [48 + n for n in (1, 7, 20, 2, 64)], heads=4, kv_heads=2, head_dim=16, block_size=4, shared_keys=48)
        kv, meta = forget_new(case), prepare(attention, case)
        assert meta.shared_parts
        got = attention.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=0.25, softcap=4.0)
    want = naive_attention(case, scale=0.25, softcap=4.0)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=1e-5, rtol=1e-5)
    assert same(kv, case)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_a_split_may_hold_keys_for_the_first_queries_alone(width: int) -> None:
    attention = pytest.importorskip("minivllm.kernels.triton.attention")
    tile = tuning.wide_decode_tile(width, 16, 2, 4, 0).block_n
    with patch.object(tuning, "MIN_KEYS_PER_SPLIT", 16):
        for context in (tile + 140, tile + 137, tile + 133):  # the first query's window begins near the end of the first tile
            case = decodes_of(width, [context], heads=2, kv_heads=1, head_dim=16, block_size=4, window=144, seed=width)
            meta = prepare(attention, case, 144)
            assert meta.splits > 1
            got = attention.self_attention(fused(case), forget_new(case), case.batch.slots[0], meta, scale=0.25)
            want = naive_attention(case, scale=0.25, window=144)
            torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=1e-5, rtol=1e-5)


def test_decodes_with_more_rows_than_a_tile_holds_are_computed_as_prompt_chunks() -> None:
    attention = pytest.importorskip("minivllm.kernels.triton.attention")
    case = decodes_of(17, [0, 30], heads=8, kv_heads=1, head_dim=16, seed=1)
    meta, kv = prepare(attention, case), forget_new(case)
    assert meta.num_decodes == 0 and meta.num_prompt_tokens == 34
    got = attention.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=0.25)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), naive_attention(case, scale=0.25), atol=1e-5, rtol=1e-5)
    assert same(kv, case)


@pytest.mark.skipif(DEVICE == "cuda", reason="Numba's kernels run on a CPU")
@pytest.mark.parametrize("width", [tuning.CPU_MAX_QUERIES, tuning.CPU_MAX_QUERIES + 1])
def test_pytorch_computes_decodes_of_more_queries_than_the_compiled_kernel_keeps(width: int) -> None:
    attention = pytest.importorskip("minivllm.kernels.numba.attention")
    case = decodes_of(width, [0, 30, 120], heads=4, kv_heads=2, head_dim=16, seed=1)
    meta, kv = prepare(attention, case), forget_new(case)
    assert isinstance(meta, attention.NumbaAttentionMeta) == (width == tuning.CPU_MAX_QUERIES)
    got = attention.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=0.25)
    torch.testing.assert_close(got.view(case.q.shape).double(), naive_attention(case, scale=0.25), atol=1e-5, rtol=1e-5)
    assert same(kv, case)


def batch_of(shape: list[tuple[int, int]], width: int) -> InputBatch:
    case = make_case(shape, query_width=width, device=DEVICE)
    total = case.batch.num_tokens
    return replace(case.batch, tokens=torch.arange(total, dtype=torch.int32, device=DEVICE))


def test_last_tokens_are_all_tokens_of_decodes_and_the_last_one_of_each_prompt_chunk() -> None:
    rows, batch = batch_of([(3, 9), (3, 5), (6, 6), (4, 33)], 3).last_tokens()
    assert rows.tolist() == batch.tokens.tolist() == [0, 1, 2, 3, 4, 5, 11, 15]
    assert batch.query_start.tolist() == [0, 3, 6, 7, 8]
    assert (batch.num_decodes, batch.query_width, batch.num_decode_tokens) == (2, 3, 6)
    assert batch.query_lens_host == (3, 3, 1, 1) and batch.seq_lens_host == (9, 5, 6, 33)
    assert len(batch.slots[0]) == len(batch.positions) == 8


def test_with_one_query_per_decode_last_tokens_are_decodes() -> None:
    rows, batch = batch_of([(1, 9), (6, 6), (4, 33)], 1).last_tokens()
    assert rows.tolist() == batch.tokens.tolist() == [0, 6, 10]
    assert batch.query_start.tolist() == [0, 1, 2, 3] and batch.num_decodes == 3 and batch.query_lens_host == (1, 1, 1)


@pytest.mark.parametrize("width", (1, 3))
def test_attention_of_last_tokens_equals_their_rows_of_the_whole_batch(backend: ModuleType, width: int) -> None:
    shape = [(width, 40), (width, 12), (6, 6), (4, 33)]
    case = make_case(shape, query_width=width, heads=4, kv_heads=2, head_dim=16, seed=3, device=DEVICE)
    rows, last = case.batch.last_tokens()
    qkv, kv = fused(case), forget_new(case)
    backend.self_attention(qkv, kv, case.batch.slots[0], prepare(backend, case), scale=0.25)
    got = backend.self_attention(qkv[rows], kv, last.slots[0], prepare(backend, replace(case, batch=last)), scale=0.25)
    want = naive_attention(case, scale=0.25)[rows.cpu()]
    torch.testing.assert_close(got.view(-1, *case.q.shape[1:]).cpu().double(), want, atol=1e-5, rtol=1e-5)
