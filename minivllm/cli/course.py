"""`minivllm course`: the exercises of the lessons.

    minivllm course status      all lessons, and how far you are
    minivllm course start 01    write my_lessons/lesson_01.py: the lesson's code with the parts left out that are yours to write
    minivllm course check 01    run your file against the lesson's checks; each failure is explained
"""
from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from minivllm.errors import InvalidInput


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("course", help="start and check the exercises of the lessons",
                                 description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", metavar="{start,check,status}", required=True)
    for name, text in (("start", "write the starter file of a lesson"), ("check", "check your file of a lesson"),
                       ("status", "list all lessons and your progress")):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        action.set_defaults(command_parser=action)
        if name != "status":
            action.add_argument("lesson", metavar="LESSON", help="number of a lesson, such as 01, or capstone-engine or capstone-policy")
        if name == "start":
            action.add_argument("--force", action="store_true", help="start again; your file is kept, with .old behind its name")
        if name == "check":
            action.add_argument("--timeout", type=float, default=20.0, metavar="SECONDS", help="limit of one task (default: 20)")


def run(args: argparse.Namespace) -> int:
    from minivllm.course.lesson_files import find_lesson, lessons_folder

    folder = lessons_folder()
    if args.action == "status":
        return _status(folder)
    lesson = find_lesson(folder, args.lesson)
    return _start(lesson, args.force) if args.action == "start" else _check(lesson, args.timeout)


def _command(action: str, number: str) -> str:
    """A command line that works as printed, also if the environment is not activated."""
    program = "minivllm" if shutil.which("minivllm") or not sys.argv[0].endswith("minivllm") else os.path.relpath(sys.argv[0])
    return f"{program} course {action} {number}"


def _status(folder: Path) -> int:
    from minivllm.course.lesson_files import find_lessons
    from minivllm.course.progress import state

    lessons = find_lessons(folder)
    number, title = (max(map(len, texts)) for texts in zip(*((lesson.number, lesson.title) for lesson in lessons), strict=True))
    for lesson in lessons:
        print(f"{lesson.number:<{number}}  {lesson.title:<{title}}  {state(lesson)}")
    return 0


def _start(lesson: Any, force: bool) -> int:
    from minivllm.course.lesson_files import starter, unwritten_lines

    path, shown = lesson.answer, os.path.relpath(lesson.answer)
    if path.exists():
        if not force:
            raise InvalidInput(f"{shown} exists: continue there, or start again with --force (your file is then kept as {path.name}.old)")
        path.replace(path.with_name(f"{path.name}.old"))
    path.parent.mkdir(exist_ok=True)
    text = starter(lesson)
    path.write_text(text, encoding="utf-8")
    print(f"{shown} is your file for {lesson.label}, which has {len(lesson.tasks)} tasks:")
    for task in lesson.tasks:
        lines = list(map(str, unwritten_lines(text, task.number)))
        where = f"line{'s' * (len(lines) > 1)} {' and '.join(lines)}"
        print(f"  task {task.number}  {task.title} ({'open: the check prints your figure' if task.is_open else where})")
    print(f"They are described in {os.path.relpath(lesson.folder / 'README.md')}. Then run: {_command('check', lesson.number)}")
    return 0


def _check(lesson: Any, timeout: float) -> int:
    from minivllm.course.grading import run_checks
    from minivllm.course.progress import passed_of, save

    if not lesson.answer.exists():
        raise InvalidInput(f"{os.path.relpath(lesson.answer)} does not exist: run `{_command('start', lesson.number)}` first")
    if not timeout > 0:
        raise InvalidInput(f"--timeout must be above 0, got {timeout:g}", "timeout")
    print(f"{lesson.label}: {lesson.title}", flush=True)
    outcomes = run_checks(lesson.folder / "check.py", lesson.answer, [task.number for task in lesson.tasks], timeout)
    if outcomes[0].task == 0:
        print(f"  no task was checked, and `course status` is as before\n{_indented(outcomes[0].message)}")
        return 1
    for task, outcome in zip(lesson.tasks, outcomes, strict=True):
        word = "not yet" if not outcome.passed else "open" if task.is_open else "passed"
        print(f"  task {task.number}  {word:7}  {task.title}")
        if outcome.message:
            print(_indented(outcome.message))
    save(lesson, outcomes)
    done = all(outcome.passed for outcome in outcomes)
    print(passed_of(lesson, [outcome.task for outcome in outcomes if outcome.passed])
          + (f". To compare with the lesson's own code: lessons/{lesson.folder.name}/lesson.py" if done else ""))
    return 0 if done else 1


def _indented(message: str) -> str:
    return "\n".join(textwrap.fill(line, 100, initial_indent=" " * 10, subsequent_indent=" " * 10) for line in message.splitlines())
