"""Runs notebooks from top to bottom and saves them with their outputs.  Run: python notebooks/execute.py [NOTEBOOK ...]

Without arguments: all notebooks. Every notebook gets the same first cell, which installs minivllm where it is missing.
"""
from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
FIRST_CELL = '''\
# Installs minivllm where it is missing, as on Colab. Elsewhere this cell does nothing.
import importlib.util
import os

if importlib.util.find_spec("minivllm") is None:
    REPOSITORY = ""  # the address from which you would clone the repository
    assert REPOSITORY, "write the address of the minivllm repository (or of your copy of it) in the line above"
    !git clone --quiet --depth 1 {REPOSITORY} minivllm_repository
    %pip install --quiet ./minivllm_repository matplotlib ipywidgets openai
if os.path.isdir("minivllm_repository"):
    %cd minivllm_repository/notebooks'''


def execute(notebook: Any) -> Any:
    """Run all cells in a new kernel, in the notebooks' folder and on one thread. The outputs are written into `notebook`.

    One thread: a tiny batch gains little from a second one, and two threads on one busy core are slow.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NOTEBOOKS_STATIC": "1", "HF_HUB_OFFLINE": "1",
           "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(FOLDER)}}).execute(env=env)
    return notebook


def save(notebook: Any, path: Path) -> None:
    """Write the notebook without what differs from machine to machine, so that a diff shows changed cells only."""
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i:02d}"
        cell.metadata.pop("execution", None)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    nbformat.write(notebook, path)


def main(names: list[str]) -> None:
    for path in [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        if first.source.startswith(FIRST_CELL.partition("\n")[0]):  # perhaps an older version of it
            first.source = FIRST_CELL
        else:
            notebook.cells.insert(notebook.cells.index(first), nbformat.v4.new_code_cell(FIRST_CELL))
        save(execute(notebook), path)
        print(f"{path.name}: {time.perf_counter() - start:.1f} s, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
