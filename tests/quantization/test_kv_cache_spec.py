"""A quantized KV cache runs through the whole engine.

Preemption, swapping to host memory and copy-on-write move its pages as raw bytes, so they must not change a token.
"""
from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivllm.config import EngineConfig
from minivllm.core.plan import BlockCopy, BlockMove
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.errors import InvalidInput, ModelError
from minivllm.families import KVGroup
from minivllm.kernels import REFERENCE
from minivllm.kernels.reference.kv_cache import LARGEST, SMALLEST_SCALE, dequantize, quantize
from minivllm.quantization.kv_cache import DenseKV, kv_format
from minivllm.sampling_params import SamplingParams
from minivllm.worker.device import check_kv_cache_dtype
from minivllm.worker.kv_cache import KVCache, KVLayout
from minivllm.worker.worker import Worker
from tests.models.paged import Paged
from tests.worker.test_batch import plan

Tokens = dict[tuple[str, int], list[int]]


DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def engine(folder: Path, **config: Any) -> EngineCore:
    settings = {"model": str(folder), "device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "block_size": 8,
                "max_model_len": 128, "num_gpu_blocks_override": 200, "max_num_seqs": 8, **config}
    return build_engine(EngineConfig(**settings))


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


@pytest.fixture(scope="module", params=["fp8", "int8"])
def quantized(request: pytest.FixtureRequest, tiny_llama: Callable[..., Path]) -> tuple[str, Tokens]:
    """A value of kv_cache_dtype, and the tokens of an engine with enough blocks."""
    core = engine(tiny_llama(), kv_cache_dtype=request.param)
    found = generate(core)
    core.close()
    return request.param, found


def test_quantized_keys_change_tokens_so_the_comparisons_below_can_fail(
    tiny_llama: Callable[..., Path], quantized: tuple[str, Tokens],
) -> None:
    core = engine(tiny_llama())
    assert generate(core) != quantized[1]
    core.close()


