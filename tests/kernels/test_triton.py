"""Each Triton kernel against the PyTorch reference: compiled on a CUDA device, or else in Triton's interpreter on a CPU."""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import kernels
from minivllm.kernels import tuning
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference import activation as activation_reference
from minivllm.kernels.reference import attention as attention_reference
from minivllm.kernels.reference import linear as linear_reference
from minivllm.kernels.reference import norm as norm_reference
from minivllm.kernels.reference import rope as rope_reference
from tests.kernels.paged import forget_new, fused, make_case, naive_attention

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from minivllm.kernels.triton import activation, attention, device, linear, norm, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes in numpy, which has no bfloat16 products.
DTYPES = [torch.float32, torch.bfloat16]
DOT_DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
HALF_ULP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative: both round once more than the definition


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = HALF_ULP[got.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def same_cache(a: KVLayer, b: KVLayer) -> bool:
    return all(torch.equal(x.nan_to_num(99.0), y.nan_to_num(99.0)) for x, y in ((a.k, b.k), (a.v, b.v)))


def check_attention(shape: list[tuple[int, int]], *, heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None = None,
                    softcap: float | None = None, dtype: torch.dtype = torch.float32, shared_keys: int = 0,
                    seed: int = 0) -> attention.TritonAttentionMeta:
    case = make_case(shape, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, window=window, dtype=dtype,
                     shared_keys=shared_keys, seed=seed, device=DEVICE)
    meta = attention.prepare_attention(case.batch, 0, block_size=block_size, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
                                       window=window, dtype=dtype)
    kv = forget_new(case)
    got = attention.self_attention(fused(case), kv, case.batch.slots[0], meta, scale=head_dim**-0.5, softcap=softcap)
    want = naive_attention(case, scale=head_dim**-0.5, window=window, softcap=softcap)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=HALF_ULP[dtype], rtol=HALF_ULP[dtype])
    assert same_cache(kv, case.kv)
    return meta


sequences = st.lists(
    st.one_of(
        st.integers(1, 90).map(lambda n: (1, n)),  # a decode
        st.integers(1, 40).map(lambda n: (n, n)),  # a whole prompt
        st.tuples(st.integers(2, 9), st.integers(1, 60)).map(lambda t: (t[0], t[0] + t[1])),  # a later chunk
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=8, deadline=None)
@given(
    shape=sequences,
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (8, 1)]),
    head_dim=st.sampled_from([8, 20]),
    block_size=st.sampled_from([1, 7, 16, 256]),
    window=st.none() | st.integers(1, 90),
    softcap=st.none() | st.just(5.0),
    dtype=st.sampled_from(DOT_DTYPES),
    seed=st.integers(0, 1000),
)
def test_attention_of_any_mix_over_scattered_poisoned_blocks_equals_a_dense_computation(
    shape: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, block_size: int, window: int | None, softcap: float | None,
    dtype: torch.dtype, seed: int,
) -> None:
    check_attention(shape, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, block_size=block_size, window=window, softcap=softcap,
                    dtype=dtype, seed=seed)


@pytest.mark.parametrize("window", [None, 300])
def test_the_keys_of_few_decodes_are_divided_into_splits_and_the_last_split_merges_them(window: int | None) -> None:
    meta = check_attention([(1, 700), (1, 3), (1, 130), (5, 30)], heads=2, kv_heads=1, head_dim=16, block_size=16, window=window)
    assert meta.splits > 1 and meta.parts is not None
    assert not meta.parts.finished.any(), "the counters must be zero for the next layer"


@settings(max_examples=12, deadline=None)
@given(
    own=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    runs=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (8, 1)]),
    head_dim=st.sampled_from([8, 20]),
    block_size=st.sampled_from([1, 4, 16]),
    softcap=st.none() | st.just(5.0),
    dtype=st.sampled_from(DOT_DTYPES),
    seed=st.integers(0, 1000),
)
def test_decodes_that_begin_with_the_same_blocks_read_them_once(
    own: list[int], runs: int, heads: tuple[int, int], head_dim: int, block_size: int, softcap: float | None,
    dtype: torch.dtype, seed: int,
) -> None:
    with patch.multiple(tuning, SHARED_KEYS_MULTIPLE=16, MIN_KEYS_PER_SPLIT=16):
        meta = check_attention([(1, 16 * runs + n) for n in own], heads=heads[0], kv_heads=heads[1], head_dim=head_dim,
                               block_size=block_size, softcap=softcap, dtype=dtype, shared_keys=16 * runs, seed=seed)
    assert meta.shared_parts


def test_a_sliding_window_does_not_share() -> None:
    meta = check_attention([(1, 20), (1, 18)], heads=2, kv_heads=1, head_dim=8, block_size=4, window=19, shared_keys=16)
    assert not meta.shared_parts


