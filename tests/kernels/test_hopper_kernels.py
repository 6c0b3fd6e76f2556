"""The Gluon kernels for few decodes and few rows: compiled on Hopper and later, or else in Triton's interpreter on a CPU."""
from __future__ import annotations

from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch

from minivllm.kernels import tuning
from minivllm.kernels.reference import attention as attention_reference
from minivllm.kernels.reference import linear as linear_reference
from minivllm.kernels.reference import rope as rope_reference
from tests.kernels.paged import forget_new, fused, make_case

pytest.importorskip("triton", reason="Triton is not installed")
from minivllm.kernels.triton import attention, device, hopper_decode, hopper_linear, linear
from tests.kernels.gluon_interpreter import interpret

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter has no bfloat16 products
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 4e-2}

if DEVICE == "cuda" and device.capability(torch.device("cuda")) < 90:
    pytest.skip("these kernels serve Hopper and later GPUs", allow_module_level=True)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        for module in (attention, linear):
            monkeypatch.setattr(module, "capability", lambda device: 90)
        for module in (hopper_decode, hopper_linear):
            interpret(monkeypatch, module)


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[str]:
    calls, function = [], getattr(module, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lens", "heads", "head_dim", "tile"), [
    ((1, 2, 70), (4, 2), 128, (8, 1, 64)),
    ((200,), (4, 2), 128, (4, 4, 64)),
    ((300, 1, 65, 64), (3, 1), 64, (4, 16, 64)),
    ((129, 33), (8, 1), 64, (4, 2, 64)),
    ((150,), (2, 2), 128, (4, 32, 64)),
])
@pytest.mark.parametrize("normed", [False, True])
def test_few_decodes_equal_the_reference_and_store_the_same_keys(
    lens: tuple[int, ...], heads: tuple[int, int], head_dim: int, tile: tuple[int, int, int], normed: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "few_decodes_tile", lambda *args: tuning.FewDecodesTile(*tile))
    calls = count_calls(monkeypatch, hopper_decode, "attend_few")
    case = make_case([(1, n) for n in lens], heads=heads[0], kv_heads=heads[1], head_dim=head_dim, block_size=16, dtype=dtype,
                     device=DEVICE, seed=len(lens))
    qk_norm = ((1 + torch.rand(sum(heads), head_dim, device=DEVICE)).to(dtype), 1e-6) if normed else None
    rope = rope_reference.rope_angles(case.batch.positions, torch.rand(head_dim // 2, device=DEVICE), 1.0, dtype)
    results = []
    for backend in (attention, attention_reference):
        meta = backend.prepare_attention(case.batch, 0, block_size=16, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
                                         window=None, dtype=dtype)
        kv = forget_new(case)
        for _ in range(2):  # the second time, the counters of splits must be 0 again
            out = backend.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=head_dim**-0.5, rope=rope, qk_norm=qk_norm)
        results.append((out, kv.k.nan_to_num(99.0), kv.v.nan_to_num(99.0)))
    assert len(calls) == 2
    (got, keys, values), (want, want_keys, want_values) = results
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(keys, want_keys, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(values, want_values)
    if not normed:  # no rotation either: the key is stored as it is
        straight = torch.ones_like(rope[0]), torch.zeros_like(rope[1])
        meta = attention.prepare_attention(case.batch, 0, block_size=16, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
                                           window=None, dtype=dtype)
        kv = forget_new(case)
        attention.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=head_dim**-0.5, rope=straight)
        assert torch.equal(kv.k.nan_to_num(99.0), case.kv.k.nan_to_num(99.0))


@pytest.mark.parametrize("what", ["window", "soft cap", "no rotation", "several tokens"])
def test_what_the_kernel_of_few_decodes_lacks_is_computed_by_the_general_one(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, hopper_decode, "attend_few")
    width, window = (2 if what == "several tokens" else 1), (5 if what == "window" else None)
    dtype = torch.float16
    case = make_case([(width, 40)], heads=2, kv_heads=1, head_dim=64, block_size=16, dtype=dtype, device=DEVICE, query_width=width)
    meta = attention.prepare_attention(case.batch, 0, block_size=16, num_heads=2, num_kv_heads=1, head_dim=64, window=window, dtype=dtype)
    rope = rope_reference.rope_angles(case.batch.positions, torch.rand(32, device=DEVICE), 1.0, dtype)
    attention.self_attention(fused(case), forget_new(case), case.batch.slots[0], meta, scale=0.1,
                             rope=None if what == "no rotation" else rope, softcap=5.0 if what == "soft cap" else None)
    assert not calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k", "kind", "tile"), [
    (2, 32, 1024, "norm", (16, 1024, 4)),
    (8, 64, 512, "gated", (16, 256, 4)),
    (5, 32, 1024, "gated", (16, 512, 8)),
    (8, 64, 768, "added", (32, 256, 8)),
    (3, 32, 2048, "added", (16, 2048, 8)),
    (16, 32, 512, "norm", (16, 512, 4)),
])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_equal_the_reference(rows: int, n: int, k: int, kind: str, tile: tuple[int, int, int], biased: bool, dtype: torch.dtype,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "hopper_linear_tile", lambda *args: tuning.LinearTile(*tile))
    calls = count_calls(monkeypatch, hopper_linear, "few_rows")
    gen = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(DEVICE, dtype)

    gated, normed = kind == "gated", kind != "added"
    x, weight = random(rows, k), random(n * (1 + gated), k) * k**-0.5
    bias, residual = random(n * (1 + gated)) if biased else None, random(rows, n) if kind == "added" else None
    norm = (random(k).abs() / 2, 1e-5) if normed else None
    if normed and dtype == torch.float16:  # `fused_linear` does not choose it, but nothing overflows here
        got = torch.empty(rows, n, dtype=dtype, device=DEVICE)
        hopper_linear.few_rows(got, x, weight, bias, norm, gated, residual, tuning.LinearTile(*tile))
    else:
        got = linear.fused_linear(x, weight, bias, norm=norm, gated=gated, residual=residual)
    assert len(calls) == 1
    want = linear_reference.fused_linear(x, weight, bias, norm=norm, gated=gated, residual=None if residual is None else residual.clone())
    torch.testing.assert_close(got, want, atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_norm_in_float16_keeps_the_kernel_that_cannot_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "hopper_linear_tile", lambda *args: tuning.LinearTile(16, 256, 4))
    calls = count_calls(monkeypatch, hopper_linear, "few_rows")
    x = torch.full((2, 256), 6e4, dtype=torch.float16, device=DEVICE)
    weight = torch.full((32, 256), 1 / 256, dtype=torch.float16, device=DEVICE)
    got = linear.fused_linear(x, weight, norm=(torch.full((256,), 4.0, dtype=torch.float16, device=DEVICE), 1e-5))
    torch.testing.assert_close(got, torch.full_like(got, 4.0), atol=4e-3, rtol=4e-3)
    assert not calls


