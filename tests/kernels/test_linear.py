"""Matrix products with packed weights equal plain products."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minivllm.kernels.reference.linear import can_pack, fused_linear, linear, pack_weight, unpack_weight


def check(x: Tensor, w: Tensor, b: Tensor | None, packed: Tensor) -> None:
    got = linear(x, packed, b)
    want = x.double() @ w.double().T + (b.double() if b is not None else 0.0)
    tolerance = 1e-5 if x.dtype == torch.float32 else 5e-2
    assert got.dtype == x.dtype and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=gen).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 33, 200])
def test_linear_is_x_times_the_weight_transposed_plus_bias(dtype: torch.dtype, bias: bool, rows: int) -> None:
    x, w, b = tensors(dtype, (rows, 24), (40, 24), (40,))
    check(x, w, b if bias else None, pack_weight(w, dtype))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (49, 33), (1, 64), (64, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_are_packed_correctly(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, w = tensors(dtype, (6, shape[1]), shape)
    packed = pack_weight(w, dtype)
    check(x, w, None, packed)
    assert torch.equal(unpack_weight(packed), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_may_be_views_of_a_larger_tensor(dtype: torch.dtype) -> None:
    wide, w = tensors(dtype, (10, 50), (40, 24))
    check(wide[::2, 10:34], w, None, pack_weight(w, dtype))


def test_a_weight_is_converted_to_the_dtype_that_it_is_packed_for() -> None:
    x, w = tensors(torch.float32, (3, 24), (40, 24))
    check(x.bfloat16(), w.bfloat16(), None, pack_weight(w, torch.bfloat16))


ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN")


@ONEDNN
def test_pytorch_has_the_private_operators_of_packed_weights() -> None:
    assert can_pack(torch.float32), (
        f"torch {torch.__version__} changed torch.ops.mkldnn._reorder_linear_weight or _linear_pointwise. Weights on a CPU now stay plain, "
        "which is slower (python -m bench.cpu_kernels): adapt kernels/reference/linear.py, or limit torch's versions in pyproject.toml")


@pytest.fixture(params=["another CPU", "operators are gone", "other arguments", "wrong product"])
def without_packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Operators:
        """torch.ops.mkldnn of a PyTorch in which the operators are gone."""

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("needs another CPU")

    def packed_only() -> Tensor:
        raise AssertionError("not reached")

    class ForOtherWeights:
        def __call__(self, x: Tensor, *_: object) -> Tensor:
            return 2 * x

        binary = __call__

    if request.param == "another CPU":
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    elif request.param == "operators are gone":
        monkeypatch.setattr(torch.ops, "mkldnn", Operators())
    elif request.param == "other arguments":
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", packed_only)
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", ForOtherWeights())
    can_pack.cache_clear()
    yield
    can_pack.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("without_packing")
def test_without_packed_products_the_plain_weight_is_used(dtype: torch.dtype) -> None:
    x, w, residual = tensors(dtype, (3, 24), (40, 24), (3, 40))
    packed = pack_weight(w, dtype)
    assert not packed.is_mkldnn
    check(x, w, None, packed)
    torch.testing.assert_close(fused_linear(x, packed, residual=residual.clone()), x @ w.T + residual, atol=1e-1, rtol=1e-2)


@ONEDNN
def test_a_packed_weight_does_not_keep_the_plain_one_alive() -> None:
    w = torch.randn(40, 24)
    packed = pack_weight(w, torch.float32)
    assert packed.is_mkldnn
    want = torch.ones(1, 24) @ w.T
    w.fill_(torch.nan)
    torch.testing.assert_close(linear(torch.ones(1, 24), packed), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_a_fused_layer_is_norm_product_gate_and_residual_in_this_order(dtype: torch.dtype, gated: bool, bias: bool, rows: int) -> None:
    x, w, b, weight, residual = tensors(dtype, (rows, 24), (40, 24), (40,), (24,), (rows, 20 if gated else 40))
    wide = x.double()
    normed = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-5) * weight.double()
    want = normed @ w.double().T + (b.double() if bias else 0.0)
    if gated:
        want = torch.nn.functional.silu(want[:, :20]) * want[:, 20:]
    want += residual.double()
    got = fused_linear(x, pack_weight(w, dtype), b if bias else None, norm=(weight, 1e-5), gated=gated, residual=residual)
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance / 10)
