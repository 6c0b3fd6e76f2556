"""Checks of lesson 1, for `minivllm course check 01`. A failed assert is the explanation that the learner reads."""
import math
import time

import torch


def task_1_bytes_of_a_cache(lesson):
    got, right = lesson.kv_bytes(3, 5, 7, 11, 4), 2 * 3 * 5 * 7 * 11 * 4
    assert got * 2 != right, "half of the right number: each token leaves a key AND a value in every layer"
    assert got * 11 != right, "this is the cache of one token. Each of the tokens has its own key and value"
    assert got * 4 != right, "this counts numbers, not bytes: multiply by bytes_per_number"
    assert got == right, (f"3 layers, 5 key/value heads of 7 numbers, 11 tokens, 4 bytes per number: expected {right} bytes, got {got}. "
                          "Every layer stores, for every token and every key/value head, one key and one value")


def task_2_no_token_sees_a_later_one(lesson):
    q, k, v = _qkv(lesson, 6)
    whole = lesson.attend(q, k, v, lesson.Work())
    assert torch.isfinite(whole).all(), "a token must see at least itself: a row without any visible token has no softmax (it is NaN)"
    k2, v2 = k.clone(), v.clone()
    k2[5], v2[5] = 9.0, 9.0
    changed = lesson.attend(q, k2, v2, lesson.Work())
    assert torch.allclose(changed[:5], whole[:5], atol=1e-5), (
        "the last token's key and value changed the outputs of EARLIER tokens. A token may see only itself and tokens before it; "
        "otherwise cached keys and values would be out of date as soon as a token is appended")
    assert not torch.allclose(changed[5], whole[5], atol=1e-5), "a token does not see itself: compare positions with <=, not with <"


def task_2_new_tokens_are_the_last_ones(lesson):
    q, k, v = _qkv(lesson, 6)
    whole = lesson.attend(q, k, v, lesson.Work())
    for new in (1, 3):
        part = lesson.attend(q[-new:], k, v, lesson.Work())
        assert torch.allclose(part, whole[-new:], atol=1e-5), (
            f"{new} new of 6 tokens: their outputs differ from those computed without a cache. The first new token has position "
            "total - new, not 0: the tokens before it are in the cache, and it sees all of them")


def task_3_the_same_letters_for_fewer_rows(lesson):
    shape = lesson.Shape()
    # Larger weights than in training: the letters vary, so that a wrong input changes them.
    weights = {name: w * 3 if w.dim() == 2 and name != "embed" else w for name, w in lesson.random_weights(shape, seed=3).items()}
    prompt, n = torch.arange(7), 12
    slow, _ = lesson.generate_without_cache(weights, shape, prompt, n)
    fast, steps, cache = lesson.generate_with_cache(weights, shape, prompt, n)
    assert len(fast) == n and len(steps) == n, f"{n} letters were requested: got {len(fast)} letters and {len(steps)} entries of Work"
    rows = [work.rows for work in steps]
    assert rows[0] == 7, f"the first step computes all 7 tokens of the prompt in one pass (prefill): it computed {rows[0]} rows"
    assert rows[1:] != list(range(8, 7 + n)), (
        "every step computes the whole text again. The cache already has the earlier tokens: pass only the newest letter to `forward`")
    assert rows[1:] == [1] * (n - 1), f"after the prompt each step computes one row, that of the newest letter. Rows per step: {rows}"
    assert len(cache) > 0, "the cache is empty: `forward` stores keys and values only if it gets the cache"
    assert fast == slow, ("the letters differ from those without a cache. The next letter comes from the LAST row of the logits, and it is "
                          "the input of the next step")
    assert len(cache) == 7 + n - 1, f"the cache has {len(cache)} tokens, expected {7 + n - 1}: the last letter is never an input"


def task_4_a_faster_cache(lesson):
    tokens, shape = 3000, lesson.Shape(layers=1)
    dice = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, tokens, 1, shape.kv_heads, shape.head_dim, generator=dice)
    yours, simple, (k, v) = math.inf, math.inf, _seconds(lesson.Cache(shape), keys, values)[1]
    assert torch.equal(k, keys.flatten(0, 1)) and torch.equal(v, values.flatten(0, 1)), (
        "after one `extend` per token, it must return the keys and values of all tokens, oldest first, and no unused slots")
    for _ in range(4):  # in turns, and the best counts: the first run after a start, or beside another program, is slower
        simple = min(simple, _seconds(_CopyingCache(), keys, values)[0])
        yours = min(yours, _seconds(lesson.Cache(shape), keys, values)[0])
    return f"{yours / tokens * 1e6:.2f} us per token over {tokens} tokens; a cache that copies everything: {simple / tokens * 1e6:.2f} us"


class _CopyingCache:
    """The lesson's way, to compare with."""

    def __init__(self):
        self.k = self.v = None

    def extend(self, layer, k, v):
        self.k = k if self.k is None else torch.cat([self.k, k])
        self.v = v if self.v is None else torch.cat([self.v, v])
        return self.k, self.v


def _seconds(cache, keys, values):
    start = time.process_time()
    for k, v in zip(keys, values, strict=True):
        out = cache.extend(0, k, v)
    return time.process_time() - start, out


def _qkv(lesson, tokens):
    shape = lesson.Shape()
    dice = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, heads, shape.head_dim, generator=dice) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
