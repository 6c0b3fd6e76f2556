"""The specification: the names of all tests as sentences, one page per folder of `tests/`.

    python docs/site/specification.py          # print all pages
    python docs/site/specification.py core     # print one

The pages change with every test, so they are no files of the repository: `make docs` makes them. Only names and docstrings are read;
no test is imported.
"""
from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[2] / "tests"
WHOLE = "project"  # page of the tests that belong to no folder
# How words of test names are written in a sentence.
WORDS = """
    AMX API AWQ AsyncLLM BOS CORS CPU CSS CUDA Chromium EOS FIFO GGUF GPTQ GPU GiB HF HTML HTTP HTTPS Hermes ID IPv6 JSON KV LLM Llama
    LoRA MLP MiB Mistral NaN NaNs Numba OPT OpenAI OpenAPI PEFT PyTorch Python QKV Qwen RAM RoPE SDK SHA SSE TLS TTFT Transformers Triton
    URL UTF-8 Unicode YAML vLLM
"""
SPELLED = {word.lower().replace("-", ""): word for word in WORDS.split()}


class SpecifiedFile(NamedTuple):
    """One file of tests: its path below `tests/`, what it is about, and its statements."""

    path: str
    about: str
    statements: tuple[str, ...]  # Markdown, one list item each


def sentence(name: str) -> str:
    """`test_a_gpu_is_used` -> "A GPU is used"."""
    words = [SPELLED.get(word, word) for word in name.removeprefix("test_").split("_") if word]
    text = " ".join(words)
    return text[:1].upper() + text[1:] if words[0] != "vLLM" else text


def first_paragraph(docstring: str | None) -> str:
    """The first paragraph of a docstring in one line. Characters with a meaning in HTML are escaped."""
    return re.sub(r"(`[^`]*`)|<", lambda m: m[1] or "&lt;", " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split()))


def statements(tree: ast.Module) -> Iterator[str]:
    """One list item per test, and per state machine of Hypothesis, whose rules and invariants are checked in random orders."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("StateMachine" in ast.unparse(base) for base in node.bases):
            yield f"*State machine.* {first_paragraph(ast.get_docstring(node))}".rstrip()
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and any("invariant" in ast.unparse(mark) for mark in method.decorator_list):
                    yield f"*Always:* {sentence(method.name)}."
        tests = node.body if isinstance(node, ast.ClassDef) else [node]
        for test in tests:
            if isinstance(test, (ast.FunctionDef, ast.AsyncFunctionDef)) and test.name.startswith("test_"):
                more = first_paragraph(ast.get_docstring(test))
                yield f"{sentence(test.name)}." + (f" *{more}*" if more and "*" not in more else f" {more}" if more else "")


def specified_files() -> Iterator[SpecifiedFile]:
    for path in sorted(TESTS.rglob("test_*.py"), key=lambda path: (path.parent == TESTS, path)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = tuple(statements(tree))
        if found:
            yield SpecifiedFile(path.relative_to(TESTS).as_posix(), first_paragraph(ast.get_docstring(tree)), found)


def render() -> dict[str, str]:
    """Name of a page -> its Markdown. "index" lists the others."""
    folders = dict[str, list[SpecifiedFile]]()
    for file in specified_files():
        folders.setdefault(file.path.partition("/")[0] if "/" in file.path else WHOLE, []).append(file)
    pages = {}
    for folder, files in folders.items():
        parts = [f"# Specification: {folder}\n"]
        for file in files:
            title = Path(file.path).stem.removeprefix("test_").replace("_", " ")
            parts.append(f"## {title}\n\n`tests/{file.path}`: {file.about}\n\n" + "\n".join(f"- {line}" for line in file.statements) + "\n")
        pages[folder] = "\n".join(parts)
    lines = [f"| [{folder}]({folder}.md) | {len(files)} | {sum(len(file.statements) for file in files)} |"
             for folder, files in folders.items()]
    index = """# Specification

What the engine does, as statements that the test suite checks: the names of its tests, grouped by the folder of `tests/`, which is the
package that they test. A statement may stand for many cases. The text in italics explains it.

| package | files | statements |
|---|---|---|
"""
    return {"index": index + "\n".join(lines) + "\n", **pages}


if __name__ == "__main__":
    made = render()
    chosen = sys.argv[1:] or list(made)
    if unknown := [name for name in chosen if name not in made]:
        sys.exit(f"there is no page {unknown[0]!r}: choose one of {', '.join(made)}")
    try:
        print("\n".join(made[name] for name in chosen), flush=True)
    except BrokenPipeError:  # the program that reads the output has ended, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit fails again
