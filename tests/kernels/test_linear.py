"""Matrix products with packed weights equal the plain ones."""
from __future__ import annotations

import pytest
import torch

from minivllm.kernels.reference.linear import linear, pack_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 33])
def test_linear_is_x_times_the_weight_transposed_plus_bias(dtype: torch.dtype, bias: bool, rows: int) -> None:
    gen = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=gen).to(dtype) for s in ((rows, 24), (40, 24), (40,)))
    got = linear(x, pack_weight(w, dtype), b if bias else None)
    want = x.double() @ w.double().T + (b.double() if bias else 0.0)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert got.dtype == dtype and got.shape == (rows, 40)
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
