"""Reference rotary embedding, against complex numbers: pair (d, d + D/2) is x + iy, and position p multiplies by e^(i p f)."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.reference.rope import apply_rope, rope_angles


def rotate_by_hand(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scale: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[:, None] * inv_freq.double()
    z = z * torch.polar(torch.full_like(angles, scale), angles)[:, None]
    return torch.cat((z.real, z.imag), -1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2000), max_size=8), st.integers(1, 3), st.sampled_from([2, 4, 16, 20]), st.sampled_from([1.0, 1.3]))
def test_each_pair_of_dimensions_is_rotated_by_position_times_frequency(positions: list[int], heads: int, dim: int, scale: float) -> None:
    at = torch.tensor(positions, dtype=torch.int64)
    x, inv_freq = torch.randn(len(positions), heads, dim), torch.rand(dim // 2)
    before = x.clone()
    cos, sin = rope_angles(at, inv_freq, scale, torch.float32)
    assert cos.shape == sin.shape == (len(positions), 1, dim)
    torch.testing.assert_close(apply_rope(x, cos, sin).double(), rotate_by_hand(x, at, inv_freq, scale), atol=2e-3, rtol=1e-3)
    assert torch.equal(x, before)


def test_heads_may_be_a_slice_of_a_fused_tensor() -> None:
    qkv = torch.randn(3, 5, 8)
    angles = rope_angles(torch.tensor([4, 0, 9]), torch.rand(4), 1.0, torch.float32)
    assert torch.equal(apply_rope(qkv[:, :4], *angles), apply_rope(qkv[:, :4].clone(), *angles))


def test_scores_depend_only_on_the_distance_of_positions() -> None:
    q, k, inv_freq = torch.randn(1, 1, 16), torch.randn(1, 1, 16), torch.rand(8)

    def score(p: int, r: int) -> torch.Tensor:
        a = apply_rope(q, *rope_angles(torch.tensor([p]), inv_freq, 1.0, torch.float32))
        b = apply_rope(k, *rope_angles(torch.tensor([r]), inv_freq, 1.0, torch.float32))
        return (a * b).sum()

    torch.testing.assert_close(score(17, 5), score(112, 100), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(score(17, 5), score(17, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_computed_in_fp32_for_every_dtype(dtype: torch.dtype) -> None:
    inv_freq = torch.tensor([1.0, 0.01])
    cos, sin = rope_angles(torch.tensor([12345]), inv_freq, 1.0, dtype)  # 12345 is not a bfloat16
    exact = (12345 * inv_freq.double()).cos().float()
    assert cos.dtype == sin.dtype == dtype
    torch.testing.assert_close(cos[0, 0, :2].float(), exact, atol=5e-3, rtol=0)
