"""Writing to the paged cache and copying whole blocks."""
from __future__ import annotations

import torch

from minivllm.kernels.layout import KVLayer
from minivllm.kernels.reference.kv_cache import copy_blocks, write_kv


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


def test_a_copied_block_equals_its_source_in_every_tensor() -> None:
    pages = [torch.randint(0, 256, (6, n), dtype=torch.uint8) for n in (24, 24, 4)]
    before = [raw.clone() for raw in pages]
    copy_blocks(pages, torch.tensor([1, 3]), torch.tensor([4, 5]))
    for old, new in zip(before, pages, strict=True):
        assert torch.equal(new[[4, 5]], old[[1, 3]]) and torch.equal(new[:4], old[:4])


def test_a_block_may_be_copied_from_and_overwritten_in_one_step() -> None:
    pages = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    old = pages.clone()
    copy_blocks([pages], torch.tensor([1, 2]), torch.tensor([2, 3]))  # block 1 overwrites 2, which is also read for 3
    assert torch.equal(pages[2], old[1]) and torch.equal(pages[3], old[2])
