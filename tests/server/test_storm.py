"""A small stress test (`python -m bench.storm` is the large one): nothing is left over, and ordinary requests get the greedy text."""
from __future__ import annotations

from pathlib import Path

import pytest

from bench.storm import storm, write_model


@pytest.mark.slow
def test_after_a_stress_test_nothing_is_left_and_ordinary_requests_got_their_greedy_text(tmp_path: Path) -> None:
    write_model(tmp_path)
    result = storm(str(tmp_path), requests=160, clients=60, seed=1, most_rounds=1)
    # The engine's memory use settles only after many requests. The large test checks it.
    assert [problem for problem in result["problems"] if not problem.startswith("engine MiB")] == []
    assert result["kinds"]["ordinary"] > 30
