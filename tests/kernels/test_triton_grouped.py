"""The Triton kernels for packed weights equal their specification, in the interpreter or on a GPU."""
from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.grouped import GroupedWeight, dequantize
from minivllm.kernels.reference import grouped as reference
from minivllm.kernels.reference.norm import rms_norm
from tests.kernels.test_grouped import KINDS, random_weight

grouped = pytest.importorskip("minivllm.kernels.triton.grouped")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = (1, 5, 20, 70)


def on_device(weight: GroupedWeight) -> GroupedWeight:
    changed: dict[str, Any] = {f.name: v.to(DEVICE) for f in dataclasses.fields(weight) if isinstance(v := getattr(weight, f.name), Tensor)}
    return dataclasses.replace(weight, **changed)


CASES = [*((kind, 1) for kind in KINDS), *((kind, rows) for kind in ("awq", "q5_k", "fp8 per output") for rows in ROWS[1:])]


@pytest.mark.parametrize(("kind", "rows"), CASES)
def test_products_equal_the_reference(kind: str, rows: int) -> None:
    # The interpreter multiplies no bfloat16 matrices.
    dtype = torch.bfloat16 if DEVICE.type == "cuda" and rows != 5 else torch.float16
    weight = on_device(random_weight(kind))
    packed, theirs = grouped.pack_groups(weight), reference.pack_groups(weight)
    x, norm, bias = (t.to(DEVICE, dtype) for t in (torch.randn(rows, 256), torch.rand(256) + 0.5, torch.randn(24)))
    before = {"norm": (norm, 1e-5)}
    for options in ([{}, before | {"bias": bias}] if rows == 1 else [before | {"gated": True}]):
        residual = torch.randn(rows, 12 if "gated" in options else 24, device=DEVICE).to(dtype)
        want = reference.grouped_linear(x.float(), theirs, **_widened(options), residual=residual.float())
        got = grouped.grouped_linear(x, packed, **options, residual=residual.clone())
        torch.testing.assert_close(got.float(), want, atol=0.02 * want.abs().max().item(), rtol=0.02)
    assert not packed.finished.any(), "every split counter is zero again"


def test_inputs_are_split_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = on_device(random_weight("q4_1", n=48, k=256))
    packed, theirs = grouped.pack_groups(weight), reference.pack_groups(weight)
    x, norm = torch.randn(3, 256, device=DEVICE).half(), (torch.ones(256, device=DEVICE).half(), 1e-5)
    for gated, splits in ((False, 3), (True, 2)):
        want = reference.grouped_linear(x.float(), theirs, norm=(norm[0].float(), norm[1]), gated=gated)
        tile = tuning.PackedTile(4, 16, 16, 2, 1, 3, splits)
        monkeypatch.setattr(tuning, "packed_tile", lambda *shape, tile=tile: tile)
        got = grouped.grouped_linear(x, packed, norm=norm, gated=gated)
        torch.testing.assert_close(got.float(), want, atol=0.01 * want.abs().max().item(), rtol=0.01)
    assert not packed.finished.any()


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_quantized_after_the_norm(packed: bool) -> None:
    x, norm = torch.randn(3, 64, device=DEVICE) * 50, (torch.rand(64, device=DEVICE) + 0.5, 1e-5)
    quantized, scales = grouped.quantize_rows(x, norm, packed=packed)
    want, want_scales = reference.quantize_rows(rms_norm(x, *norm))
    order = torch.arange(64).view(2, 2, 16).transpose(1, 2).flatten() if packed else torch.arange(64)
    torch.testing.assert_close(scales, want_scales)
    # Triton's interpreter loses the carry when a mantissa rounds up to the next power of two.
    assert (quantized.float() == want.float()[:, order]).float().mean() > 0.95
    static, scales = grouped.quantize_rows(x, None, torch.tensor(2.0, device=DEVICE), packed=packed)
    assert bool((scales == 2).all())
    assert ((static.float() * 2 - x[:, order]).abs() <= 0.02 + 0.0625 * x[:, order].abs()).float().mean() > 0.95


def _widened(options: dict[str, Any]) -> dict[str, Any]:
    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) else tuple(map(wide, value)) if isinstance(value, tuple) else value

    return {name: wide(value) for name, value in options.items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8 blocks"])
def test_rows_of_a_table_are_exact(kind: str) -> None:
    weight = on_device(random_weight(kind, k=192 if "k" not in kind and "fp8" not in kind and "int8" not in kind else 256))
    ids = torch.tensor([3, 0, 3, 23], device=DEVICE)
    got = grouped.grouped_rows(grouped.pack_groups(weight), ids, torch.float32)
    torch.testing.assert_close(got, dequantize(weight)[ids], atol=1e-6, rtol=1e-5)
