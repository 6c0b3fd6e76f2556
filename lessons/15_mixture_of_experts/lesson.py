"""Lesson 15: mixture of experts. A router sends each token to a few of many MLPs.

    python lessons/15_mixture_of_experts/lesson.py
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 512, 64, 128, 8, 2


@dataclass(frozen=True)
class Experts:
    """E gated MLPs."""

    gate_up: Tensor  # [E, 2 * inner, hidden]: rows of the gate, then of up
    down: Tensor  # [E, hidden, inner]

    def __len__(self) -> int:
        return len(self.down)

    def compute(self, expert: int, x: Tensor) -> Tensor:
        """One expert's MLP: x [rows, hidden] -> [rows, hidden]."""
        gate, up = F.linear(x, self.gate_up[expert]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[expert])


def route(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """x [tokens, hidden], router [E, hidden] -> each token's experts [tokens, k], the best first, and their weights [tokens, k].

    The weights of a token add up to 1.
    """
    # TASK 1: probabilities of all experts, the k largest of them, and these divided by their sum
    probabilities = F.linear(x, router).softmax(-1)
    weights, ids = probabilities.topk(top_k, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True)
    # END


def one_by_one(x: Tensor, experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """The definition: each token, each of its experts. Reads an expert again for every token."""
    rows = []
    for row, chosen, shares in zip(x, ids.tolist(), weights, strict=True):
        rows.append(sum(share * experts.compute(expert, row[None])[0] for expert, share in zip(chosen, shares, strict=True)))
    return torch.stack(rows)


def every_expert(x: Tensor, experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """Every expert computes every token, and most results are multiplied by 0."""
    shares = torch.zeros(len(x), len(experts)).scatter_(1, ids, weights)  # [tokens, E]
    return sum(shares[:, e, None] * experts.compute(e, x) for e in range(len(experts)))


def group_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """ids [tokens, k] -> the assignments sorted by expert, and where each expert's begin [E + 1]; the last entry is their number.

    Assignment a belongs to token a // k: it is entry a of the flattened ids. Assignments of one expert stay in order.
    """
    # TASK 2: a stable sort, and the sums of the counts
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    return order, F.pad(counts.cumsum(0), (1, 0))
    # END


def grouped(x: Tensor, experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """Each expert computes its tokens in one product. A kernel computes all groups in one launch."""
    outputs = torch.empty(ids.numel(), x.shape[1])  # of each assignment
    order, begins = group_by_expert(ids, len(experts))
    # TASK 3: for each expert that has assignments: gather its tokens, compute them, put the results at the places of the assignments
    for e in range(len(experts)):
        places = order[begins[e]:begins[e + 1]]
        if len(places):
            outputs[places] = experts.compute(e, x[places // ids.shape[1]])
    # END
    # Each token adds its k results in its own order, so the sum does not depend on the other tokens.
    return (outputs.view(*ids.shape, -1) * weights[:, :, None]).sum(1)


def fastest(x: Tensor, experts: Experts, ids: Tensor, weights: Tensor) -> Tensor:
    """The way that task 4 measures."""
    return grouped(x, experts, ids, weights)


def rows_of_tiles(ids: Tensor, num_experts: int, height: int) -> int:
    """A kernel computes tiles of `height` rows, each with one expert. Rows that it computes, with the padding of each group's last tile."""
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    return int((-(-counts // height)).sum()) * height


def with_capacity(x: Tensor, experts: Experts, ids: Tensor, weights: Tensor, factor: float) -> tuple[Tensor, float]:
    """Each expert takes the first `capacity` of its assignments -> outputs, and the share of the assignments that is dropped."""
    capacity = math.ceil(factor * ids.numel() / len(experts))
    order, begins = group_by_expert(ids, len(experts))
    rank = torch.empty(ids.numel(), dtype=torch.long)  # of each assignment in its group
    rank[order] = torch.arange(ids.numel()) - begins[:-1].repeat_interleave(begins.diff())
    kept = (rank < capacity).view(ids.shape)
    return grouped(x, experts, ids, weights * kept), 1 - float(kept.float().mean())


def experts_read(batch: int, num_experts: int, top_k: int) -> float:
    """Mean number of different experts that `batch` tokens choose, if all are equally likely."""
    return num_experts * (1 - (1 - top_k / num_experts) ** batch)


def example(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Experts]:
    """x [tokens, hidden], a router [E, hidden], and experts. Tokens of a text are not spread evenly: these have a part in common."""
    dice = torch.Generator().manual_seed(0)
    router = torch.randn(EXPERTS, HIDDEN, generator=dice) * 0.2
    experts = Experts(torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=dice) / 8, torch.randn(EXPERTS, HIDDEN, INNER, generator=dice) / 8)
    return torch.randn(tokens, HIDDEN, generator=dice) + 0.3 * torch.randn(HIDDEN, generator=dice), router, experts


def show_reading() -> None:
    """Mixtral-8x7B: 32 layers; an expert is three matrices of 4,096 x 14,336. On an H100, which reads 3,350 GB/s."""
    expert, rest = 3 * 4096 * 14336, 46.70e9 - 32 * 8 * 3 * 4096 * 14336
    print("Mixtral-8x7B, 46.7 billion weights of 2 bytes, 2 of 8 experts per token, on an H100 (bounds of reading)")
    print("  tokens in the step  " + "".join(f"{batch:8d}" for batch in (1, 2, 4, 8, 16, 64)) + "   a dense model of this size")
    reads = [experts_read(batch, 8, 2) for batch in (1, 2, 4, 8, 16, 64)]
    sizes = [2 * (rest + 32 * count * expert) / 1e9 for count in (*reads, 8)]
    print("  experts read of 8   " + "".join(f"{count:8.1f}" for count in reads))
    print("  GB                  " + "".join(f"{size:8.1f}" for size in sizes[:-1]) + f"{sizes[-1]:29.1f}")
    print("  ms                  " + "".join(f"{size / 3.35:8.1f}" for size in sizes[:-1]) + f"{sizes[-1] / 3.35:29.1f}")


def main() -> None:
    torch.set_num_threads(1)
    show_reading()
    x, router, experts = example()
    ids, weights = route(x, router, TOP_K)
    print(f"\n{TOKENS} tokens, {EXPERTS} experts of a small layer, {TOP_K} per token")
    for token in range(3):
        (a, b), (p, q) = ids[token].tolist(), weights[token].tolist()
        print(f"  token {token}: {p:.2f} x expert {a} + {q:.2f} x expert {b}")
    order, begins = group_by_expert(ids[:8], EXPERTS)
    print("  experts of the first 8 tokens: " + " ".join("".join(map(str, pair)) for pair in ids[:8].tolist()))
    print("  the same, sorted:              " + "".join(str(int(ids[:8].flatten()[a])) for a in order) + f"   begins {begins.tolist()}")
    print("  tokens per expert:  " + "".join(f"{count:6d}" for count in torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()))

    exact, one_read = one_by_one(x, experts, ids, weights), 3 * HIDDEN * INNER
    print("\n                   largest difference   million multiply-adds   times an expert is read")
    for way, rows, reads in ((one_by_one, ids.numel(), ids.numel()), (every_expert, TOKENS * EXPERTS, EXPERTS),
                             (grouped, ids.numel(), EXPERTS)):
        difference = float((way(x, experts, ids, weights) - exact).abs().max())
        shown = "below 0.0001" if difference < 1e-4 else f"{difference:.4f}"
        print(f"  {way.__name__:12s}{shown:>25s}{rows * one_read / 1e6:24.1f}{reads:26d}")

    print("\nrows that a kernel computes for each row that it needs, by the height of its tiles")
    print("  tokens in the step  " + "".join(f"{count:8d}" for count in (1, 8, 64, 512)))
    for height in (16, 64, 128):
        print(f"  tiles of {height:3d} rows   " + "".join(
            f"{rows_of_tiles(ids[:count], EXPERTS, height) / ids[:count].numel():8.1f}" for count in (1, 8, 64, 512)))

    print("\nwith a fixed capacity per expert, as in training")
    last, one = slice(TOKENS - 8, None), slice(TOKENS - 1, None)
    for factor in (1.0, 1.25, 2.0):
        output, dropped = with_capacity(x, experts, ids, weights, factor)
        alone, _ = with_capacity(x[one], experts, ids[one], weights[one], EXPERTS)
        change = float((output[-1] - alone[0]).norm() / alone[0].norm())
        nowhere = int((output[last].abs().sum(1) == 0).sum())
        print(f"  factor {factor:4.2f}: {dropped:5.1%} of the assignments are dropped; {nowhere} of the last 8 tokens have no expert; "
              f"the last one's output changes by {change:.0%}")
    print("\nthe weights of Mixtral-8x7B are 93 GB, and a card has 80 GB. Which part of a step can another card do?")


if __name__ == "__main__":
    main()
