"""How tests load lessons: scripts in folders whose names start with a digit, so `import` cannot name them."""
from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

LESSONS = Path(__file__).parents[2] / "lessons"


def load_lesson(folder: Path) -> ModuleType:
    """The lesson as a module. Its import must have no effect."""
    spec = importlib.util.spec_from_file_location(f"lesson_{folder.name}", folder / "lesson.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def run_lesson_alone(folder: Path) -> str:
    """Run the lesson as a script from its own folder -> what it prints. It may import neither minivllm nor another lesson."""
    path = folder / "lesson.py"
    check = "assert not [name for name in sys.modules if name.split('.')[0] in ('minivllm', 'lessons')]"
    code = f"import sys, runpy; runpy.run_path({str(path)!r}, run_name='__main__'); {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout
