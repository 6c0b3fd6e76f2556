"""How tests load lessons: scripts in folders whose names start with a digit, so `import` cannot name them."""
from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
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


# Reads "lesson.py, tab, output file" and answers with the exit status. PyTorch is imported once, which takes longer than most lessons.
SERVER = """
import os, runpy, sys
import torch
for line in sys.stdin:
    path, output = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        sys.stdout.flush()
        os.dup2(os.open(output, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.chdir(os.path.dirname(path))
        runpy.run_path(path, run_name="__main__")
        assert not [name for name in sys.modules if name.split(".")[0] in ("minivllm", "lessons")]
        sys.stdout.flush()
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process without minivllm. It ends with this one, which closes its input."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def run_with_package(folder: Path) -> str:
    """Run a lesson that imports minivllm as a script -> what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(LESSONS.parent)}
    return subprocess.run([sys.executable, folder / "lesson.py"], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_lesson_alone(folder: Path) -> str:
    """Run the lesson as a script from its own folder -> what it prints. It may import neither minivllm nor another lesson."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
        print(f"{folder / 'lesson.py'}\t{output.name}", file=server.stdin, flush=True)
        status, printed = server.stdout.readline().strip(), output.read()
    assert status == "0", printed
    return printed
