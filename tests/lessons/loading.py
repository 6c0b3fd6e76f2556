"""How tests load lessons: scripts in folders whose names start with a digit, so `import` cannot name them."""
from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from minivllm.course.grading import load

LESSONS = Path(__file__).parents[2] / "lessons"


@dataclass(frozen=True)
class Mistake:
    """A typical wrong solution: `old`, which occurs once in lesson.py, becomes `new`. The check of `task` then explains: `says`."""

    task: int
    old: str
    new: str
    says: str


def lesson_folder(number: str) -> Path:
    (folder,) = LESSONS.glob(f"{number}_*")
    return folder


def load_lesson(folder: Path) -> ModuleType:
    """The lesson as a module. Its import must have no effect."""
    return load(folder / "lesson.py", f"lesson_{folder.name}")


@functools.cache
def run_lesson_alone(folder: Path) -> str:
    """Run the lesson as a script from its own folder -> what it prints. It may import neither minivllm nor another lesson."""
    path = folder / "lesson.py"
    check = "assert not [name for name in sys.modules if name.split('.')[0] in ('minivllm', 'lessons')]"
    code = f"import sys, runpy; runpy.run_path({str(path)!r}, run_name='__main__'); {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout
