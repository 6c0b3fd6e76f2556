"""Attention over a quantized KV cache: each backend against a dense computation in float64 with the keys and values that are stored.

New keys and values are quantized before they are attended to, so that no result depends on the step in which a key was stored.
"""
from __future__ import annotations

from importlib import import_module
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels import tuning
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference import rope
from tests.kernels.paged import Case, forget_new, fused, make_case, naive_attention, quantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def attend(backend: ModuleType, plain: Case, dtype: torch.dtype, window: int | None = None, softcap: float | None = None,
           size: float = 1.0) -> None:
    """Compare outputs and the cache after one step. plain: the unquantized case; size: of the values."""
    case = quantized(plain, dtype)
    meta = backend.prepare_attention(
        case.batch, 0, block_size=case.block_size, num_heads=case.q.shape[1], num_kv_heads=case.kv.k.shape[2], head_dim=case.q.shape[2],
        window=window, dtype=case.q.dtype, cache_dtype=dtype)
    kv, scale = forget_new(case), case.q.shape[2] ** -0.5
    got = backend.self_attention(fused(plain), kv, case.batch.slots[0], meta, scale=scale, softcap=softcap)
    want = naive_attention(case, scale=scale, window=window, softcap=softcap)
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(got.view(case.q.shape).cpu().double() / size, want / size, atol=tolerance, rtol=tolerance)
    assert same(kv, case.kv), "all new keys and values are in the cache"


def same(a: KVLayer, b: KVLayer) -> bool:
    return all(x is not None and y is not None and torch.equal(x.float().nan_to_num(999.0), y.float().nan_to_num(999.0))
               for x, y in ((a.k, b.k), (a.v, b.v), (a.k_scale, b.k_scale), (a.v_scale, b.v_scale)))


# Each shape is one more kernel that Numba compiles, in seconds: so most cases have the shape of the tests' small model.
SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(("dtype", "width"), [(torch.float8_e4m3fn, 1), (torch.int8, 1), (torch.int8, 3)], ids=["fp8", "int8", "int8, 3"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (300, 4.0), (6, None)])
def test_any_mix_of_decodes_and_prompt_chunks(
    backend: ModuleType, dtype: torch.dtype, width: int, window: int | None, softcap: float | None,
) -> None:
    shape = [(width, 700), (width, width), (width, 130), (6, 6), (5, 40), (20, 33)]
    attend(backend, make_case(shape, query_width=width, block_size=16, window=window, device=DEVICE, **SHAPE), dtype, window, softcap)


@settings(max_examples=6, deadline=None)
@given(
    lens=st.lists(st.integers(1, 90), min_size=1, max_size=3), prompt=st.integers(2, 30), context=st.sampled_from([0, 1, 40]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]), block_size=st.sampled_from([1, 7, 16]), window=st.none() | st.integers(1, 90),
    half=st.booleans(), dtype=st.sampled_from([torch.float8_e4m3fn, torch.int8]), seed=st.integers(0, 1000),
)
def test_any_mix_over_scattered_poisoned_blocks(
    backend: ModuleType, lens: list[int], prompt: int, context: int, heads: tuple[int, int], block_size: int, window: int | None,
    half: bool, dtype: torch.dtype, seed: int,
) -> None:
    shape = [*((1, n) for n in lens), (prompt, prompt + context)]
    if "numba" in backend.__name__:
        heads, half = (4, 2), False
    attend(backend, make_case(shape, heads=heads[0], kv_heads=heads[1], head_dim=8, block_size=block_size, window=window, seed=seed,
                              dtype=torch.float16 if half else torch.float32, device=DEVICE), dtype, window)


def test_bfloat16_on_a_cpu() -> None:
    attention = pytest.importorskip("minivllm.kernels.numba.attention")
    attend(attention, make_case([(1, 300), (1, 20), (5, 40)], dtype=torch.bfloat16, **SHAPE), torch.float8_e4m3fn)


@DTYPES
@pytest.mark.parametrize("width", [1, 2])
def test_a_shared_prefix_is_read_once(dtype: torch.dtype, width: int) -> None:
    attention = pytest.importorskip("minivllm.kernels.triton.attention")
    with patch.multiple(tuning, SHARED_KEYS_MULTIPLE=16, MIN_KEYS_PER_SPLIT=16):
        attend(attention, make_case([(width, 64 + n) for n in (2, 7, 90)], query_width=width, block_size=16,
                                    shared_keys=64, device=DEVICE, **SHAPE), dtype)


@DTYPES
@pytest.mark.parametrize("magnitude", [1e-4, 3e4])
def test_keys_and_values_of_any_magnitude(backend: ModuleType, dtype: torch.dtype, magnitude: float) -> None:
    """In float16 too, whose numbers end at 65504: scores stay small because the queries are as small as the keys are large."""
    case = make_case([(1, 40), (1, 3), (6, 9)], dtype=torch.float16, device=DEVICE, poison=False, **SHAPE)
    q, kv = case.q / magnitude, KVLayer(case.kv.k * (magnitude / 4), case.kv.v * (magnitude / 4))
    assert q.isfinite().all() and kv.k.isfinite().all()
    keys, values = ([t * (magnitude / 4) for t in some] for some in (case.keys, case.values))
    attend(backend, Case(case.batch, kv, q, keys, values, case.block_size), dtype, size=magnitude / 4)


@DTYPES
def test_what_is_stored_is_rotated_and_normalized_as_in_the_reference(backend: ModuleType, dtype: torch.dtype) -> None:
    reference = import_module("minivllm.kernels.reference.attention")
    case = make_case([(1, 9), (1, 3), (6, 11)], device=DEVICE, **SHAPE)
    qk_norm = torch.randn(6, 8, device=DEVICE), 1e-6
    angles = rope.rope_angles(case.batch.positions, torch.rand(4, device=DEVICE), 1.0, torch.float32)
    results = []
    for module in (backend, reference):
        meta = module.prepare_attention(case.batch, 0, block_size=4, num_heads=4, num_kv_heads=2, head_dim=8, window=None,
                                        dtype=torch.float32, cache_dtype=dtype)
        kv = forget_new(quantized(case, dtype))
        out = module.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=0.25, rope=angles, qk_norm=qk_norm)
        results.append((out, *(t.float().nan_to_num(999.0) for t in (kv.k, kv.v, kv.k_scale, kv.v_scale) if t is not None)))
    for got, want, step in zip(*results, (1e-3, 0.13, 0.13, 0.01, 0.01), strict=True):  # a number between two steps may become either
        torch.testing.assert_close(got, want, atol=1.0 if dtype == torch.int8 and step == 0.13 else 1e-3, rtol=step)
