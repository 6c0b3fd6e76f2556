"""From logits to tokens: filters, counter-based noise, Gumbel-max, penalties, log-probabilities.

Sampling from softmax(z) needs no sum and no generator state: add independent Gumbel noise to every z and take the largest
(the Gumbel-max trick, after Gumbel, 1954). The noise of token `id` is a pure function of the row's key and the id:

    key  = two 32-bit words mixed from seed, child and position           (minivllm.sampling.noise, on the host)
    word = mix(mix(hash(id) ^ key0) + key1)                                  32-bit arithmetic, equal on every device
    v    = (word + 1/2) / 2^32       E = -log1p(-v)       g = -log(E)        floats, equal within rounding

So the token of a row does not depend on the other rows of the batch. `hash` is lowbias32 (C. Wellons, "Prospecting for hash functions",
2018). The mixing of id and key consists of the same steps, with key1 added between them. Only tokens with a small E are ever sampled, and
floats have the finest steps near v = 0. So tokens with a probability of 1e-9 are sampled as often as they should be.

The three filters are one threshold per row: the smallest z that they keep. So equal values are kept or removed together:

    min-p   z >= max z + log(min_p)
    top-k   z >= the k-th largest z
    top-p   z >= the last z needed, from the largest down, for a fraction p of the mass that min-p and top-k leave

`sample` computes the same token in one of two ways: `sample_plain` as in the formulas, or on a CPU `_sample_row`, which finds the few
tokens that can be the result with integer comparisons, and computes logarithms for these alone.
"""
from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.splitmix64 import GOLDEN, MULTIPLIERS

KEYS_PER_POSITION = 4  # noise keys; the first one is that of the sampled token
MUL1, MUL2 = 0x7FEB352D, 0x846CA68B  # lowbias32's multipliers
V_MAX = 1.0 - 2.0**-24  # the largest float32 below 1: keeps E finite
NO_FILTER = -math.inf
HEAD = 8.0  # on a CPU, tokens with at least e^-8 of the highest probability are compared one by one


# --- noise ---------------------------------------------------------------------------------------------------------


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _fold(x: Tensor, shift: int) -> Tensor:
    """x ^ (x >> shift) with a logical shift (torch has no shift for uint32, and int32's copies the sign bit)."""
    return x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))


def hash_ids(ids: Tensor) -> Tensor:
    """lowbias32 of each id, int32 -> int32 (the bits of a uint32; products wrap)."""
    x = _fold(_fold(ids, 16) * MUL1, 15) * _signed(MUL2)
    return _fold(x, 16)


def noise_words(keys: Tensor, ids: Tensor) -> Tensor:
    """Random words [n, C] int32 of tokens `ids` [C] int32 under row keys [n, 2] int32."""
    x = hash_ids(ids)[None, :] ^ keys[:, 0:1]
    x = _fold(x, 16) * MUL1
    x = (_fold(x, 15) + keys[:, 1:2]) * _signed(MUL2)
    return _fold(x, 16)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from random words of any shape."""
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    v = ((unsigned.to(torch.float32) + 0.5) * 2.0**-32).clamp_max_(V_MAX)
    return -torch.log(-torch.log1p(-v))


def stream_keys(streams: Tensor, counters: Tensor) -> Tensor:
    """Keys [n, 2] int32: output number `counters` [n] int64 of the SplitMix64 streams [n] int64, the bits of a uint64. Products wrap."""
    x = streams + (counters + 1) * _signed64(GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed64(MULTIPLIERS[0])
    x = (x ^ _shifted(x, 27)) * _signed64(MULTIPLIERS[1])
    x = x ^ _shifted(x, 31)
    return x.view(torch.int32).view(-1, 2)  # the low word first, as every device here is little-endian


def _signed64(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shifted(x: Tensor, bits: int) -> Tensor:
    """int64 x >> bits as for unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# --- filters -------------------------------------------------------------------------------------------------------


