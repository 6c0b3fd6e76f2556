"""Bad words: a word of tokens w0 ... wk is avoided by banning wk wherever the output ends with w0 ... w(k-1).

The newest tokens may be known on the device only, so the comparison runs there. All words are compared by hashes of the output's end:

    output       ... t2 t1 t0         H(1) = t0,   H(2) = t0 + t1 B,   H(3) = t0 + t1 B + t2 B^2, ...        modulo 2^64
    word         the H of its tokens but the last one, and how many these are: computed once per set of words

A step needs one running sum per row and one comparison per word, however long the words are, and nothing is rebuilt while the batch stays
the same. No state follows the output, so preemption, chunks and drafts need no care. (Two different ends of the same length have the same
hash with a probability of about 2^-64. Such a row would lose one token for one step.)
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.kernels.upload import upload
from minivllm.splitmix64 import GOLDEN

Array = np.ndarray[Any, Any]
PAIR_BYTES = 24  # of device memory for each pair of a row and a word


@dataclass(frozen=True, slots=True, eq=False)
class WordSet:
    """The words of one request that have at least two tokens."""

    lengths: Array  # [W] tokens before the last one
    hashes: Array  # [W] int64: of these tokens
    last: Array  # [W]

    @property
    def longest(self) -> int:
        return int(self.lengths.max())


@lru_cache(maxsize=64)
def word_set(words: tuple[tuple[int, ...], ...]) -> WordSet | None:
    """Words of token ids, prepared for comparison; None if all have one token. Requests often repeat an earlier set."""
    long = [word for word in words if len(word) > 1]
    if not long:
        return None
    powers = _powers(max(map(len, long)) - 1)
    ends = (np.array(word[-2::-1], np.int64) for word in long)  # the newest token first
    return WordSet(np.array([len(word) - 1 for word in long]), np.array([((end + 1) * powers[: len(end)]).sum() for end in ends]),
                   np.array([word[-1] for word in long], np.int64))


def _powers(count: int) -> Array:
    """B^0, B^1, ... modulo 2^64, as int64."""
    factors = np.full(count, GOLDEN, np.uint64)
    factors[:1] = 1
    return factors.cumprod(dtype=np.uint64).view(np.int64)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """All pairs of a logits row and one of its words, on the device."""

    steps: Tensor  # [longest] 1, 2, ...
    powers: Tensor  # [longest]
    hash_index: Tensor  # [P] of the hash to compare, among [n, longest]
    hashes: Tensor  # [P] of the words
    banned: Tensor  # [P] index of the word's last token among [L, V] logits


class BadWords:
    """Bans tokens for the rows of a step. It keeps what it uploaded while the next steps have the same rows and words."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wanted: list[tuple[int, WordSet]] = []
        self._pairs: _Pairs | None = None

    def reset(self) -> None:
        """Free the device memory."""
        self._wanted, self._pairs = [], None

    def apply(self, logits: Tensor, wanted: list[tuple[int, WordSet]], starts: Array, ends: Array, outputs: Array, tokens: Tensor) -> None:
        """In place on logits [L, V]. wanted [n]: index of a logits row, and its words; starts, ends [n]: the row's tokens in the flat
        table; outputs [n]: how many of them are output; tokens: the token table."""
        if self._pairs is None or wanted != self._wanted:
            self._wanted, self._pairs = wanted, self._upload(wanted, logits.shape[1])
        pairs = self._pairs
        start, end, num_outputs = (column[:, None] for column in upload([starts, ends, outputs], self._device))
        index = torch.maximum(end - pairs.steps, start)
        hashes = ((tokens.view(-1)[index].long() + 1) * pairs.powers).cumsum(1)  # [n, longest]
        hashes.masked_fill_(pairs.steps > num_outputs, 0)
        matched = hashes.view(-1)[pairs.hash_index] == pairs.hashes
        logits.view(-1).index_add_(0, pairs.banned, torch.where(matched, -math.inf, 0.0).to(logits.dtype))

    def _upload(self, wanted: Sequence[tuple[int, WordSet]], vocab_size: int) -> _Pairs:
        longest = max(words.longest for _, words in wanted)
        hash_index = np.concatenate([n * longest + words.lengths - 1 for n, (_, words) in enumerate(wanted)])
        hashes = np.concatenate([words.hashes for _, words in wanted])
        banned = np.concatenate([i * vocab_size + words.last for i, words in wanted])
        return _Pairs(*upload([np.arange(1, longest + 1), _powers(longest), hash_index, hashes, banned], self._device))
