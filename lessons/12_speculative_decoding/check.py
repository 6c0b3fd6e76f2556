"""Checks of lesson 12, for `minivllm course check 12`. A failed assert is the explanation that the learner reads."""
import random

import torch


def task_1_guesses_from_the_text(lesson):
    assert lesson.propose([1, 2, 3, 4, 5], 3) == [], "the last two tokens, 4 and 5, are new: there is nothing to guess"
    got = lesson.propose([1, 2, 3, 4, 1, 2], 2)
    assert got != [1, 2], "this is the end of the text itself. The guess is what came AFTER an earlier occurrence of it"
    assert got == [3, 4], f"1, 2 was followed by 3, 4 before: guess [3, 4], got {got}"
    got = lesson.propose([1, 2, 7, 0, 5, 1, 2, 8, 0, 5, 1, 2], 1)
    assert got == [8], f"1, 2 occurred twice before, and [5, 1, 2] once, followed by 8: take the longest match, then the latest. Got {got}"
    got = lesson.propose([9, 1, 2, 7, 0, 1, 2, 8, 9, 1, 2], 1)
    assert got != [8], "the match of 3 tokens, 9, 1, 2, was followed by 7. A longer match is a better guess than a later one"
    assert got == [7], f"expected [7], got {got}"
    got = lesson.propose([5, 6, 5, 6], 4)
    assert got == [5, 6, 5, 6], f"only 2 tokens follow the match, and 4 were requested: continue in the same way, got {got}"


def task_2_the_longest_correct_beginning(lesson):
    got = lesson.accept([1, 2, 3], [1, 2, 9, 4])
    assert got != [1, 2], "the model's own choice after the accepted drafts, 9, is right too: a step always makes at least one token"
    assert got != [1, 2, 9, 4], "4 is the model's choice after the WRONG draft 3: it continues another text"
    assert got == [1, 2, 9], f"drafts 1 and 2 are right, then the model chose 9: [1, 2, 9], got {got}"
    assert lesson.accept([1, 2, 3], [9, 2, 3, 4]) == [9], "the first draft is wrong, so 2 and 3 follow a wrong token"
    got = lesson.accept([1, 2], [1, 2, 3])
    assert got == [1, 2, 3], f"all drafts are right: then the model's choice after the last one comes for free. Got {got}"
    assert lesson.accept([], [7]) == [7], "without drafts a step makes one token"


def task_3_the_distribution_stays(lesson):
    p, dice, count = torch.tensor([0.6, 0.3, 0.1]), random.Random(1), 3000
    for q in (torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.8, 0.1])):
        counts, accepted = torch.zeros(3), 0
        for _ in range(count):
            draft = dice.choices(range(3), q.tolist())[0]
            token = lesson.choose_or_recover(p, q, draft, dice.random(), lesson.gumbel(3, dice))
            counts[token] += 1
            accepted += token == draft
        assert not torch.allclose(counts / count, q, atol=0.03), (
            "the tokens have the distribution of the DRAFTS: a draft that the model finds less probable must be rejected sometimes")
        rate = lesson.acceptance(p, q)
        assert accepted / count > rate - 0.05, f"only {accepted / count:.0%} of the drafts were kept, and min(1, p / q) keeps {rate:.0%}"
        assert torch.allclose(counts / count, p, atol=0.03), (
            f"tokens have the distribution {[round(x, 2) for x in (counts / count).tolist()]} instead of [0.6, 0.3, 0.1]. A rejected draft "
            "must be replaced by a sample of max(0, p - q): what the accepted drafts have given too little of, not of p again")


def task_4_how_many_drafts(lesson):
    total, shown = 0.0, []
    for rate in (0.9, 0.7, 0.3):
        for sequences in (1, 32, 128, 512):
            k = lesson.choose_k(rate, sequences)
            assert isinstance(k, int) and 0 <= k <= 16, f"k must be a whole number from 0 to 16, got {k!r}"
            total += lesson.speed(rate, sequences, k) / 12
            shown.append(k)
    return f"mean speed {total:.2f} times that without drafts, with k = {shown} (4 batch sizes for each of 90%, 70% and 30% accepted)"
