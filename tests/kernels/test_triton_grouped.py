"""The Triton kernels for packed weights equal their specification, in the interpreter or on a GPU."""
from __future__ import annotations

import dataclasses
import itertools
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
from minivllm.kernels.triton import fp8, packed_weight  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = (1, 5, 20, 70)


def on_device(weight: GroupedWeight) -> GroupedWeight:
    changed: dict[str, Any] = {f.name: v.to(DEVICE) for f in dataclasses.fields(weight) if isinstance(v := getattr(weight, f.name), Tensor)}
    return dataclasses.replace(weight, **changed)


def pack(weight: GroupedWeight) -> Any:
    """For the kernels."""
    packed = packed_weight.pack_groups(weight)
    assert isinstance(packed, packed_weight.PackedWeight), "the kernels cover it"
    return packed


CASES = [*((kind, 1) for kind in KINDS), *((kind, rows) for kind in ("awq", "q5_k", "fp8 per output") for rows in ROWS[1:])]


@pytest.mark.parametrize(("kind", "rows"), CASES)
def test_products_equal_the_reference(kind: str, rows: int) -> None:
    # The interpreter multiplies no bfloat16 matrices.
    dtype = torch.bfloat16 if DEVICE.type == "cuda" and rows != 5 else torch.float16
    weight = on_device(random_weight(kind))
    packed, theirs = pack(weight), reference.pack_groups(weight)
    x, norm, bias = (t.to(DEVICE, dtype) for t in (torch.randn(rows, 256), torch.rand(256) + 0.5, torch.randn(24)))
    before = {"norm": (norm, 1e-5)}
    for options in ([{}, before | {"bias": bias}] if rows == 1 else [before | {"gated": True}]):
        residual = torch.randn(rows, 12 if "gated" in options else 24, device=DEVICE).to(dtype)
        want = reference.grouped_linear(x.float(), theirs, **_widened(options), residual=residual.float())
        got = grouped.grouped_linear(x, packed, **options, residual=residual.clone())
        torch.testing.assert_close(got.float(), want, atol=0.02 * want.abs().max().item(), rtol=0.02)
    assert not packed.finished.any(), "every split counter is zero again"


@pytest.mark.parametrize(("kind", "outputs"), list(zip(KINDS, itertools.cycle((4, 8, 2)))))
def test_one_row_is_multiplied_with_several_outputs_at_a_time(kind: str, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gated, with inputs that are no multiple of a program's words, and outputs that are no multiple of its outputs."""
    monkeypatch.setattr(tuning, "packed_row_tile", lambda *shape: (outputs, 256))
    weight = on_device(random_weight(kind, n=12, k=1280))
    tensors = torch.randn(1, 1280), torch.rand(1280) + 0.5, torch.randn(12), torch.randn(1, 6)
    x, norm, bias, residual = (t.half().to(DEVICE) for t in tensors)
    options = {"norm": (norm, 1e-5), "bias": bias, "gated": True}
    want = reference.grouped_linear(x.float(), reference.pack_groups(weight), **_widened(options), residual=residual.float())
    got = grouped.grouped_linear(x, pack(weight), **options, residual=residual.clone())
    torch.testing.assert_close(got.float(), want, atol=2e-3 * want.abs().max().item(), rtol=2e-3)


def test_inputs_are_split_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = on_device(random_weight("q4_1", n=48, k=256))
    packed, theirs = pack(weight), reference.pack_groups(weight)
    x, norm = torch.randn(3, 256, device=DEVICE).half(), (torch.ones(256, device=DEVICE).half(), 1e-5)
    for gated, splits in ((False, 3), (True, 2)):
        want = reference.grouped_linear(x.float(), theirs, norm=(norm[0].float(), norm[1]), gated=gated)
        tile = tuning.PackedTile(4, 16, 16, 2, 3, splits)
        monkeypatch.setattr(tuning, "packed_tile", lambda *shape, tile=tile: tile)
        got = grouped.grouped_linear(x, packed, norm=norm, gated=gated)
        torch.testing.assert_close(got.float(), want, atol=0.01 * want.abs().max().item(), rtol=0.01)
    assert not packed.finished.any()


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_quantized_after_the_norm(packed: bool) -> None:
    x, norm = torch.randn(3, 64, device=DEVICE) * 50, (torch.rand(64, device=DEVICE) + 0.5, 1e-5)
    quantized, scales = fp8.quantize_rows(x, norm, packed=packed)
    want, want_scales = reference.quantize_rows(rms_norm(x, *norm))
    order = torch.arange(64).view(2, 2, 16).transpose(1, 2).flatten() if packed else torch.arange(64)
    torch.testing.assert_close(scales, want_scales)
    # Triton's interpreter loses the carry when a mantissa rounds up to the next power of two.
    assert (quantized.float() == want.float()[:, order]).float().mean() > 0.95
    static, scales = fp8.quantize_rows(x, None, torch.tensor(2.0, device=DEVICE), packed=packed)
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
    got = grouped.grouped_rows(pack(weight), ids, torch.float32)
    torch.testing.assert_close(got, dequantize(weight)[ids], atol=1e-6, rtol=1e-5)


def weight_of(bits: int, group: int, k: int, *, zeros: bool, n: int = 24) -> GroupedWeight:
    """Integers with a scale per `group` inputs."""
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (k, n), dtype=torch.uint8).t()  # not contiguous, as methods bring them
    scales = torch.rand(n, k // group).half() * 0.02
    zero = torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8) if zeros else 1 << bits - 1
    return on_device(GroupedWeight(codes=codes, bits=bits, scales=scales, zeros=zero))


