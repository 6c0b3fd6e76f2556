"""Every notebook runs from start to end without error, has its pictures, and prints the saved output where it is deterministic."""
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need the test extra: pip install -e '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="notebooks need the test extra: pip install -e '.[test]'")
pytest.importorskip("ipykernel", reason="notebooks need the test extra: pip install -e '.[test]'")
pytest.importorskip("matplotlib", reason="notebooks need the test extra: pip install -e '.[test]'")

if TYPE_CHECKING:
    from minivllm.models.hub import ModelFiles

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def stdout(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_saved_with_its_outputs_in_order(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom before saving"
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert all(pictures(cell) for cell in cells if "plt.show()" in cell.source)
    assert not any(str(Path.home()) in str(cell.outputs) or str(ROOT) in str(cell.outputs) for cell in cells), "a path of one machine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_its_deterministic_cells_print_the_saved_output(path: Path, default_model: ModelFiles) -> None:
    saved = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    for cell in code_cells(fresh):
        cell.outputs = []
    # One thread: a tiny batch gains little from a second one, and two threads on one busy core are slow.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    nbclient.NotebookClient(fresh, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute(env=env)
    for before, after in zip(code_cells(saved), code_cells(fresh), strict=True):
        assert pictures(after) == pictures(before)
        if "same-everywhere" in before.metadata.get("tags", ()):
            assert stdout(after) == stdout(before)
