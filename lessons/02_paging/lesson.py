"""Lesson 2: keys and values in pages, found through a table, as an operating system keeps memory.

Run it:  python lessons/02_paging/lesson.py      (a second on a CPU; needs torch, nothing else)

Texts grow, and nobody knows how far. So memory is cut into blocks, each text owns a list of block numbers (its table), and
attention follows the table. Three texts grow in turn; their attention equals that over plain tensors. Then one is forked.
"""
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Text:
    """A growing text, as the memory manager sees it."""

    table: list[int] = field(default_factory=list)  # entry i: the block that holds tokens i * size ... i * size + size - 1
    length: int = 0


class Memory:
    """`blocks` x `size` slots for one layer's keys and values, of `heads` heads with `dim` numbers each."""

    def __init__(self, blocks: int, size: int, heads: int, dim: int) -> None:
        self.size = size
        self.k = torch.full((blocks, size, heads, dim), float("nan"))  # nan: whoever reads an unwritten slot will notice
        self.v = torch.full((blocks, size, heads, dim), float("nan"))
        self.free = list(range(blocks))
        self.owners = [0] * blocks  # how many tables name the block
        self.copies = 0

    def take(self) -> int:
        block = self.free.pop(0)
        self.owners[block] = 1
        return block

    def give_back(self, block: int) -> None:
        self.owners[block] -= 1
        if self.owners[block] == 0:
            self.free.append(block)

    def append(self, text: Text, k: Tensor, v: Tensor) -> None:
        """Write one token's key and value [heads, dim] at the end of `text`."""
        index, offset = divmod(text.length, self.size)
        if index == len(text.table):  # the last block is full (or there is none yet)
            text.table.append(self.take())
        elif self.owners[text.table[index]] > 1:  # somebody else reads this block: copy on write
            text.table[index] = self.copy(text.table[index])
        self.k[text.table[index], offset] = k
        self.v[text.table[index], offset] = v
        text.length += 1

    def copy(self, shared: int) -> int:
        own = self.take()
        self.k[own], self.v[own] = self.k[shared], self.v[shared]
        self.give_back(shared)
        self.copies += 1
        return own

    def fork(self, text: Text) -> Text:
        """A second text with the same past. Nothing is copied: both tables name the same blocks."""
        for block in text.table:
            self.owners[block] += 1
        return Text(text.table.copy(), text.length)

    def end(self, text: Text) -> None:
        for block in text.table:
            self.give_back(block)


def attend_gathered(q: Tensor, memory: Memory, text: Text) -> Tensor:
    """First way: collect the scattered keys and values, then attend as ever. q [heads, dim] -> [heads, dim]."""
    k = memory.k[text.table].flatten(0, 1)[:text.length]  # [length, heads, dim]: the table is an index, the rest is a copy
    v = memory.v[text.table].flatten(0, 1)[:text.length]
    weights = torch.einsum("hd,shd->hs", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, v)


def attend_by_block(q: Tensor, memory: Memory, text: Text) -> Tensor:
    """Second way, a kernel's: one block after the other, no copy and no list of all scores ("online softmax").

    A softmax is a weighted mean with weights exp(score). Keep the sum of weights and of weighted values so far; when a larger
    score turns up, scale both down to it. Blocks may come in any order, or be shared out among processors.
    """
    best = torch.full((q.shape[0], 1), -torch.inf)  # largest score so far, [heads, 1]
    total = torch.zeros(q.shape[0], 1)
    mixed = torch.zeros_like(q)
    for i, block in enumerate(text.table):
        n = min(memory.size, text.length - i * memory.size)  # the last block may be partly filled
        k, v = memory.k[block, :n], memory.v[block, :n]
        scores = torch.einsum("hd,shd->hs", q, k) * q.shape[-1] ** -0.5
        higher = torch.maximum(best, scores.amax(-1, keepdim=True))
        shrink, weights = (best - higher).exp(), (scores - higher).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        mixed = mixed * shrink + torch.einsum("hs,shd->hd", weights, v)
        best = higher
    return mixed / total


def waste(lengths: list[int], size: int) -> float:
    """Texts that grow to these lengths in blocks of `size`: share of the slots they hold that is empty, over all their steps."""
    empty = held = 0
    for length in lengths:
        for tokens in range(1, length + 1):
            slots = -(-tokens // size) * size
            empty, held = empty + slots - tokens, held + slots
    return empty / held


def waste_reserved(lengths: list[int], limit: int) -> float:
    """The same if each text holds `limit` slots from its first step on."""
    used = sum(length * (length + 1) // 2 for length in lengths)
    return 1 - used / (sum(lengths) * limit)


def some_lengths(n: int, limit: int = 2048, seed: int = 0) -> list[int]:
    """Log-normal: most texts are short, a few very long. Mean about 500 tokens."""
    dice = random.Random(seed)
    return [min(limit, max(1, round(dice.lognormvariate(5.8, 0.9)))) for _ in range(n)]


def agrees(memory: Memory, text: Text, plain: list[Tensor]) -> bool:
    """Is attention over the paged text what it is over the same keys and values side by side?"""
    k, v = torch.stack(plain).unbind(1)  # [length, heads, dim]
    q = torch.randn(k.shape[1:], generator=torch.Generator().manual_seed(text.length))
    weights = torch.einsum("hd,shd->hs", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    expected = torch.einsum("hs,shd->hd", weights, v)
    return all(torch.allclose(attend(q, memory, text), expected, atol=1e-6) for attend in (attend_gathered, attend_by_block))


def part_one() -> None:
    memory, dice = Memory(blocks=12, size=4, heads=2, dim=8), torch.Generator().manual_seed(0)
    texts = {name: Text() for name in "abc"}
    plain: dict[str, list[Tensor]] = {name: [] for name in "abc"}

    def write(name: str) -> None:
        kv = torch.randn(2, 2, 8, generator=dice)  # key and value of one token
        memory.append(texts[name], *kv)
        plain[name].append(kv)

    for turn in range(11):
        for name in "abc"[: 1 + turn % 3]:  # a grows in each turn, b in two of three, c in one of three
            write(name)
    print("three texts grew in turn, in blocks of 4:")
    for name, text in texts.items():
        assert agrees(memory, text, plain[name])
        print(f"  {name}: {text.length:2d} tokens, table {text.table}, attention equal to that over plain tensors")

    texts["d"], plain["d"] = memory.fork(texts["a"]), plain["a"].copy()
    print(f"\nd is a fork of a: table {texts['d'].table}, owners {[memory.owners[b] for b in texts['d'].table]}, {memory.copies} copies")
    for _ in range(2):
        for name in "ad":
            write(name)
            print(f"  {name} writes token {texts[name].length - 1}: table {texts[name].table}, copies so far: {memory.copies}")
    assert all(agrees(memory, texts[name], plain[name]) for name in texts), "a fork changed its origin, or the other way round"
    for text in texts.values():
        memory.end(text)
    assert sorted(memory.free) == list(range(12)), "a block was lost"


def part_two() -> None:
    lengths = some_lengths(300)
    print(f"\n300 texts, mean length {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}. Slots held and empty, on average:")
    print(f"  reserved for the longest (2048)  {waste_reserved(lengths, 2048):6.1%}")
    for size in (1, 4, 16, 64, 256):
        print(f"  blocks of {size:3d}                    {waste(lengths, size):6.1%}")


if __name__ == "__main__":
    part_one()
    part_two()