UNUSUAL = [(4, 576, 576, True), (4, 192, 576, False), (8, 192, 384, True), (4, 96, 288, True), (4, 48, 144, False), (4, 192, 192, False),
           (4, 1000, 1000, False), (8, 1056, 1056, False), (4, 1000, 1000, True), (4, 8, 64, False), (4, 24, 72, True)]


@pytest.mark.parametrize(("bits", "group", "k", "zeros"), UNUSUAL)
def test_groups_and_inputs_of_unusual_sizes(bits: int, group: int, k: int, zeros: bool) -> None:
    weight = weight_of(bits, group, k, zeros=zeros)
    packed, dense = packed_weight.pack_groups(weight), dequantize(weight)
    assert isinstance(packed, reference.PackedGroups) == (group % 16 > 0 and (zeros or group < k)), "only these are left to the reference"
    for rows in (0, 1, 2):
        x = torch.randn(rows, k, device=DEVICE).half()
        want = x.float() @ dense.t()
        torch.testing.assert_close(grouped.grouped_linear(x, packed).float(), want, atol=0.02, rtol=0.01)
    ids = torch.tensor([23, 1], device=DEVICE)
    for some in (ids, ids.int(), *([] if isinstance(packed, reference.PackedGroups) else [ids[:0]])):
        torch.testing.assert_close(grouped.grouped_rows(packed, some, torch.float32), dense[some.long()], atol=1e-6, rtol=1e-5)


def test_packing_in_slices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("q4_0", "q5_0", "q6_k", "q8_0"):
        weight = on_device(random_weight(kind))
        whole = pack(weight)
        with monkeypatch.context() as patch:
            patch.setattr(packed_weight, "PACKED_CODES", 5 * 256)
            again = pack(weight)
        assert all(torch.equal(a, b) for a, b in zip(whole.planes, again.planes, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_reference(kind: str) -> None:
    weight = on_device(random_weight(kind))
    theirs = reference.pack_groups(weight)
    rest = (theirs.rest.scales, theirs.rest.zeros, theirs.rest.mins, theirs.rest.super_scales, theirs.rest.super_mins)
    want = sum(t.nbytes for t in (*theirs.planes, *rest) if isinstance(t, Tensor))
    more = weight.zeros.numel() if isinstance(weight.zeros, Tensor) else 0  # a zero next to its scale takes 16 bits, not 8
    assert sum({t.data_ptr(): t.nbytes for t in pack(weight).planes}.values()) == want + more


@pytest.mark.parametrize(("arch", "kilobytes"), [(89, 99), (90, 227)])
def test_tiles_fit_into_shared_memory(arch: int, kilobytes: int) -> None:
    """An upper bound for every layer's shape: as if all stages of words and inputs were in shared memory."""
    for rows, n, k, bits, gated in itertools.product((2, 8, 16, 17, 32, 64), (64, 1024, 1536, 3072, 4096, 6144, 14336, 32768),
                                                     (576, 1024, 4096, 14336), (4, 5, 6, 8), (False, True)):
        tile = tuning.packed_tile(rows, n, k, bits, gated, arch)
        words = (1 + gated) * tile.block_n * tile.words * 2  # bytes
        inputs = tile.block_m * tile.words * (2 if bits == 8 else 4) * 2
        assert tile.num_stages * (words + inputs) <= kilobytes * 1024, (rows, n, k, bits, gated, tile)
