"""ALiBi: scores that fall with the distance of the key, in each backend, against a plain dense computation in float64."""
from __future__ import annotations

from types import ModuleType
from unittest.mock import patch

import pytest
import torch

from minivllm.kernels import tuning
from tests.kernels.paged import forget_new, fused, make_case, naive_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPES = torch.tensor([0.5, 0.11, 0.03, 0.004], device=DEVICE)  # weak enough that far keys matter


def check(backend: ModuleType, shape: list[tuple[int, int]], width: int, softcap: float | None = None, shared_keys: int = 0) -> object:
    case = make_case(shape, query_width=width, heads=4, kv_heads=2, head_dim=16, shared_keys=shared_keys, seed=width, device=DEVICE)
    meta = backend.prepare_attention(case.batch, 0, block_size=case.block_size, num_heads=4, num_kv_heads=2, head_dim=16, window=None,
                                     dtype=torch.float32)
    got = backend.self_attention(fused(case), forget_new(case), case.batch.slots[0], meta, scale=0.25, softcap=softcap, alibi=SLOPES)
    want = naive_attention(case, scale=0.25, softcap=softcap, alibi=SLOPES)
    torch.testing.assert_close(got.view(case.q.shape).cpu().double(), want, atol=2e-5, rtol=2e-5)
    return meta


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("width", [1, 3])
def test_scores_fall_with_the_distance_for_decodes_and_prompt_chunks(backend: ModuleType, width: int, softcap: float | None) -> None:
    check(backend, [(width, 700), (width, 130), (width, width), (6, 6), (4, 33), (11, 50)], width, softcap)  # the first is split


@pytest.mark.parametrize("width", [1, 3])
def test_distances_to_a_shared_prefix_differ_between_the_decodes(width: int) -> None:
    attention = pytest.importorskip("minivllm.kernels.triton.attention")
    with patch.multiple(tuning, SHARED_KEYS_MULTIPLE=16, MIN_KEYS_PER_SPLIT=16):
        meta = check(attention, [(width, 48 + width + n) for n in (1, 7, 20, 2, 64)], width, shared_keys=48)
    assert meta.shared_parts
