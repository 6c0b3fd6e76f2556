"""Each Triton kernel against its PyTorch twin: in Triton's interpreter on a CPU, compiled where there is a CUDA device."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference import activation as activation_twin
from minivllm.kernels.reference import kv_cache as kv_cache_twin
from minivllm.kernels.reference import norm as norm_twin
from minivllm.kernels.reference import rope as rope_twin
from tests.kernels.paged import make_case, naive_attention

pytest.importorskip("triton", reason="Triton is not installed")
from minivllm.kernels.triton import activation, attention, kv_cache, norm, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes in numpy, which has no bfloat16 products.
DTYPES = [torch.float32, torch.bfloat16]
DOT_DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
HALF_ULP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative: both twins round once more than the definition


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = HALF_ULP[got.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def check_attention(shape: list[tuple[int, int]], *, heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None = None,
                    softcap: float | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> attention.AttentionMeta:
    case = make_case(shape, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, window=window, dtype=dtype,
                     seed=seed, device=DEVICE)
    meta = attention.prepare_attention(case.batch, 0, block_size=block_size, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
                                       window=window, dtype=dtype)
    got = attention.attention(case.q, case.kv, meta, scale=head_dim**-0.5, softcap=softcap)
    want = naive_attention(case, scale=head_dim**-0.5, window=window, softcap=softcap)
    torch.testing.assert_close(got.cpu().double(), want, atol=HALF_ULP[dtype], rtol=HALF_ULP[dtype])
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
def test_attention_of_any_mix_over_scattered_poisoned_blocks_equals_hand_written_maths(
    shape: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, block_size: int, window: int | None, softcap: float | None,
    dtype: torch.dtype, seed: int,
) -> None:
    check_attention(shape, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, block_size=block_size, window=window, softcap=softcap,
                    dtype=dtype, seed=seed)


@pytest.mark.parametrize("window", [None, 300])
def test_few_decodes_share_their_keys_out_over_splits_and_the_merge_equals_the_whole(window: int | None) -> None:
    meta = check_attention([(1, 700), (1, 3), (5, 30)], heads=2, kv_heads=1, head_dim=16, block_size=16, window=window)
    assert meta.launches[0].splits > 1


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 99))
def test_norms_equal_their_twins(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, residual, weight = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((rows, width), (rows, width), (width,)))
    close(norm.rms_norm(x, weight, 1e-5), norm_twin.rms_norm(x, weight, 1e-5))
    got, stream = norm.add_rms_norm(x, residual.clone(), weight, 1e-5)
    want, stream_twin = norm_twin.add_rms_norm(x, residual.clone(), weight, 1e-5)
    close(stream, stream_twin)
    close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_per_head_norm_rope_and_cache_write_equal_their_twins_on_slices_of_a_fused_projection(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(1)
    qkv = torch.randn(5, 9, head_dim, device=DEVICE).to(dtype)  # 5 query heads, 2 key heads, 2 value heads
    weight = torch.randn(7, head_dim, device=DEVICE).to(dtype)
    close(norm.rms_norm(qkv[:, :7], weight, 1e-6), norm_twin.rms_norm(qkv[:, :7], weight, 1e-6))
    angles = rope_twin.rope_angles(torch.arange(5, device=DEVICE) * 9, torch.rand(head_dim // 2, device=DEVICE), 1.0, dtype)
    close(rope.apply_rope(qkv[:, :7], *angles), rope_twin.apply_rope(qkv[:, :7], *angles))
    slots = torch.tensor([3, 9, 20, 7, 1], device=DEVICE)
    ours, twins = (KVLayer(*(torch.full((6, 4, 2, head_dim), torch.nan, dtype=dtype, device=DEVICE) for _ in "kv")) for _ in range(2))
    kv_cache.write_kv(qkv[:, 5:7], qkv[:, 7:], ours, slots)
    kv_cache_twin.write_kv(qkv[:, 5:7], qkv[:, 7:], twins, slots)
    assert torch.equal(ours.k.nan_to_num(99.0), twins.k.nan_to_num(99.0)) and torch.equal(ours.v.nan_to_num(99.0), twins.v.nan_to_num(99.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 80, 1500])
def test_silu_and_mul_equals_its_twin(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(3, 2 * width, device=DEVICE).to(dtype)
    close(activation.silu_and_mul(x), activation_twin.silu_and_mul(x))
