"""docs/from_vllm.md is the page that the tables give."""
from __future__ import annotations

from pathlib import Path

from minivllm.compat.__main__ import render


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "from_vllm.md"
    assert page.read_text(encoding="utf-8") == render(), "run: python -m minivllm.compat > docs/from_vllm.md"
