"""How the notebooks read saved measurements."""
from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="notebooks need the test extra: pip install -e '.[test]'")

from notebooks import helpers

ROWS = """some machine, 1 threads; commit 0123
bf16       perplexity  13.1006   4,092 tokens     {dense} MB of weights   {dtype}   72.6 s
fp8 KV     perplexity  13.2085   4,092 tokens     {dense} MB of weights   {dtype}   83.7 s
awq        perplexity  14.9401   4,092 tokens     {packed} MB of weights   {dtype}   89.8 s
nf4        perplexity  16.5843   4,092 tokens     {dense} MB of weights   {dtype}   27.5 s
Q4_K       perplexity  14.1073   4,092 tokens     100.3 MB of weights   {dtype}   51.2 s
broken     failed, see above
"""


@pytest.mark.parametrize("dtype, dense, packed", [("float32", "538.1", "171.4"), ("bfloat16", "269.1", "114.8")])
def test_the_newest_perplexities_are_read_with_16_bit_embeddings(dtype: str, dense: str, packed: str, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "2026-01-01-old-perplexity.txt").write_text(ROWS.format(dense="1.0", packed="1.0", dtype=dtype))
    (tmp_path / "2026-02-01-new-perplexity.txt").write_text(ROWS.format(dense=dense, packed=packed, dtype=dtype))
    monkeypatch.setattr(helpers, "RESULTS", tmp_path)
    name, found = helpers.perplexities()
    assert name == "2026-02-01-new-perplexity"
    assert {row: perplexity for row, (perplexity, _) in found.items()} == {
        "bf16": 13.1006, "fp8 KV": 13.2085, "awq": 14.9401, "nf4": 16.5843, "Q4_K": 14.1073}
    sizes = {row: round(megabytes) for row, (_, megabytes) in found.items()}
    assert sizes == {"bf16": 269, "fp8 KV": 269, "awq": 115, "nf4": 116, "Q4_K": 100}


def test_the_newest_task_scores_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.perplexity import show

    rows = {"bf16": [True, True, True, False], "fp8 KV": [True, False, False, True]}
    with (tmp_path / "2026-02-01-cpu-task.txt").open("w") as file, contextlib.redirect_stdout(file):
        print("some machine, 1 threads; commit 0123")
        for name, right in rows.items():
            row = {"right": right, "error": 0.039, "weight_bytes": 269e6, "dtype": "bfloat16", "seconds": 7.3}
            show(name, row, {"right": rows["bf16"]})
    (tmp_path / "2026-01-01-cpu-task.txt").write_text("bf16       task  10.0% +- 1.0%   1 of 10 right (+0 -0)\n")
    monkeypatch.setattr(helpers, "RESULTS", tmp_path)
    assert helpers.tasks() == ("2026-02-01-cpu-task", {"bf16": (0.75, 0.039, 0, 0), "fp8 KV": (0.5, 0.039, 1, 2)})
