"""Workers on a GPU: the noise and tokens of a CPU, overlapping moves, a measured cache size, and no wait for the device."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from minivllm.core.plan import BlockMove, RowAdmission
from minivllm.errors import InvalidInput
from minivllm.kernels import select
from minivllm.kernels.reference import sampling as ops
from minivllm.sampling.sampler import Sampler
from minivllm.sampling_params import SamplingParams
from minivllm.worker.batch import RowTable
from minivllm.worker.kv_cache import KVCache
from tests.kernels.test_sampling import keys_of
from tests.worker.plans import Planner, Sequence
from tests.worker.test_batch import plan
from tests.worker.test_kv_cache import content, numbered, shape
from tests.worker.test_model_runner import Tiny, run, sequences_of
from tests.worker.test_worker import build

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=3),
    SamplingParams(temperature=1.2, top_k=7, min_p=0.01),
    SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.5, logprobs=0),
    SamplingParams(temperature=1.0, min_tokens=3, logit_bias={5: 4.0, 9: -100}, stop_token_ids=[11]),
    SamplingParams(temperature=1.0, allowed_token_ids=[3, 4, 5], bad_words_token_ids=((3,), (4, 5))),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation that makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module", params=[False, True], ids=["full attention", "two KV groups"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield Tiny(tmp_path_factory.mktemp("tiny"), request.param, "cuda:0")
    torch.backends.cuda.matmul.allow_tf32 = allowed


def test_random_words_are_bit_equal_and_noise_within_rounding() -> None:
    keys, ids = keys_of(list(range(50))), torch.arange(5000, dtype=torch.int32)
    words = ops.noise_words(keys, ids)
    assert torch.equal(ops.noise_words(keys.to(CUDA), ids.to(CUDA)).cpu(), words)
    torch.testing.assert_close(ops.gumbel(words.to(CUDA)).cpu(), ops.gumbel(words), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}], ids=lambda f: "+".join(f) or "no filter"
)
def test_sampled_tokens_equal_those_of_the_cpu(filters: dict[str, float]) -> None:
    logits = torch.randn(400, 5000, generator=torch.Generator().manual_seed(1)) * 3
    columns = {name: torch.full((400,), value) for name, value in filters.items()}
    t, keys = torch.full((400,), 0.9), keys_of(list(range(400)))
    on_gpu = ops.sample(logits.to(CUDA), t.to(CUDA), keys.to(CUDA), **{n: c.to(CUDA) for n, c in columns.items()})
    differ = int((on_gpu.cpu() != ops.sample(logits, t, keys, **columns)).sum())
    assert differ <= 1  # floats are equal within rounding, so a near-tie may fall the other way


def test_a_mixed_batch_is_sampled_and_packed_without_waiting_and_like_on_a_cpu() -> None:
    vocab, n = 300, len(MIXED)
    results = []
    for device in (CPU, CUDA):
        sampler, rows = Sampler(n, vocab, device, (2,)), RowTable(n, 1, 64, 4, device)
        admitted = tuple(
            RowAdmission(i, str(i), tuple(range(3, 12)), 9, ((1, 2, 3, 4, 5),), p, 40 + i, 0, 1 if i == 2 else None)
            for i, p in enumerate(MIXED)
        )
        drawn = []
        logits = torch.randn(8, n, vocab, generator=torch.Generator().manual_seed(2)).to(device) * 2
        for step in range(8):
            starts, counts = ([0] * n, [9] * n) if step == 0 else ([8 + step] * n, [1] * n)
            the_plan = plan(
                list(range(n)), starts, counts, samples=list(range(n)), admitted=admitted if step == 0 else ()
            )
            context = no_waiting if device == CUDA else contextmanager(lambda: iter([None]))
            with context():
                rows.apply(the_plan)
                for a in the_plan.admitted:
                    sampler.admit(a)
                packed = rows.pack(the_plan)
                choice = sampler.sample(logits[step].clone(), packed.columns.sample_rows, packed.columns.sample_positions, rows.tokens)
                rows.write_tokens(packed.sample_index, choice.token_ids)
            drawn.append((choice.token_ids.tolist(), packed.batch.tokens.tolist(), packed.batch.slots[0].tolist()))
            assert choice.logprobs is not None
            drawn.append(
                [
                    (e.token_id, e.rank, e.top_ids)
                    for e in choice.logprobs.entries([t.cpu() for t in choice.logprobs.tensors()])
                ]
            )
        results.append(drawn)
    assert results[0] == results[1]


@pytest.mark.parametrize("depth", [0, 1])
def test_greedy_tokens_equal_transformers_in_any_plan(tiny: Tiny, depth: int) -> None:
    for seed in range(3):
        sequences = sequences_of(tiny)
        run(tiny.runner(), tiny.planner(seed=seed), sequences, random.Random(seed), depth)
        assert [s.outputs for s in sequences] == tiny.expected


def test_moves_overlap_with_computation_and_are_reported_when_finished() -> None:
    cache = KVCache(shape(), 40, 40, CUDA, select(CUDA))
    numbered(cache)
    before = {b: content(cache, b) for b in range(40)}
    out = tuple(BlockMove(i, device_block=i, host_block=39 - i) for i in range(1, 31))
    assert cache.apply(plan([], [], [], moves_out=out)) == ()
    assert cache.finished_moves(wait=True) == tuple(range(1, 31))
    for layer in cache.layers:
        layer.k.zero_(), layer.v.zero_()
    back = tuple(BlockMove(100 + i, device_block=i + 5, host_block=39 - i) for i in range(1, 31))
    assert cache.apply(plan([], [], [], moves_in=back)) == ()
    seen: tuple[int, ...] = ()
    while len(seen) < 30:
        seen += cache.finished_moves(wait=False)
    assert seen == tuple(range(101, 131)) and cache.finished_moves(wait=True) == ()
    for i in range(1, 31):
        assert content(cache, i + 5) == before[i]


def test_a_step_can_read_the_blocks_that_its_own_plan_moves_in() -> None:
    cache = KVCache(shape(), 1000, 1000, CUDA, select(CUDA))
    numbered(cache)
    cache.apply(plan([], [], [], moves_out=tuple(BlockMove(i, device_block=i, host_block=i) for i in range(1, 1000))))
    cache.finished_moves(wait=True)
    want = cache.layers[-1].v[1:].clone()
    for _ in range(5):
        for layer in cache.layers:
            layer.k.zero_(), layer.v.zero_()
        cache.apply(plan([], [], [], moves_in=tuple(BlockMove(i, device_block=i, host_block=i) for i in range(1, 1000))))
        read = cache.layers[-1].v[1:].clone()  # what a step's attention would see
        assert torch.equal(read, want)
        cache.finished_moves(wait=True)


def test_a_worker_uses_its_fraction_of_the_memory(tiny_llama: Callable[..., Path]) -> None:
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info()
    share = (total - free_before) / total + 0.05
    worker = build(tiny_llama(), device="cuda", dtype="auto", gpu_memory_utilization=share)
    assert worker.dtype == torch.bfloat16 and worker.max_num_batched_tokens == 8192
    s = Sequence("a", 0, tuple(range(200)), 5)
    planner = Planner(16, list(range(1, 30)))
    while s.left:
        result = worker.execute(planner.plan([(s, s.left)]))
        assert result.error is None
    used = total - torch.cuda.mem_get_info()[0]
    assert 0.8 * share < used / total < share + 0.01
    worker.close()
    assert torch.cuda.mem_get_info()[0] > free_before - 0.01 * total


def test_too_small_a_fraction_is_refused_with_one_that_suffices(tiny_llama: Callable[..., Path]) -> None:
    with pytest.raises(InvalidInput, match="raise it to 0") as error:
        build(tiny_llama(), device="cuda", gpu_memory_utilization=0.0001)
    assert error.value.param == "gpu_memory_utilization"


def test_a_cache_too_large_for_the_gpu_is_refused_and_its_memory_released(tiny_llama: Callable[..., Path]) -> None:
    free_before, total = torch.cuda.mem_get_info()
    with pytest.raises(InvalidInput, match="no memory for a KV cache") as error:
        build(tiny_llama(), device="cuda", kv_cache_memory_bytes=1 << 42)
    assert error.value.param == "kv_cache_memory_bytes"
    del error
    build(tiny_llama(), device="cuda", num_gpu_blocks_override=20).close()
    assert torch.cuda.mem_get_info()[0] > free_before - 0.01 * total
