"""LoRA kernels of each implementation, against plain products row by row. Triton's run in its interpreter on a CPU."""
from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.layout import AdapterWeights
from minivllm.kernels.reference.activation import silu_and_mul
from minivllm.kernels.reference.linear import fused_linear
from minivllm.kernels.reference.norm import rms_norm

SLOTS = 3


@pytest.fixture(scope="module", params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return import_module(f"minivllm.kernels.{request.param}.lora")


def make(rows: tuple[int, ...], k: int, rank: int, dtype: torch.dtype, device: str) -> tuple[AdapterWeights, Tensor]:
    """Weights in slots as the engine has them: views with a stride, zeros beyond each adapter's rank. -> (weights, ranks [SLOTS + 1])."""
    generator = torch.Generator().manual_seed(3)
    ranks, width = torch.tensor([5, rank, 1, 0], dtype=torch.int32), len(rows) * rank
    slots = torch.zeros(SLOTS, width * k + sum(rows) * rank + 64, dtype=dtype)
    a, b = slots[:, : width * k].unflatten(1, (width, k)), slots[:, width * k : -64].unflatten(1, (sum(rows), rank))
    for slot, r in enumerate(ranks[:SLOTS].tolist()):
        for part in range(len(rows)):
            a[slot, part * rank : part * rank + r] = torch.randn(r, k, generator=generator).to(dtype) / k**0.5
        b[slot, :, :r] = torch.randn(sum(rows), r, generator=generator).to(dtype)
    slots = slots.to(device)
    a, b = slots[:, : width * k].unflatten(1, (width, k)), slots[:, width * k : -64].unflatten(1, (sum(rows), rank))
    return AdapterWeights(a, b, rows), ranks.to(device)


def changes(x: Tensor, weights: AdapterWeights, slots: list[int]) -> Tensor:
    """What the adapters add to the product: [T, N] float32, row by row."""
    out = torch.zeros(len(x), sum(weights.rows), device=x.device)
    for row, slot in enumerate(slots):
        start = 0
        for part, n in enumerate(weights.rows if slot >= 0 else ()):
            h = weights.a[slot, part * weights.rank :][: weights.rank].float() @ x[row].float()
            out[row, start : start + n] = weights.b[slot, start : start + n].float() @ h
            start += n
    return out


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXES = (([-1, 0], False), ([0, 0, 2], False), ([2, -1, 0, 1, 2], True))  # (slots, with a residual)
SHAPES = (  # (parts, inputs, rank, normed)
    ((24, 8, 8), 48, 16, True), ((40, 40), 32, 32, True), ((56,), 1100, 16, False), ((8,), 4100, 16, True))


@pytest.mark.parametrize(("few_rows", "dtype"), [(256, torch.float32), (256, torch.float16), (0, torch.float16)])  # 0: tiles
@pytest.mark.parametrize(("rows", "k", "rank", "normed"), SHAPES)
def test_delta_is_what_each_rows_adapter_adds(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...], k: int, rank: int, normed: bool, few_rows: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(tuning, "LORA_FEW_ROWS", few_rows)
    weights, ranks = make(rows, k, rank, dtype, DEVICE)
    norm = (1 + torch.randn(k, device=DEVICE).to(dtype) / 4, 1e-5) if normed else None
    for slots, added in MIXES:
        x, residual = (torch.randn(len(slots), n, device=DEVICE).to(dtype) for n in (k, sum(rows)))
        step = backend.prepare_lora(torch.tensor(slots, dtype=torch.int32, device=DEVICE), ranks)
        want_x = x if norm is None else rms_norm(x, *norm)
        want = (changes(want_x, weights, slots) + (residual.float() if added else 0)).to(dtype)
        got, got_x = backend.lora_delta(x, weights, step, norm=norm, residual=residual.clone() if added else None)
        tolerance = 1e-4 if dtype == torch.float32 else 6e-2
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got_x, want_x, atol=1e-3, rtol=1e-3)


