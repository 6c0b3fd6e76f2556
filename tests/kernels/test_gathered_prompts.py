"""Prompt attention over keys in order. Its kernel needs a GPU of Hopper. On a CPU PyTorch takes its place, and what is around it runs."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.reference import attention as specification
from tests.kernels.paged import Case, forget_new, fused, make_case, naive_attention, quantized

pytest.importorskip("triton", reason="Triton is not installed")
from minivllm.kernels.triton import attention, gathered_prompts
from minivllm.kernels.triton.device import gluon_kernels
from minivllm.kernels.triton.gathered_prompts import group, order_keys

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
TILE = tuning.GATHER_TILE
CACHES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def attend(out: Tensor, q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, seq_lens: Tensor, key_start: Tensor, *, scale: float,
           first_head: int, kv_heads: int, heads_per_kv: int, seqs: tuple[int, int], num_tokens: int, k_column: int, v_column: int) -> None:
    """What `hopper_attention.attend` computes, with its tiles: a weight of 0 does not undo a value that is not finite."""
    d, begin = q.shape[2], query_start.tolist()
    assert num_tokens == begin[seqs[1]] - begin[seqs[0]]
    for b in range(*seqs):
        n = int(seq_lens[b])
        row = int(key_start[b] - key_start[seqs[0]])
        position = torch.arange(n - begin[b + 1] + begin[b], n)[:, None]
        for h in range(first_head * heads_per_kv, (first_head + kv_heads) * heads_per_kv):
            column = (h // heads_per_kv - first_head) * d
            keys, values = (x[row : row + -(-n // TILE) * TILE, c + column :][:, :d].float()
                            for x, c in ((k, k_column), (v, v_column)))
            scores = q[begin[b] : begin[b + 1], h].float() @ keys.T * scale
            scores = torch.where(torch.arange(len(keys)) <= position, scores, -torch.inf)
            out[begin[b] : begin[b + 1], h * d : (h + 1) * d] = (scores.softmax(-1) @ values).to(out.dtype)


@contextmanager
def on_this_device(workspace: int) -> Iterator[None]:
    """The kernel for short chunks too, and in a workspace of so many bytes. On a CPU the workspace holds NaN at first."""
    with patch.multiple(tuning, MIN_ORDERED_QUERIES=1, WORKSPACE_BYTES=workspace):
        if CUDA:
            yield
            return
        with patch.object(gathered_prompts, "hopper_kernel", lambda device: SimpleNamespace(attend=attend)):
            torch.use_deterministic_algorithms(True)
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(False)


def run(case: Case, kv: str = "", module: Any = attention) -> tuple[Tensor, Any]:
    """-> ([T, H, D], what `prepare_attention` returned)."""
    h, d, dtype = case.q.shape[1], case.q.shape[2], case.q.dtype
    meta = module.prepare_attention(case.batch, 0, block_size=case.block_size, num_heads=h, num_kv_heads=case.kv.k.shape[2], head_dim=d,
                                    window=None, dtype=dtype, **({"cache_dtype": CACHES[kv]} if kv else {}))
    return module.self_attention(fused(case), forget_new(case), case.batch.slots[0], meta, scale=d**-0.5).view(case.q.shape), meta


@pytest.mark.skipif(CUDA, reason="the next test runs the kernel itself")
@pytest.mark.parametrize(("shape", "rows", "kv", "passes"), [  # rows of the workspace, and (passes, KV heads of the first one)
    ([(9, 9), (12, 12)], 9, "", (1, 2)),
    ([(9, 300), (5, 5), (12, 257)], 1000, "", (1, 2)), ([(9, 300), (5, 5), (12, 257)], 512, "", (2, 2)),
    ([(9, 300), (5, 5), (12, 257)], 200, "fp8", (3, 1)), ([(9, 300), (5, 5)], 1000, "int8", (1, 2)),
    ([(1, 150), (1, 9), (6, 200), (11, 11)], 1000, "", (1, 2)), ([(1, 150), (1, 9), (6, 6), (11, 11)], 1000, "", (1, 2)),
])
def test_keys_are_read_in_order_by_one_pass_or_several(
    shape: list[tuple[int, int]], rows: int, kv: str, passes: tuple[int, int],
) -> None:
    case = make_case(shape, heads=4, kv_heads=2, head_dim=64, block_size=16, dtype=torch.float16)
    case = quantized(case, CACHES[kv]) if kv else case
    with on_this_device(rows * 2 * 2 * 64 * 2):
        got, meta = run(case, kv)
    assert meta.ordered is not None
    assert (meta.ordered.first_token is None) == any(1 < q < n for q, n in shape)
    assert (len(meta.ordered.passes), meta.ordered.passes[0].heads) == passes
    torch.testing.assert_close(got.double(), naive_attention(case, scale=0.125), atol=4e-3, rtol=4e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="the kernel is for Hopper")
@pytest.mark.parametrize(("heads", "dtype", "kv"), [
    ((16, 8, 128), torch.bfloat16, ""), ((16, 8, 128), torch.bfloat16, "fp8"), ((16, 8, 128), torch.bfloat16, "int8"),
    ((16, 8, 128), torch.float16, ""), ((32, 8, 128), torch.bfloat16, ""), ((4, 4, 128), torch.bfloat16, ""),
    ((9, 3, 64), torch.bfloat16, ""), ((8, 1, 64), torch.bfloat16, "")],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch."))
def test_the_kernel_computes_what_the_reference_computes(heads: tuple[int, int, int], dtype: torch.dtype, kv: str) -> None:
    for shape in ([(1000, 1000), (1, 1), (129, 129), (64, 64)], [(300, 1000), (129, 129), (64, 1064), (200, 4200)],
                  [(1, 700), (1, 33), (77, 1077), (500, 500), (1, 2), (2, 3001)]):
        case = make_case(shape, heads=heads[0], kv_heads=heads[1], head_dim=heads[2], block_size=16, dtype=dtype, device="cuda")
        case = quantized(case, CACHES[kv]) if kv else case
        want, _ = run(case, kv, specification)
        for rows in (32000, max(1100, 4224 // heads[1])):  # one KV head of the longest sequence fits
            with on_this_device(rows * heads[1] * heads[2] * 4):
                got, meta = run(case, kv)
            assert meta.ordered is not None
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="the kernel is for Hopper")
def test_a_long_past_and_large_scores_stay_exact() -> None:
    case = make_case([(500, 20000), (3000, 3000)], heads=4, kv_heads=2, head_dim=128, block_size=16, dtype=torch.bfloat16, device="cuda")
    case = replace(case, q=case.q * 20)
    got, meta = run(case)
    assert meta.ordered is not None
    torch.testing.assert_close(got, run(case, module=specification)[0], atol=2e-2, rtol=2e-2)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(1, 3000))
def test_sequences_are_grouped_in_their_order_and_within_the_workspace(lens: list[int], most: int) -> None:
    groups = group(lens, most)
    assert [i for begin, end in groups for i in range(begin, end)] == list(range(len(lens)))
    rows = [sum(-(-n // TILE) * TILE for n in lens[begin:end]) for begin, end in groups]
    assert all(n <= most or end == begin + 1 for n, (begin, end) in zip(rows, groups, strict=True))
    following = [-(-lens[begin] // TILE) * TILE for begin, _ in groups[1:]]
    assert all(n + more > most for n, more in zip(rows, following, strict=False)), "a pass has room for the next sequence"


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 40000)), min_size=1, max_size=8), st.integers(1, 16))
def test_a_pass_never_needs_more_than_the_workspace(chunks: list[tuple[int, int]], kv_heads: int) -> None:
    batch: Any = SimpleNamespace(
        captured=False, tokens=torch.zeros(1), num_seqs=len(chunks), query_lens_host=tuple(q for q, _ in chunks),
        seq_lens_host=tuple(q + past for q, past in chunks), seq_lens=torch.tensor([q + past for q, past in chunks]), query_start=None)
    with on_this_device(8 << 20):
        ordered = order_keys(batch, 0, kv_heads, 128, None, torch.bfloat16) if not CUDA else None
    if ordered is not None and ordered.first_token is None:
        assert all(p.rows * p.heads * 512 <= 8 << 20 and 0 < p.heads <= kv_heads for p in ordered.passes)
        assert sum(p.tokens for p in ordered.passes) == sum(q for q, _ in chunks)


def chunk(**changes: Any) -> Any:
    case = make_case([(300, 900)], heads=2, kv_heads=1, head_dim=64, dtype=torch.float16)
    return replace(case.batch, **changes)


def test_only_long_chunks_of_steps_that_are_not_captured_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_prompts, "hopper_kernel", lambda device: SimpleNamespace(attend=attend))
    assert order_keys(chunk(), 0, 1, 64, None, torch.float16) is not None
    refused: list[Callable[[], Any]] = [
        lambda: order_keys(chunk(captured=True), 0, 1, 64, None, torch.float16),
        lambda: order_keys(chunk(), 0, 1, 64, 500, torch.float16),
        lambda: order_keys(chunk(), 0, 1, 80, None, torch.float16),
        lambda: order_keys(chunk(), 0, 1, 64, None, torch.float32),
        lambda: order_keys(chunk(query_lens_host=(100,)), 0, 1, 64, None, torch.float16),
    ]
    assert [make() for make in refused] == [None] * 5
    monkeypatch.setattr(tuning, "WORKSPACE_BYTES", 1023 * 256)  # 900 keys are padded to 1024 rows of 256 bytes
    assert order_keys(chunk(), 0, 1, 64, None, torch.float16) is None, "one KV head of the sequence does not fit"


def test_an_untested_version_of_triton_means_the_slower_kernel_and_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(gathered_prompts, "capability", lambda device: 90)
    monkeypatch.setattr(gathered_prompts.triton, "__version__", "3.9.0")
    gluon_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [gathered_prompts.hopper_kernel(torch.device("cuda", 0)) for _ in range(3)] == [None] * 3
    finally:
        gluon_kernels.cache_clear()
    assert len(caplog.records) == 1 and "Triton 3.9.0" in caplog.text
    assert order_keys(chunk(), 0, 1, 64, None, torch.float16) is None  # a CPU
