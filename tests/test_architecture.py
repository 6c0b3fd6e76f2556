"""Which module may import which: the design's rules as data, checked against the syntax tree of every file.

Imports inside functions and under TYPE_CHECKING count like all others.
The last tests plant violations, to show that each rule can fail.
"""
from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minivllm"

# A unit is a module or a folder directly under minivllm/. Each may import itself and the units on its right.
# "core.plan" on the right means only this module of core.
INPUT = ("errors", "sampling_params", "speculative_config", "config", "families")  # a user's input; every unit may import it
SPELLINGS = ("compat.settings", "compat.environment")  # vLLM's settings as data
BRIDGE = (*INPUT, "core.plan", "core.block_math")  # the only modules of the control plane that the data plane may import
KERNELS = (*BRIDGE, "kernels")
PARALLEL = (*KERNELS, "parallel")
PARAMETERS = (*PARALLEL, "quantization", "lora")
LAYERS = (*PARAMETERS, "layers")
MODELS = (*LAYERS, "models")
CHOICE = (*MODELS, "sampling", "speculative")
WORKER = (*CHOICE, "planning.weight_offload", "worker")
ENGINE = (*WORKER, "outputs", "engine_request", "splitmix64", "core", "planning", "engine", "compat.settings")
# what the server may import
ENGINE_CLIENT = (*INPUT, "outputs", "engine_request", "core.plan", "core.admission", "engine", "output_parsers")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "sampling_params": ("errors",),
    "speculative_config": ("errors",),
    "config": ("errors", "sampling_params", "speculative_config", *SPELLINGS, "scheduling_policy"),
    "compat": (*ENGINE, "cli.flags"),
    "families": ("errors",),
    "outputs": ("core.plan", "engine_request"),
    "engine_request": ("errors", "sampling_params"),
    "scheduling_policy": ("engine_request",),
    "splitmix64": (),
    "output_parsers": (),
    # the control plane
    "core": (*INPUT, "outputs", "engine_request", "scheduling_policy"),
    "planning": (*INPUT, "core.block_math", "quantization.methods"),  # no torch: plans are made before anything is loaded
    # the data plane: each layer may import the layers below it
    "kernels": (*BRIDGE, "splitmix64"),
    "parallel": KERNELS,
    "quantization": PARALLEL,
    "lora": PARALLEL,
    "layers": PARAMETERS,
    "models": LAYERS,
    "sampling": (*MODELS, "splitmix64"),
    "speculative": (*MODELS, "sampling"),
    "worker": (*CHOICE, "planning.weight_offload"),
    # the engine, which connects both planes
    "engine": ENGINE,
    "server": ENGINE_CLIENT,
    "course": ("errors",),
    "benchmarks": (*ENGINE, "planning"),
    "entrypoints": ("cli",),
    "cli": (*ENGINE, "compat.environment", "server", "planning", "benchmarks", "course", "minivllm"),
    "__init__": (*INPUT, "outputs", "engine", "engine_request", "compat"),
    "__main__": ("cli",),
}
ALWAYS = ("minivllm",)  # the package itself: its version and its lazy names

# Third-party packages that only these folders or files may import.
CONFINED = {
    "triton": "minivllm.kernels.triton",
    "numba": "minivllm.kernels.numba",
    "llvmlite": "minivllm.kernels.numba",
    "fastapi": "minivllm.server",
    "starlette": "minivllm.server",
    "pydantic": "minivllm.server",
    "pydantic_core": "minivllm.server",
    "uvicorn": "minivllm.server",
    "httptools": "minivllm.benchmarks.client",
    "llguidance": "minivllm.engine",
}
# Circles that still have to be removed, each as the set of its modules.
KNOWN_CIRCLES: set[frozenset[str]] = set()
STANDARD_LIBRARY_ONLY = (
    "errors", "sampling_params", "speculative_config", "config", "families", "outputs", "engine_request", "scheduling_policy", "splitmix64",
    "core", "planning", "output_parsers", "course")
