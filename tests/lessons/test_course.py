"""What holds for every lesson and capstone: form, README, tasks. A new one is tested by adding its folder and its mistakes."""
from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from minivllm.cli.main import build_parser
from minivllm.course.grading import Outcome, grade
from minivllm.course.lesson_files import Lesson, find_lessons, marked_regions, starter
from tests.lessons.loading import LESSONS, Mistake, run_lesson_alone, run_with_package

ALL = find_lessons(LESSONS)
NOT_YET: set[str] = set()  # folders that have no graded tasks yet
SECTIONS = ["The problem", "The idea", "The code", "In minivllm", "What vLLM adds", "Tasks", "Questions", "Sources"]
each_lesson = pytest.mark.parametrize("lesson", ALL, ids=lambda lesson: lesson.folder.name)


def source(lesson: Lesson) -> str:
    return (lesson.folder / "lesson.py").read_text(encoding="utf-8")


def readme(lesson: Lesson) -> str:
    return (lesson.folder / "README.md").read_text(encoding="utf-8")


def fences(markdown: str, language: str) -> list[list[str]]:
    """The lines of each code block with this language."""
    return [text.splitlines() for text in re.findall(rf"^```{language}\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)]


def mistakes(lesson: Lesson) -> list[Mistake]:
    name = lesson.folder.name if lesson.is_capstone else f"lesson_{lesson.number}"
    return list(importlib.import_module(f"tests.lessons.test_{name}").MISTAKES)


def outcomes(lesson: Lesson, text: str, folder: Path, only: int | None = None) -> dict[int, Outcome]:
    answer = folder / "answer.py"
    answer.write_text(text, encoding="utf-8")
    return {outcome.task: outcome for outcome in grade(lesson.folder / "check.py", answer, only=only)}


# ---- the form of a lesson

def test_every_folder_is_a_lesson_with_tasks() -> None:
    folders = {path.name for path in LESSONS.iterdir() if path.is_dir() and path.name[0].isdigit()}
    assert folders - {lesson.folder.name for lesson in ALL} <= NOT_YET


@each_lesson
def test_a_lesson_has_100_to_200_lines_and_a_capstone_up_to_500(lesson: Lesson) -> None:
    lines = [line for line in source(lesson).splitlines() if line.strip() != "# END" and not re.match(r" *# TASK \d+: ", line)]
    assert 100 <= len(lines) <= (500 if lesson.is_capstone else 200)


def unexplained_letters(text: str) -> list[str]:
    """Letters of the einsums of a text that no comment explains: "h heads, d head_dim"."""
    comments = " ".join(re.findall(r"#.*", text))
    letters = {letter for equation in re.findall(r"einsum\(\s*[\"']([^\"']+)", text) for letter in equation if letter.isalpha()}
    return sorted(letter for letter in letters if not re.search(rf"\b{letter} [a-z]{{2}}", comments))


@each_lesson
def test_a_lesson_explains_its_einsums_and_computes_on_one_thread(lesson: Lesson) -> None:
    text = source(lesson)
    assert unexplained_letters(text) == []
    assert ("torch.set_num_threads(1)" in text.partition("\ndef main(")[2]) == ("import torch\n" in text)


@each_lesson
def test_a_lesson_runs_alone_and_prints_what_its_readme_shows(lesson: Lesson) -> None:
    """Blocks `output` are compared in full. In blocks `output machine` digits may differ: they are times of one machine."""
    run = run_with_package if lesson.number == "capstone-policy" else run_lesson_alone
    printed = run(lesson.folder).splitlines()
    exact, masked = fences(readme(lesson), "output"), fences(readme(lesson), "output machine")
    assert exact + masked, "the README shows no output of the lesson"
    assert [line for block in exact for line in block if line not in printed] == []
    shapes = [mask(line) for line in printed]
    assert [line for block in masked for line in block if mask(line) not in shapes] == []


def mask(line: str) -> str:
    """A line without its numbers and without the spaces that depend on their length."""
    return re.sub(r"[ #.,█▏-]+", " ", re.sub(r"\d", "#", line)).strip()


@each_lesson
def test_a_readme_has_its_sections_in_order_and_a_drawing(lesson: Lesson) -> None:
    text = readme(lesson)
    assert text.startswith("# Capstone: " if lesson.is_capstone else f"# Lesson {int(lesson.number)}: ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    idea = text.partition("## The idea")[2].partition("\n## ")[0]
    assert "```\n" in idea or "```mermaid" in idea or "![" in idea, "the idea has no drawing"
    assert (lesson.folder / "answers.md").is_file() and "(answers.md)" in text and "<details>" not in text
    assert text.partition("## Sources")[2].count("](http") >= 1


@each_lesson
def test_links_of_a_readme_lead_to_files(lesson: Lesson) -> None:
    for name in ("README.md", "answers.md"):
        text = (lesson.folder / name).read_text(encoding="utf-8")
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
        assert [link for link in links if not (lesson.folder / link).exists()] == []


def symbols(path: Path) -> set[str]:
    """Names that a module defines: `name`, `Class`, `Class.member` (a method, a field, or an attribute of self)."""

    def assigned(node: ast.AST) -> set[str]:
        """Names and attributes of self that are assigned anywhere below a node."""
        targets = [target for n in ast.walk(node) if isinstance(n, ast.Assign) for target in n.targets]
        targets += [n.target for n in ast.walk(node) if isinstance(n, ast.AnnAssign)]
        targets += [element for target in targets if isinstance(target, ast.Tuple) for element in target.elts]
        return {t.id if isinstance(t, ast.Name) else t.attr for t in targets if isinstance(t, (ast.Name, ast.Attribute))}

    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = assigned(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = assigned(node) | {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
            found |= {f"{node.name}.{name}" for name in members}
    return found


def wrong_symbols(lesson: Lesson) -> Iterator[str]:
    """Symbols of the table "here, there" that do not exist: on the left in lesson.py, on the right in the file linked before them."""
    table = readme(lesson).partition("## In minivllm")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    here = symbols(lesson.folder / "lesson.py")
    for left, right in rows:
        yield from (name for name in re.findall(r"`([A-Za-z_.]+)`", left) if name not in here)
        for link, text in re.findall(r"\]\(([^)]+\.py)\)((?:(?!\]\().)*)", right):
            yield from (f"{link} {name}" for name in re.findall(r"`([A-Za-z_.]+)`", text) if name not in symbols(lesson.folder / link))
    if len(rows) < 2:
        yield "fewer than two rows"


@each_lesson
def test_the_table_of_the_package_names_what_exists(lesson: Lesson) -> None:
    assert list(wrong_symbols(lesson)) == []


@each_lesson
def test_commands_of_a_readme_exist(lesson: Lesson) -> None:
    parser, _ = build_parser()
    lines = [line for block in fences(readme(lesson), "bash") for line in block if line and not line.startswith("#")]
    number = lesson.number
    for wanted in (f".venv/bin/python lessons/{lesson.folder.name}/lesson.py", f".venv/bin/minivllm course start {number}",
                   f".venv/bin/minivllm course check {number}"):
        assert wanted in lines
    for line in lines:
        program, *arguments = line.partition("  #")[0].split()
        if program == ".venv/bin/minivllm":
            assert parser.parse_known_args(arguments)[1] == [], line
        else:
            assert program == ".venv/bin/python", line
            file = LESSONS.parent / (f"{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0])
            assert file.is_file(), line


# ---- tasks

@each_lesson
def test_a_lesson_has_two_to_four_tasks_of_which_the_last_is_open(lesson: Lesson) -> None:
    assert [task.number for task in lesson.tasks] == list(range(1, len(lesson.tasks) + 1))
    assert 2 <= len(lesson.tasks) <= (7 if lesson.is_capstone else 4)
    assert [task.is_open for task in lesson.tasks] == [False] * (len(lesson.tasks) - 1) + [True]
    blanked = {task for task, _, _ in marked_regions(source(lesson))}
    assert blanked == {task.number for task in lesson.tasks if not task.is_open}


@each_lesson
def test_the_lessons_own_code_passes_and_the_open_task_prints_a_figure(lesson: Lesson, tmp_path: Path) -> None:
    found = outcomes(lesson, source(lesson), tmp_path)
    assert [outcome for outcome in found.values() if not outcome.passed] == []
    assert list(found) == [task.number for task in lesson.tasks]
    assert re.search(r"\d", found[len(lesson.tasks)].message)


@each_lesson
def test_a_starter_file_says_which_tasks_are_not_written(lesson: Lesson, tmp_path: Path) -> None:
    text = starter(lesson)
    found = outcomes(lesson, text, tmp_path)
    for task, start, end in marked_regions(source(lesson)):
        assert re.match(r"not written yet: line \d+$|needs task \d+, which is not written yet", found[task].message)
        assert "\n".join(source(lesson).splitlines()[start + 1:end]) not in text, "the starter file shows the solution"
    assert "# END" not in text
    assert [found[task.number].passed for task in lesson.tasks if not task.is_open] == [False] * (len(lesson.tasks) - 1)


@each_lesson
def test_typical_mistakes_are_explained(lesson: Lesson, tmp_path: Path) -> None:
    known = mistakes(lesson)
    assert {mistake.task for mistake in known} == {task.number for task in lesson.tasks}, "each task needs a typical mistake"
    for mistake in known:
        assert source(lesson).count(mistake.old) == 1, mistake
        found = outcomes(lesson, source(lesson).replace(mistake.old, mistake.new), tmp_path, mistake.task)[mistake.task]
        assert not found.passed and mistake.says in found.message, (mistake, found)


# ---- the list of lessons

def test_the_list_has_every_lesson_with_its_time_and_modules() -> None:
    text = (LESSONS / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| \[(\d+): ([^\]]+)\]\(([^)]+)/README\.md\) \| (\d+) minutes \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    assert [folder for _, _, folder, _, _ in found] == sorted(path.parent.name for path in LESSONS.glob("[0-9]*/README.md"))
    for number, title, folder, minutes, modules in found:
        readme = (LESSONS / folder / "README.md").read_text(encoding="utf-8")
        assert f"# Lesson {number}: {title}\n" in readme or folder in NOT_YET
        assert f"Time: about {minutes} minutes." in readme or folder in NOT_YET
        assert [name for name in re.findall(r"`([^`]+)`", modules) if not (LESSONS.parent / "minivllm" / name).exists()] == []


def test_the_checks_of_a_readme_can_fail(tmp_path: Path) -> None:
    assert fences("```output\na\nb\n```\n```bash\nc\n```\n", "output") == [["a", "b"]]
    assert mask("12 steps   in 3.5 ms") == mask("7 steps in 123.45 ms") != mask("7 steps in 123.45 us")
    (tmp_path / "m.py").write_text("A = 1\nclass B:\n    c: int\n    def d(self): ...\n")
    assert symbols(tmp_path / "m.py") == {"A", "B", "B.c", "B.d", "c", "d"}
    assert unexplained_letters("torch.einsum('qd,kd->qk', a, b)  # q queries, k keys\n") == ["d"]
