"""Checks of lesson 10, for `minivllm course check 10`. A failed assert is the explanation that the learner reads."""
import itertools
import math
import time

import torch

LOGITS = torch.tensor([1.0, 4.0, 2.0, 3.0, 0.0])  # probabilities 3%, 64%, 9%, 23%, 1%


def task_1_each_filter_alone(lesson):
    assert lesson.threshold_of(LOGITS) == -math.inf, "without filters every token is kept: the threshold is -inf"
    assert _kept(lesson, top_k=2) == [1, 3], f"top_k 2 keeps the two largest logits, tokens 1 and 3: kept {_kept(lesson, top_k=2)}"
    assert _kept(lesson, top_k=99) == [0, 1, 2, 3, 4], "top_k may be larger than the vocabulary: then it keeps everything"
    kept = _kept(lesson, min_p=0.3)
    assert kept != [1, 2, 3], "min_p multiplies PROBABILITIES. Logits are their logarithms: add log(min_p) to the largest one"
    assert kept != [], "min_p is a part of the HIGHEST probability (here 0.3 x 64%), so the most probable token is always kept"
    assert kept == [1, 3], f"min_p 0.3: logits of at least 4 + log(0.3) = 2.80 are kept, tokens 1 and 3: kept {kept}"
    kept = _kept(lesson, top_p=0.7)
    assert kept != [1], "top_p 0.7: token 1 alone has 64%, which is not enough. The token that crosses 70% is kept too"
    assert kept == [1, 3], f"top_p 0.7: tokens 1 and 3 have 88% together: kept {kept}"
    assert _kept(lesson, top_p=0.5) == [1], f"top_p 0.5: token 1 alone has 64%, so it is enough: kept {_kept(lesson, top_p=0.5)}"
    assert _kept(lesson, top_p=0.0) == [1], "top_p 0: at least one token is always kept"


def task_1_filters_together(lesson):
    kept = _kept(lesson, top_k=3, top_p=0.9)
    assert kept != [1, 2, 3], (
        "top_k 3, then top_p 0.9: of the probability of the three that are LEFT, tokens 1 and 3 have 91%, so they are enough")
    assert kept == [1, 3], f"top_k 3 and top_p 0.9 together keep tokens 1 and 3: kept {kept}"
    assert _kept(lesson, top_k=4, min_p=0.3) == [1, 3], "with two filters the larger threshold decides"


def task_2_greedy_and_filters(lesson):
    for position in range(20):
        token = lesson.sample(LOGITS, (position, 77), top_k=1)
        assert token == 1, f"top_k 1 keeps only token 1, and token {token} was chosen: remove what is below the threshold BEFORE the choice"
    tokens = {lesson.sample(LOGITS / 4, (position * 977, 5)) for position in range(50)}
    assert len(tokens) > 1, "50 different keys always gave the same token: add noise that depends on the key"
    assert lesson.sample(LOGITS, (3, 4)) == lesson.sample(LOGITS, (3, 4)), "the same key must give the same token"


def task_2_the_distribution(lesson):
    count, probabilities = 1500, (LOGITS / 2).softmax(-1)
    counts = torch.zeros(5)
    for i in range(count):
        counts[lesson.sample(LOGITS, (i * 2654435761 % 2**32, 12345), 2.0)] += 1
    expected = probabilities * count
    uniform = float(((counts - count / 5) ** 2).sum() / count)
    assert uniform > 20, "all tokens are chosen equally often: the noise must be ADDED to the logits, not replace them"
    sharp = float(((counts - LOGITS.softmax(-1) * count) ** 2 / (LOGITS.softmax(-1) * count)).sum())
    assert sharp > 30, "this is the distribution of temperature 1, and the temperature was 2: add the noise to logits / temperature"
    distance = float(((counts - expected) ** 2 / expected).sum())  # chi-squared with 4 degrees of freedom
    assert distance < 25, (
        f"1,500 samples gave {counts.int().tolist()}, and softmax(logits / 2) means about {expected.int().tolist()}. Only Gumbel noise "
        "makes the largest sum follow the softmax: uniform or normal noise does not")


def task_3_unrelated_keys(lesson):
    keys = {numbers: lesson.key_of(*numbers) for numbers in itertools.product(range(8), range(4), range(30))}
    for key in keys.values():
        assert len(key) == 2 and all(isinstance(word, int) and 0 <= word < 2**32 for word in key), f"a key has two 32-bit words, got {key}"
    for name, a, b in (("positions", (1, 0, 0), (1, 0, 1)), ("children", (1, 0, 0), (1, 1, 0)), ("seeds", (1, 0, 0), (2, 0, 0))):
        assert keys[a] != keys[b], f"two {name} have the same key, so they get the same noise: mix seed, child and position into it"
    assert len(set(keys.values())) == len(keys), (
        "two combinations of seed, child and position share a key. A sum such as seed + child + position is the same for many of them: "
        "mix after each number")
    bits = [bin((a ^ b) & (2**32 - 1)).count("1") for (a, _), (b, _) in zip(list(keys.values())[:-1], list(keys.values())[1:], strict=True)]
    assert 12 < sum(bits) / len(bits) < 20, "neighboring positions have similar keys, so their noise is related: mix64 the result"


def task_4_faster(lesson):
    torch.set_num_threads(1)
    logits = 3 * torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0))
    took = math.inf
    for _ in range(2):
        start = time.process_time()
        tokens = [lesson.sample(row, (i, 9), top_p=0.9) for i, row in enumerate(logits)]
        took = min(took, time.process_time() - start)
    for i, (row, token) in enumerate(zip(logits, tokens, strict=True)):
        falling = row.sort(descending=True).values
        mass = (falling - falling[0]).exp()
        last = falling[int((mass.cumsum(0) - mass < 0.9 * mass.sum()).sum()) - 1]
        right = int((row.masked_fill(row < last, -math.inf) + lesson.gumbel(lesson.random_words((i, 9), len(row)))).argmax())
        assert token == right, f"row {i}: token {token}, expected {right}. A faster way must choose the same token"
    return f"{took / 4 * 1e3:.1f} ms per row of 151,936 logits with top_p 0.9"


def _kept(lesson, **filters):
    return (lesson.threshold_of(LOGITS, **filters) <= LOGITS).nonzero().flatten().tolist()
