"""docs/scaling.md has the table that the arithmetic prints."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.scaling import ScalingInputs, arithmetic, markdown

MEASURED = "memory of one router"  # depends on the version of Python


def test_the_page_has_the_table_that_is_printed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = [row for row in arithmetic(ScalingInputs()) if row[0] != MEASURED]
    assert len(rows) == 10
    for line in markdown(rows).splitlines():
        assert line in page.splitlines(), "run: python -m bench.scaling --markdown"


def test_twice_the_gpus_are_twice_the_requests_and_failures() -> None:
    values = [{what: value for what, _, value in arithmetic(inputs)} for inputs in (ScalingInputs(), replace(ScalingInputs(), gpus=2000))]
    assert [float(v["requests per second"].replace(",", "")) for v in values] == [17177, 34354]
    assert [v["failures per day"] for v in values] == ["0.47", "0.95"]
    assert values[0]["requests per second and replica"] == values[1]["requests per second and replica"]
