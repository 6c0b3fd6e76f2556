"""docs/life_of_a_request.md has what a new run of its two requests prints."""
from __future__ import annotations

from bench.life import MARK, PAGE, filled, record
from minivllm.models.hub import ModelFiles


def test_the_life_of_a_request_is_that_of_a_new_run(default_model: ModelFiles) -> None:
    page, parts = PAGE.read_text(encoding="utf-8"), record()
    assert [mark[2] for mark in MARK.finditer(page)] == list(parts), "each part has one mark, in this order"
    assert filled(page, parts) == page, "run: python -m bench.life --write"


def test_a_part_replaces_the_text_below_its_mark() -> None:
    page = "A text.\n\n<!-- life: steps -->\n\n```text\nold\n```\n\n```text\nkept\n```\n"
    assert filled(page, {"steps": "new\nlines\n"}) == page.replace("old", "new\nlines")
