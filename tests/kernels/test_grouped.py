"""Packed weights: packing loses nothing, and products with them are products with the dequantized weight."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minivllm.kernels.grouped import GroupedWeight, dequantize, smallest_exact
from minivllm.kernels.reference import grouped
from minivllm.kernels.reference.norm import rms_norm

KINDS = {
    "awq": dict(bits=4, group=32, zeros=True), "q4_0": dict(bits=4, group=32, zeros=8), "q4_1": dict(bits=4, group=32, mins=True),
    "q5_0": dict(bits=5, group=32, zeros=16), "q5_1": dict(bits=5, group=32, mins=True), "q8_0": dict(bits=8, group=32, zeros=128),
    "q4_k": dict(bits=4, group=32, mins=True, super_group=256), "q5_k": dict(bits=5, group=32, mins=True, super_group=256),
    "q6_k": dict(bits=6, group=16, zeros=32, super_group=256), "fp8 per output": dict(bits=8, group=256, fp8=True),
    "fp8 blocks": dict(bits=8, group=128, fp8=True, rows_per_scale=4), "int8": dict(bits=8, group=256, zeros=128),
}


def random_weight(kind: str, n: int = 24, k: int = 256, seed: int = 0) -> GroupedWeight:
    """A weight of this kind whose values are about as large as those of a trained model."""
    torch.manual_seed(seed)
    spec = dict(group=32, zeros=0, mins=False, super_group=0, fp8=False, rows_per_scale=1) | KINDS[kind]
    groups = k // spec["group"]
    codes = torch.randint(0, 1 << spec["bits"], (n, k), dtype=torch.uint8)
    scales, mins, supers, super_mins = torch.rand(n // spec["rows_per_scale"], groups) * 0.02, torch.rand(n, groups) * 0.1, None, None
    if spec["super_group"]:
        supers, super_mins = ((torch.rand(n, k // spec["super_group"]) * 1e-3).half() for _ in range(2))
        scales, mins = (torch.randint(0, 64, (n, groups), dtype=torch.uint8) for _ in range(2))
    zeros: Tensor | int = torch.randint(0, 16, (n, groups), dtype=torch.uint8) if spec["zeros"] is True else spec["zeros"]
    return GroupedWeight(
        codes=torch.randn(n, k).to(torch.float8_e4m3fn) if spec["fp8"] else codes, bits=spec["bits"],
        scales=scales.half() if supers is None else scales, zeros=zeros,
        mins=(mins.half() if supers is None else mins) if spec["mins"] else None, super_scales=supers,
        super_mins=super_mins if spec["mins"] else None)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_loses_nothing(kind: str) -> None:
    weight = random_weight(kind)
    packed = grouped.pack_groups(weight)
    again = grouped.unpack_groups(packed)
    assert again.codes.dtype == weight.codes.dtype and torch.equal(again.codes.float(), weight.codes.float())
    assert sum(plane.nbytes for plane in packed.planes) * 8 == weight.codes.numel() * weight.bits


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_dequantized_weight(kind: str) -> None:
    weight = random_weight(kind)
    dense, packed = dequantize(weight), grouped.pack_groups(weight)
    x, norm, bias = torch.randn(5, 256), (torch.rand(256) + 0.5, 1e-5), torch.randn(24)
    want = F.linear(rms_norm(x, *norm), dense, bias)
    torch.testing.assert_close(grouped.grouped_linear(x, packed, bias, norm=norm), want)
    residual = torch.randn(5, 12)
    gated = F.silu(want[:, :12]) * want[:, 12:] + residual
    torch.testing.assert_close(grouped.grouped_linear(x, packed, bias, norm=norm, gated=True, residual=residual.clone()), gated)
    if weight.scales.shape[0] == 24:
        ids = torch.tensor([3, 0, 3, 23])
        torch.testing.assert_close(grouped.grouped_rows(packed, ids, torch.float32), dense[ids])


@given(st.sampled_from(list(KINDS)), st.integers(0, 1000))
def test_every_value_follows_the_formula(kind: str, seed: int) -> None:
    weight = random_weight(kind, seed=seed)
    n, k = seed % 24, (seed * 37) % 256
    g = k // weight.group
    scale, low = weight.scales[n * len(weight.scales) // 24, g].item(), 0 if weight.mins is None else weight.mins[n, g].item()
    if weight.super_scales is not None:
        scale *= weight.super_scales[n, 0].item()
        low *= 0 if weight.super_mins is None else weight.super_mins[n, 0].item()
    zero = weight.zeros if isinstance(weight.zeros, int) else weight.zeros[n, g].item()
    assert dequantize(weight)[n, k].item() == pytest.approx(scale * (weight.codes[n, k].item() - zero) - low, abs=1e-5)


def test_scales_keep_their_values() -> None:
    cases = (torch.tensor([1.5, 6e-8]), torch.float16), (torch.tensor([1e-30]), torch.bfloat16), (torch.rand(9), torch.float32)
    for values, dtype in cases:
        values = values.to(torch.bfloat16).float() if dtype is torch.bfloat16 else values
        found = smallest_exact(values if dtype is not torch.float16 else values.half().float())
        assert found.dtype is dtype
