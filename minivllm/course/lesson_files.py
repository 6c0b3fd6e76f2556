"""Lessons and capstones on disk: their folders, titles and tasks, and the starter file made from `lesson.py`.

A task's solution is marked in `lesson.py` by two comments of the same indentation:

    # TASK 2: rescale both sums to the larger score
    total = total * shrink + weights.sum(-1)
    # END

The starter file has `raise NotImplementedError` in place of the lines between them.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minivllm.errors import InvalidInput, nearest

MARK = re.compile(r"^(?P<indent> *)# TASK (?P<task>\d+): (?P<hint>.+)$")
END = "# END"
UNWRITTEN = re.compile(r"NotImplementedError\([\"']task (?P<task>\d+)[\"']\)")  # in a starter file, and in what such a line raises
ANSWERS = "my_lessons"  # folder of the learner's files, beside lessons/


@dataclass(frozen=True)
class Task:
    """One exercise: `### Task 2: ...` in the README. An open task has no single solution, and its check prints a figure."""

    number: int
    title: str
    is_open: bool


@dataclass(frozen=True)
class Lesson:
    """A lesson, or a capstone: a larger exercise in a folder `capstone_NAME`, whose number is its name, capstone-NAME."""

    number: str  # two digits, or a capstone's name
    folder: Path
    title: str
    tasks: tuple[Task, ...]

    @property
    def answer(self) -> Path:
        """The learner's file."""
        name = self.folder.name if self.is_capstone else f"lesson_{self.number}"
        return self.folder.parents[1] / ANSWERS / f"{name}.py"

    @property
    def is_capstone(self) -> bool:
        return not self.number.isdigit()

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.number if self.is_capstone else f"lesson {self.number}"


def lessons_folder() -> Path:
    """The folder `lessons` of the repository. Lessons are not part of an installed wheel."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "lessons").is_dir():
            return root / "lessons"
    raise InvalidInput("there is no folder lessons here: run this command in a clone of the repository")


def find_lessons(folder: Path) -> list[Lesson]:
    """All lessons with graded tasks in order, then the capstones."""
    return [_read(path.parent) for pattern in ("[0-9][0-9]_*", "capstone_*") for path in sorted(folder.glob(f"{pattern}/check.py"))]


def find_lesson(folder: Path, name: str) -> Lesson:
    """The lesson for "3", "03" or "03_paged_attention", or the capstone for "capstone-engine" or "capstone_engine"."""
    lessons = {lesson.number: lesson for lesson in find_lessons(folder)}
    number = name.partition("_")[0].zfill(2) if name[:1].isdigit() else name.replace("_", "-")
    if number in lessons:
        return lessons[number]
    several = [known for known in lessons if name and known.startswith(number)]
    hint = nearest(name, [lesson.number if lesson.is_capstone else lesson.folder.name for lesson in lessons.values()])
    hint = f"; did you mean {' or '.join(map(repr, several))}?" if several else hint or "."
    raise InvalidInput(f"there is no lesson {name!r}{hint} Lessons: {', '.join(lessons)}", "lesson")


def _read(folder: Path) -> Lesson:
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = re.search(r"^# (?:Lesson \d+|Capstone): (.+)$", text, re.MULTILINE)
    tasks = re.findall(r"^### Task (\d+)( \(open\))?: (.+)$", text, re.MULTILINE)
    number = folder.name[:2] if folder.name[0].isdigit() else folder.name.replace("_", "-")
    return Lesson(number, folder, title[1] if title else folder.name,
                  tuple(Task(int(task), name, bool(is_open)) for task, is_open, name in tasks))


def marked_regions(source: str) -> Iterator[tuple[int, int, int]]:
    """(task, line of its mark, line of its END) for each marked region. Lines count from 0."""
    lines = source.splitlines()
    starts = [(i, match) for i, line in enumerate(lines) if (match := MARK.match(line))]
    for i, match in starts:
        end = lines.index(match["indent"] + END, i)  # ValueError: a bug of the lesson, which a test finds
        yield int(match["task"]), i, end


def unwritten_lines(text: str, task: int) -> list[int]:
    """Lines of a learner's file where this task is not written yet. Lines count from 1, as in messages."""
    return [i for i, line in enumerate(text.splitlines(), 1) if (match := UNWRITTEN.search(line)) and int(match["task"]) == task]


def starter(lesson: Lesson) -> str:
    """The text of the learner's file: `lesson.py` without the solutions."""
    source = (lesson.folder / "lesson.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    for task, start, end in reversed(list(marked_regions(source))):
        indent = " " * (len(lines[start]) - len(lines[start].lstrip()))
        lines[start + 1:end + 1] = [f'{indent}raise NotImplementedError("task {task}")']  # see UNWRITTEN
    head = [f"# Your file for {lesson.label}. The tasks are described in lessons/{lesson.folder.name}/README.md.",
            "# Replace each line `raise NotImplementedError(...)` with your code. You may change everything else too.",
            f"# To check it: .venv/bin/minivllm course check {lesson.number}"]
    return "\n".join([*head, *lines]) + "\n"
