"""The automaton of stop strings: equal to a search of the whole text, and linear in it."""
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.engine import stop_strings
from minivllm.engine.stop_strings import START, StopStrings

STOPS = st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("abc"), max_size=40), stops=STOPS)
def test_the_automaton_agrees_with_a_search_of_the_whole_text(text: str, stops: list[str]) -> None:
    automaton, state, ignoring = StopStrings(stops), START, START
    for i, char in enumerate(text):
        seen = text[:i + 1]
        longest = max((s for s in stops if seen.endswith(s)), key=len, default=None)
        state, end, found = automaton.search(state, char)
        ignoring, _, nothing = automaton.search(ignoring, char, True)
        assert (found, end, nothing, ignoring) == (longest, 1, None, state)
        assert automaton.held_back[state] == max((k for s in stops for k in range(len(s)) if seen.endswith(s[:k])), default=0)


@settings(deadline=None, max_examples=300)
@given(pieces=st.lists(st.text(st.sampled_from("abc"), max_size=6), max_size=8), stops=STOPS)
def test_a_text_in_pieces_is_searched_up_to_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    automaton, state, added, found = StopStrings(stops), START, 0, None
    for piece in pieces:
        state, end, found = automaton.search(state, piece)
        added += end
        if found is not None:
            break
    assert (added, found) == ((min(ends)[0], min(ends)[2]) if ends else (len(text), None))


def test_the_work_per_character_grows_neither_with_the_stop_strings_nor_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    class Counting(list[int]):
        def __getitem__(self, index: Any) -> Any:
            nonlocal steps
            steps += 1
            return super().__getitem__(index)

    text = ("a" * 399 + "c") * 20  # the worst case: again and again nearly a match
    for stops in (["a" * 400 + "b"], ["a" * length + "b" for length in range(1, 401)]):
        automaton = StopStrings(stops)
        monkeypatch.setattr(automaton, "_fallback", Counting(automaton._fallback))
        steps = 0
        automaton.search(START, text)
        assert steps <= len(text)


def test_equal_sets_of_stop_strings_share_one_automaton() -> None:
    assert stop_strings.compiled(("x", "yz")) is stop_strings.compiled(("x", "yz"))
