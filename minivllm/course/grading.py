"""Runs a lesson's `check.py` against a learner's file.

`check.py` has functions `task_N_...(lesson)`, which get the learner's file as a module. A failed `assert` is the explanation that the
learner reads. A function may return text: the figure of an open task, the last one, which runs only if all others pass. The same
check then runs on the lesson's own code, to compare. The checks run in a separate process, with one thread and a time limit for each
task, because a learner's file may loop, print, exit or crash.
"""
from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from minivllm.course.lesson_files import MARK, UNWRITTEN, unwritten_lines


@dataclass(frozen=True)
class Outcome:
    """The result of one task. `message` explains a failure, or is the figure of a passed open task."""

    task: int
    passed: bool
    message: str = ""


def run_checks(checks: Path, answer: Path, tasks: list[int], seconds: float) -> list[Outcome]:
    """One outcome per task, from another process; a single one with task 0 if the file could not be loaded.

    seconds: the limit of one task
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        command = [sys.executable, "-P", __file__, str(checks), str(answer), str(results), str(seconds)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            status = f"exit status {subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=False).returncode}"
        except KeyboardInterrupt:
            status = "interrupted"
        found = [Outcome(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]
    stopped = next((o for o in found if o.task == 0), None)  # the file could not be loaded
    if stopped is not None:
        return [stopped]
    done = {outcome.task: outcome for outcome in found}
    late = next((o for o in found if not o.passed and o.message.startswith("still running")), None)
    lost = "not checked, because an earlier task did not end" if late else f"Python ended before this task was checked ({status})"
    for task, outcome in done.items():
        if -task in done and done[-task].passed:  # the figure of the lesson's own code
            done[task] = replace(outcome, message=f"yours: {outcome.message}\nthe lesson's: {done[-task].message}")
    return [done.get(task) or Outcome(task, False, lost) for task in tasks]


def grade(checks: Path, answer: Path, begin: Callable[[int], None] = lambda task: None, only: int | None = None) -> Iterator[Outcome]:
    """The outcomes, task by task, in this process: of all tasks, or of one. `begin` is called before each task; 0 is loading the files."""
    begin(0)
    try:
        lesson = load(answer, "learner")
    except BaseException as error:
        yield Outcome(0, False, _explain(error, answer, None))
        return
    functions = _by_task(load(checks, "checks"))
    failed = 0  # the first task that did not pass
    for task, group in functions.items():
        if only not in (None, task):
            continue
        if failed and task == max(functions):
            yield Outcome(task, False, f"needs task {failed}, which does not pass yet")
            continue
        begin(task)
        figures = []
        try:
            for check in group:
                figures.append(check(lesson))
        except BaseException as error:
            failed = failed or task
            yield Outcome(task, False, _explain(error, answer, task))
        else:
            yield Outcome(task, True, "\n".join(figure for figure in figures if figure))


def load(path: Path, name: str) -> ModuleType:
    """A file as a module with this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def _by_task(checks: ModuleType) -> dict[int, list[Callable[[ModuleType], Any]]]:
    found: dict[int, list[Callable[[ModuleType], Any]]] = {}
    for name, value in vars(checks).items():
        if match := re.match(r"task_(\d+)_", name):
            found.setdefault(int(match[1]), []).append(value)
    return dict(sorted(found.items()))


def _explain(error: BaseException, answer: Path, task: int | None) -> str:
    """What went wrong, for a learner: the check's explanation, or the line of their file."""
    if isinstance(error, SyntaxError) and error.filename == str(answer):
        return f"line {error.lineno} is not valid Python: {error.msg}\n    {(error.text or '').strip()}"
    if (blank := UNWRITTEN.search(f"{error!r} {error}")) is not None:  # a compiler of kernels quotes the line
        missing = int(blank["task"])
        where = "".join(f": line {number}" for number in unwritten_lines(answer.read_text(encoding="utf-8"), missing)[:1])
        return f"not written yet{where}" if missing == task else f"needs task {missing}, which is not written yet{where}"
    while not (frames := [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(answer)]) and error.__cause__:
        error = error.__cause__  # an interpreter of kernels wraps errors
    name = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if frames:
        where = f"line {frames[-1].lineno} (`{(frames[-1].line or '').strip()}`)"
        if isinstance(error, SystemExit):
            return f"{where} ends the program. Remove that line"
        own = _in_a_task(frames, answer)
        caller = "" if own in (None, frames[-1]) else f"\nIt was called from your line {own.lineno} (`{(own.line or '').strip()}`)"
        return f"{where} raises {name}{caller}"
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
        return f"your file has no {error.name!r} any more. Copy it from a new starter file (`course start --force`)"
    return f"the check could not use what your code returned ({name}). Does each function return what its docstring says?"


def _in_a_task(frames: list[traceback.FrameSummary], answer: Path) -> traceback.FrameSummary | None:
    """The innermost of these lines that follows a mark `# TASK n` in its function: a line that the learner wrote, not a given one."""
    source = answer.read_text(encoding="utf-8")
    marks = [i for i, line in enumerate(source.splitlines(), 1) if MARK.match(line)]
    functions = [(n.lineno, n.end_lineno or 0) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    for frame in reversed(frames):
        line = frame.lineno or 0
        start = max((first for first, last in functions if first <= line <= last), default=line)
        if any(start < mark < line for mark in marks):
            return frame
    return None


class _Watch:
    """Ends this process if one task takes too long, after it has written which line of the learner's file was running."""

    def __init__(self, seconds: float, answer: Path, report: Callable[[Outcome], None]) -> None:
        self.seconds, self.answer, self.report = seconds, answer, report
        self.main = threading.get_ident()
        self.timer: threading.Timer | None = None

    def begin(self, task: int) -> None:
        self.stop()
        seconds = self.seconds if task else 3 * self.seconds  # loading imports torch, which is slow for the first time
        self.timer = threading.Timer(seconds, self._late, (task, seconds))
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def _late(self, task: int, seconds: float) -> None:
        frame: FrameType | None = sys._current_frames()[self.main]
        while frame is not None and frame.f_code.co_filename != str(self.answer):
            frame = frame.f_back
        where = "" if frame is None else f", in line {frame.f_lineno}: {self._line(frame.f_lineno)}"
        self.report(Outcome(task, False, f"still running after {seconds:g} s{where}\nDoes every loop there end?"))
        os._exit(3)

    def _line(self, number: int) -> str:
        return f"`{self.answer.read_text(encoding='utf-8').splitlines()[number - 1].strip()}`"


def main(checks: str, answer: str, results: str, seconds: str) -> None:
    """The other process of `run_checks`: one JSON line per outcome."""
    with open(results, "a", encoding="utf-8") as file:

        def report(outcome: Outcome) -> None:
            print(json.dumps(asdict(outcome)), file=file, flush=True)

        watch = _Watch(float(seconds), Path(answer), report)
        for outcome in grade(Path(checks), Path(answer), watch.begin):
            report(outcome)
        if outcome.passed and outcome.message:
            task = outcome.task
            for outcome in grade(Path(checks), Path(checks).with_name("lesson.py"), lambda _: watch.begin(-task), only=task):
                report(replace(outcome, task=-task))
        watch.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