def test_tiles_divide_the_weight_and_give_each_warp_whole_instructions() -> None:
    sizes = product((8, 16), (96, 576, 1024, 1536, 6144, 151936), (576, 896, 1536, 2560, 3072, 4864, 9728, 14336), (False, True))
    for rows, n, k, gated in sizes:
        tile = tuning.hopper_linear_tile(rows, n, k, gated, 2, 90)
        assert tile is None or (n % tile.block_n == 0 and k % tile.block_k == 0 and tile.block_k // tile.num_warps >= 32), (n, k, gated)


def test_splits_make_256_programs_where_sequences_are_few_enough() -> None:
    for programs, keys in product(range(1, 65), (1, tuning.LONG_KEYS, tuning.LONG_KEYS + 1, 16384)):
        tile = tuning.few_decodes_tile(programs, keys, 128, 2, 2, 90)
        assert tile is not None and tile.min_keys % (16 * tile.num_warps) == 0, "a split begins with a whole tile"
        if keys <= tuning.LONG_KEYS:
            assert tile.splits == 8 or programs * tile.splits <= 256 < programs * (tile.splits + 1), programs
        else:
            assert tile.splits in (8, 32) or programs * tile.splits <= 256 < programs * (tile.splits + 1), programs


def test_more_rows_use_these_kernels_for_small_weights_only() -> None:
    small, large = (partial(tuning.hopper_linear_tile, n=n, k=4096, gated=False, itemsize=2, arch=90) for n in (1024, 6144))
    assert [small(rows) is not None for rows in (1, 2, 8, 9, 16, 17)] == [False, True, True, True, True, False]
    assert [large(rows) is not None for rows in (1, 2, 8, 9, 16, 17)] == [False, True, True, False, False, False]


def test_kernels_that_cannot_be_imported_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    device.gluon_kernels.cache_clear()
    assert [device.gluon_kernels("no_such_kernels") for _ in range(2)] == [None, None]
    assert len(caplog.records) == 1 and "Slower kernels replace those of no_such_kernels.py" in caplog.text
