"""The choice of attacks of `bench.hostile`, and how it judges what an attacker got. The attacks take minutes and are no test."""
from __future__ import annotations

import re
from collections import Counter

import pytest

from bench.hostile import ATTACKS, balanced_pairs


@pytest.mark.parametrize(("count", "rounds", "each"), [(14, None, {13}), (14, 3, {3}), (7, None, {6}), (7, 3, {2, 3})])
def test_each_attack_takes_part_in_as_many_pairs(count: int, rounds: int | None, each: set[int]) -> None:
    pairs = balanced_pairs(ATTACKS[:count], rounds)
    assert len({frozenset(map(id, pair)) for pair in pairs}) == len(pairs)
    assert set(Counter(id(attack) for pair in pairs for attack in pair).values()) == each


@pytest.mark.parametrize(("name", "held", "broken"), [
    ("silent connections", "400 opened, 400 closed by the server", "400 opened, 0 closed by the server"),
    ("trailers", "closed after 2227 KiB", "closed after 61441 KiB"), ("slow tools", "400 x 3", "400 x 2, 200 x 1"),
    ("administrate", "403 x 1, 200 x 1", "200 x 2"),
])
def test_an_attack_that_succeeds_is_reported(name: str, held: str, broken: str) -> None:
    expected = next(attack.expected for attack in ATTACKS if attack.name == name)
    assert re.search(expected, held) and not re.search(expected, broken)
