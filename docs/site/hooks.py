"""Hooks of MkDocs: which pages the site has, and what their links become.

The pages are the repository's own files at their own paths. A link to a file that is not Markdown (code, a notebook, the license) leads to
a page that shows that file, so that the site can be read without the repository.
"""
from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import specification  # beside this file
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/*/*.md", "lessons/*.md", "lessons/*/*.md", "notebooks/*.md")
NOTEBOOKS = ("notebooks/*.ipynb",)
ASSETS = ("docs/*.png", "docs/*.svg", "lessons/*/*.png", "docs/site/extra.css", "docs/site/iframe-worker.js")
LINK = re.compile(r"(?<=\]\()(?P<target>[^()\s#:]+)(?P<anchor>#[^()\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".conf": "nginx", ".service": "ini", "": "docker"}


def matching(patterns: Iterable[str]) -> list[str]:
    """Paths below the repository's root, in the order of the patterns."""
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def linked_path(page: str, target: str) -> str:
    """The path below the root that a link leads to, or "" if it leads outside."""
    path = (ROOT / page).parent.joinpath(target).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""


def linked_files(pages: Mapping[str, str]) -> set[str]:
    """The files that pages (path -> Markdown) link and that need a page themselves."""
    found = set[str]()
    for page, markdown in pages.items():
        for match in LINK.finditer(markdown):
            path = linked_path(page, match["target"])
            if path and (ROOT / path).is_file() and Path(path).suffix not in (".md", ".png", ".svg", ".ipynb"):
                found.add(path)
    return found


def fenced(text: str, language: str = "text") -> str:
    fence = "`" * max(4, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def code_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    language = "text" if path == "LICENSE" else LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fenced(text, language)}"


def notebook_page(path: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook with its saved outputs, and its pictures: path -> content."""
    parts, pictures = [], dict[str, bytes]()
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else fenced(source, "python"))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{path}.{len(pictures)}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![output of the cell above]({Path(picture).name})")
            elif text := "".join(output.get("text", data.get("text/plain", ()))):
                parts.append(fenced(text))
    return "\n\n".join(parts), pictures


def lesson_titles() -> list[dict[str, str]]:
    """Entries of the navigation: one per lesson, with the first line of its README."""
    titles = []
    for page in matching(["lessons/*/README.md"]):
        title = (ROOT / page).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").removeprefix("Lesson ")
        titles.append({title: page})
    return titles


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # anchors as on GitHub
    for section in config.nav:
        if "Course" in section:
            names = {Path(path).stem.lstrip("0").replace("_", ": ", 1).replace("_", " "): path for path in matching(NOTEBOOKS)}
            notebooks = [{name: f"{path}.md"} for name, path in names.items()]
            section["Course"] = ["lessons/README.md", *lesson_titles(), {"Notebooks": ["notebooks/README.md", *notebooks]},
                                 "lessons/WRITING.md"]
        if "Specification" in section:
            section["Specification"] = [{name: f"docs/specification/{name}.md"} for name in specification.render()]
    return config


def on_files(files: Files, config: Any) -> Files:
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    pages = {path: (ROOT / path).read_text(encoding="utf-8") for path in matching(PAGES)}
    for path in [*pages, *matching(ASSETS)]:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in matching(NOTEBOOKS):
        pages[path], pictures = notebook_page(path)
        files.append(File.generated(config, f"{path}.md", content=pages[path]))
        for name, content in pictures.items():
            files.append(File.generated(config, name, content=content))
    for path in sorted(linked_files(pages)):
        files.append(File.generated(config, f"{path}.md", content=code_page(path)))
    for name, text in specification.render().items():  # found by a search after the pages that explain
        files.append(File.generated(config, f"docs/specification/{name}.md", content=f"---\nsearch:\n  boost: 0.5\n---\n\n{text}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files become links to their pages. Text inside <details> is Markdown, as on other viewers."""
    def to_page(match: re.Match[str]) -> str:
        target = match["target"]
        path = linked_path(page.file.src_uri, target)
        if path.endswith(".ipynb") and not (ROOT / path).is_file():  # not written yet: the list of notebooks
            return "README.md"
        generated = files.get_file_from_path(f"{path}.md") if path else None
        return (f"{target}.md" if generated else target) + (match["anchor"] or "")

    return LINK.sub(to_page, markdown).replace("<details>", '<details markdown="1">')
