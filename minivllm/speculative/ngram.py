"""N-gram lookup: the text may continue as it did after an earlier occurrence of its last tokens (prompt lookup, A. Saxena, 2023).

    tokens   ... the cat sat on the mat ... the cat |      the last 2 tokens occurred before: propose "sat on the mat"
                         ^ end of the match

An index holds where each n-gram of the shortest length ended last, and for each of these ends the one before it. So a new token costs one
entry, and a lookup a few comparisons, however long the text is.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

MAX_CANDIDATES = 8  # earlier occurrences of which the longest match is taken


class NgramIndex:
    """The n-grams of one growing list of tokens."""

    __slots__ = ("_high", "_last", "_low", "_previous", "tokens")

    def __init__(self, low: int, high: int) -> None:
        """low, high: the shortest and the longest end of the text that must have occurred before."""
        self._low, self._high = low, high
        self.tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}  # n-gram of `low` tokens -> position after its last occurrence
        self._previous: list[int] = []  # position -> the same of the occurrence before; 0: there is none

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. An n-gram is indexed once a token follows it."""
        old, low = len(self.tokens), self._low
        self.tokens.extend(tokens)
        everything, last, previous = self.tokens, self._last, self._previous
        previous.extend([0] * len(tokens))
        for end in range(max(old, low), len(everything)):
            key = tuple(everything[end - low : end])
            previous[end] = last.get(key, 0)
            last[key] = end

    def copy(self) -> NgramIndex:
        """An independent index with the same tokens."""
        other = NgramIndex(self._low, self._high)
        other.tokens, other._last, other._previous = self.tokens.copy(), self._last.copy(), self._previous.copy()
        return other

    def propose(self, count: int) -> tuple[int, ...]:
        """`count` tokens that may come next; () if the last tokens are new. A text that repeats itself is continued in the same way."""
        end = self._longest_match()
        return tuple(islice(cycle(self.tokens[end : end + count]), count)) if end else ()

    def _longest_match(self) -> int:
        """Position after the earlier occurrence that agrees with the end of the text for the most tokens, at most `high`. 0: none."""
        tokens, low, high = self.tokens, self._low, self._high
        size = len(tokens)
        end = self._last.get(tuple(tokens[size - low :]), 0) if size > low else 0
        best = longest = 0
        for _ in range(MAX_CANDIDATES):
            if end == 0:
                break
            length = low
            while length < high and length < end and tokens[end - length - 1] == tokens[size - length - 1]:
                length += 1
            if length > longest:
                best, longest = end, length
            if longest == high:
                break
            end = self._previous[end]
        return best
