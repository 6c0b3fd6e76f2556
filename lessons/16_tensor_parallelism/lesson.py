"""Lesson 16: tensor parallelism. Every rank holds a part of every matrix, and sums tell the ranks what the others have computed.

    python lessons/16_tensor_parallelism/lesson.py

Here a rank is a thread, and the ranks send tensors through queues. In an engine it is a process with a GPU.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Queue

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY, LAYERS = 64, 8, 4, 16, 192, 101, 3


@dataclass
class Group:
    """One rank's connection to the others."""

    rank: int
    size: int
    queues: list[list[Queue[Tensor]]]  # [from][to]
    sent: int = 0  # numbers that this rank has sent
    exchanges: int = 0

    def send(self, to: int, x: Tensor) -> None:
        self.sent += x.numel()
        self.queues[self.rank][to].put(x.clone())

    def receive(self, sender: int) -> Tensor:
        return self.queues[sender][self.rank].get(timeout=5)

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in their order."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self.send(rank, x)
        return [x if rank == self.rank else self.receive(rank) for rank in range(self.size)]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, on every rank. All add in the same order, so that all get the same bits."""
        self.exchanges += 1
        return exchange(self, x)


def exchange(group: Group, x: Tensor) -> Tensor:
    """The way in which `all_reduce` adds: each rank sends everything to all others."""
    return torch.stack(group.gather(x)).sum(0)


def run_ranks(size: int, work: Callable[[Group], Tensor]) -> tuple[list[Tensor], list[Group]]:
    """Run `work` on each of `size` ranks at the same time -> their results and connections."""
    queues: list[list[Queue[Tensor]]] = [[Queue() for _ in range(size)] for _ in range(size)]
    groups, results, errors = [Group(rank, size, queues) for rank in range(size)], {}, []

    def one(group: Group) -> None:
        try:
            results[group.rank] = work(group)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if str(error)), errors[0])  # not the timeout of a rank that waited for the failed one
    return [results[rank] for rank in range(size)], groups


# ---- the parts of a matrix. A weight is [outputs, inputs]


def outputs_of(weight: Tensor, rank: int, size: int) -> Tensor:
    """Column-parallel: the rank computes a part of the outputs, from all inputs."""
    # TASK 1: which part of the rows?
    return weight.chunk(size, 0)[rank]
    # END


def inputs_of(weight: Tensor, rank: int, size: int) -> Tensor:
    """Row-parallel: the rank has a part of the inputs, and computes a summand of every output."""
    # TASK 1: which part of the columns?
    return weight.chunk(size, 1)[rank]
    # END


def vocabulary_of(table: Tensor, rank: int, size: int) -> tuple[Tensor, int]:
    """The rank's rows of a table [vocabulary, hidden], and the first token that they belong to. The last rank may have fewer rows."""
    rows = -(-len(table) // size)
    return table[rank * rows:(rank + 1) * rows], rank * rows


# ---- a small model. size 1: one rank that holds everything


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [tokens, heads * HEAD_DIM], k and v [tokens, kv_heads * HEAD_DIM] -> [tokens, heads * HEAD_DIM]. Heads do not know each other."""
    q, k, v = (x.unflatten(1, (-1, HEAD_DIM)).transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


def attend(group: Group, layer: dict[str, Tensor], x: Tensor) -> Tensor:
    """Whole heads on each rank: x [tokens, hidden] -> [tokens, hidden]."""
    q, k, v = (F.linear(x, outputs_of(layer[name], group.rank, group.size)) for name in ("q", "k", "v"))
    return group.all_reduce(F.linear(attention(q, k, v), inputs_of(layer["o"], group.rank, group.size)))


def mlp(group: Group, layer: dict[str, Tensor], x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)): x [tokens, hidden] -> [tokens, hidden], the same on every rank."""
    # TASK 2: gate and up by outputs, down by inputs, and one exchange
    gate, up = (F.linear(x, outputs_of(layer[name], group.rank, group.size)) for name in ("gate", "up"))
    return group.all_reduce(F.linear(F.silu(gate) * up, inputs_of(layer["down"], group.rank, group.size)))
    # END


def embed(group: Group, table: Tensor, tokens: Tensor) -> Tensor:
    """tokens [tokens] -> rows of the table [tokens, hidden], of which this rank may look at its own part only."""
    part, first = vocabulary_of(table, group.rank, group.size)
    # TASK 3: rows of the tokens that this rank holds, zeros for the others, and the sum over the ranks
    mine = (tokens >= first) & (tokens < first + len(part))
    rows = part[torch.where(mine, tokens - first, 0)] * mine[:, None]
    return group.all_reduce(rows)
    # END


def logits_of(group: Group, table: Tensor, x: Tensor) -> Tensor:
    """x [hidden] -> logits [vocabulary]: each rank computes those of its tokens."""
    return torch.cat(group.gather(F.linear(x, vocabulary_of(table, group.rank, group.size)[0])))


def forward(group: Group, weights: dict[str, Tensor], layers: list[dict[str, Tensor]], tokens: Tensor) -> Tensor:
    x = embed(group, weights["embed"], tokens)
    for layer in layers:
        x = x + attend(group, layer, norm(x))
        x = x + mlp(group, layer, norm(x))
    return logits_of(group, weights["head"], norm(x)[-1])


def example() -> tuple[dict[str, Tensor], list[dict[str, Tensor]], Tensor]:
    dice = torch.Generator().manual_seed(0)
    shapes = {"q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN), "v": (KV_HEADS * HEAD_DIM, HIDDEN),
              "o": (HIDDEN, HEADS * HEAD_DIM), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    layers = [{name: torch.randn(shape, generator=dice) / shape[1]**0.5 for name, shape in shapes.items()} for _ in range(LAYERS)]
    weights = {name: torch.randn(VOCABULARY, HIDDEN, generator=dice) for name in ("embed", "head")}
    return weights, layers, torch.randint(0, VOCABULARY, (12,), generator=dice)


def step_ms(gpus: int, weights: float = 141e9, layers: int = 80, exchange_us: float = 15.0) -> tuple[float, float]:
    """Llama-3-70B, one sequence, H100: ms of reading the weights, and of two exchanges per layer, which take some microseconds each."""
    return weights / gpus / 3350e6, 0.0 if gpus == 1 else 2 * layers * exchange_us / 1e3


def main() -> None:
    torch.set_num_threads(1)
    print("Llama-3-70B, 141 GB of weights, one sequence, on H100s with 80 GB (bounds; an exchange takes 15 us)")
    print("  GPUs   GB on each   ms of reading   ms of 160 exchanges   tokens/s")
    for gpus in (1, 2, 4, 8, 16):
        reading, exchanging = step_ms(gpus)
        print(f"  {gpus:4d}{141 / gpus:13.1f}{reading:16.1f}{exchanging:22.1f}{1e3 / (reading + exchanging):11.0f}"
              + ("   does not fit" if gpus == 1 else ""))
    weights, layers, tokens = example()
    (whole,), _ = run_ranks(1, lambda group: forward(group, weights, layers, tokens))
    print(f"\na small model of {LAYERS} layers, {len(tokens)} tokens; its best next token is {int(whole.argmax())}")
    print("  ranks   largest difference of logits   equal on all ranks   best token   exchanges   numbers sent by a rank")
    for size in (1, 2, 4):
        results, groups = run_ranks(size, lambda group: forward(group, weights, layers, tokens))
        difference = max(float((result - whole).abs().max()) for result in results)
        equal = all(torch.equal(result, results[0]) for result in results)
        print(f"  {size:5d}{'below 0.0001' if difference < 1e-4 else f'{difference:.4f}':>31s}{equal!s:>21s}{int(results[0].argmax()):13d}"
              f"{groups[0].exchanges:12d}{groups[0].sent:25,d}")


if __name__ == "__main__":
    main()
