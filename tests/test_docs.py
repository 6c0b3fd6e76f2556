"""The documents are correct where a program can check it: paths exist, terms are defined, and replaced words do not come back.

Every check is a function of texts, so that the last tests can show on small texts that each of them can fail.
"""
from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from minivllm.core.scheduler import Scheduler
from minivllm.engine.executor import Executor
from minivllm.engine.output_processor import OutputProcessor
from minivllm.sampling_params import SamplingParams
from tests.engine.fake import make_engine

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md",
                *(path for folder in ("docs", "lessons", "notebooks") for path in (ROOT / folder).rglob("*.md"))])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GLOSSARY = ROOT / "docs" / "glossary.md"
READING_PATH = ROOT / "docs" / "reading_path.md"
SITE = ROOT / "docs" / "site" / "mkdocs.yml"

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


def unnamed_modules(markdown: str, modules: Iterable[str]) -> list[str]:
    """Modules that no table names in its first column, neither themselves nor by a folder above them."""
    named = {name for cells in rows(markdown) for name in re.findall(r"`([^`]+)`", cells[0])}
    return [module for module in modules if not {module, *(f"{parent}/" for parent in Path(module).parents)} & named]


def called_methods(markdown: str) -> list[str]:
    """The methods in the list of one step, in its order."""
    block = re.search(r"^```\n(plan +=.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    return re.findall(r"\b(?:scheduler|executor|outputs|pending|\))\.(\w+)\(", block[1] if block else "")


def calls_of_one_step() -> list[tuple[str, str]]:
    """(method, "n" or "n + 1") of every call that a running engine makes in one step, with asynchronous scheduling."""
    engine, calls = make_engine(planning_depth=1), list[tuple[str, int]]()

    def watch(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def watched(*args: Any) -> Any:
            result = method(*args)
            step = next((value.step_id for value in (*args, result) if hasattr(value, "step_id")), -1)
            calls.append((name, step))
            if name == "sample":
                watch(result, "wait")
            return result

        setattr(owner, name, watched)

    outputs = engine._pipeline._outputs
    for owner, names in ((engine.scheduler, ("schedule", "update")), (engine.executor, ("launch", "sample")),
                         (outputs, ("masks", "advance_grammars", "push_text", "propose", "assemble"))):
        for name in names:
            watch(owner, name)
    engine.add_request("a", [5, 6, 7], SamplingParams(max_tokens=9))
    engine.step()
    calls.clear()
    engine.step()
    first = min(step for _, step in calls if step >= 0)
    return [(name, "n" if step == first else "n + 1") for name, step in calls]


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


def without_code(markdown: str) -> str:
    """The text with empty lines in place of fenced code, so that line numbers stay."""
    return re.sub(r"^( *)(`{3,}).*?^\1\2`*$", lambda block: "\n" * block[0].count("\n"), markdown, flags=re.MULTILINE | re.DOTALL)


def anchors(markdown: str) -> set[str]:
    """The anchors of all headings, as GitHub and the site form them."""
    headings = re.findall(r"^#+ +(.+?) *$", without_code(markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path, markdown: str) -> list[str]:
    """Relative links of a page that lead to no file, to no heading, or out of the repository."""
    broken = []
    for target, anchor in re.findall(r"\]\(([^()\s#:]*)(?:#([^()\s]*))?\)", without_code(markdown)):
        path = (page.parent / target).resolve() if target else page
        inside = path.is_relative_to(ROOT) and path.is_file()
        text = markdown if path == page else path.read_text(encoding="utf-8") if inside and path.suffix == ".md" else ""
        if not inside or (anchor and anchor not in anchors(text)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


def unseparated_blocks(markdown: str) -> list[int]:
    """Numbers of lines with a list or table directly after a paragraph: GitHub shows it, the site's Markdown joins it to the paragraph."""
    lines = without_code(markdown).splitlines()
    is_block = [bool(re.match(r"([-*] |\d+\. |\|)", line)) for line in lines]
    is_text = [bool(line.strip()) and not block and line[0] not in " #<" for line, block in zip(lines, is_block, strict=True)]
    return [i + 2 for i in range(len(lines) - 1) if is_text[i] and is_block[i + 1]]


def unexplained(markdown: str) -> list[str]:
    """First cells of the rows that have nothing in a column named "meaning"."""
    found, names = [], list[str]()
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])] if line.startswith("|") else []
        names = (names or cells) if cells else []
        if "meaning" in names and len(cells) == len(names) and not cells[names.index("meaning")]:
            found.append(cells[0])
    return found


def site_module(name: str) -> Any:
    """A module of `docs/site`, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_site_{name}", SITE.parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unrecorded_figures(markdown: str, recorded: Iterable[Any]) -> list[str]:
    """Decimal numbers of a page that are no rounded number of the records."""
    numbers, todo = set[float](), list(recorded)
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list)):
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, float):
            numbers.add(value)
    figures = re.findall(r"(?<![\w.-])\d+\.\d+(?![\w-]|\.\d)", markdown)
    return [figure for figure in figures
            if not any(abs(float(figure) - number) <= 0.51 * 10.0 ** -len(figure.partition(".")[2]) for number in numbers)]


def texts() -> dict[str, str]:
    """Everything that a student reads: the package, documents, lessons, and the cells of the notebooks."""
    paths = [*PAGES, *(path for folder in ("docs", "minivllm", "lessons") for path in (ROOT / folder).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}
    for path in NOTEBOOKS:
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


def test_the_lists_and_the_picture_of_one_step_show_the_calls_of_a_running_engine() -> None:
    calls, picture = calls_of_one_step(), site_module("step_picture")
    assert [(name, step) for _, name, step, _, _ in picture.CALLS] == calls
    assert picture.FILE.read_text(encoding="utf-8") == picture.render(), "run: python docs/site/step_picture.py"
    for name in ("README.md", "docs/architecture.md"):
        assert called_methods((ROOT / name).read_text(encoding="utf-8")) == [method for method, _ in calls], name


def test_architecture_names_every_package_and_every_module_of_the_control_plane() -> None:
    text, package = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), ROOT / "minivllm"
    packages = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    modules = [path.name for path in (package / "core").glob("*.py") if path.name != "__init__.py"]
    assert unnamed_modules(text, [*packages, *modules]) == []


def test_the_map_of_the_readme_names_every_package_and_every_module_beside_them() -> None:
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("```\nminivllm/\n")[2].partition("```")[0]
    package = ROOT / "minivllm"
    names = [*(f"{path.parent.name}/" for path in package.glob("*/__init__.py")), *(path.name for path in package.glob("[!_]*.py"))]
    assert len(names) > 20 and [name for name in names if not re.search(rf"(^|[ (]){re.escape(name)}", block, re.MULTILINE)] == []


def test_replaced_words_do_not_occur() -> None:
    assert replaced_words({path: text for path, text in texts().items() if not path.startswith(NOT_YET_REWORDED)}) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_link_of_a_notebook_leads_to_a_file_and_a_heading(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    not_yet_written = [link for link in broken_links(notebook, text) if re.fullmatch(r"\d\d_\w+\.ipynb", link)]
    assert [link for link in broken_links(notebook, text) if link not in not_yet_written] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_have_an_empty_line_before_them(page: Path) -> None:
    assert unseparated_blocks(page.read_text(encoding="utf-8")) == []


def test_the_reference_is_up_to_date_and_explains_every_field() -> None:
    for name, text in site_module("reference").render().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run: python docs/site/reference.py"
        assert unexplained(text) == [], f"docs/{name}: write the meaning as a comment beside the field"


def test_the_story_of_performance_has_recorded_figures() -> None:
    text = (ROOT / "docs" / "performance_story.md").read_text(encoding="utf-8")
    named = re.findall(r"bench/results/[\w.-]+\.json", text)
    records = [json.loads((ROOT / name).read_text(encoding="utf-8")) for name in named]
    estimates = {"1.5", "3.5", "1.6", "0.6"}  # "about", a ratio, and a part of a model's name
    assert len(named) == 2 and [figure for figure in unrecorded_figures(text, records) if figure not in estimates] == []


def test_the_specification_has_every_test_as_a_sentence() -> None:
    pages = site_module("specification").render()
    for folder in (path for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))):
        assert f"[{folder.name}]({folder.name}.md)" in pages["index"]
        for path in folder.glob("test_*.py"):
            count = len(re.findall(r"^ *(?:async )?def test_", path.read_text(encoding="utf-8"), re.MULTILINE))
            section = pages[folder.name].partition(f"`tests/{path.relative_to(ROOT / 'tests')}`")[2].partition("\n## ")[0]
            assert section.count("\n- ") >= count > 0 or (not section and not count), path
    assert "\n- A freed block keeps its content until it is allocated again.\n" in pages["core"]


@pytest.mark.parametrize(("name", "text"), [
    ("test_a_gpu_is_used", "A GPU is used"), ("test_vllm_names_are_the_same", "vLLM names are the same"), ("test_json", "JSON")])
def test_the_name_of_a_test_becomes_a_sentence(name: str, text: str) -> None:
    assert site_module("specification").sentence(name) == text


def test_the_map_to_vllm_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "vllm_map.md").read_text(encoding="utf-8")
    modules = [path.relative_to(ROOT / "minivllm").as_posix() for path in (ROOT / "minivllm").rglob("*.py")]
    assert unnamed_modules(text, [module for module in modules if not Path(module).name.startswith("__")]) == [], (
        "add the module to a row of docs/vllm_map.md, beside its counterpart in vLLM")
    first_column = "\n".join(f"| x | {cells[0]} |" for cells in rows(text))
    assert missing_paths(first_column, modules) == []


def test_every_document_is_in_the_navigation_of_the_site() -> None:
    named = set(re.findall(r"- (?:[^:\n]+: )?(\S+\.md)$", SITE.read_text(encoding="utf-8"), re.MULTILINE))
    documents = {str(page.relative_to(ROOT)) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert documents <= named
    assert all((ROOT / name).is_file() for name in named)


def test_the_site_builds_without_warnings_and_loads_nothing_from_other_servers(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs mkdocs: pip install -e '.[docs]'")
    pytest.importorskip("material", reason="the site needs mkdocs-material: pip install -e '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--config-file", str(SITE), "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert {"index.html", "docs/architecture.html", "lessons/01_autoregression_and_kv_cache/index.html",
            "docs/specification/core.html"} <= set(pages)
    loaded = re.compile(r"<(?:script|img|link)\b[^>]*?\b(?:src|href)=\"?(?:https?:)?//")
    assert [name for name, text in pages.items() if loaded.search(text)] == []


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


def test_a_planted_broken_link_is_found() -> None:
    page = ROOT / "README.md"
    good = "# A title: with `code`\n[a](docs/glossary.md) [b](docs/glossary.md#kv-cache) [c](#a-title-with-code) [d](https://a.b/c)\n```\n[e](no)\n```\n"
    assert broken_links(page, good) == []
    assert broken_links(page, good + "[x](docs/missing.md) [y](docs/glossary.md#no-heading) [z](#none) [u](../../etc/hosts)") == [
        "docs/missing.md", "docs/glossary.md#no-heading", "#none", "../../etc/hosts"]


@pytest.mark.parametrize("block", ["- a", "1. a", "| a |", "* a"])
def test_a_planted_list_without_an_empty_line_is_found(block: str) -> None:
    assert unseparated_blocks(f"A text.\n{block}\n") == [2]
    assert unseparated_blocks(f"# A title\n{block}\n\nA text.\n\n{block}\n  continued\n{block}\n```\ntext\n{block}\n```\n") == []


def test_a_planted_field_without_a_meaning_is_found() -> None:
    text = "| field | type | meaning |\n| --- | --- | --- |\n| `a` | int \\| str | a text |\n| `b` | int |  |\n\n| path | |\n|---|---|\n"
    assert unexplained(text + "| `c` |  |\n") == ["`b`"]


def test_a_planted_unnamed_module_is_found() -> None:
    text = "| here | in vLLM |\n|---|---|\n| `core/plan.py`, `server/` | `worker/batch.py` |\n"
    assert unnamed_modules(text, ["core/plan.py", "server/app.py", "worker/batch.py", "core/new.py"]) == ["worker/batch.py", "core/new.py"]


def test_a_planted_figure_that_was_not_recorded_is_found() -> None:
    assert unrecorded_figures("It takes 1.88 ms, 92.4 GB/s, or 1.89.", [{"rows": [{"step": 1.8803, "GB/s": 92.42}]}]) == ["1.89"]
