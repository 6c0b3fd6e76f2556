"""The measurement of structured output that lesson 17 names runs, here with a small vocabulary."""
from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("llguidance")

from bench import grammar_cost
from minivllm.engine.tokenizer import Tokenizer
from tests.conftest import write_tiny_tokenizer


def test_masks_are_timed_for_a_vocabulary_of_the_given_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    monkeypatch.setattr(grammar_cost, "VOCABULARY", tokenizer.vocab_size)
    found = grammar_cost.masks_alone(tokenizer, 1, steps=2)
    assert [row["rows"] for row in found] == [1, 32, 256] and all(row["masks_ms"] > 0 for row in found)
    assert f"a vocabulary of {tokenizer.vocab_size} entries is indexed" in capsys.readouterr().out
