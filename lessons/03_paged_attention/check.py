"""Checks of lesson 3, for `minivllm course check 03`. A failed assert is the explanation that the learner reads."""
import math
import time

import torch


def task_1_only_filled_slots(lesson):
    cache, k, v = _cache(lesson, [5, 2, 7], tokens=10)
    got = [lesson.filled(cache, [5, 2, 7], index, 10) for index in range(3)]
    lengths = [len(keys) for keys, _ in got]
    assert lengths != [4, 4, 4], (
        "the last block has 4 slots, and a sequence of 10 tokens uses 2 of them. The others hold anything: here NaN, on a GPU old keys of "
        "another sequence")
    assert lengths == [4, 4, 2], f"10 tokens in blocks of 4 are 4, 4 and 2 filled slots: got {lengths}"
    keys, values = (torch.cat(list(part)) for part in zip(*got, strict=True))
    assert not torch.isnan(keys).any(), "this reads a block that is not in the table: entry `index` of the table is the block's number"
    assert torch.equal(keys, k) and torch.equal(values, v), "these are not the sequence's keys and values in order"
    cache.k[5, 0] = 7.0
    assert got[0][0][0, 0, 0] == 7.0, "the keys were copied. A slice of the block is a view: nothing needs to be moved"


def task_2_the_old_sums_are_scaled(lesson):
    q, k, v = _qkv(6)
    q, k, v = q[:1], k[:, :1], v[:, :1]
    rising = lesson.scores_of(q, k)[0].argsort()
    first = lesson.add_block(_empty(lesson, q), q, k[rising[4:]], v[rising[4:]])
    assert torch.isfinite(first.best).all(), "`best` is still -inf after a block: it must become the largest score"
    second = lesson.add_block(first, q, k[rising[:2]], v[rising[:2]])
    assert torch.allclose(second.best, lesson.scores_of(q, k).amax(-1)), (
        "the second block has smaller scores than the first one, and `best` must stay: it is the largest score of ALL blocks so far")
    halves = [lesson.attend_plain(q, k[part], v[part]) for part in (rising[4:], rising[:2])]
    assert not torch.allclose(second.output(), sum(halves) / 2, atol=1e-4), (
        "each block counts the same, whatever its scores: a softmax inside a block divides too early. Keep sums of exp(score - best)")
    for order, what in ((rising.flip(0), "falling"), (rising, "rising")):
        part = _empty(lesson, q)
        for block in order.split(2):
            part = lesson.add_block(part, q, k[block], v[block])
        right = lesson.attend_plain(q, k, v)
        assert torch.isfinite(part.output()).all(), (
            "the result is not finite. exp(score - best) never overflows if `best` is the largest score so far, old or new")
        wrong = not torch.allclose(part.output(), right, atol=1e-4)
        assert not (wrong and what == "rising"), (
            "wrong if a later block has a larger score. The old sums contain exp(score - OLD best). To add numbers relative to the new "
            "best, multiply both old sums, `total` and `weighted`, by exp(old best - new best)")
        assert not wrong, "wrong even if the first block has the largest score: add this block's weights and its weighted values"


def task_2_each_head_alone(lesson):
    q, k, v = _qkv(6)
    part = lesson.add_block(_empty(lesson, q), q, k, v)
    assert part.total.shape == (len(q),), f"each of the {len(q)} heads has its own sum of weights: got the shape {list(part.total.shape)}"
    assert torch.allclose(part.output(), lesson.attend_plain(q, k, v), atol=1e-4), (
        "wrong with several heads: each has its own scores. Sum its weights over the tokens only, the last dimension")


def task_2_large_scores(lesson):
    q, k, v = _qkv(4)
    part = lesson.add_block(lesson.add_block(_empty(lesson, q), q * 40, k[:2], v[:2]), q * 40, k[2:], v[2:])
    assert torch.isfinite(part.output()).all(), "scores of some hundreds overflow exp: subtract the largest score before exp"
    assert torch.allclose(part.best, lesson.scores_of(q * 40, k).amax(-1)), "`best` must be the largest score of all blocks so far"


def task_3_parts_in_any_order(lesson):
    q, k, v = _qkv(9)
    right = lesson.attend_plain(q, k, v)
    a, b, c = (lesson.add_block(_empty(lesson, q), q, k[part], v[part]) for part in (slice(0, 2), slice(2, 3), slice(3, 9)))
    merged = lesson.merge(lesson.merge(a, b), c)
    mean = (a.output() + b.output() + c.output()) / 3
    assert not torch.allclose(merged.output(), mean, atol=1e-4), (
        "this is the mean of the parts' results. A part with more keys, or with larger scores, counts more: merge sums, not results")
    assert torch.allclose(merged.output(), right, atol=1e-4), (
        "the merged result differs from attention over all keys. Each part's sums are relative to its own best score: scale both parts to "
        "the larger one before you add them")
    assert torch.allclose(lesson.merge(c, lesson.merge(b, a)).output(), right, atol=1e-4), "the order of parts must not matter"
    assert torch.allclose(lesson.merge(_empty(lesson, q), a).output(), a.output(), atol=1e-4), "a part without keys must change nothing"


def task_4_a_faster_batch(lesson):
    torch.set_num_threads(1)
    dice = torch.Generator().manual_seed(0)
    lengths = [40 + 7 * i for i in range(24)]
    tables, free = [], torch.randperm(400, generator=dice).tolist()
    cache, sequences = lesson.PagedCache(400, 16, 2, 32), []
    for length in lengths:
        tables.append([free.pop() for _ in range(math.ceil(length / 16))])
        sequences.append(torch.randn(2, length, 2, 32, generator=dice))
        cache.write(tables[-1], *sequences[-1])
    queries = torch.randn(24, 4, 32, generator=dice)
    seconds = math.inf
    for _ in range(5):  # the first one is slower than the others
        start = time.process_time()
        out = lesson.attend_batch(queries, cache, tables, lengths)
        seconds = min(seconds, time.process_time() - start)
    right = torch.stack([lesson.attend_plain(q, k, v) for q, (k, v) in zip(queries, sequences, strict=True)])
    assert out.shape == right.shape, f"the result must have the shape {tuple(right.shape)} of the queries, got {tuple(out.shape)}"
    assert not torch.isnan(out).any(), "NaN: an unwritten slot was read. A weight of zero does not help, because 0 x NaN is NaN"
    assert torch.allclose(out, right, atol=1e-4), "the results differ from attention over each sequence alone: is padding masked?"
    return f"{seconds * 1e3:.2f} ms for a step of 24 sequences with {sum(lengths)} keys"


def _qkv(tokens):
    dice = torch.Generator().manual_seed(4)
    return (2 * torch.randn(4, 8, generator=dice), *torch.randn(2, tokens, 2, 8, generator=dice))


def _empty(lesson, q):
    return lesson.Partial(torch.full((len(q),), -math.inf), torch.zeros(len(q)), torch.zeros(q.shape))


def _cache(lesson, table, tokens):
    cache = lesson.PagedCache(9, 4, 2, 8)
    k, v = torch.randn(2, tokens, 2, 8, generator=torch.Generator().manual_seed(5))
    cache.write(table, k, v)
    return cache, k, v
