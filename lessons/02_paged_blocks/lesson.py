"""Lesson 2: keys and values in pages that are found through a table, as in the memory of an operating system.

Run it:  python lessons/02_paged_blocks/lesson.py      (a second on a CPU; needs torch, nothing else)

Sequences grow, and their final length is unknown. So memory is divided into blocks, each sequence has a list of block numbers (its block
table), and attention follows the table. Three sequences grow in turn, and their attention equals that over plain tensors. Then one
sequence is forked.
"""
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sequence:
    """A growing sequence: the part that the memory manager needs."""

    table: list[int] = field(default_factory=list)  # entry i: the block that holds tokens i * size ... i * size + size - 1
    length: int = 0


class Memory:
    """`blocks` x `size` slots for one layer's keys and values, each of `heads` heads with `dim` numbers."""

    def __init__(self, blocks: int, size: int, heads: int, dim: int) -> None:
        self.size = size
        self.k = torch.full((blocks, size, heads, dim), float("nan"))  # nan: a read of an unwritten slot changes the result
        self.v = torch.full((blocks, size, heads, dim), float("nan"))
        self.free = list(range(blocks))
        self.owners = [0] * blocks  # reference counts: the number of tables that contain the block
        self.copies = 0

    def allocate(self) -> int:
        block = self.free.pop(0)
        self.owners[block] = 1
        return block

    def free_block(self, block: int) -> None:
        self.owners[block] -= 1
        if self.owners[block] == 0:
            self.free.append(block)

    def append(self, sequence: Sequence, k: Tensor, v: Tensor) -> None:
        """Write one token's key and value [heads, dim] at the end of `sequence`."""
        index, offset = divmod(sequence.length, self.size)
        if index == len(sequence.table):  # the last block is full (or there is none yet)
            sequence.table.append(self.allocate())
        elif self.owners[sequence.table[index]] > 1:  # the block has another owner: copy-on-write
            sequence.table[index] = self.copy(sequence.table[index])
        self.k[sequence.table[index], offset] = k
        self.v[sequence.table[index], offset] = v
        sequence.length += 1

    def copy(self, shared: int) -> int:
        own = self.allocate()
        self.k[own], self.v[own] = self.k[shared], self.v[shared]
        self.free_block(shared)
        self.copies += 1
        return own

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens. No block is copied: both tables contain the same blocks."""
        for block in sequence.table:
            self.owners[block] += 1
        return Sequence(sequence.table.copy(), sequence.length)

    def release(self, sequence: Sequence) -> None:
        for block in sequence.table:
            self.free_block(block)


def attend_gathered(q: Tensor, memory: Memory, sequence: Sequence) -> Tensor:
    """First way: collect the scattered keys and values, then attend as usual. q [heads, dim] -> [heads, dim]."""
    k = memory.k[sequence.table].flatten(0, 1)[:sequence.length]  # [length, heads, dim]: indexing with the table copies
    v = memory.v[sequence.table].flatten(0, 1)[:sequence.length]
    weights = torch.einsum("hd,shd->hs", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, v)


def attend_by_block(q: Tensor, memory: Memory, sequence: Sequence) -> Tensor:
    """Second way, that of a kernel: one block after another, without a copy and without a list of all scores ("online softmax").

    The result is a mean of values with weights exp(score). The loop keeps the sum of weights and the sum of weighted values. If a block has
    a larger score, both sums are scaled down to it. Blocks may come in any order, and processors may divide them.
    """
    best = torch.full((q.shape[0], 1), -torch.inf)  # largest score so far, [heads, 1]
    total = torch.zeros(q.shape[0], 1)
    weighted = torch.zeros_like(q)
    for i, block in enumerate(sequence.table):
        n = min(memory.size, sequence.length - i * memory.size)  # the last block may be partly filled
        k, v = memory.k[block, :n], memory.v[block, :n]
        scores = torch.einsum("hd,shd->hs", q, k) * q.shape[-1] ** -0.5
        higher = torch.maximum(best, scores.amax(-1, keepdim=True))
        shrink, weights = (best - higher).exp(), (scores - higher).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        weighted = weighted * shrink + torch.einsum("hs,shd->hd", weights, v)
        best = higher
    return weighted / total


def waste(lengths: list[int], size: int) -> float:
    """Sequences grow to these lengths in blocks of `size` -> the fraction of reserved slots that are empty, over all their steps."""
    empty = held = 0
    for length in lengths:
        for tokens in range(1, length + 1):
            slots = -(-tokens // size) * size
            empty, held = empty + slots - tokens, held + slots
    return empty / held


def waste_reserved(lengths: list[int], limit: int) -> float:
    """The same if each sequence reserves `limit` slots from its first step on."""
    used = sum(length * (length + 1) // 2 for length in lengths)
    return 1 - used / (sum(lengths) * limit)


def some_lengths(n: int, limit: int = 2048, seed: int = 0) -> list[int]:
    """Log-normal: most sequences are short, a few are very long. The mean is about 500 tokens."""
    generator = random.Random(seed)
    return [min(limit, max(1, round(generator.lognormvariate(5.8, 0.9)))) for _ in range(n)]


def agrees(memory: Memory, sequence: Sequence, plain: list[Tensor]) -> bool:
    """Whether attention over the paged sequence equals attention over the same keys and values in one tensor."""
    k, v = torch.stack(plain).unbind(1)  # [length, heads, dim]
    q = torch.randn(k.shape[1:], generator=torch.Generator().manual_seed(sequence.length))
    weights = torch.einsum("hd,shd->hs", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    expected = torch.einsum("hs,shd->hd", weights, v)
    return all(torch.allclose(attend(q, memory, sequence), expected, atol=1e-6) for attend in (attend_gathered, attend_by_block))


def part_one() -> None:
    memory, generator = Memory(blocks=12, size=4, heads=2, dim=8), torch.Generator().manual_seed(0)
    sequences = {name: Sequence() for name in "abc"}
    plain: dict[str, list[Tensor]] = {name: [] for name in "abc"}

    def write(name: str) -> None:
        kv = torch.randn(2, 2, 8, generator=generator)  # key and value of one token
        memory.append(sequences[name], *kv)
        plain[name].append(kv)

    for turn in range(11):
        for name in "abc"[: 1 + turn % 3]:  # a grows in each turn, b in two of three turns, c in one of three
            write(name)
    print("three sequences grew in turn, in blocks of 4:")
    for name, sequence in sequences.items():
        assert agrees(memory, sequence, plain[name])
        print(f"  {name}: {sequence.length:2d} tokens, table {sequence.table}, attention equal to that over plain tensors")

    sequences["d"], plain["d"] = memory.fork(sequences["a"]), plain["a"].copy()
    owners = [memory.owners[block] for block in sequences["d"].table]
    print(f"\nd is a fork of a: table {sequences['d'].table}, owners {owners}, {memory.copies} copies")
    for _ in range(2):
        for name in "ad":
            write(name)
            print(f"  {name} writes token {sequences[name].length - 1}: table {sequences[name].table}, copies so far: {memory.copies}")
    assert all(agrees(memory, sequences[name], plain[name]) for name in sequences), "a fork changed its origin, or the other way round"
    for sequence in sequences.values():
        memory.release(sequence)
    assert sorted(memory.free) == list(range(12)), "a block was lost"


def part_two() -> None:
    lengths = some_lengths(300)
    print(f"\n300 sequences, mean length {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}. Slots reserved and empty, on average:")
    print(f"  reserved for the longest (2048)  {waste_reserved(lengths, 2048):6.1%}")
    for size in (1, 4, 16, 64, 256):
        print(f"  blocks of {size:3d}                    {waste(lengths, size):6.1%}")


if __name__ == "__main__":
    part_one()
    part_two()