OUTSIDE = ("lessons", "notebooks", "bench", "tests", "docs")  # they import the package; the package never imports them


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def sources() -> dict[str, str]:
    """Module name -> source text, for every file of the package."""
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str, known: Iterable[str]) -> set[str]:
    """Full names of the modules a source text imports: `from a import b` is a.b if that is a module, else a."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be searched for"
            both = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            names |= both or {str(node.module)}
    return names


def unit(module: str) -> str:
    """``minivllm.core.plan -> core``, ``minivllm -> minivllm``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def allowed(importer: str, target: str) -> bool:
    may = (*MAY_IMPORT[unit(importer)], *ALWAYS, unit(importer))
    inside = target.removeprefix("minivllm.")
    return any(inside == name or inside.startswith(f"{name}.") for name in may)


def violations(files: Mapping[str, str]) -> list[str]:
    """Every broken rule in `files` (module name -> source), as a sentence."""
    found = []
    for module, source in files.items():
        if unit(module) not in MAY_IMPORT:
            found.append(f"{module}: {unit(module)} has no row in MAY_IMPORT")
            continue
        for target in sorted(imported(source, files)):
            top = target.split(".")[0]
            if top == "minivllm":
                if not allowed(module, target):
                    found.append(f"{module} may not import {target}")
            elif top in OUTSIDE:
                found.append(f"{module} may not import {target}: the package must not depend on what is built on it")
            elif top in CONFINED and not f"{module}.".startswith(f"{CONFINED[top]}."):
                found.append(f"{module} may not import {target}: only {CONFINED[top]} may")
            elif unit(module) in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names:
                found.append(f"{module} may not import {target}: {unit(module)} is standard library only")
    return found


def import_graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of `files` that it imports anywhere: at the top, inside functions, under TYPE_CHECKING.

    `from package import name` is an import of the package's `__init__` if `name` comes from there, and of `package.name` if that is a
    module. `import package.module` also runs the `__init__`, but the importer takes nothing from it, so it is no edge.
    """
    files = {name.removesuffix(".__init__"): source for name, source in files.items()}
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= members & set(files)
                if members - set(files):
                    targets.add(str(node.module))
        graph[module] = targets & set(files)
    return graph


def circles(files: Mapping[str, str]) -> set[frozenset[str]]:
    """The groups of modules that import one another, directly or through others: the graph's strongly connected components."""
    graph = import_graph(files)
    reachable: dict[str, set[str]] = {}
    for start in graph:
        found, todo = set[str](), [start]
        while todo:
            for target in graph[todo.pop()] - found:
                found.add(target)
                todo.append(target)
        reachable[start] = found
    return {frozenset(other for other in found if module in reachable[other]) for module, found in reachable.items() if module in found}


def is_compiled(module: str) -> bool:
    """Whether a module needs a compiler that some machines lack."""
    return any(f"{module}.".startswith(f"minivllm.kernels.{compiler}.") for compiler in ("triton", "numba"))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ---- the rules

def test_every_import_in_the_package_follows_the_rules() -> None:
    assert violations(sources()) == []


