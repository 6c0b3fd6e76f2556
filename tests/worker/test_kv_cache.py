"""Cache tensors, block copies and moves, and the arithmetic of how many blocks fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minivllm.core.plan import BlockCopy, BlockMove
from minivllm.errors import InvalidInput
from minivllm.families import KVGroup
from minivllm.kernels import select
from minivllm.quantization.kv_cache import DenseKV
from minivllm.worker.kv_cache import KVCache, KVLayout
from minivllm.worker.memory import (
    CPU_MINIMUM,
    MIB,
    CacheSettings,
    MemoryBudget,
    MemoryLedger,
    available_host_memory,
    cpu_budget,
    size_cache,
)
from tests.worker.test_batch import plan

CPU = torch.device("cpu")


def shape(
    block_size: int = 4, windows: tuple[int | None, ...] = (None,), layers: int = 3, dtype: torch.dtype = torch.float32
) -> KVLayout:
    groups = tuple(
        KVGroup(2, 2, 8, w, tuple(range(g * layers, (g + 1) * layers)))
        for g, w in enumerate(windows)
    )
    return KVLayout(groups, tuple(DenseKV.of(group, dtype) for group in groups), block_size)


def numbered(cache: KVCache) -> None:
    """Every block of every tensor filled with a different number."""
    for j, layer in enumerate(cache.layers):
        for which, tensor in enumerate((layer.k, layer.v)):
            for block in range(len(tensor)):
                tensor[block].fill_(1000 * j + 500 * which + block)


def content(cache: KVCache, block: int) -> list[float]:
    values = [t[block] for layer in cache.layers for t in (layer.k, layer.v)]
    assert all((v == v.flatten()[0]).all() for v in values)
    return [v.flatten()[0].item() for v in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_zeroed_aligned_and_as_large_as_the_ledger_says(dtype):
    s = shape(windows=(None, 5), dtype=dtype)
    cache = KVCache(s, 9, 0, CPU, select(CPU))
    assert len(cache.layers) == 6
    for layer in cache.layers:
        for t in (layer.k, layer.v):
            assert t.shape == (9, 4, 2, 8) and t.dtype == dtype and not t.any() and t.data_ptr() % 64 == 0
    # Two groups of three layers share three tensors.
    assert [x.k.data_ptr() for x in cache.layers[:3]] == [x.k.data_ptr() for x in cache.layers[3:]]
    assert 9 * s.block_bytes == sum(t.nbytes for layer in cache.layers[:3] for t in (layer.k, layer.v))


def test_copy_on_write_copies_a_block_in_every_tensor():
    cache = KVCache(shape(), 8, 0, CPU, select(CPU))
    numbered(cache)
    before = {b: content(cache, b) for b in range(8)}
    cache.apply(plan([], [], [], copies=(BlockCopy(2, 5, 0, 0, 0), BlockCopy(2, 6, 1, 0, 0))))
    assert {b: content(cache, b) for b in range(8)} == {**before, 5: before[2], 6: before[2]}


def test_blocks_are_unchanged_after_a_move_to_host_memory_and_back():
    cache = KVCache(shape(), 30, 30, CPU, select(CPU))
    numbered(cache)
    before = {b: content(cache, b) for b in range(30)}
    out = tuple(
        BlockMove(100 + i, device_block=i, host_block=29 - i) for i in range(1, 21)
    )  # more than are staged at once
    assert cache.apply(plan([], [], [], moves_out=out)) == tuple(m.move_id for m in out)
    for layer in cache.layers:
        layer.k.zero_(), layer.v.zero_()
    back = tuple(BlockMove(200 + i, device_block=i + 2, host_block=29 - i) for i in range(1, 21))
    assert cache.apply(plan([], [], [], moves_in=back)) == tuple(m.move_id for m in back)
    for i in range(1, 21):
        assert content(cache, i + 2) == before[i]
    assert cache.finished_moves(wait=True) == ()


def test_a_step_moves_blocks_out_then_in_then_copies():
    cache = KVCache(shape(), 8, 8, CPU, select(CPU))
    numbered(cache)
    two, three = content(cache, 2), content(cache, 3)
    cache.apply(plan([], [], [], moves_out=(BlockMove(1, 3, 4),)))
    cache.apply(
        plan(
            [],
            [],
            [],
            moves_out=(BlockMove(2, 2, 5),),
            moves_in=(BlockMove(3, 2, 4),),
            copies=(BlockCopy(2, 7, 0, 0, 0),),
        )
    )
    assert content(cache, 2) == three and content(cache, 7) == three
    cache.apply(plan([], [], [], moves_in=(BlockMove(4, 6, 5),)))
    assert content(cache, 6) == two


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_the_models_own_length_is_lowered_and_an_explicit_one_is_an_error_with_the_numbers():
    s = shape(block_size=4)
    budget = 11 * s.block_bytes
    request = CacheSettings(max_model_len=100, length_is_explicit=False, chunk=8)
    size = size_cache(request, s, MemoryBudget(budget, "account", "gpu_memory_utilization", "raise it"))
    assert (size.num_blocks, size.max_model_len) == (11, 40)
    explicit = CacheSettings(max_model_len=100, length_is_explicit=True, chunk=8)
    with pytest.raises(InvalidInput, match="lower max_model_len to 40") as error:
        size_cache(explicit, s, MemoryBudget(budget, "account", "gpu_memory_utilization", "raise it to 0.95"))
    assert error.value.param == "max_model_len" and "raise it to 0.95" in error.value.message
    fits = CacheSettings(max_model_len=40, length_is_explicit=True, chunk=8)
    assert size_cache(fits, s, MemoryBudget(budget, "account", "", "")).max_model_len == 40


@pytest.mark.parametrize("budget", [-5, 0, 1])
def test_a_budget_without_room_for_a_block_names_the_setting_to_change(budget):
    s = shape()
    with pytest.raises(InvalidInput) as error:
        size_cache(
            CacheSettings(max_model_len=10, length_is_explicit=False, chunk=8),
            s,
            MemoryBudget(budget * s.block_bytes, "weights 3 GiB", "gpu_memory_utilization", "raise it to 0.97"),
        )
    assert error.value.param == "gpu_memory_utilization" and "raise it to 0.97" in error.value.message


def test_explicit_sizes_win_over_what_was_measured():
    s = shape(block_size=4)
    by_blocks = CacheSettings(max_model_len=16, length_is_explicit=False, chunk=8, num_blocks=7)
    assert size_cache(by_blocks, s, MemoryBudget(10**9, "", "", "")).num_blocks == 7
    by_bytes = CacheSettings(max_model_len=16, length_is_explicit=False, chunk=8, cache_bytes=6 * s.block_bytes + 1)
    assert size_cache(by_bytes, s, MemoryBudget(10**9, "", "", "")).num_blocks == 6


def test_the_cache_of_a_small_model_stays_small_on_a_cpu():
    group = KVGroup(9, 3, 64, None, tuple(range(30)))  # the default model's
    s = KVLayout((group,), (DenseKV.of(group, torch.float32),), 16)
    request = CacheSettings(max_model_len=8192, length_is_explicit=False, chunk=2048)
    size = size_cache(request, s, cpu_budget(request, s, weight_bytes=538_000_000))
    assert size.max_model_len == 8192
    assert size.num_blocks * s.block_bytes <= max(CPU_MINIMUM, 538_000_000)


def test_the_systems_free_memory_is_read():
    assert 64 * MIB < available_host_memory() < 1 << 50


def test_the_ledger_of_a_gpu_is_a_table_of_two_lines_whose_figures_add_up_to_the_total():
    gib = 1 << 30
    ledger = MemoryLedger(total=8 * gib, weights=gib, step=gib // 2, other=3 * gib // 4, graphs_planned=gib // 4, rows=3 * gib // 8,
                    cache=4 * gib, graphs_taken=gib // 8)
    names, figures = ledger.table()
    assert len(names) == len(figures)
    columns = [name.strip() for name in names.split("  ")[1:] if name]
    assert columns == ["weights", "peak of a step", "CUDA graphs", "(set aside)", "row tables", "KV cache", "other use", "left", "total"]
    assert figures.split() == ["1.00", "0.50", "0.12", "0.25", "0.38", "4.00", "0.75", "1.25", "8.00"]
    for name, figure in zip(columns, figures.split(), strict=True):  # right-aligned under its name
        assert names.index(name) + len(name) == figures.index(f" {figure}") + 1 + len(figure)
    many = replace(ledger, total=1000 * gib).table()
    assert len(many[0]) == len(many[1]) and many[1].endswith(" 1000.00")
