"""A KV cache format that the package does not contain (int8 with a scale per token and head) runs through the whole engine.

Preemption, swapping to host memory and copy-on-write move its pages as raw bytes, so they must not change a token.
"""
from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm.config import EngineConfig
from minivllm.core.plan import BlockCopy, BlockMove
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.errors import ModelError
from minivllm.families import KVGroup
from minivllm.kernels import REFERENCE, Ops
from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference import attention
from minivllm.quantization.kv_cache import DenseKV
from minivllm.sampling_params import SamplingParams
from minivllm.worker.kv_cache import KVCache, KVLayout
from minivllm.worker.worker import Components, Worker
from tests.worker.test_batch import plan

Tokens = dict[tuple[str, int], list[int]]


@dataclass(frozen=True)
class Int8KV:
    """Pieces of a page: keys, values [block_size, heads, head_dim] int8, then their scales [block_size, heads] float32."""

    kv_heads: int
    head_dim: int

    def piece_bytes(self, block_size: int) -> tuple[int, int, int, int]:
        numbers = block_size * self.kv_heads
        return numbers * self.head_dim, numbers * self.head_dim, 4 * numbers, 4 * numbers

    def view(self, pieces: Sequence[Tensor], block_size: int) -> KVLayer:
        heads = (len(pieces[0]), block_size, self.kv_heads)
        k, v = (piece.view(torch.int8).view(*heads, self.head_dim) for piece in pieces[:2])
        k_scale, v_scale = (piece.view(torch.float32).view(heads) for piece in pieces[2:])
        return KVLayer(k, v, k_scale, v_scale)


def dequantized(kv: KVLayer) -> KVLayer:
    assert kv.k_scale is not None and kv.v_scale is not None
    return KVLayer(kv.k * kv.k_scale[..., None], kv.v * kv.v_scale[..., None])


def store_kv(qkv: Tensor, kv: KVLayer, slots: Tensor, meta: Any, **options: Any) -> Tensor:
    dense = dequantized(kv)
    q = REFERENCE.store_kv(qkv, dense, slots, meta, **options)
    for stored, scales, values in ((kv.k, kv.k_scale, dense.k), (kv.v, kv.v_scale, dense.v)):
        assert scales is not None
        new = values.flatten(0, 1)[slots]  # [T, heads, head_dim]
        scale = new.abs().amax(-1).clamp_min(1e-8) / 127
        scales.flatten(0, 1)[slots] = scale
        stored.flatten(0, 1)[slots] = (new / scale[..., None]).round().to(torch.int8)
    return q


def self_attention(
    qkv: Tensor, kv: KVLayer, slots: Tensor, meta: Any, *, scale: float, softcap: float | None = None, **options: Any,
) -> Tensor:
    q = store_kv(qkv, kv, slots, meta, **options)
    return attention.attention(q, dequantized(kv), meta, scale=scale, softcap=softcap).reshape(len(qkv), -1)


def ops_for(device: torch.device) -> Ops:
    return dataclasses.replace(REFERENCE, self_attention=self_attention, store_kv=store_kv)


INT8 = Components(kv_format=lambda group, dtype: Int8KV(group.kv_heads, group.head_dim), ops=ops_for)


def engine(folder: Path, components: Components = INT8, **config: Any) -> EngineCore:
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "block_size": 8,
                "max_model_len": 128, "num_gpu_blocks_override": 200, "max_num_seqs": 8, **config}
    return build_engine(EngineConfig(**settings), components)


def generate(core: EngineCore) -> Tokens:
    """Run long greedy and sampled requests that share a prefix. The children of one of them write to a shared block."""
    rng = random.Random(3)
    base = [rng.randrange(2, 320) for _ in range(40)]
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
    for i in range(5):
        core.add_request(f"r{i}", {"prompt_token_ids": base[: 21 + 4 * i]}, replace(params, temperature=i % 2, n=2 if i == 3 else 1))
    found: Tokens = {}
    while core.has_unfinished_requests():
        for delta in core.step():
            found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        core.scheduler.check()
    return found


@pytest.fixture(scope="module")
def expected(tiny_llama: Callable[..., Path]) -> Tokens:
    core = engine(tiny_llama())
    found = generate(core)
    core.close()
    return found


def test_int8_keys_change_tokens_so_the_comparisons_below_can_fail(
    tiny_llama: Callable[..., Path], expected: Tokens,
) -> None:
    core = engine(tiny_llama(), Components())
    assert generate(core) != expected
    core.close()


@pytest.mark.parametrize("host_gib", [0.0, 2**-8], ids=["recompute", "swap"])
def test_preemption_and_copies_of_int8_blocks_change_no_token(
    tiny_llama: Callable[..., Path], expected: Tokens, host_gib: float, monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = engine(tiny_llama(), num_gpu_blocks_override=23, kv_offloading_size=host_gib)
    assert isinstance(core.executor, Worker)
    copied: list[int] = []
    launch = core.executor.launch
    monkeypatch.setattr(core.executor, "launch", lambda plan: (copied.append(len(plan.copies)), launch(plan))[1])
    assert generate(core) == expected
    stats = core.scheduler.stats()
    assert stats.num_preemptions > 0 and bool(stats.num_swaps) == bool(host_gib) and sum(copied) > 0
    core.close()


def test_copies_and_moves_include_every_piece_of_a_page() -> None:
    group = KVGroup(4, 2, 8, None, (0, 1, 2))
    cache = KVCache(KVLayout((group,), (Int8KV(2, 8),), 5), 12, 4, torch.device("cpu"), REFERENCE)
    pieces = [t for layer in cache.layers for t in (layer.k, layer.v, layer.k_scale, layer.v_scale)]
    assert all(t is not None for t in pieces) and len({t.data_ptr() for t in pieces if t is not None}) == 12
    for i, t in enumerate(pieces):
        t.copy_(torch.randint(-100, 100, t.shape, generator=torch.Generator().manual_seed(i)))  # type: ignore[union-attr]
    before = [t.clone() for t in pieces]  # type: ignore[union-attr]
    cache.apply(plan([], [], [], copies=(BlockCopy(2, 5, 0, 0, 0),), moves_out=(BlockMove(1, 3, 1),)))
    cache.apply(plan([], [], [], moves_in=(BlockMove(2, 7, 1),)))
    for t, old in zip(pieces, before, strict=True):
        source = [0, 1, 2, 3, 4, 2, 6, 3, 8, 9, 10, 11]
        assert t is not None and torch.equal(t, old[source])


def test_smaller_pages_mean_more_blocks_in_the_same_memory(tiny_llama: Callable[..., Path]) -> None:
    blocks = []
    for components in (INT8, Components()):
        core = engine(tiny_llama(), components, num_gpu_blocks_override=None, kv_cache_memory_bytes=1 << 20)
        blocks.append(core.executor.num_blocks)
        core.close()
    heads, dim, tokens, layers = 2, 8, 8, 2
    assert blocks == [(1 << 20) // (2 * layers * tokens * heads * (dim + 4)), (1 << 20) // (2 * layers * tokens * heads * dim * 4)]


def test_layers_whose_pages_differ_in_size_cannot_share_blocks() -> None:
    groups = KVGroup(4, 2, 8, None, (0,)), KVGroup(4, 2, 16, None, (1,))
    with pytest.raises(ModelError, match="different sizes"):
        KVLayout(groups, tuple(DenseKV.of(group, torch.float32) for group in groups), 16)
