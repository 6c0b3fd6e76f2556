"""Search for many stop strings in a text that grows: one automaton per set of stop strings (Aho and Corasick, 1975).

A state is the longest suffix of the text that is a prefix of a stop string. The next character extends this prefix if some stop string
continues with it. If none does, the search falls back to the next shorter suffix that is such a prefix, and tries again:

    stop strings "</s>" and "/>"       text     x   <   /   >
                                       state    -   <   </  />      from "</" it falls back to "/", which ">" extends to a match

A character extends the state by at most one, and each fallback shortens it, so the work per character does not depend on the number or
the length of the stop strings. `python -m bench.text_cost` compares it with an alternation in Python's `re`.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

START = 0  # the state of an empty text


class StopStrings:
    """The automaton. It does not change, so all sequences of a request share it; each keeps only its state."""

    def __init__(self, stops: Sequence[str]) -> None:
        next_states: list[dict[str, int]] = [{}]  # state -> character -> the state whose prefix is longer by this character
        lengths = [0]  # of the prefixes
        match: list[str | None] = [None]  # the longest stop string at the end of the text
        for stop in stops:
            state = START
            for char in stop:
                if char not in next_states[state]:
                    next_states[state][char] = len(next_states)
                    next_states.append({})
                    lengths.append(lengths[state] + 1)
                    match.append(None)
                state = next_states[state][char]
            match[state] = stop
        fallback, held_back = [START] * len(next_states), [0] * len(next_states)
        in_order = [START]  # shorter prefixes first: a fallback is always complete before it is used
        for state in in_order:
            for char, longer in next_states[state].items():
                in_order.append(longer)
                if state != START:
                    fallback[longer] = _advance(next_states, fallback, fallback[state], char)
                shorter = fallback[longer]
                match[longer] = match[longer] or match[shorter]
                held_back[longer] = lengths[longer] if next_states[longer] else held_back[shorter]
        self._next_states, self._fallback, self._match = next_states, fallback, match
        self._first_chars = frozenset(next_states[START])
        self.held_back = held_back  # state -> how many characters at the end of the text may still become part of a stop string

    def search(self, state: int, text: str, ignore_matches: bool = False) -> tuple[int, int, str | None]:
        """Add `text` up to the end of the first stop string in it: (new state, number of characters added, stop string or None).

        If several stop strings end at the same character, the longest one is returned.
        """
        if state == START and self._first_chars.isdisjoint(text):
            return START, len(text), None
        next_states, fallback, match = self._next_states, self._fallback, self._match
        for position, char in enumerate(text):
            state = _advance(next_states, fallback, state, char)
            if match[state] is not None and not ignore_matches:
                return state, position + 1, match[state]
        return state, len(text), None


def _advance(next_states: Sequence[dict[str, int]], fallback: Sequence[int], state: int, char: str) -> int:
    while state != START and char not in next_states[state]:
        state = fallback[state]
    return next_states[state].get(char, START)


@lru_cache(maxsize=32)
def compiled(stops: tuple[str, ...]) -> StopStrings:
    """The automaton of these stop strings. Requests often repeat an earlier set, and 16,384 characters take about 10 ms to compile."""
    return StopStrings(stops)
