"""docs/8gb.md is the page that the plans give, and its models fit."""
from __future__ import annotations

from pathlib import Path

import pytest

from minivllm.cli.plan_page import WORTH_RUNNING, plan_of, render
from minivllm.planning.memory_plan import GIB, TYPICAL_REQUEST


def test_the_page_in_docs_is_the_one_that_the_plans_give() -> None:
    page = Path(__file__).parents[2] / "docs" / "8gb.md"
    assert page.read_text(encoding="utf-8") == render(), "run: python -m minivllm.cli.plan_page > docs/8gb.md"


def test_every_model_that_is_worth_running_fits() -> None:
    for row in WORTH_RUNNING:
        found = plan_of(row.model, row.storage).memory
        assert found.fits and found.sequences(TYPICAL_REQUEST) >= 1, row.served


@pytest.mark.parametrize(("model", "storage", "gib", "fits"), [  # what people say about 8 GB. AWQ's zeros take more on a GPU than in files
    ("mistralai/Mistral-7B-Instruct-v0.3", None, 13.5, False), ("meta-llama/Llama-3.1-8B-Instruct", None, 15.0, False),
    ("mistralai/Mistral-7B-Instruct-v0.3", "awq", 3.9, True), ("Qwen/Qwen2.5-7B-Instruct", "awq", 5.2, True),
    ("meta-llama/Llama-3.1-8B-Instruct", "awq", 5.4, True), ("meta-llama/Llama-3.1-8B-Instruct", "fp8", 8.5, False),
    ("meta-llama/Llama-2-13b-chat-hf", "awq", 6.8, False), ("Qwen/Qwen2.5-14B-Instruct", "awq", 9.3, False),
])
def test_claims_about_8_gb(model: str, storage: str | None, gib: float, fits: bool) -> None:
    found = plan_of(model, storage).memory
    assert found.weight_bytes / GIB == pytest.approx(gib, rel=0.02, abs=0.05) and found.fits == fits
