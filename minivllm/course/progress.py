"""What a learner has passed: `my_lessons/progress.json`, written by `course check` and read by `course status`."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

from minivllm.course.grading import Outcome
from minivllm.course.lesson_files import Lesson


def _path(lesson: Lesson) -> Path:
    return lesson.answer.parent / "progress.json"


def _digest(lesson: Lesson) -> str:
    return hashlib.sha256(lesson.answer.read_bytes()).hexdigest()


def _stored(lesson: Lesson) -> dict[str, dict[str, object]]:
    try:
        found = json.loads(_path(lesson).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a damaged file loses only the notes: `course check` writes them again
        return {}
    return found if isinstance(found, dict) else {}


def save(lesson: Lesson, outcomes: list[Outcome]) -> None:
    stored = _stored(lesson)
    stored[lesson.number] = {"file": _digest(lesson), "passed": [outcome.task for outcome in outcomes if outcome.passed]}
    _path(lesson).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def passed_of(lesson: Lesson, passed: list[int]) -> str:
    """"2 of 3 tasks passed": open tasks, which have a figure and no solution, do not count."""
    written = [task.number for task in lesson.tasks if not task.is_open]
    return f"{len(set(written) & set(passed))} of {len(written)} tasks passed"


def state(lesson: Lesson) -> str:
    """One phrase for `course status`."""
    if not lesson.answer.exists():
        return "not started"
    stored = _stored(lesson).get(lesson.number)
    if stored is None:
        return "started, not checked yet"
    passed = stored["passed"]
    count = passed_of(lesson, passed if isinstance(passed, list) else [])
    return count if stored["file"] == _digest(lesson) else f"{count}; changed since that check"