def filter_threshold(z: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """The smallest z that the filters keep in each row [n]. A filter is off with None for all rows, or top_k 0, top_p 1, min_p 0."""
    largest = z.amax(dim=-1)
    threshold = torch.full_like(largest, NO_FILTER)
    if min_p is not None:
        threshold = largest + min_p.log()  # log(0) is -inf: off
    if top_k is None and top_p is None:
        return threshold
    falling = z.sort(dim=-1, descending=True).values
    if top_k is not None:
        last = torch.where(top_k > 0, top_k, z.shape[-1]).clamp_max(z.shape[-1]).long() - 1
        kth = falling.gather(-1, last[:, None])[:, 0]
        threshold = torch.where(top_k > 0, torch.maximum(threshold, kth), threshold)
    if top_p is not None:
        mass = torch.exp(falling - largest[:, None]) * (falling >= threshold[:, None])
        before = mass.cumsum(-1) - mass
        needed = (before < top_p[:, None] * mass.sum(-1, keepdim=True)).sum(-1).clamp_min(1)
        nucleus = falling.gather(-1, needed[:, None] - 1)[:, 0]
        threshold = torch.where(top_p < 1.0, torch.maximum(threshold, nucleus), threshold)
    return threshold


# --- choosing ------------------------------------------------------------------------------------------------------


def argmax(logits: Tensor) -> Tensor:
    """The most probable token of each row, [n, V] -> [n] int64 (numpy's argmax is ten times torch's on a CPU)."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def sample(logits: Tensor, temperature: Tensor, keys: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None,
           min_p: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """One token per row: logits [n, V] float32 or half, the rest one value (keys: two) per row -> [n] int64, in `out` if given.

    Temperature 0 takes the largest logit, and of equal ones the first. A filter that no row uses is None. A row with only -inf has no
    distribution; its token is 0.
    """
    method = _sample_cpu if logits.device.type == "cpu" else sample_plain
    tokens = method(logits.float(), temperature, keys, top_k, top_p, min_p)
    return tokens if out is None else out.copy_(tokens)


def sample_plain(logits: Tensor, temperature: Tensor, keys: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None,
                 min_p: Tensor | None = None) -> Tensor:
    """`sample` by the formulas above, on any device: logits float32."""
    greedy = (temperature == 0)[:, None]  # no noise is added
    largest = logits.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)  # -inf - -inf would be NaN
    z = (logits - largest) / torch.where(greedy, 1.0, temperature[:, None])
    noise = gumbel(noise_words(keys, torch.arange(z.shape[-1], dtype=torch.int32, device=z.device)))
    if top_k is not None or top_p is not None or min_p is not None:
        z.masked_fill_(z < filter_threshold(z, top_k, top_p, min_p)[:, None], NO_FILTER)
    return noise.masked_fill_(greedy, 0.0).add_(z).argmax(dim=-1)


def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None,
                  min_p: Tensor | None = None) -> Tensor:
    """The distribution that `sample` samples from: [n, V] float32, the rest one value per row -> [n, V]. Temperature 0 counts as 1."""
    largest = logits.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    z = (logits - largest) / torch.where(temperature == 0, 1.0, temperature)[:, None]
    if top_k is not None or top_p is not None or min_p is not None:
        z.masked_fill_(z < filter_threshold(z, top_k, top_p, min_p)[:, None], NO_FILTER)
    return z.softmax(dim=-1)


# --- the same on a CPU ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _hashed_vocabulary(size: int) -> np.ndarray[Any, Any]:
    """hash(id) of every id."""
    return hash_ids(torch.arange(size, dtype=torch.int32)).numpy().view(np.uint32)


def _gumbel_cpu(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`gumbel` for uint32 words."""
    v = np.minimum((words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(V_MAX))
    return -np.log(-np.log1p(-v))


def _finish(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The last fold of `noise_words`."""
    return words ^ (words >> np.uint32(16))


def _sample_cpu(logits: Tensor, temperature: Tensor, keys: Tensor, top_k: Tensor | None, top_p: Tensor | None,
                min_p: Tensor | None) -> Tensor:
    n, size = logits.shape
    if not temperature.any():
        return argmax(logits)
    rows, words = logits.numpy(), keys.numpy().view(np.uint32)
    temperatures = temperature.tolist()
    ks = top_k.tolist() if top_k is not None else [0] * n
    ps = top_p.tolist() if top_p is not None else [1.0] * n
    floors = min_p.tolist() if min_p is not None else [0.0] * n
    hashed = _hashed_vocabulary(size)
    z, x, shifted = np.empty(size, np.float32), np.empty(size, np.uint32), np.empty(size, np.uint32)  # stay in the L2 cache
    tokens = np.empty(n, np.int64)
    for i in range(n):
        if temperatures[i] == 0.0:
            tokens[i] = rows[i].argmax()
            continue
        largest = rows[i].max()
        if largest == -np.inf:
            tokens[i] = 0
            continue
        np.subtract(rows[i], largest, out=z)
        np.divide(z, np.float32(temperatures[i]), out=z)
        threshold = _threshold_cpu(z, ks[i], ps[i], floors[i])
        tokens[i] = _sample_row(z, threshold, words[i, 0], words[i, 1], hashed, x, shifted)
    return torch.from_numpy(tokens)


def _threshold_cpu(z: np.ndarray[Any, Any], top_k: int, top_p: float, min_p: float) -> float:
    """`filter_threshold` for one row [V] whose largest value is 0."""
    threshold = float(np.log(np.float32(min_p))) if min_p > 0 else NO_FILTER
    if 0 < top_k < z.size:
        threshold = max(threshold, float(np.partition(z, z.size - top_k)[z.size - top_k]))
    if top_p < 1.0:
        # Usually the tokens within HEAD of the largest are enough, and sorting these alone is cheap. The mass is that of all survivors.
        survivors = z[z >= threshold] if threshold > NO_FILTER else z
        wanted = np.float32(top_p) * np.exp(survivors, dtype=np.float32).sum(dtype=np.float64)
        for lowest in (-HEAD, -1.5 * HEAD, NO_FILTER):
            falling = np.sort(survivors[survivors >= lowest])[::-1]
            mass = np.exp(falling, dtype=np.float32).cumsum(dtype=np.float64)
            if mass[-1] >= wanted or lowest == NO_FILTER:
                break
        threshold = max(threshold, float(falling[min(int(np.searchsorted(mass, wanted)), falling.size - 1)]))
    return threshold


def _sample_row(z: np.ndarray[Any, Any], threshold: float, key0: np.uint32, key1: np.uint32, hashed: np.ndarray[Any, Any],
                x: np.ndarray[Any, Any], shifted: np.ndarray[Any, Any]) -> int:
    """argmax of z + noise over the tokens with z >= threshold, for one row [V] whose largest value is 0.

    The result has the largest score z + g. Let `bound` be the score of any token. A token can only be the result if its score is at least
    `bound`. As g = -log E and v <= E = -log1p(-v), this requires word < 2^32 exp(z - bound), which is an integer comparison. z is at most
    0, and below -HEAD for all but a few tokens. `x` and `shifted` are scratch memory.
    """
    if threshold >= -HEAD:
        few = np.flatnonzero(z >= threshold)
        if few.size <= z.size // 16:
            y = hashed[few] ^ key0
            y ^= y >> np.uint32(16)
            y *= np.uint32(MUL1)
            y ^= y >> np.uint32(15)
            y += key1
            y *= np.uint32(MUL2)
            return int(few[np.argmax(z[few] + _gumbel_cpu(_finish(y)))])
    np.bitwise_xor(hashed, key0, out=x)
    np.right_shift(x, np.uint32(16), out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    np.multiply(x, np.uint32(MUL1), out=x)
    np.right_shift(x, np.uint32(15), out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    np.add(x, key1, out=x)
    np.multiply(x, np.uint32(MUL2), out=x)  # the last fold is missing; it does not change the upper 16 bits
    # The bound is the better score of two tokens, the most probable one and the one with the most noise. Few tokens can exceed it.
    bound = _best(z, x, np.array([z.argmax(), x.argmin()]), threshold)[1]
    candidate = z >= np.float32(-HEAD)
    candidate &= x <= _word_limit(math.exp(-bound))
    candidate |= x <= _word_limit(math.exp(-HEAD - bound))
    return _best(z, x, np.flatnonzero(candidate), threshold)[0]


def _best(z: np.ndarray[Any, Any], x: np.ndarray[Any, Any], ids: np.ndarray[Any, Any], threshold: float) -> tuple[int, float]:
    """The token with the largest score among `ids` with z >= threshold, and its score."""
    ids = ids[z[ids] >= threshold]
    scores = z[ids] + _gumbel_cpu(_finish(x[ids]))
    best = int(scores.argmax())
    return int(ids[best]), float(scores[best])


def _word_limit(v: float) -> np.uint32:
    """The largest word before the last fold that can give a value of at most `v`, plus 0.1% for rounding."""
    return np.uint32(min(int(v * 1.001 * 2.0**32) | 0xFFFF, 0xFFFFFFFF))


# --- grammar masks, penalties and log-probabilities ----------------------------------------------------------------


def apply_bitmask(logits: Tensor, index: Tensor | None, words: Tensor) -> None:
    """In place on logits [n, V]: row index[i] (None: row i) keeps the tokens whose bits are set in words [m, W] int32.

    Bit t % 32 of word t // 32 is token t; tokens beyond 32 W are not allowed. The bits are expanded from bytes, whose intermediate
    tensor is smaller than one of 32-bit words.
    """
    vocab, masked = logits.shape[-1], len(words)
    octets = words.view(torch.uint8)[:, :, None]  # [m, 4 W, 1]: bit t % 8 of byte t // 8, as every device here is little-endian
    bit = torch.arange(8, dtype=torch.uint8, device=logits.device)
    banned = (octets >> bit).bitwise_and_(1).eq_(0).view(torch.bool).reshape(masked, -1)[:, :vocab]
    covered = banned.shape[1]
    if index is None:
        logits[:, :covered].masked_fill_(banned, -math.inf)
        logits[:, covered:] = -math.inf
        return
    some = logits[index]
    some[:, :covered].masked_fill_(banned, -math.inf)
    some[:, covered:] = -math.inf
    logits[index] = some


def apply_penalties(logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> None:
    """In place on logits [n, V]. seen: [n, V] bool, tokens in prompt or output; counts: [n, V] int32, number of times in the output.

    The repetition penalty (Keskar et al., CTRL, 2019) applies to tokens of prompt and output, the frequency and presence penalties (OpenAI)
    to tokens of the output. Each has one value per row.
    """
    if logits.device.type == "cpu":
        _apply_penalties_cpu(logits, seen, counts, repetition, frequency, presence)
        return
    factor = torch.where(seen, repetition[:, None], 1.0)
    logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    logits -= frequency[:, None] * counts
    logits -= presence[:, None] * (counts > 0)


def _apply_penalties_cpu(logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> None:
    """The same, computed only for the tokens seen."""
    for i in range(len(logits)):
        ids = torch.from_numpy(np.flatnonzero(seen[i].numpy()))
        some, count = logits[i, ids], counts[i, ids]
        some = torch.where(some > 0, some / repetition[i], some * repetition[i])
        logits[i, ids] = some - frequency[i] * count - presence[i] * (count > 0)


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of logits [n, V] and chosen tokens [n]: their logprob [n], rank [n] (1 = best), and the top k's ids and logprobs [n, k]."""
    chosen = logits.gather(-1, token_ids[:, None])
    norm = logits.logsumexp(dim=-1, keepdim=True)
    rank = (logits > chosen).sum(dim=-1) + 1
    top = logits.topk(min(k, logits.shape[-1]), dim=-1) if k else None
    top_ids = top.indices if top else token_ids.new_empty((len(token_ids), 0))
    top_values = top.values - norm if top else chosen.new_empty((len(token_ids), 0))
    return (chosen - norm)[:, 0], rank, top_ids, top_values
