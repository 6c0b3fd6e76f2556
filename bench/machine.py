"""The machine that a figure was measured on: processor, its relevant instructions, GPU, versions, commit."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
PACKAGES = ("torch", "transformers", "triton", "numpy")


def describe(device: str, threads: int) -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "flags": [f for f in FLAGS if f in _cpu_flags()],
        "gpu": _gpu() if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def one_line(machine: dict[str, Any]) -> str:
    flags = " ".join(machine["flags"]) or "no known SIMD flags"
    where = f"{machine['cpu']}, {machine['threads']} threads on {machine['cpus_usable']} usable cores, {flags}"
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    return f"{machine['gpu'] + '; ' if machine['gpu'] else ''}{where}; python {machine['python']}, {versions}; commit {machine['commit']}"


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}


def _cpu_model() -> str:
    info = _cpuinfo()
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']} (family {info.get('cpu family')}, model {info.get('model')})"


def _cpu_flags() -> set[str]:
    return set(_cpuinfo().get("flags", "").split())


def _gpu() -> str:
    code = "import torch; print(torch.cuda.get_device_name())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip() or "unknown GPU"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    dirty = "+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{commit}{dirty}" or "unknown"