def test_rows_of_the_table_have_no_cycle() -> None:
    """No two units may import each other (outputs and core share core.plan alone)."""
    for name, may in MAY_IMPORT.items():
        for other in may:
            if other in MAY_IMPORT and other != name:
                assert name not in MAY_IMPORT[other], f"{name} and {other} may import each other"


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Exact in both directions: a new circle fails, and so does an entry of `KNOWN_CIRCLES` that no longer exists."""
    assert circles(sources()) == KNOWN_CIRCLES


def test_lessons_import_neither_the_package_nor_another_lesson() -> None:
    """The one exception is the capstone that changes the package."""
    lessons = sorted((ROOT / "lessons").glob("*/*.py"))
    assert lessons
    for path in lessons:
        others = {"minivllm", "lessons", "notebooks", "bench", "tests"} - ({"minivllm"} if path.parent.name == "capstone_policy" else set())
        for target in imported(path.read_text(encoding="utf-8"), ()):
            assert target.split(".")[0] not in others, f"{path} imports {target}"


def test_every_module_has_a_docstring() -> None:
    without = [name for name, text in sources().items() if text.strip() and not ast.get_docstring(ast.parse(text))]
    assert without == []


def test_every_file_that_the_documents_name_exists() -> None:
    folders = ("minivllm", "tests", "bench", "lessons", "notebooks", "docs")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*")]
    documents = set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "vllm_map.md"}  # which names vLLM's; tests/test_docs.py checks ours
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(documents)):
        named = set(re.findall(r"[\w/.-]*\w\.(?:py|md)\b", document.read_text(encoding="utf-8")))
        missing = {name for name in named if not any(file.endswith(f"/{name.lstrip('./')}") for file in files)}
        assert missing <= {"README.md", "CONTRIBUTING.md"}, f"{document.name} names {missing}"


def test_the_control_plane_leaves_torch_and_numpy_unimported() -> None:
    modules = [name for name in sources() if unit(name) in STANDARD_LIBRARY_ONLY]
    assert "minivllm.core.scheduler" in modules
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
print([name for name in ("torch", "numpy") if name in sys.modules])
"""
    assert run(code) == "[]\n"