def test_calls_of_a_step_share_no_words_and_no_results() -> None:
    """Later calls of a step have other inputs and other widths, and more of them than one fill of memory makes words for."""
    lora = pytest.importorskip("minivllm.kernels.triton.lora", reason="Triton is not installed")
    slots = [1, -1, 1]
    narrow, ranks = make((24,), 48, 16, torch.float32, DEVICE)
    wide, _ = make((24, 8), 48, 16, torch.float32, DEVICE)
    step = lora.prepare_lora(torch.tensor(slots, dtype=torch.int32, device=DEVICE), ranks)
    first = step.take_words(2)
    assert first.tolist() == [lora.EMPTY] * 2
    assert first.data_ptr() != step.take_words(2).data_ptr()
    for weights in (narrow, wide, narrow, wide):
        x = torch.randn(3, 48, device=DEVICE)
        torch.testing.assert_close(lora.lora_delta(x, weights, step)[0], changes(x, weights, slots), atol=1e-4, rtol=1e-4)


def test_numbers_that_are_no_numbers_arrive() -> None:
    """The bits that mark a word as empty are a NaN, which may be an input."""
    lora = pytest.importorskip("minivllm.kernels.triton.lora", reason="Triton is not installed")
    weights, ranks = make((24,), 48, 16, torch.float32, DEVICE)
    x = torch.full((2, 48), lora.EMPTY, dtype=torch.int32, device=DEVICE).view(torch.float32)
    step = lora.prepare_lora(torch.tensor([1, -1], dtype=torch.int32, device=DEVICE), ranks)
    delta = lora.lora_delta(x, weights, step)[0]
    assert delta[0].isnan().all()
    assert (delta[1] == 0).all()


@pytest.mark.parametrize("slot", [0, 1, -1])
@pytest.mark.parametrize(("rows", "k", "rank", "gated"), [
    ((24, 8, 8), 48, 16, False), ((40, 40), 600, 16, True), ((40, 40), 32, 48, True), ((56,), 1100, 32, False)])
def test_one_row_is_the_product_with_its_adapter(rows: tuple[int, ...], k: int, rank: int, gated: bool, slot: int) -> None:
    lora = pytest.importorskip("minivllm.kernels.triton.lora", reason="Triton is not installed")
    weights, ranks = make(rows, k, rank, torch.float32, DEVICE)
    weight, bias, x = (torch.randn(*shape, device=DEVICE) / k**0.5 for shape in ((sum(rows), k), (sum(rows),), (1, k)))
    norm = None if len(rows) == 1 else (1 + torch.randn(k, device=DEVICE) / 4, 1e-5)
    residual = torch.randn(1, sum(rows), device=DEVICE) if len(rows) == 1 else None
    step = lora.prepare_lora(torch.tensor([slot], dtype=torch.int32, device=DEVICE), ranks)
    got = lora.lora_linear(x, weight, bias, weights, step, norm=norm, gated=gated, residual=None if residual is None else residual.clone())
    normed = x if norm is None else rms_norm(x, *norm)
    want = fused_linear(normed, weight, bias) + changes(normed, weights, [slot])
    want = silu_and_mul(want) if gated else want
    torch.testing.assert_close(got, want if residual is None else want + residual, atol=1e-4, rtol=1e-4)


def test_one_row_declines_what_it_has_no_kernel_for() -> None:
    lora = pytest.importorskip("minivllm.kernels.triton.lora", reason="Triton is not installed")
    for slots, rows in (([0, 1], (24,)), ([0], (23, 8))):
        weights, ranks = make(rows, 48, 16, torch.float32, DEVICE)
        step = lora.prepare_lora(torch.tensor(slots, dtype=torch.int32, device=DEVICE), ranks)
        x, weight = torch.zeros(len(slots), 48, device=DEVICE), torch.zeros(sum(rows), 48, device=DEVICE)
        assert lora.lora_linear(x, weight, None, weights, step) is None
