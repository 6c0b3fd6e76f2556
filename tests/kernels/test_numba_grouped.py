"""Packed weights on a CPU: the Numba kernels against the reference, which is their specification."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minivllm import kernels
from minivllm.kernels import tuning
from minivllm.kernels.grouped import GroupedWeight, dequantize
from minivllm.kernels.reference import grouped as reference
from tests.kernels.test_grouped import KINDS, random_weight

pytest.importorskip("numba", reason="Numba is not installed")
from minivllm.kernels.numba import grouped

TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of a product, as a part of its largest element
DTYPES = list(TOLERANCE)
ROWS = max(tuning.CPU_PACKED_ROWS) + 4  # both ways of computing a product are tested


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def packed_both(weight: GroupedWeight) -> tuple[grouped.PackedTiles, reference.PackedGroups]:
    packed = grouped.pack_groups(weight)
    assert isinstance(packed, grouped.PackedTiles)
    return packed, reference.pack_groups(weight)


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    finite = want[want.isfinite()].float()
    scale = finite.abs().max().item() if len(finite) else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[got.dtype] * scale, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(24, 256), (32, 768), (1, 1024), (33, 512)])
def test_the_layout_holds_every_weight(kind: str, n: int, k: int) -> None:
    if n % KINDS[kind].get("rows_per_scale", 1):
        return  # blocks hold four whole outputs
    weight = random_weight(kind, n, k)
    packed, dense = grouped.pack_groups(weight), dequantize(weight)
    assert isinstance(packed, grouped.PackedTiles) and packed.shape == (n, k)
    assert torch.equal(grouped._dense_product(torch.eye(k), packed, None).t(), dense)
    ids = torch.tensor([n - 1, 0, n // 2, 0])
    assert torch.equal(grouped.grouped_rows(packed, ids, torch.float32), dense[ids])
    if n % 16 == 0:
        held = sum(t.nbytes for t in (packed.words, packed.high, packed.scales, packed.offsets, packed.supers) if t is not None)
        stored = [weight.scales, weight.mins, weight.super_scales, weight.super_mins]
        zeros = [] if isinstance(weight.zeros, int) else [weight.zeros]
        repeats = n // len(weight.scales)  # of scales that several outputs share
        assert held * 8 == n * k * weight.bits + 8 * repeats * sum(t.nbytes for t in [*stored, *zeros] if t is not None)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(rows=st.integers(1, 9) | st.integers(1, 40) | st.just(ROWS), n=st.sampled_from([16, 24, 48, 7]), super_groups=st.integers(1, 3),
       dtype=st.sampled_from(DTYPES), normed=st.booleans(), biased=st.booleans(), after=st.sampled_from(["", "gated", "added"]),
       seed=st.integers(0, 99))
def test_products_equal_the_reference(kind: str, rows: int, n: int, super_groups: int, dtype: torch.dtype, normed: bool, biased: bool,
                                      after: str, seed: int) -> None:
    n -= n % KINDS[kind].get("rows_per_scale", 1)
    gated, k = after == "gated" and n % 2 == 0, 256 * super_groups
    packed, expected = packed_both(random_weight(kind, n, k, seed))
    gen = torch.Generator().manual_seed(seed)
    x, gain, bias, residual = (torch.randn(*s, generator=gen).to(dtype) for s in ((rows, k), (k,), (n,), (rows, n // 2 if gated else n)))
    options = dict(bias=bias if biased else None, norm=(gain, 1e-5) if normed else None, gated=gated)
    got, want = (backend.grouped_linear(x, weight, residual=residual.clone() if after else None, **options)
                 for backend, weight in ((grouped, packed), (reference, expected)))
    assert_near(got, want)


@pytest.mark.parametrize("k", [32, 96, 160, 416])
@pytest.mark.parametrize("kind", ["awq", "q4_1", "q5_0", "q8_0"])
def test_inputs_may_be_any_multiple_of_a_group(kind: str, k: int) -> None:
    packed, expected = packed_both(random_weight(kind, 16, k))
    for rows in (1, 6, ROWS):
        x = torch.randn(rows, k)
        assert_near(grouped.grouped_linear(x, packed), reference.grouped_linear(x, expected))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scales_may_be_of_any_float_type(scale_dtype: torch.dtype) -> None:
    weight = random_weight("awq", 16)
    weight = dataclasses.replace(weight, scales=weight.scales.to(scale_dtype))
    packed, expected = packed_both(weight)
    x = torch.randn(3, 256)
    assert_near(grouped.grouped_linear(x, packed), reference.grouped_linear(x, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["q4_1", "q8_0", "fp8 per output"])
def test_infinity_and_nan_give_what_the_reference_gives_and_change_no_other_row(kind: str, dtype: torch.dtype) -> None:
    packed, expected = packed_both(random_weight(kind, 16))
    x = torch.randn(5, 256).to(dtype)
    before = grouped.grouped_linear(x, packed)
    for value in (torch.inf, -torch.inf, torch.nan):
        x[2, 77] = value
        got = grouped.grouped_linear(x, packed, residual=torch.ones(5, 16, dtype=dtype))
        assert_near(got, reference.grouped_linear(x, expected, residual=torch.ones(5, 16, dtype=dtype)))
        assert not got[2].isfinite().any() and got[[0, 1, 3, 4]].isfinite().all()
        assert_near(got[[0, 1, 3, 4]], before[[0, 1, 3, 4]] + 1)


@pytest.mark.parametrize("rows", [1, 7, ROWS])
def test_results_do_not_depend_on_the_number_of_threads(rows: int) -> None:
    packed, x = grouped.pack_groups(random_weight("q4_1", 320)), torch.randn(rows, 256)
    want = grouped.grouped_linear(x, packed)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        got = grouped.grouped_linear(x, packed)
        assert torch.equal(got, want) if rows < ROWS else torch.allclose(got, want)


def test_x_may_be_a_part_of_a_larger_tensor() -> None:
    packed, expected = packed_both(random_weight("q4_1", 16))
    wide = torch.randn(3, 512)
    for x in (wide[:, 256:], wide[:, ::2]):
        assert_near(grouped.grouped_linear(x, packed), reference.grouped_linear(x, expected))


def test_no_rows_give_no_rows() -> None:
    packed, _ = packed_both(random_weight("q4_1", 32))
    x = torch.empty(0, 256)
    assert grouped.grouped_linear(x, packed).shape == (0, 32) and grouped.grouped_linear(x, packed, gated=True).shape == (0, 16)


def uncovered() -> dict[str, GroupedWeight]:
    four_bits, fp8 = random_weight("q4_1"), random_weight("fp8 per output")
    return {
        "fp8 with NaN": dataclasses.replace(fp8, codes=torch.full((24, 256), torch.nan).to(fp8.codes.dtype)),
        "zeros and mins": dataclasses.replace(four_bits, zeros=3),
        "groups of 4": GroupedWeight(codes=four_bits.codes, bits=4, scales=torch.rand(24, 64).half()),
    }


@pytest.mark.parametrize("name", ["fp8 with NaN", "zeros and mins", "groups of 4"])
def test_other_weights_are_computed_by_the_reference(name: str) -> None:
    weight = uncovered()[name]
    packed, x = grouped.pack_groups(weight), torch.randn(2, 256)
    assert isinstance(packed, reference.PackedGroups)
    got, want = grouped.grouped_linear(x, packed), reference.grouped_linear(x, packed)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    if len(weight.scales) == 24:
        ids = torch.tensor([5, 2])
        got, want = (backend.grouped_rows(packed, ids, torch.float32) for backend in (grouped, reference))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_these_kernels_are_selected_for_a_cpu() -> None:
    ops = kernels.select(torch.device("cpu"))
    assert (ops.pack_groups, ops.grouped_linear, ops.grouped_rows) == (grouped.pack_groups, grouped.grouped_linear, grouped.grouped_rows)
