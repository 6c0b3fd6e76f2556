"""Counts of the package's code: how much there is to read, and how its modules depend on each other.

    python -m bench.structure            everything below. --step also runs a tiny model, for the files of a decode step

    lines          per package, and in total without server, cli and benchmarks (budget: 19,000)
    longest        classes by lines and by methods, functions by lines
    import circles groups of modules that import each other, including imports for type checking and inside functions
    a decode step  files whose functions run between the engine loop and the detokenizer, for one token of one request
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minivllm"
APART = ("server", "cli", "benchmarks", "entrypoints", "course")  # not in the engine's budget of lines


def sources() -> dict[str, str]:
    """Path relative to the package -> text."""
    return {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def unit(path: str) -> str:
    """core/plan.py -> core; a module directly under the package -> (top)."""
    return path.split("/")[0] if "/" in path else "(top)"


def lines_per_package(files: Mapping[str, str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for path, text in files.items():
        counts[unit(path)] += text.count("\n")
    return counts


def definitions(files: Mapping[str, str]) -> Iterator[tuple[str, str, int, int]]:
    """("class" or "def", path:name, lines, methods) of every class and function."""
    for path, text in files.items():
        stack: list[tuple[ast.AST, str]] = [(ast.parse(text), "")]
        while stack:
            node, prefix = stack.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    name = f"{prefix}{child.name}"
                    length = (child.end_lineno or child.lineno) - child.lineno + 1
                    methods = sum(isinstance(c, (ast.FunctionDef, ast.AsyncFunctionDef)) for c in child.body)
                    yield ("class" if isinstance(child, ast.ClassDef) else "def"), f"{path}:{name}", length, methods
                    stack.append((child, f"{name}."))
                else:
                    stack.append((child, prefix))


def imports(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, anywhere in its text. A package's __init__ counts under the package's name."""
    names = {"minivllm." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in files}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(files[path])):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(names)
                targets |= inside or {node.module}
        found[name] = {target for target in targets if target in names and target != name}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


class _OneStepDone(Exception):
    """Raised when the engine loop sends its first message, to end the loop."""


def files_of_a_decode_step() -> list[str]:
    """Files of the package in which a function runs during one decode step, from the engine loop until the delta is sent."""
    import json
    import queue
    import tempfile

    from bench import models
    from minivllm import EngineConfig, SamplingParams
    from minivllm.engine import compose, loop

    with tempfile.TemporaryDirectory() as folder:
        models.write_config("tiny", Path(folder))
        _write_tokenizer(Path(folder), json.loads((Path(folder) / "config.json").read_text())["vocab_size"])
        engine = compose.build_engine(EngineConfig(model=folder, load_format="dummy", num_gpu_blocks_override=32,
                                                   max_model_len=64))
    def send(message: Any) -> None:
        raise _OneStepDone

    engine_loop = loop.EngineLoop(engine, queue.SimpleQueue(), send)
    engine.add_request("a", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.7))
    for _ in range(5):
        engine.step()
    seen: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            seen.add(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        with contextlib.suppress(_OneStepDone):  # as wanted: `send` raises it
            engine_loop.run()
    finally:
        sys.setprofile(None)
    engine.close()
    return sorted(seen)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"w{i}" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.structure", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true", help="also count the files that a decode step passes through")
    parser.add_argument("--most", type=int, default=6, metavar="N", help="entries of each list (default: 6)")
    args = parser.parse_args()
    files = sources()
    lines = lines_per_package(files)
    print("lines per package:", ", ".join(f"{name} {count:,}" for name, count in lines.most_common()))
    print(f"total {lines.total():,}; without {', '.join(APART)}: {lines.total() - sum(lines[name] for name in APART):,}")
    found = list(definitions(files))
    for title, kind, key in (("longest classes", "class", 2), ("classes with most methods", "class", 3), ("longest functions", "def", 2)):
        rows = sorted((row for row in found if row[0] == kind), key=lambda row: -row[key])[: args.most]
        print(f"{title}:", ", ".join(f"{row[1]} {row[key]}" for row in rows))
    groups = circles(imports(files))
    print(f"import circles: {len(groups)}", *(f"\n    {', '.join(group)}" for group in groups), sep="")
    if args.step:
        step = files_of_a_decode_step()
        print(f"files of a decode step: {len(step)}\n    {', '.join(step)}")


if __name__ == "__main__":
    main()
