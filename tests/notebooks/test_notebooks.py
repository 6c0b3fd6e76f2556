"""Every notebook runs from start to end without error, has its pictures, and prints the saved output where it is deterministic."""
from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the test extra: pip install -e '.[test]'")
pytest.importorskip("nbclient", reason="notebooks need the test extra: pip install -e '.[test]'")
pytest.importorskip("ipykernel", reason="notebooks need the test extra: pip install -e '.[test]'")
pytest.importorskip("matplotlib", reason="notebooks need the test extra: pip install -e '.[test]'")

from notebooks.execute import FIRST_CELL, FOLDER, ROOT, execute  # noqa: E402

if TYPE_CHECKING:
    from minivllm.models.hub import ModelFiles

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_LINES = 25  # of a cell: it fits a screen together with its picture


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def stdout(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def draws(cell: Any) -> bool:
    """Whether a cell shows a picture itself, not in a function that another cell calls."""
    return re.search(r"^(plt\.show|helpers\.play)\(", cell.source, re.MULTILINE) is not None


def problems(notebook: Any) -> list[str]:
    """What a saved notebook should not be, as sentences."""
    cells = code_cells(notebook)
    texts = [str(output) for cell in cells for output in cell.outputs]
    found = []
    if cells[0].source != FIRST_CELL:
        found.append("the first code cell is not the one that installs: run notebooks/execute.py")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("it was not run from top to bottom before saving: run notebooks/execute.py")
    if not any(map(pictures, cells)):
        found.append("it has no picture")
    for number, cell in enumerate(cells, 1):
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"cell {number} ended with an error")
        if draws(cell) and not pictures(cell):
            found.append(f"cell {number} has no picture")
        if (lines := len([line for line in cell.source.splitlines() if line.strip()])) > MAX_LINES:
            found.append(f"cell {number} has {lines} lines, more than {MAX_LINES}")
        found += [f"cell {number} names the color {color}: use those of helpers" for color in re.findall(r"#[0-9a-fA-F]{6}\b", cell.source)]
        if re.search(r"^\s*\(?\w+,\)?\s*=\s*helpers\.results\(", cell.source, re.MULTILINE):
            found.append(f"cell {number} needs exactly one saved measurement, and more may be saved: name it with helpers.result")
    machine = {str(Path.home()), str(ROOT), tempfile.gettempdir() + "/"} - {"/"}
    found += [f"an output has a path of one machine: {path}" for path in sorted(machine) if any(path in text for text in texts)]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_saved_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_its_deterministic_cells_print_the_saved_output(path: Path, default_model: ModelFiles) -> None:
    saved = nbformat.read(path, as_version=4)
    fresh = execute(nbformat.read(path, as_version=4))
    for before, after in zip(code_cells(saved), code_cells(fresh), strict=True):
        assert pictures(after) == pictures(before)
        if "same-everywhere" in before.metadata.get("tags", ()):
            assert stdout(after) == stdout(before)


def test_the_readme_lists_every_notebook() -> None:
    listed = re.findall(r"\]\((\S+\.ipynb)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.name for path in NOTEBOOKS]


# ---- the helpers, and checks that can fail


def picture_cell(source: str, number: int, *, saved: bool = True) -> Any:
    data = {"image/png": "aGk="} if saved else {"text/plain": str(Path.home() / "x")}
    outputs = [nbformat.v4.new_output("display_data", data=data)]
    return nbformat.v4.new_code_cell(source, execution_count=number, outputs=outputs)


def test_a_planted_problem_is_found() -> None:
    first = nbformat.v4.new_code_cell(FIRST_CELL, execution_count=1)
    good = picture_cell("plt.show()", 2)
    assert problems(nbformat.v4.new_notebook(cells=[first, good])) == []
    bad = picture_cell("x = '#a0b1c2'\n" * 25 + "(one,) = helpers.results('*-gpu.json').values()\nplt.show()", 3, saved=False)
    found = "\n".join(problems(nbformat.v4.new_notebook(cells=[good, bad])))
    for part in ("installs", "top to bottom", "cell 2 has no picture", "27 lines", "#a0b1c2", "a path of one machine",
                 "exactly one saved measurement"):
        assert part in found


def test_letters_can_be_read_on_every_color() -> None:
    from notebooks import helpers

    assert helpers.ink(helpers.YELLOW) == helpers.ink(helpers.SKY) == helpers.ink(helpers.GREY) == "black"
    assert helpers.ink(helpers.BLUE) == helpers.ink(helpers.BLACK) == "white"


@pytest.mark.parametrize("static", [False, True])
def test_sliders_where_there_is_a_package_for_them_and_one_picture_elsewhere(
        static: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys
    import types

    from notebooks import helpers

    sliders: list[dict[str, Any]] = []
    widgets = types.SimpleNamespace(interact=lambda draw, **all_: sliders.append(all_), SelectionSlider=lambda **options: options)
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.setenv("NOTEBOOKS_STATIC", "1" if static else "")
    drawn: list[int] = []

    def draw(block_size: int) -> None:
        drawn.append(block_size)

    helpers.play(draw, block_size=(16, [1, 16]))
    if static:
        assert drawn == [16] and not sliders and "draw(block_size=16)" in capsys.readouterr().out
    else:
        assert not drawn and sliders[0]["block_size"]["options"] == [1, 16] and sliders[0]["block_size"]["value"] == 16


@pytest.mark.parametrize("gpu, seconds", [(False, 1.0), (True, 2.0)])
def test_the_clock_counts_this_thread_unless_a_gpu_computes(gpu: bool, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from notebooks import helpers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(helpers.time, "thread_time", lambda: 1.0)
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: 2.0)
    assert helpers.clock() == seconds
