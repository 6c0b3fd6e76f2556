"""Reference activations, against their formulas."""
from __future__ import annotations

import math

import pytest
import torch

from minivllm.kernels.reference import activation as ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_and_mul_gates_the_second_half_by_the_first(dtype: torch.dtype) -> None:
    x = torch.randn(5, 14).to(dtype)
    before = x.clone()
    gate, up = x[:, :7].double(), x[:, 7:].double()
    got = ops.silu_and_mul(x)
    assert got.dtype == dtype and got.shape == (5, 7) and got.is_contiguous()
    torch.testing.assert_close(got.double(), gate / (1 + torch.exp(-gate)) * up, atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0.02)
    assert torch.equal(x, before)


def test_activations_equal_their_formulas() -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    torch.testing.assert_close(ops.silu(x), x / (1 + torch.exp(-x)))
    torch.testing.assert_close(ops.relu(x), torch.where(x > 0, x, 0.0))
    torch.testing.assert_close(ops.gelu(x), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
    torch.testing.assert_close(ops.gelu_tanh(x), 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
