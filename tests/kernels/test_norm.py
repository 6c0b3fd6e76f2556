"""Reference norms, against their definitions in float64."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.reference.norm import layer_norm, rms_norm


def rms_by_hand(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 9), st.integers(1, 70), st.sampled_from([1e-6, 1e-5, 0.1]), st.sampled_from([1e-4, 1.0, 1e3]))
def test_rms_norm_divides_by_the_root_mean_square(rows: int, width: int, eps: float, magnitude: float) -> None:
    x, weight = torch.randn(rows, width) * magnitude, torch.randn(width)
    before = x.clone()
    torch.testing.assert_close(rms_norm(x, weight, eps).double(), rms_by_hand(x, weight, eps), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)  # the input may be the residual stream


def test_rms_norm_of_heads_takes_one_row_of_weights_per_head_and_strided_input() -> None:
    qkv, weight = torch.randn(5, 6, 8), torch.randn(4, 8)
    torch.testing.assert_close(rms_norm(qkv[:, :4], weight, 1e-6).double(), rms_by_hand(qkv[:, :4], weight, 1e-6), atol=1e-5, rtol=1e-5)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 16), torch.ones(16), 1e-6), torch.zeros(2, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_rows_are_in_fp32(dtype: torch.dtype) -> None:
    x = torch.full((1, 4096), 100.0, dtype=dtype)  # the sum of squares, 4e7, overflows float16, and bfloat16 is too coarse for it
    got = rms_norm(x, torch.ones(4096, dtype=dtype), 1e-6)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), torch.ones(1, 4096), atol=0, rtol=0.005)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_subtracts_the_mean_and_divides_by_the_deviation(affine: bool) -> None:
    x = torch.randn(4, 20) * 3 + 5
    weight, bias = (torch.randn(20), torch.randn(20)) if affine else (None, None)
    want = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    if weight is not None and bias is not None:
        want = want * weight + bias
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), want, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 9), st.integers(1, 70), st.sampled_from([1e-6, 1e-5, 0.1]), st.sampled_from([1e-4, 1.0, 1e3]))
def test_rms_norm_of_few_bfloat16_rows_is_rounded_once(rows: int, width: int, eps: float, magnitude: float) -> None:
    x, weight = (torch.randn(rows, width) * magnitude).bfloat16(), torch.randn(width).bfloat16()
    got = rms_norm(x, weight, eps)
    assert got.dtype == torch.bfloat16 and got.is_contiguous()
    torch.testing.assert_close(got.double(), rms_by_hand(x, weight, eps), atol=1e-6, rtol=2**-7)


def test_many_bfloat16_rows_get_the_same_norm_as_few() -> None:
    x, weight = torch.randn(200, 576).bfloat16(), torch.randn(576).bfloat16()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5)[:3], rms_norm(x[:3], weight, 1e-5), atol=0, rtol=2**-6)
