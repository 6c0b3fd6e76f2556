"""The documents are correct where a program can check it: paths exist, terms are defined, and replaced words do not come back.

Every check is a function of texts, so that the last tests can show on small texts that each of them can fail.
"""
from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from minivllm.core.scheduler import Scheduler
from minivllm.engine.executor import Executor
from minivllm.engine.output_processor import OutputProcessor

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
READING_PATH = ROOT / "docs" / "reading_path.md"

# The words that this project uses, one per thing.
TERMS = (
    "sequence", "request", "prompt", "output tokens", "preempt", "resume", "swap out", "swap in", "recompute", "CPU KV offload",
    "host blocks", "block hash", "prefix-cache key", "block pool", "free list", "reference count", "owner", "admission control",
    "authentication middleware", "priority order", "queue position", "overlap", "asynchronous scheduling", "sampled token", "logits row",
    "acceptance", "output parser", "parsed message", "load generator", "client", "cached", "evictable",
)
# Words that they replace, words a student may stumble over, and spellings that are not American.
REPLACED = re.compile(
    r"\b(gives? way|gave way|giving way|put(?:s|ting)? away|host tier|host memory places|(?:written|write) anew|planning ahead"
    r"|drawn tokens?|read answers?|last in order|content still to be found|whoever|nobody|somebody|everybody|everyone|anybody"
    r"|of (?:its|their) own"
    r"|behaviours?|colours?|honours?|neighbours?|licences?|\w*(?:quanti|normali|synchroni|parametri)s(?:e|ed|es|ing|ation))\b",
    re.IGNORECASE)
# Folders and files that still contain such words.
NOT_YET_REWORDED: tuple[str, ...] = ()


def rows(markdown: str) -> list[list[str]]:
    """The cells of all table rows, without headers and separators."""
    found, lines = [], markdown.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        is_separator, is_header = set(line) <= set("|-: "), following.startswith("|-")
        if line.startswith("|") and not is_separator and not is_header:
            found.append(cells)
    return found


def missing_paths(markdown: str, exists: Iterable[str]) -> list[str]:
    """Paths in backticks in the tables' last column that are neither in `exists` nor a folder of it."""
    known = set(exists)
    folders = {f"{parent}/" for path in known for parent in Path(path).parents}
    return [name for cells in rows(markdown) for name in re.findall(r"`([^`]+)`", cells[-1]) if name not in known | folders]


def undefined_terms(markdown: str, terms: Iterable[str]) -> list[str]:
    defined = {cells[0].lower() for cells in rows(markdown)}
    return [term for term in terms if term.lower() not in defined]


def replaced_words(texts: Mapping[str, str]) -> list[str]:
    """"path:line: word" for each replaced word in `texts` (path -> text)."""
    return [f"{path}:{number}: {match[0]}" for path, text in texts.items() for number, line in enumerate(text.splitlines(), 1)
            for match in REPLACED.finditer(line)]


def wrong_calls(markdown: str) -> list[str]:
    """Calls in the list of one step that do not match the signature of the method."""
    classes = {"scheduler": Scheduler, "executor": Executor, "outputs": OutputProcessor}
    block = re.search(r"^```\n(plan +=.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    wrong = [] if block else ["there is no list"]
    for node in ast.walk(ast.parse(block[1] if block else "")):
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
                and node.func.value.id in classes):
            try:
                inspect.signature(getattr(classes[node.func.value.id], node.func.attr)).bind(None, *node.args)
            except (AttributeError, TypeError):
                wrong.append(ast.unparse(node))
    return wrong


def texts() -> dict[str, str]:
    """Everything that a student reads: the package, documents, lessons, and the cells of the notebooks."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "minivllm").rglob("*.py"),
             *(ROOT / "lessons").rglob("*.py"), *(ROOT / "lessons").rglob("*.md")]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found[str(path.relative_to(ROOT))] = "\n".join("".join(cell["source"]) for cell in cells)
    return found


def test_every_path_in_the_glossary_exists() -> None:
    package = ROOT / "minivllm"
    assert missing_paths(GLOSSARY.read_text(encoding="utf-8"), [str(path.relative_to(package)) for path in package.rglob("*.py")]) == []


def test_every_term_has_a_definition_a_path_and_occurs_once() -> None:
    table = rows(GLOSSARY.read_text(encoding="utf-8"))
    assert all(len(cells) == 4 and cells[0] and cells[1].endswith((".", ")")) and cells[3] for cells in table)
    names = [cells[0].lower() for cells in table]
    assert len(names) == len(set(names)) >= 50


def test_the_glossary_defines_the_words_that_the_project_uses() -> None:
    assert undefined_terms(GLOSSARY.read_text(encoding="utf-8"), TERMS) == []


def test_the_reading_path_has_ten_files_that_exist_each_with_a_question_and_an_answer() -> None:
    text = READING_PATH.read_text(encoding="utf-8")
    table = rows(text)
    assert [cells[0] for cells in table] == [str(i) for i in range(1, 11)]
    assert all((ROOT / cells[1].strip("`")).is_file() and cells[3].endswith("?") for cells in table)
    assert len(re.findall(r"^\d+\. ", text.partition("## Answers")[2], re.MULTILINE)) == 10


def test_the_readme_links_glossary_and_reading_path_near_its_top() -> None:
    top = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20])
    assert "(docs/glossary.md)" in top and "(docs/reading_path.md)" in top


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_the_list_of_one_step_matches_the_code(name: str) -> None:
    assert wrong_calls((ROOT / name).read_text(encoding="utf-8")) == []


def test_replaced_words_do_not_occur() -> None:
    assert replaced_words({path: text for path, text in texts().items() if not path.startswith(NOT_YET_REWORDED)}) == []


# ---- each check can fail

TABLE = "| term | meaning | where |\n|---|---|---|\n| row | A row. | `worker/batch.py` |\n"


def test_a_planted_missing_path_is_found() -> None:
    assert missing_paths(TABLE, ["worker/batch.py"]) == missing_paths(TABLE.replace("batch.py", ""), ["worker/batch.py"]) == []
    assert missing_paths(TABLE, ["worker/rows.py"]) == ["worker/batch.py"]


def test_a_planted_missing_term_is_found() -> None:
    assert undefined_terms(TABLE, ["Row"]) == [] and undefined_terms(TABLE, ["row", "slot"]) == ["slot"]


@pytest.mark.parametrize(("call", "wrong"), [
    ("scheduler.schedule(now)", []), ("scheduler.update(plan, result, stops)", ["scheduler.update(plan, result, stops)"]),
    ("scheduler.plan(now)", ["scheduler.plan(now)"])])
def test_a_planted_wrong_call_is_found(call: str, wrong: list[str]) -> None:
    assert wrong_calls(f"```\nplan = {call}  # a step\n```\n") == wrong
    assert wrong_calls("no list") == ["there is no list"]


@pytest.mark.parametrize("word", [
    "Nobody", "of its own", "gives way", "put away", "host tier", "whoever", "colours", "quantised", "dequantise", "normalisation",
    "planning ahead"])
def test_a_planted_replaced_word_is_found(word: str) -> None:
    assert replaced_words({"a.py": f"# a line\n# {word} here"}) == [f"a.py:2: {word}"]


@pytest.mark.parametrize("text", ["put it away", "two-way", "quantized", "promise", "comprises", "the host's memory", "precise colors"])
def test_other_words_are_not_reported(text: str) -> None:
    assert replaced_words({"a.py": text}) == []