def test_importing_the_package_imports_no_heavy_package() -> None:
    heavy = ("torch", "numpy", "numba", "transformers", "tokenizers", "fastapi", "pydantic", "huggingface_hub")
    assert run(f"import sys, minivllm\nprint([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_the_engine_imports_without_the_servers_packages_and_without_gguf() -> None:
    """A bare PyTorch box with transformers and triton is enough."""
    load_generator = [f"minivllm.benchmarks.{name}" for name in ("client", "load", "serve_run")]  # they need httptools
    modules = [name for name in sources() if unit(name) not in ("server", "entrypoints", "__main__") and not is_compiled(name)
               and name not in load_generator]
    code = f"""
import importlib, sys
for blocked in ("fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "httptools", "openai", "gguf", "triton", "numba",
                "llvmlite", "llguidance"):
    sys.modules[blocked] = None
for module in {[m for m in modules if m != "minivllm.__init__"]}:
    importlib.import_module(module)
from minivllm import LLM, SamplingParams
print("imported")
"""
    assert run(code) == "imported\n"


def test_importing_everything_starts_nothing_and_prints_nothing() -> None:
    here = {name: importlib.util.find_spec(name) is not None for name in ("triton", "numba")}
    modules = [name for name in sources() if unit(name) != "__main__" and name != "minivllm.__init__"
               and (not is_compiled(name) or here[name.split(".")[2]])]
    code = f"""
import importlib, json, logging, threading
for module in {modules}:
    importlib.import_module(module)
print(json.dumps([threading.active_count(), len(logging.getLogger().handlers)]))
"""
    assert json.loads(run(code)) == [1, 0]


# ---- planted violations

CLEAN = {"minivllm.core.plan": "import dataclasses", "minivllm.core.scheduler": "from minivllm.core.plan import StepPlan"}


@pytest.mark.parametrize(("module", "source", "says"), [
    ("minivllm.core.request", "import torch", "standard library only"),
    ("minivllm.core.request", "from numpy import array", "standard library only"),
    ("minivllm.core.request", "import minivllm.worker.batch", "may not import minivllm.worker.batch"),
    ("minivllm.core.request", "def f():\n    from minivllm.engine import engine", "may not import minivllm.engine"),
    ("minivllm.families", "import torch", "standard library only"),
    ("minivllm.worker.batch", "from minivllm.core.scheduler import Scheduler", "may not import minivllm.core.scheduler"),
    ("minivllm.worker.batch", "from minivllm.core import scheduler", "may not import minivllm.core.scheduler"),
    ("minivllm.worker.batch", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import minivllm.engine.llm",
     "may not import minivllm.engine.llm"),
    ("minivllm.layers.linear", "from minivllm.models.decoder import Decoder", "may not import minivllm.models.decoder"),
    ("minivllm.kernels.reference.norm", "import triton", "only minivllm.kernels.triton may"),
    ("minivllm.kernels.reference.norm", "from numba import njit", "only minivllm.kernels.numba may"),
    ("minivllm.kernels.triton_extra", "import triton.language as tl", "only minivllm.kernels.triton may"),
    ("minivllm.engine.client", "from pydantic import BaseModel", "only minivllm.server may"),
    ("minivllm.server.app", "import llguidance", "only minivllm.engine may"),
    ("minivllm.server.app", "from minivllm.worker.batch import Rows", "may not import minivllm.worker.batch"),
    ("minivllm.server.app", "from minivllm.core.scheduler import Scheduler", "may not import minivllm.core.scheduler"),
    ("minivllm.engine.llm", "from tests.models.tiny import load", "must not depend on what is built on it"),
    ("minivllm.engine.llm", "import bench.harness", "must not depend on what is built on it"),
    ("minivllm.surprise", "", "has no row"),
])
def test_a_planted_violation_is_found(module: str, source: str, says: str) -> None:
    assert violations(CLEAN) == []
    found = violations({**CLEAN, module: source})
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize(("module", "source"), [
    ("minivllm.worker.batch", "from minivllm.core.plan import StepPlan"),
    ("minivllm.worker.batch", "from minivllm.core import plan"),
    ("minivllm.engine.engine", "from minivllm.core.scheduler import Scheduler\nfrom minivllm.worker import batch\nimport torch"),
    ("minivllm.kernels.triton.norm", "import triton.language as tl"),
    ("minivllm.server.app", "from fastapi import FastAPI\nfrom minivllm.engine.client import EngineClient"),
])
def test_what_the_design_allows_is_not_reported(module: str, source: str) -> None:
    assert violations({**CLEAN, module: source}) == []


A, B, C = "minivllm.core.a", "minivllm.core.b", "minivllm.core.c"


@pytest.mark.parametrize(("files", "found"), [
    ({A: "from minivllm.core.b import x", B: "from minivllm.core.a import y"}, [{A, B}]),
    ({A: "import minivllm.core.b", B: "import minivllm.core.c", C: "from minivllm.core import a"}, [{A, B, C}]),
    ({A: "from minivllm.core.b import x", B: "def f():\n    from minivllm.core.a import y"}, [{A, B}]),
    ({A: "from minivllm.core.b import x", B: "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import minivllm.core.a"}, [{A, B}]),
    ({A: "import minivllm.core.a"}, [{A}]),
    ({A: "import minivllm.core.b", B: "import minivllm.core.a", C: "import minivllm.core.a", "minivllm.x": "import minivllm.y",
      "minivllm.y": "import minivllm.x"}, [{A, B}, {"minivllm.x", "minivllm.y"}]),
    # An `__init__` that defines or imports what its modules take from it.
    ({"minivllm.core": "from minivllm.core.a import x", A: "from minivllm.core import VERSION"}, [{"minivllm.core", A}]),
    ({"minivllm.core": "from minivllm.core.a import x", A: "from minivllm.core import b, VERSION", B: ""}, [{"minivllm.core", A}]),
    ({"minivllm.__init__": "from minivllm.core.a import x", A: "from minivllm import __version__"}, [{"minivllm", A}]),
])
def test_a_planted_circle_is_found(files: dict[str, str], found: list[set[str]]) -> None:
    assert circles(files) == set(map(frozenset, found))


@pytest.mark.parametrize("files", [
    {A: "import minivllm.core.b\nimport minivllm.core.c", B: "import minivllm.core.c", C: "import json"},
    {"minivllm.core": "from minivllm.core.a import x", A: "from minivllm.core import b", B: "import minivllm.core.c", C: ""},
    {"minivllm.__init__": "from minivllm.core.a import x", A: "import minivllm.core.b", B: ""},
])
def test_imports_in_one_direction_are_no_circle(files: dict[str, str]) -> None:
    assert circles(files) == set()
