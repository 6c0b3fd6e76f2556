"""Attention sinks: one more score of each head's softmax, in each backend, against a plain dense computation in float64."""
from __future__ import annotations

from types import ModuleType
from unittest.mock import patch

import pytest
import torch

from minivllm.kernels import tuning
from tests.kernels.paged import forget_new, fused, make_case, naive_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINKS = torch.tensor([2.0, -1.0, 0.5, 300.0], device=DEVICE)  # the last head sees almost nothing


def check(backend: ModuleType, shape: list[tuple[int, int]], width: int, window: int | None = None, shared_keys: int = 0) -> object:
    case = make_case(shape, query_width=width, heads=4, kv_heads=2, head_dim=16, shared_keys=shared_keys, seed=width, device=DEVICE,
                     window=window)
    meta = backend.prepare_attention(case.batch, 0, block_size=case.block_size, num_heads=4, num_kv_heads=2, head_dim=16, window=window,
                                     dtype=torch.float32)
    got = backend.self_attention(fused(case), forget_new(case), case.batch.slots[0], meta, scale=0.25, sinks=SINKS)
    want = naive_attention(case, scale=0.25, window=window, sinks=SINKS)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=2e-5, rtol=2e-5)
    return meta


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("width", [1, 3])
def test_sinks_take_their_part_of_the_softmax_of_decodes_and_prompt_chunks(backend: ModuleType, width: int, window: int | None) -> None:
    check(backend, [(width, 700), (width, 130), (width, width), (6, 6), (4, 33), (11, 50)], width, window)  # the first is split


def test_a_sink_counts_once_beside_a_shared_prefix() -> None:
    attention = pytest.importorskip("minivllm.kernels.triton.attention")
    with patch.multiple(tuning, SHARED_KEYS_MULTIPLE=16, MIN_KEYS_PER_SPLIT=16):
        meta = check(attention, [(1, 49 + n) for n in (1, 7, 20, 2, 64)], 1, shared_keys=48)
    assert meta.shared_parts
