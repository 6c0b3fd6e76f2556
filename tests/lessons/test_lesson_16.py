"""Lesson 16: it cuts matrices where minivllm cuts them, and its exchanges give what gloo's give."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from minivllm.parallel.group import ParallelGroup
from minivllm.parallel.shard import span
from tests.lessons.loading import Mistake

MLP = 'return group.all_reduce(F.linear(F.silu(gate) * up, inputs_of(layer["down"], group.rank, group.size)))'
MISTAKES = [
    Mistake(1, "weight.chunk(size, 0)[rank]", "weight.chunk(size, 1)[rank]", "Half of the outputs"),
    Mistake(1, "weight.chunk(size, 1)[rank]", "weight[:, rank::size]", "neighboring rows"),
    Mistake(2, MLP, MLP.replace("group.all_reduce", ""), "without an exchange"),
    Mistake(2, MLP, "gate, up = group.all_reduce(gate), group.all_reduce(up)\n    " + MLP, "only the end must be exchanged"),
    Mistake(2, MLP, MLP.replace("F.linear(F.silu(gate) * up, ", "F.silu(F.linear(gate * up, ").replace("size)))", "size))))"),
            "silu of a sum"),
    Mistake(3, "tokens - first, 0)] * mine[:, None]", "tokens - first, 0)]", "contribute zeros"),
    Mistake(3, "rows = part[torch.where(mine, tokens - first, 0)] * mine[:, None]", "rows = table[tokens] * mine[:, None]", "from `part`"),
    Mistake(4, "return torch.stack(group.gather(x)).sum(0)", "group.gather(x)\n    return x", "is wrong"),
]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_lesson_and_package_cut_at_the_same_places(lesson: ModuleType, size: int) -> None:
    weight, table = torch.arange(96.0).view(8, 12), torch.arange(33.0).view(11, 3)
    for rank in range(size):
        start, end = span(8, 8 // size, rank, size)
        assert torch.equal(lesson.outputs_of(weight, rank, size), weight[start:end])
        start, end = span(12, 12 // size, rank, size)
        assert torch.equal(lesson.inputs_of(weight, rank, size), weight[:, start:end])
        start, end = span(11, -(-11 // size), rank, size)
        part, first = lesson.vocabulary_of(table, rank, size)
        assert first == start and torch.equal(part, table[start:end])


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_gives_the_same_logits_and_each_rank_the_same_bits(lesson: ModuleType, size: int) -> None:
    weights, layers, tokens = lesson.example()
    (whole,), _ = lesson.run_ranks(1, lambda group: lesson.forward(group, weights, layers, tokens))
    results, groups = lesson.run_ranks(size, lambda group: lesson.forward(group, weights, layers, tokens))
    torch.testing.assert_close(results[0], whole, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(result, results[0]) for result in results)
    assert {group.exchanges for group in groups} == {2 * len(layers) + 1}


def test_the_exchanges_of_lesson_and_package_give_the_same(lesson: ModuleType) -> None:
    """The package's ranks are threads here too, and gloo connects them."""
    store, parts = torch.distributed.HashStore(), torch.arange(24.0).view(2, 3, 4)

    def theirs(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = ParallelGroup.connect(store, rank, 2, torch.device("cpu"), seconds=60.0)
        return group.all_reduce(parts[rank].clone()), group.all_gather(parts[rank], columns=8)

    with ThreadPoolExecutor(2) as pool:
        sums, gathered = zip(*pool.map(theirs, range(2)), strict=True)
    ours, _ = lesson.run_ranks(2, lambda group: group.all_reduce(parts[group.rank]))
    assert all(torch.equal(ours[rank], sums[rank]) for rank in range(2))
    ours, _ = lesson.run_ranks(2, lambda group: torch.cat(group.gather(parts[group.rank]), 1))
    assert all(torch.equal(ours[rank], gathered[rank]) for rank in range(2))
