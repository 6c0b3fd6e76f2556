"""Writing to the paged cache and copying whole blocks."""
from __future__ import annotations

import torch

from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference.kv_cache import copy_blocks, move_blocks, write_kv


def layers(num_blocks: int, n: int = 2, block_size: int = 4, seed: int = 0) -> list[KVLayer]:
    gen = torch.Generator().manual_seed(seed)
    return [KVLayer(*(torch.randn(num_blocks, block_size, 2, 3, generator=gen) for _ in range(2))) for _ in range(n)]


def test_each_token_lands_in_its_slot_and_nothing_else_changes() -> None:
    kv = layers(5, 1)[0]
    before = KVLayer(kv.k.clone(), kv.v.clone())
    k, v = torch.randn(3, 2, 3), torch.randn(3, 2, 3)
    slots = [7, 16, 4]
    write_kv(k, v, kv, torch.tensor(slots))
    for i, slot in enumerate(slots):
        assert torch.equal(kv.k[slot // 4, slot % 4], k[i]) and torch.equal(kv.v[slot // 4, slot % 4], v[i])
    others = [s for s in range(20) if s not in slots]
    assert torch.equal(kv.k.view(20, 2, 3)[others], before.k.view(20, 2, 3)[others])
    assert torch.equal(kv.v.view(20, 2, 3)[others], before.v.view(20, 2, 3)[others])


def test_padded_rows_may_all_write_to_the_null_block() -> None:
    kv = layers(3, 1)[0]
    rest = kv.k[1:].clone()
    write_kv(torch.ones(5, 2, 3), torch.ones(5, 2, 3), kv, torch.zeros(5, dtype=torch.int64))
    assert torch.equal(kv.k[1:], rest)


def test_keys_that_are_views_of_a_fused_projection_are_written_correctly() -> None:
    kv = layers(3, 1)[0]
    qkv = torch.randn(2, 18)
    k, v = qkv[:, 6:12].view(2, 2, 3), qkv[:, 12:].view(2, 2, 3)
    write_kv(k, v, kv, torch.tensor([4, 9]))
    assert torch.equal(kv.k[2, 1], k[1]) and torch.equal(kv.v[1, 0], v[0])


def test_a_copied_block_equals_its_source_in_every_layer() -> None:
    pool = layers(6)
    before = [KVLayer(x.k.clone(), x.v.clone()) for x in pool]
    copy_blocks(pool, torch.tensor([1, 3]), torch.tensor([4, 5]))
    for old, new in zip(before, pool, strict=True):
        for a, b in ((old.k, new.k), (old.v, new.v)):
            assert torch.equal(b[[4, 5]], a[[1, 3]])
            assert torch.equal(b[:4], a[:4])


def test_a_block_may_be_copied_from_and_written_over_in_one_step() -> None:
    pool = layers(5, 1)
    old = pool[0].k.clone()
    copy_blocks(pool, torch.tensor([1, 2]), torch.tensor([2, 3]))  # 2 is overwritten by 1 and read for 3
    assert torch.equal(pool[0].k[2], old[1]) and torch.equal(pool[0].k[3], old[2])


def test_blocks_moved_to_host_memory_and_back_are_unchanged() -> None:
    pool, host = layers(6), layers(4, seed=1)
    before = [KVLayer(x.k.clone(), x.v.clone()) for x in pool]
    move_blocks(pool, host, torch.tensor([2, 5]), torch.tensor([3, 0]))
    for layer in pool:
        layer.k.fill_(torch.nan), layer.v.fill_(torch.nan)
    move_blocks(host, pool, torch.tensor([3, 0]), torch.tensor([1, 4]))
    for old, new in zip(before, pool, strict=True):
        assert torch.equal(new.k[[1, 4]], old.k[[2, 5]]) and torch.equal(new.v[[1, 4]], old.v[[2, 5]])
        assert new.k[[0, 2, 3, 5]].isnan().all()
