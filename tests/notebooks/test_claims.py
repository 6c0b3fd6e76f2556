"""The claims ledger: every claim has a verdict, printed by the cell that checks it, and the verdicts follow from the cases."""
from __future__ import annotations

import ast
import re
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the test extra: pip install -e '.[test]'")

from notebooks.execute import FOLDER  # noqa: E402

NUM_CLAIMS = 21
VERDICTS = ("HOLDS", "HOLDS ONLY IF", "OUT OF DATE", "WRONG")


def code_cells() -> list[Any]:
    return [cell for cell in nbformat.read(FOLDER / "15_claims.ipynb", as_version=4).cells if cell.cell_type == "code"]


def claims() -> dict[int, str]:
    """The dict that the notebook states."""
    source = next(cell.source for cell in code_cells() if cell.source.startswith("CLAIMS = "))
    found: dict[int, str] = ast.literal_eval(source.removeprefix("CLAIMS = "))
    return found


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_every_claim_is_judged_once_by_a_cell_that_prints_its_words_and_a_verdict() -> None:
    judged: list[int] = []
    for cell in code_cells():
        numbers = [int(number) for number in re.findall(r"^judge\((\d+),", cell.source, re.MULTILINE)]
        for number in numbers:
            words = rf"^{number}\. {re.escape(claims()[number])}\n"
            verdict = re.search(words + r"   VERDICT: (.+?)(?: since .+)?\n(   \[.+\] .+\n)+", printed(cell), re.MULTILINE)
            assert verdict is not None, f"claim {number} has no printed verdict with its cases"
            assert verdict[1] in VERDICTS
        judged += numbers
    assert sorted(judged) == sorted(claims()) == list(range(1, NUM_CLAIMS + 1))


@pytest.mark.parametrize("cases, outdated, expected", [
    ({"a": True, "b": True}, "", "holds"), ({"a": False, "b": False}, "x", "wrong"), ({"a": True, "b": False}, "", "holds only if"),
    ({"a": True, "b": False}, "grouped-query attention", "out of date")])
def test_the_verdict_follows_from_the_cases(cases: dict[str, bool], outdated: str, expected: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    source = next(cell.source for cell in code_cells() if "def judge(" in cell.source)
    tree = ast.parse(source)
    names: dict[str, Any] = {"CLAIMS": claims(), "ledger": {}}
    judge = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "judge")
    exec(compile(ast.Module([judge], []), "judge", "exec"), names)
    names["judge"](7, cases, outdated)
    assert names["ledger"] == {7: expected} and expected.upper() in capsys.readouterr().out