def test_a_prefix_that_is_shared_by_many_sequences_needs_several_programs() -> None:
    meta = check_attention([(1, 256 + n) for n in range(1, 40)], heads=4, kv_heads=1, head_dim=16, block_size=16, shared_keys=256)
    assert meta.shared_parts == 4 and meta.num_decodes * 4 > 2 * 64
    assert meta.parts is not None and not meta.parts.finished.any(), "the counters must be zero for the next layer"


def test_a_prefix_of_no_shared_keys_changes_nothing() -> None:
    case = make_case([(1, 300), (1, 20)], heads=4, kv_heads=2, head_dim=16, block_size=16, device=DEVICE)
    batch = replace(case.batch, shared=torch.zeros(1, dtype=torch.int32, device=DEVICE))
    meta = attention.prepare_attention(batch, 0, block_size=16, num_heads=4, num_kv_heads=2, head_dim=16, window=None, dtype=torch.float32)
    assert meta.shared_parts
    got = attention.self_attention(fused(case), forget_new(case), batch.slots[0], meta, scale=0.25)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), naive_attention(case, scale=0.25), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (9, 3)])
def test_new_keys_are_stored_and_queries_rotated_as_in_the_reference(heads: tuple[int, int]) -> None:
    case = make_case([(1, 9), (1, 3), (6, 11), (4, 4)], heads=heads[0], kv_heads=heads[1], head_dim=20, device=DEVICE)
    qk_norm = torch.randn(sum(heads), 20, device=DEVICE), 1e-6
    rope = rope_reference.rope_angles(case.batch.positions, torch.rand(10, device=DEVICE), 1.0, torch.float32)
    results = []
    for backend in (attention, attention_reference):
        meta = backend.prepare_attention(case.batch, 0, block_size=4, num_heads=heads[0], num_kv_heads=heads[1], head_dim=20, window=None,
                                      dtype=torch.float32)
        kv = forget_new(case)
        queries = backend.store_kv(fused(case), kv, case.batch.slots[0], meta, rope=rope, qk_norm=qk_norm)
        results.append((queries, kv.k.nan_to_num(99.0), kv.v.nan_to_num(99.0)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", [89, 90])
def test_decodes_of_any_size_use_kernels_that_are_compiled_at_start(kv_heads: int, head_dim: int, arch: int) -> None:
    def variant(seqs: int, keys: int) -> tuple[int, tuning.AttentionTile | None, bool]:
        programs = seqs * kv_heads
        if few := tuning.few_decodes_tile(programs, keys, head_dim, 2, 2, arch):
            return few.num_warps, None, False
        split = tuning.num_splits(programs, keys, 132 if arch == 90 else 24) > 1
        return 0, tuning.decode_tile(programs, keys, head_dim, 2, 2, arch), split

    compiled = {variant(seqs, keys) for seqs in tuning.DECODE_GRAPHS for keys in (1, tuning.SHORT_KEYS, 16384)}
    for seqs in range(1, tuning.DECODE_GRAPHS[-1] + 1):
        assert {variant(seqs, keys) for keys in (1, 200, 256, 257, 512, 513, 1500, 16384)} <= compiled, seqs


@settings(max_examples=6, deadline=None)
@given(
    shape=sequences,
    heads=st.sampled_from([(4, 2), (9, 3)]),
    head_dim=st.sampled_from([8, 20]),
    normed=st.booleans(),
    roped=st.booleans(),
    dtype=st.sampled_from(DOT_DTYPES),
    seed=st.integers(0, 1000),
)
def test_heads_are_normalized_and_rotated_before_they_attend_as_in_the_reference(
    shape: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, normed: bool, roped: bool, dtype: torch.dtype, seed: int,
) -> None:
    case = make_case(shape, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype, seed=seed, device=DEVICE)
    qkv = fused(case)
    qk_norm = (torch.randn(sum(heads), head_dim, device=DEVICE).to(dtype), 1e-6) if normed else None
    rope = rope_reference.rope_angles(case.batch.positions, torch.rand(head_dim // 2, device=DEVICE), 1.0, dtype) if roped else None
    results = []
    for backend in (attention, attention_reference):
        meta = backend.prepare_attention(case.batch, 0, block_size=4, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
                                      window=None, dtype=dtype)
        kv = forget_new(case)
        out = backend.self_attention(qkv, kv, case.batch.slots[0], meta, scale=head_dim**-0.5, rope=rope, qk_norm=qk_norm)
        results.append((out, kv.k.nan_to_num(99.0), kv.v.nan_to_num(99.0)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=4 * HALF_ULP[dtype], rtol=4 * HALF_ULP[dtype])


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 16, 17, 32, 33]),
    width=st.sampled_from([16, 40, 300]),
    columns=st.sampled_from([1, 8, 50]),
    normed=st.booleans(), gated=st.booleans(), biased=st.booleans(), added=st.booleans(),
    dtype=st.sampled_from(DOT_DTYPES),
    seed=st.integers(0, 99),
)
def test_a_linear_layer_with_norm_gate_and_residual_equals_the_reference(
    rows: int, width: int, columns: int, normed: bool, gated: bool, biased: bool, added: bool, dtype: torch.dtype, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(DEVICE, dtype)

    x, weight = random(rows, width), random(columns * (1 + gated), width) * width**-0.5
    bias = random(columns * (1 + gated)) if biased else None
    norm_of = (random(width), 1e-5) if normed else None
    residual = random(rows, columns) if added else None

    def run(backend: object) -> torch.Tensor:
        return backend.fused_linear(x, weight, bias, norm=norm_of, gated=gated, residual=None if residual is None else residual.clone())

    torch.testing.assert_close(run(linear), run(linear_reference), atol=6 * HALF_ULP[dtype], rtol=4 * HALF_ULP[dtype])


def test_a_norm_in_float16_does_not_overflow() -> None:
    x = torch.full((2, 32), 6e4, dtype=torch.float16, device=DEVICE)
    weight = torch.full((8, 32), 1 / 32, dtype=torch.float16, device=DEVICE)
    got = linear.fused_linear(x, weight, norm=(torch.full((32,), 4.0, dtype=torch.float16, device=DEVICE), 1e-5))
    close(got, torch.full((2, 8), 4.0, dtype=torch.float16, device=DEVICE))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 99))
def test_norms_equal_the_reference(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((rows, width), (width,)))
    close(norm.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 80, 1500])
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations_equal_the_reference(name: str, dtype: torch.dtype, width: int) -> None:
    x = 3 * torch.randn(3, 2 * width, device=DEVICE).to(dtype)
    close(getattr(activation, name)(x), getattr(activation_reference, name)(x))


