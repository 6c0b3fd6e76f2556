"""Lesson 12: several tokens for one pass of the model. Guess the next tokens cheaply, check all guesses in one step, keep what is right.

A decode step reads all weights for one token per sequence. Checking k guesses costs hardly more: they are k more rows. First greedy
decoding with guesses from the text itself, then sampling with guesses from another distribution, then the arithmetic of when this pays.
"""
import math
import random
from itertools import cycle, islice

import torch
from torch import Tensor

TEXT = ("{'name': 'hen', 'legs': 2, 'eggs': 5}, {'name': 'fox', 'legs': 4, 'eggs': 0}, {'name': 'hat', 'legs': 0, 'eggs': 0}, "
        "{'name': 'cat', 'legs': 4, 'eggs': 0}")  # what the model writes, token by token; a token is a letter here


def propose(tokens: list[int], count: int, shortest: int = 2, longest: int = 4) -> list[int]:
    """Guesses: the text may continue as it did after an earlier occurrence of its last tokens ([] if they are new)."""
    # TASK 1: look for the longest match that ends earlier, of equal ones the latest; continue after it (again and again, if it is short)
    for length in range(longest, shortest - 1, -1):
        last = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):  # a match ends before position `end`
            if tokens[end - length:end] == last:
                return list(islice(cycle(tokens[end:end + count]), count))
    return []
    # END


def accept(drafts: list[int], chosen: list[int]) -> list[int]:
    """The tokens that a step makes. chosen [len(drafts) + 1]: the model's own token after the text and the first i drafts, for each i."""
    # TASK 2: keep drafts while they equal the model's choice, and then the model's choice at the first difference (or after the last draft)
    count = 0
    while count < len(drafts) and drafts[count] == chosen[count]:
        count += 1
    return chosen[:count + 1]
    # END


def generate(text: list[int], start: int, k: int) -> tuple[int, int, list[tuple[int, list[int], int]]]:
    """Greedy decoding of a "model" that writes `text`, from position `start` -> steps, rows computed, and (position, drafts, accepted)."""
    tokens, steps, rows, log = text[:start], 0, 0, []
    while len(tokens) < len(text):
        drafts = propose(tokens, min(k, len(text) - len(tokens) - 1)) if k else []
        chosen, right = [], True  # one pass computes all rows: the last token, and each draft
        for i in range(len(drafts) + 1):
            chosen.append(text[len(tokens) + i] if right else -1)  # after a wrong draft the model's choice is of no use
            right = right and i < len(drafts) and drafts[i] == chosen[i]
        made = accept(drafts, chosen)
        log.append((len(tokens), drafts, len(made) - 1))
        tokens += made
        steps, rows = steps + 1, rows + 1 + len(drafts)
    assert tokens == text, "guesses changed the text"
    return steps, rows, log


def choose_or_recover(p: Tensor, q: Tensor, draft: int, uniform: float, noise: Tensor) -> int:
    """One token with the distribution p [vocabulary], although `draft` was sampled from q [vocabulary].

    uniform: a random number between 0 and 1. noise [vocabulary]: Gumbel noise (lesson 10) for a second choice.
    """
    # TASK 3: accept the draft with probability min(1, p / q); else sample from max(0, p - q), by its logarithm plus noise
    if uniform * q[draft] < p[draft]:
        return draft
    rest = (p - q).clamp_min(0.0)
    return int((rest.log() + noise).argmax())
    # END


def acceptance(p: Tensor, q: Tensor) -> float:
    """The probability that a draft from q is accepted."""
    return float(torch.minimum(p, q).sum())


def tokens_per_step(rate: float, k: int) -> float:
    """Expected tokens of a step with k drafts, each accepted with probability `rate`: 1 + rate + rate^2 + ... + rate^k."""
    return sum(rate**i for i in range(k + 1))


def step_ms(sequences: int, drafts: int, context: int = 100) -> float:
    """Lesson 8's bound for Qwen3-0.6B on an A100: weights and keys are read once, and each sequence has 1 + drafts rows."""
    reading = (1.19e9 + sequences * context * 114_688) / 2039e6
    return max(reading, sequences * (1 + drafts) * 1.2e9 / 312e9)


def choose_k(rate: float, sequences: int) -> int:
    """How many drafts to check in a step."""
    return 4


def speed(rate: float, sequences: int, k: int) -> float:
    """Tokens per ms with k drafts, in units of the speed without drafts. (The guesses themselves cost nothing here.)"""
    return tokens_per_step(rate, k) / step_ms(sequences, k) * step_ms(sequences, 0)


def gumbel(count: int, dice: random.Random) -> Tensor:
    return torch.tensor([-math.log(-math.log(dice.random())) for _ in range(count)])


def show_sampling(samples: int = 4000) -> None:
    """Guesses from a poor model do not change what is sampled, only how often a guess is accepted."""
    p, dice = torch.tensor([0.50, 0.25, 0.15, 0.07, 0.03]), random.Random(0)
    print(f"\n{samples:,} tokens sampled        {'token 0':>10s}" + "".join(f"{i:10d}" for i in range(1, 5)) + "   accepted")
    print("  the model's p             " + "".join(f"{x:10.1%}" for x in p.tolist()))
    for name, q in (("equal q", p), ("flat q", torch.full((5,), 0.2)), ("wrong q", p.flip(0))):
        counts, accepted = torch.zeros(5), 0
        for _ in range(samples):
            draft = dice.choices(range(5), q.tolist())[0]
            token = choose_or_recover(p, q, draft, dice.random(), gumbel(5, dice))
            counts[token] += 1
            accepted += token == draft
        print(f"  drafts from {name:14s}" + "".join(f"{x:10.1%}" for x in (counts / samples).tolist())
              + f"{accepted / samples:11.1%} (formula: {acceptance(p, q):.1%})")


def main() -> None:
    torch.set_num_threads(1)
    letters = sorted(set(TEXT))
    text = [letters.index(letter) for letter in TEXT]
    print(f"a step of one sequence of Qwen3-0.6B on an A100: {1.19e9 / 2039e6:.2f} ms of reading weights, {1.2e9 / 312e9:.3f} ms of "
          "arithmetic\n")
    print("greedy decoding of a text with 4 records; guesses from the text so far")
    print("  k   steps   rows   tokens per step")
    for k in (0, 1, 2, 4, 8):
        steps, rows, log = generate(text, 12, k)
        print(f"  {k}{steps:8d}{rows:7d}{(len(text) - 12) / steps:12.2f}")
    for position, drafts, accepted in [entry for entry in log if entry[1]][6:11]:
        guess = "".join(letters[i] for i in drafts)
        print(f"    after {TEXT[position - 12:position]!r}: guess {guess!r}, {accepted} of {len(drafts)} accepted")
    show_sampling()
    print("\nspeed with k drafts, in units of the speed without: Qwen3-0.6B on an A100 (bounds), 100 tokens of context")
    print("  sequences         " + "".join(f"{n:16d}" for n in (1, 16, 64, 256)))
    for rate in (0.8, 0.4):
        for k in (1, 4, 8):
            print(f"  accepted {rate:.0%}, k = {k}" + "".join(f"{speed(rate, n, k):16.2f}" for n in (1, 16, 64, 256)))
    print("\nwith one sequence a step is still limited by reading 1.19 GB of weights. Must they have 16 bits?")


if __name__ == "__main__":
    main()
