"""`minivllm collect-env`: the facts about the machine that a bug report needs. The only path in it is the cache's."""
from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minivllm import __version__

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "jinja2", "gguf",
            "fastapi", "starlette", "pydantic", "uvicorn", "openai", "prometheus-client")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")  # these determine dtype and kernels


def add_parser(commands: Any) -> None:
    commands.add_parser("collect-env", help="print versions and hardware, for bug reports", description="Print versions and hardware.")


def run(args: argparse.Namespace) -> int:
    for name, value in facts():
        print(f"{name:<16} {value}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    yield "minivllm", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    wsl = " (WSL)" if "microsoft" in platform.release().lower() else ""
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}{wsl}"
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield from _cpu()
    yield from _gpu()
    yield from _cache()


def _cpu() -> Iterator[tuple[str, str]]:
    info: dict[str, str] = {}
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, colon, value = line.partition(":")
            if colon:
                info.setdefault(name.strip().lower(), value.strip())
    yield "CPU", info.get("model name") or platform.processor() or "unknown"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU cores", f"{usable} usable of {os.cpu_count()}"
    flags = set((info.get("flags") or info.get("features") or "").split())
    yield "CPU flags", ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "none of " + ", ".join(CPU_FLAGS)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _gpu() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except ImportError:
        yield "GPU", "unknown: torch is not installed"
        return
    yield "CUDA of torch", torch.version.cuda or "none (a CPU build)"
    if not torch.cuda.is_available():
        yield "GPU", "none usable"
        return
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield f"GPU {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} SMs"


def _cache() -> Iterator[tuple[str, str]]:
    from minivllm.models.cache import cache_dir

    folder = cache_dir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else None
    yield "cache", f"{folder} ({'empty' if size is None else f'{size / 2**20:.0f} MiB'})"
    yield "settings", ", ".join(sorted(name for name in os.environ if name.startswith("MINIVLLM_"))) or "no MINIVLLM_ variables"