@pytest.mark.parametrize("host_gib", [0.0, 2**-8], ids=["recompute", "swap"])
def test_preemption_and_copies_of_quantized_blocks_change_no_token(
    tiny_llama: Callable[..., Path], quantized: tuple[str, Tokens], host_gib: float, monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = engine(tiny_llama(), kv_cache_dtype=quantized[0], num_gpu_blocks_override=23, kv_offloading_size=host_gib)
    assert isinstance(core.executor, Worker)
    copied: list[int] = []
    launch = core.executor.launch
    monkeypatch.setattr(core.executor, "launch", lambda plan: (copied.append(len(plan.copies)), launch(plan))[1])
    assert generate(core) == quantized[1]
    stats = core.scheduler.stats()
    assert stats.num_preemptions > 0 and bool(stats.num_swaps) == bool(host_gib) and sum(copied) > 0
    core.close()


@pytest.mark.parametrize("name", DTYPES)
def test_copies_and_moves_include_every_piece_of_a_page(name: str) -> None:
    group = KVGroup(4, 2, 8, None, (0, 1, 2))
    spec = kv_format(name)(group, torch.float32)
    cache = KVCache(KVLayout((group,), (spec,), 5), 12, 4, torch.device("cpu"), REFERENCE)
    pieces = [t for layer in cache.layers for t in (layer.k, layer.v, layer.scales) if t is not None]
    assert len(pieces) == len({t.data_ptr() for t in pieces}) == 9 and pieces[0].dtype == spec.dtype == DTYPES[name]
    assert sum(t.nbytes for t in pieces) == 12 * cache.layout.block_bytes
    for i, t in enumerate(pieces):
        t.copy_(torch.randint(-100, 100, t.shape, generator=torch.Generator().manual_seed(i)))
    before = [t.clone() for t in pieces]
    cache.apply(plan([], [], [], copies=(BlockCopy(2, 5, 0, 0, 0),), moves_out=(BlockMove(1, 3, 1),)))
    cache.apply(plan([], [], [], moves_in=(BlockMove(2, 7, 1),)))
    for t, old in zip(pieces, before, strict=True):
        source = [0, 1, 2, 3, 4, 2, 6, 3, 8, 9, 10, 11]
        assert torch.equal(t.float(), old[source].float())


def test_smaller_pages_mean_more_blocks_in_the_same_memory(tiny_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = []
    for name in ("int8", "auto"):
        core = engine(tiny_llama(), kv_cache_dtype=name, num_gpu_blocks_override=None, kv_cache_memory_bytes=1 << 20)
        blocks.append(core.executor.num_blocks)
        assert core.info().kv_cache_dtype == {"int8": "int8", "auto": "float32"}[name]
        core.close()
    heads, dim, tokens, layers = 2, 8, 8, 2
    assert blocks == [(1 << 20) // (2 * layers * tokens * heads * (dim + 2)), (1 << 20) // (2 * layers * tokens * heads * dim * 4)]
    assert f"KV cache in int8: 0.1 KiB per token, room for {8 * (blocks[0] - 1):,} tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("config", "words"), [
    ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype must be one of auto, fp8, int8, float32, bfloat16, float16, got 'fp8_e5m2'"),
    ({"kv_cache_dtype": "bfloat16"}, "is not the model's dtype, float32: use 'auto', or dtype='bfloat16' as well"),
])
def test_a_cache_that_this_model_cannot_have_is_refused(tiny_llama: Callable[..., Path], config: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as error:
        engine(tiny_llama(), **config)
    assert error.value.param == "kv_cache_dtype"


def test_an_older_gpu_has_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3060")
    check_kv_cache_dtype("int8", torch.float16, torch.device("cuda"))
    with pytest.raises(InvalidInput, match=r"8\.9 or later .* and RTX 3060 has 8\.6: use 'int8'"):
        check_kv_cache_dtype("fp8", torch.float16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_kv_cache_dtype("fp8", torch.float16, torch.device("cuda"))


@st.composite
def heads_to_store(draw: st.DrawFn) -> torch.Tensor:
    """[rows, head_dim] float32: rows of any magnitude, some with zeros."""
    rows = draw(st.integers(1, 6))
    x = torch.randn(rows, draw(st.sampled_from([1, 8, 20])), generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    x *= torch.tensor([draw(st.sampled_from([0.0, 1e-38, 1e-20, 1e-3, 1.0, 77.0, 6e4, 1e30])) for _ in range(rows)])[:, None]
    return x * (torch.rand(x.shape) > draw(st.sampled_from([0.0, 0.5])))


@given(x=heads_to_store(), name=st.sampled_from(list(DTYPES)))
def test_what_is_stored_is_near_and_finite_and_stored_again_is_the_same(x: torch.Tensor, name: str) -> None:
    stored, scale = quantize(x, DTYPES[name])
    back = dequantize(stored, scale, torch.float32)
    bound = scale.float()[:, None] * 0.75 if name == "int8" else x.abs() / 16 + scale.float()[:, None] / 1024
    assert back.isfinite().all() and ((back - x).abs() <= bound * (1 + 1e-5)).all()
    assert (back[x == 0] == 0).all() and (scale > 0).all()
    assert (scale.float() <= x.abs().amax(-1) / LARGEST[DTYPES[name]] * (1 + 2**-8) + 2 * SMALLEST_SCALE).all()
    again, scale_again = quantize(back, DTYPES[name])
    assert torch.equal(again.float(), stored.float()) and torch.equal(scale_again, scale)


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.02), ("fp8", 0.08)])
def test_logits_are_near_those_with_unquantized_keys(name: str, tolerance: float, tmp_path: Path) -> None:
    """The rms of their differences is below `tolerance` of the logits' standard deviation, for a prompt in chunks and decodes after it."""
    pytest.importorskip("transformers")
    from tests.models.tiny import load, make_hf

    make_hf("Qwen3", num_key_value_heads=2, head_dim=16).save_pretrained(tmp_path)
    model, tokens = load(tmp_path), [random.Random(0).randrange(97) for _ in range(60)]
    runs = []
    for kv_cache_dtype, chunks in ((name, (30, 15, *[1] * 15)), (name, (60,)), ("auto", (60,))):
        paged, rest = Paged(model, capacity=60, kv_cache_dtype=kv_cache_dtype), iter(tokens)
        runs.append(torch.cat([paged.run((0, list(itertools.islice(rest, n)))) for n in chunks]))
    in_chunks, at_once, unquantized = runs
    apart = ((at_once - unquantized).square().mean().sqrt() / unquantized.std()).item()
    assert tolerance / 4 < apart < tolerance
    torch.testing.assert_close(in_chunks, at_once, atol=1e-3, rtol=0.0)


def test_layers_whose_pages_differ_in_size_cannot_share_blocks() -> None:
    groups = KVGroup(4, 2, 8, None, (0,)), KVGroup(4, 2, 16, None, (1,))
    with pytest.raises(ModelError, match="different sizes"):
        KVLayout(groups, tuple(DenseKV.of(group, torch.float32) for group in groups), 16)
