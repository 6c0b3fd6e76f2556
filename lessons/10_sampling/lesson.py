"""Lesson 10: from a row of logits to one token, so that the same request gets the same tokens in any batch.

Filters remove improbable tokens, noise makes the choice random, and the largest sum wins. The noise is not taken from a generator with a
state: it is a function of the request's seed, the position and the token.
"""
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


def mix64(x: int) -> int:
    """SplitMix64's output function: any change of x changes about half of the 64 bits."""
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def key_of(seed: int, child: int, position: int) -> tuple[int, int]:
    """Two 32-bit words for one choice. Another seed, child (of `n` outputs) or position gives unrelated words."""
    # TASK 3: mix the three numbers into 64 bits, and split them into the low and the high word
    stream = mix64(mix64(seed + GOLDEN) + GOLDEN * child)
    word = mix64(stream + GOLDEN * (4 * position + 1))  # 4 per position: speculative decoding (a later lesson) needs the others
    return word & MASK32, word >> 32
    # END


def random_words(key: tuple[int, int], count: int) -> Tensor:
    """A 32-bit word for each token id 0 ... count - 1: [count] int64. Integer arithmetic, so it is equal on every device."""
    def fold(x: Tensor, shift: int) -> Tensor:
        return x ^ (x >> shift)

    def hashed(x: Tensor, between: int = 0) -> Tensor:  # lowbias32
        x = (fold(x, 16) * 0x7FEB352D) & MASK32
        x = ((fold(x, 15) + between & MASK32) * 0x846CA68B) & MASK32
        return fold(x, 16)

    return hashed(hashed(torch.arange(count)) ^ key[0], key[1])


def gumbel(words: Tensor) -> Tensor:
    """Gumbel noise from random words: -log(-log(u)) of uniform numbers u between 0 and 1, in float32."""
    v = ((words.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-v))  # u = 1 - v: floats are finest near 0, where the tokens with a small chance are decided


def threshold_of(z: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The smallest logit that the filters keep. 0, 1.0 and 0.0 turn a filter off.

    min-p: tokens with at least min_p times the highest probability. top-k: the k largest. top-p: from the largest down, as many as are
    needed for a fraction p of the probability that the other two filters leave.
    """
    threshold = torch.tensor(-math.inf)
    falling = z.sort(descending=True).values
    # TASK 1: raise `threshold` for each filter that is on. No softmax of all logits is needed
    if min_p > 0.0:
        threshold = falling[0] + math.log(min_p)
    if top_k > 0:
        threshold = torch.maximum(threshold, falling[min(top_k, len(falling)) - 1])
    if top_p < 1.0:
        mass = (falling - falling[0]).exp() * (falling >= threshold)
        before = mass.cumsum(0) - mass  # the probability of all larger ones, not divided by the sum
        needed = int((before < top_p * mass.sum()).sum().clamp_min(1))
        threshold = torch.maximum(threshold, falling[needed - 1])
    # END
    return threshold


def sample(logits: Tensor, key: tuple[int, int], temperature: float = 1.0, **filters: float) -> int:
    """logits [vocabulary] -> a token with the probability softmax(logits / temperature) among those that the filters keep."""
    if temperature == 0.0:
        return int(logits.argmax())
    z = logits / temperature
    # TASK 2: remove what is below the threshold, add noise, take the largest
    z = z.masked_fill(z < threshold_of(z, **filters), -math.inf)
    return int((z + gumbel(random_words(key, len(z)))).argmax())
    # END


def sample_softmax(logits: Tensor, generator: torch.Generator, top_p: float) -> int:
    """The usual way: probabilities, a sort, a cumulative sum, and a random number of a generator."""
    probabilities, ids = logits.softmax(-1).sort(descending=True)
    kept = probabilities * (probabilities.cumsum(0) - probabilities < top_p)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def next_logits(token: int, vocabulary: int = 50) -> Tensor:
    """A stand-in for a model: logits that depend on the last token."""
    return 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(token))


def generate(choose: Callable[[Tensor, int, int], int], first_tokens: list[int], steps: int) -> list[list[int]]:
    """Several sequences in one batch. choose(logits, row, position) -> token."""
    rows = [[token] for token in first_tokens]
    for position in range(steps):
        for row, tokens in enumerate(rows):
            tokens.append(choose(next_logits(tokens[-1]), row, position))
    return rows


def show_filters() -> None:
    words = ["mat", "sofa", "floor", "roof", "table", "moon", "idea", "zebra"]
    logits = torch.tensor([3.0, 2.4, 2.2, 1.6, 1.1, -0.5, -1.5, -2.0])
    print("the cat sat on the ...          " + "".join(f"{word:>7s}" for word in words))
    for name, temperature, filters in (("temperature 1", 1.0, {}), ("temperature 0.5", 0.5, {}), ("temperature 2", 2.0, {}),
                                       ("top_k 3", 1.0, {"top_k": 3}), ("top_p 0.8", 1.0, {"top_p": 0.8}),
                                       ("min_p 0.2", 1.0, {"min_p": 0.2}), ("temperature 2, min_p 0.2", 2.0, {"min_p": 0.2})):
        z = logits / temperature
        kept = z.masked_fill(z < threshold_of(z, **filters), -math.inf).softmax(-1).tolist()
        print(f"  {name:30s}" + "".join(f"{p:7.1%}" if p else "      -" for p in kept))
    counts = torch.zeros(8)
    for position in range(4000):
        counts[sample(logits, key_of(1, 0, position))] += 1
    print(f"  {'4,000 samples':30s}" + "".join(f"{p:7.1%}" for p in (counts / 4000).tolist()))


def main() -> None:
    torch.set_num_threads(1)
    show_filters()
    print("\none request of 20 tokens: how many tokens stay the same if three others join its batch?")
    alone, together = [], []
    for batch, results in (([7], alone), ([3, 5, 7, 11], together)):
        generator, mine = torch.Generator().manual_seed(1), batch.index(7)
        ways = (lambda logits, row, position, g=generator: sample_softmax(logits, g, 0.9),
                lambda logits, row, position, seeds=batch: sample(logits, key_of(seeds[row], 0, position), top_p=0.9))
        results.extend(generate(choose, batch, 20)[mine] for choose in ways)
    for name, a, b in zip(("one generator for all", "a function of seed, position, token"), alone, together, strict=True):
        print(f"  {name:36s} {sum(x == y for x, y in zip(a[1:], b[1:], strict=True)):2d} of 20")
    logits = 3 * torch.randn(8, 151_936, generator=torch.Generator().manual_seed(0))
    print("\n8 rows of 151,936 logits, top_p 0.9")
    generator = torch.Generator().manual_seed(0)
    for name, choose in (("softmax, sort, multinomial", lambda row: sample_softmax(row, generator, 0.9)),
                         ("threshold, noise, argmax", lambda row: sample(row, (1, 2), top_p=0.9)),
                         ("noise, argmax (no filter)", lambda row: sample(row, (1, 2))),
                         ("argmax (temperature 0)", lambda row: sample(row, (1, 2), 0.0))):
        start = time.perf_counter()
        for row in logits:
            choose(row)
        print(f"  {name:36s} {(time.perf_counter() - start) * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