@pytest.mark.parametrize("half", [4, 10, 64])
def test_rope_angles_equal_the_reference_at_small_and_large_positions(half: int) -> None:
    positions = torch.tensor([0, 1, 77, 4095, 131071], device=DEVICE)
    inv_freq = 10000.0 ** -(torch.arange(half, device=DEVICE) / half)
    backends = [backend.rope_angles(positions, inv_freq, 1.1, torch.float32) for backend in (rope, rope_reference)]
    for got, want in zip(*backends, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@triton.jit
def _mark(flag):
    tl.store(flag, 1.0)


@pytest.mark.gpu
def test_kernels_launched_while_compiling_in_parallel_do_not_run_but_are_compiled() -> None:
    flag = torch.zeros(1, device="cuda")
    with device.compiling_in_parallel():
        device.launch(_mark, (1,), flag, num_warps=1)
    assert flag.item() == 0.0
    device.launch(_mark, (1,), flag, num_warps=1)
    assert flag.item() == 1.0
    with pytest.raises(ZeroDivisionError), device.compiling_in_parallel():
        raise ZeroDivisionError
    device.launch(_mark, (1,), flag.zero_(), num_warps=1)
    assert flag.item() == 1.0  # after an error inside, kernels run again


def test_long_sequences_are_split_more_finely_and_many_of_them_only_in_two() -> None:
    short = [tuning.num_splits(8 * seqs, 512, 132) for seqs in (1, 8, 16, 17, 64, 256)]
    long = [tuning.num_splits(8 * seqs, 16384, 132) for seqs in (1, 8, 16, 17, 64, 66, 256)]
    assert short == [2, 2, 2, 1, 1, 1]
    assert long == [16, 16, 8, 2, 2, 1, 1]


class Logged:
    """A kernel that records whether it was run or compiled."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[[], None]:
        return lambda: self.log.append("run")

    def warmup(self, grid: tuple[int, ...]) -> None:
        self.log.append("compiled")


def test_kernels_of_other_threads_run_while_one_thread_compiles() -> None:
    kernel = Logged()
    with device.compiling_in_parallel():
        other = Thread(target=device.launch, args=(kernel, (1,)))
        other.start()
        other.join()
        device.launch(kernel, (1,))
    device.launch(kernel, (1,))
    assert kernel.log == ["run", "compiled", "run"]


def test_without_triton_the_pytorch_kernels_are_selected_for_a_gpu_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    class Missing:
        def find_spec(self, name: str, *args: object) -> None:
            if name == "minivllm.kernels.triton":
                raise ImportError(name)

    for name in [name for name in sys.modules if name.startswith("minivllm.kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(kernels, "triton")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert kernels.select(torch.device("cuda")) is kernels.REFERENCE
    assert "pip install triton" in caplog.text
