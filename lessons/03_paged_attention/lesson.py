"""Lesson 3: attention over keys and values in scattered blocks, without collecting them first.

A decode step has one query per head, and the keys of its sequence are in blocks that a block table lists. The lesson computes attention in
three ways: over a copy, block by block with an online softmax, and in parts that are merged. All three give the same numbers.
"""
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


class PagedCache:
    """One layer's keys and values in blocks. NaN in unwritten slots: a read of one changes the result visibly."""

    def __init__(self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> None:
        self.block_size = block_size
        self.k = torch.full((num_blocks, block_size, kv_heads, head_dim), math.nan)
        self.v = torch.full((num_blocks, block_size, kv_heads, head_dim), math.nan)

    def write(self, table: list[int], k: Tensor, v: Tensor) -> None:
        """Store a whole sequence: k and v [tokens, kv_heads, head_dim]."""
        for position in range(len(k)):
            block, offset = table[position // self.block_size], position % self.block_size
            self.k[block, offset], self.v[block, offset] = k[position], v[position]


@dataclass
class Partial:
    """Attention over some of the keys, not divided yet. It is enough to continue with other keys, or to merge two parts."""

    best: Tensor  # [heads] largest score so far
    total: Tensor  # [heads] sum of exp(score - best)
    weighted: Tensor  # [heads, head_dim] sum of exp(score - best) * value

    def output(self) -> Tensor:
        """[heads, head_dim]: the mean of the values, weighted with softmax(scores)."""
        return self.weighted / self.total[:, None]


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """q [heads, head_dim] against k [tokens, kv_heads, head_dim] -> [heads, tokens]. Each key head serves heads / kv_heads query heads."""
    grouped = q.view(k.shape[1], -1, q.shape[1])  # [kv_heads, group, head_dim]
    return (grouped @ k.permute(1, 2, 0)).flatten(0, 1) / math.sqrt(q.shape[1])


def weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """weights [heads, tokens], v [tokens, kv_heads, head_dim] -> [heads, head_dim]."""
    grouped = weights.view(v.shape[1], -1, weights.shape[1])  # [kv_heads, group, tokens]
    return (grouped @ v.transpose(0, 1)).flatten(0, 1)


def attend_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook: all scores, softmax, weighted sum."""
    return weighted_sum(scores_of(q, k).softmax(-1), v)


def attend_gathered(q: Tensor, cache: PagedCache, table: list[int], length: int) -> Tensor:
    """Collect the scattered keys and values (indexing copies them), then attend as usual."""
    k = cache.k[table].flatten(0, 1)[:length]
    v = cache.v[table].flatten(0, 1)[:length]
    return attend_plain(q, k, v)


def filled(cache: PagedCache, table: list[int], index: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values in the used slots of the sequence's block `index`: two views [tokens, kv_heads, head_dim]."""
    # TASK 1: which block is it, and how many of its slots does a sequence of `length` tokens use?
    used = min(cache.block_size, length - index * cache.block_size)
    return cache.k[table[index], :used], cache.v[table[index], :used]
    # END


def add_block(part: Partial, q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Online softmax: the state after another block of keys and values."""
    scores = scores_of(q, k)  # [heads, tokens]
    # TASK 2: the new best, total and weighted. The old sums were made with the old best
    best = torch.maximum(part.best, scores.amax(-1))
    shrink = (part.best - best).exp()  # [heads] 1 where the best score is still the old one
    weights = (scores - best[:, None]).exp()  # [heads, tokens]
    total = part.total * shrink + weights.sum(-1)
    weighted = part.weighted * shrink[:, None] + weighted_sum(weights, v)
    # END
    return Partial(best, total, weighted)


def attend_blocks(q: Tensor, cache: PagedCache, table: list[int], length: int, first: int = 0, last: int | None = None) -> Partial:
    """Attention over the blocks first ... last - 1 of a sequence (default: all), one after another, in place."""
    part = Partial(torch.full(q.shape[:1], -math.inf), torch.zeros(q.shape[:1]), torch.zeros(q.shape))
    for index in range(first, len(table) if last is None else last):
        part = add_block(part, q, *filled(cache, table, index, length))
    return part


def merge(a: Partial, b: Partial) -> Partial:
    """One partial result from two over different keys."""
    # TASK 3: both sums must be relative to the same best score before they are added
    best = torch.maximum(a.best, b.best)
    shrink_a, shrink_b = (a.best - best).exp(), (b.best - best).exp()
    total = a.total * shrink_a + b.total * shrink_b
    weighted = a.weighted * shrink_a[:, None] + b.weighted * shrink_b[:, None]
    # END
    return Partial(best, total, weighted)


def attend_split(q: Tensor, cache: PagedCache, table: list[int], length: int, workers: int) -> Tensor:
    """Each worker takes an equal share of the blocks; here one after another, on a GPU at the same time. Then their results are merged."""
    share = math.ceil(len(table) / workers)
    parts = [attend_blocks(q, cache, table, length, first, min(first + share, len(table))) for first in range(0, len(table), share)]
    whole = parts[0]
    for part in parts[1:]:
        whole = merge(whole, part)
    return whole.output()


def attend_batch(queries: Tensor, cache: PagedCache, tables: list[list[int]], lengths: list[int]) -> Tensor:
    """A decode step of many sequences: queries [sequences, heads, head_dim] -> the same shape."""
    pairs = zip(queries, tables, lengths, strict=True)
    return torch.stack([attend_blocks(q, cache, table, length).output() for q, table, length in pairs])


def show_online_softmax() -> None:
    """One head, head_dim 1: scores are the keys themselves, and the values are 10, 20, 30, ..."""
    k, v = torch.tensor([1.0, 2.0, 0.5, 4.0, 3.0, 3.5]).view(6, 1, 1), torch.arange(10.0, 70.0, 10.0).view(6, 1, 1)
    cache, q = PagedCache(5, 2, 1, 1), torch.ones(1, 1)
    cache.write([3, 0, 4], k, v)
    part = Partial(torch.full((1,), -math.inf), torch.zeros(1), torch.zeros(1, 1))
    print("online softmax, blocks of 2 tokens       best   total   weighted   mean so far")
    for index in range(3):
        keys, values = filled(cache, [3, 0, 4], index, 6)
        part = add_block(part, q, keys, values)
        state = f"{part.best.item():4.1f}  {part.total.item():6.3f}  {part.weighted.item():9.2f}  {part.output().item():12.3f}"
        print(f"  scores {keys.flatten().tolist()!s:11s} values {values.flatten().tolist()!s:13s} {state}")
    print(f"  softmax over all six at once: {attend_plain(q, k, v).item():49.3f}\n")


def main() -> None:
    torch.set_num_threads(1)
    show_online_softmax()
    heads, kv_heads, dim, block_size, length = 9, 3, 64, 16, 2000  # one layer of SmolLM2-135M
    torch.manual_seed(0)
    q, k, v = torch.randn(heads, dim), torch.randn(length, kv_heads, dim), torch.randn(length, kv_heads, dim)
    table = random.Random(0).sample(range(400), math.ceil(length / block_size))
    cache = PagedCache(400, block_size, kv_heads, dim)
    cache.write(table, k, v)
    plain = attend_plain(q, k, v)
    ways = {"over a copy": attend_gathered(q, cache, table, length), "block by block": attend_blocks(q, cache, table, length).output(),
            "8 parts, merged": attend_split(q, cache, table, length, 8)}
    once = 2 * length * kv_heads * dim * 2 / 2**20  # MiB of keys and values in 2 bytes per number
    print(f"{length} tokens in {len(table)} blocks; one layer has {once:.2f} MiB of keys and values (2 bytes per number)")
    print("                   largest difference   memory traffic   blocks one after another")
    for name, out in ways.items():
        traffic = 3 * once if name == "over a copy" else once  # read, write the copy, read the copy
        chain = {"over a copy": "-", "block by block": str(len(table))}.get(name, str(math.ceil(len(table) / 8)))
        difference = float((out - plain).abs().max())
        shown = "below 0.00001" if difference < 1e-5 else f"{difference:.5f}"
        print(f"  {name:15s}  {shown:>18s}  {traffic:10.2f} MiB  {chain:>25s}")
    outputs = [31, 128, 12, 55, 240, 19, 77, 34]
    idle = 1 - sum(outputs) / (len(outputs) * max(outputs))
    print(f"\na batch of {len(outputs)} sequences that make {outputs} tokens "
          f"runs for {max(outputs)} steps: {idle:.0%} of its rows are idle")


if __name__ == "__main__":
    main()
