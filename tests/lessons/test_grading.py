"""`minivllm course` with a lesson of three lines: start, check and status, and everything that a learner's file may do wrong."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minivllm.cli.main import main
from minivllm.course import lesson_files
from minivllm.course.grading import grade, run_checks

LESSON = '''"""A lesson."""
def double(x):
    # TASK 1: twice x
    return 2 * x
    # END


def quadruple(x):
    # TASK 2: use double
    return double(double(x))
    # END
'''
CHECK = '''
def task_1_double(lesson):
    assert lesson.double(3) != 9, "this is the square"
    assert lesson.double(3) == 6, "double(3) is 6"


def task_2_quadruple(lesson):
    assert lesson.quadruple(3) == 12, "four times 3 is 12"
    assert lesson.quadruple("ab").upper() == "ABABABAB"


def task_3_open(lesson):
    return f"{lesson.quadruple(5)} points"
'''
README = "# Lesson 7: doubling\n\n### Task 1: double\n### Task 2: quadruple\n### Task 3 (open): points\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lessons" / "07_doubling"
    folder.mkdir(parents=True)
    for name, text in (("lesson.py", LESSON), ("check.py", CHECK), ("README.md", README)):
        (folder / name).write_text(text)
    monkeypatch.setattr(lesson_files, "lessons_folder", lambda: tmp_path / "lessons")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def explain(root: Path, text: str) -> list[str]:
    answer = root / "answer.py"
    answer.write_text(text)
    return [outcome.message for outcome in grade(root / "lessons" / "07_doubling" / "check.py", answer)]


def test_a_learner_starts_checks_and_sees_the_progress(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = root / "my_lessons" / "lesson_07.py"
    assert main(["course", "status"]) == 0 and main(["course", "start", "7"]) == 0 and main(["course", "status"]) == 0
    shown = capfd.readouterr().out
    assert "07  doubling  not started" in shown and "task 3  points (open" in shown and "started, not checked yet" in shown
    assert "task 1  double (line 7)" in shown
    text = answer.read_text()
    assert text.count("raise NotImplementedError(\"task") == 2 and "2 * x" not in text and "# TASK 1: twice x" in text

    assert main(["course", "check", "07"]) == 1
    shown = capfd.readouterr().out
    assert "not written yet: line 7" in shown and "0 of 2 tasks passed" in shown
    answer.write_text(text.replace('raise NotImplementedError("task 1")', "print('in double'); return 2 * x"))
    assert main(["course", "check", "7"]) == 1
    shown = capfd.readouterr().out
    assert "in double" in shown and "task 1  passed   double" in shown and "1 of 2" in shown
    answer.write_text(text.replace("def double", "def double("))
    assert main(["course", "check", "7"]) == 1
    shown = capfd.readouterr().out
    assert shown.count("is not valid Python") == 1 and "no task was checked" in shown
    answer.write_text(LESSON.replace("double(double(x))", "24 if x == 5 else 4 * x") + "\n")
    assert main(["course", "status"]) == 0 and main(["course", "check", "07_doubling"]) == 0 and main(["course", "status"]) == 0
    shown = capfd.readouterr().out
    assert "1 of 2 tasks passed; changed since that check" in shown and "2 of 2 tasks passed\n" in shown
    assert "task 3  open     points\n          yours: 24 points\n          the lesson's: 20 points\n" in shown


def test_starting_again_keeps_the_old_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["course", "start", "07"]) == 0
    (root / "my_lessons" / "lesson_07.py").write_text("mine")
    assert main(["course", "start", "07"]) == 1
    assert "lesson_07.py exists: continue there, or start again with --force" in capsys.readouterr().err
    assert main(["course", "start", "07", "--force"]) == 0
    assert (root / "my_lessons" / "lesson_07.py.old").read_text() == "mine"


@pytest.mark.parametrize(("argv", "says"), [
    (["start", "08"], "there is no lesson '08'. Lessons: 07"),
    (["check", "07_dubling"], "lesson_07.py does not exist: run `minivllm course start 07` first"),
    (["check", "doubling"], "there is no lesson 'doubling'; did you mean '07_doubling'? Lessons: 07"),
    (["start", "capstone"], "did you mean 'capstone-a' or 'capstone-b'? Lessons: 07, capstone-a, capstone-b"),
    (["start", "capstone_bb"], "did you mean 'capstone-b'? Lessons"),
])
def test_a_wrong_lesson_is_named(root: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    if "capstone" in says:
        for name in ("capstone_a", "capstone_b"):
            shutil.copytree(root / "lessons" / "07_doubling", root / "lessons" / name)
    assert main(["course", *argv]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "says"), [([], "{start,check,status}"), (["start"], "LESSON"), (["check"], "LESSON")])
def test_a_missing_argument_is_named(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    with pytest.raises(SystemExit):
        main(["course", *argv])
    assert f"required: {says}" in capsys.readouterr().err


def test_a_given_line_is_reported_with_the_learners_line_that_led_to_it(root: Path) -> None:
    text = "def given(x):\n    return len(x)\n\n\n" + LESSON.replace("double(double(x))", "given(x)")
    assert explain(root, text)[1] == (
        "line 2 (`return len(x)`) raises TypeError: object of type 'int' has no len()\nIt was called from your line 14 (`return given(x)`)")


def test_an_open_task_is_measured_only_if_all_others_pass(root: Path) -> None:
    assert explain(root, LESSON.replace("double(double(x))", "5 * x"))[2] == "needs task 2, which does not pass yet"


@pytest.mark.parametrize(("old", "new", "says"), [
    ("2 * x", "x * x", ["this is the square"]),
    ("2 * x", "1 / 0", ["line 4 (`return 1 / 0`) raises ZeroDivisionError: division by zero"]),
    ("2 * x", "exit()", ["line 4 (`return exit()`) ends the program. Remove that line"]),
    ("2 * x", 'input("? ")', ["line 4 (`return input(\"? \")`) raises"]),
    ("2 * x", "(2 * x", ["line 4 is not valid Python: '(' was never closed\n    return (2 * x"]),
    ("return 2 * x", 'raise NotImplementedError("task 1")', ["not written yet: line 4", "needs task 1, which is not written yet: line 4"]),
    ("def double", "def twice", ["your file has no 'double' any more. Copy it from a new starter file"]),
    ("double(double(x))", "None", ["", "four times 3 is 12"]),
    ("double(double(x))", "12", ["", "the check could not use what your code returned (AttributeError"]),
])
def test_every_failure_is_explained(root: Path, old: str, new: str, says: list[str]) -> None:
    found = explain(root, LESSON.replace(old, new))
    for message, start in zip(found, says, strict=False):
        assert message.startswith(start)


def test_the_lessons_own_code_passes(root: Path) -> None:
    assert explain(root, LESSON) == ["", "", "20 points"]


@pytest.mark.parametrize(("new", "says"), [
    ("while True:\n        x = x", "still running after 1 s, in line 5: `x = x`\nDoes every loop there end?"),
    ("import os\n    os._exit(9)", "Python ended before this task was checked (exit status 9)"),
])
def test_a_file_that_loops_or_ends_python_is_explained(root: Path, new: str, says: str) -> None:
    answer = root / "answer.py"
    answer.write_text(LESSON.replace("return double(double(x))", "pass").replace("return 2 * x", new))
    first, *others = run_checks(root / "lessons" / "07_doubling" / "check.py", answer, [1, 2, 3], 1.0)
    assert first.message.replace("line 4: `while True:`", "line 5: `x = x`") == says and not any(outcome.passed for outcome in others)


def test_a_loop_outside_of_functions_is_explained_once(root: Path) -> None:
    answer = root / "answer.py"
    answer.write_text("while True:\n    pass\n")
    found = run_checks(root / "lessons" / "07_doubling" / "check.py", answer, [1, 2, 3], 0.5)
    assert [outcome.task for outcome in found] == [0] and found[0].message.startswith("still running after 1.5 s, in line ")
