"""The install rules of the Makefile refuse an environment that belongs to another clone."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("stamp", [".installed", ".installed-test", "-clients/.installed"])
def test_an_install_through_a_symbolic_link_is_refused(tmp_path: Path, stamp: str) -> None:
    """Its programs do nothing, so that a rule without the test would succeed and install nothing."""
    for name in ("other/bin/python", "other/bin/pip"):
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        os.utime(program, (0, 0))
    for link in ("venv", "venv-clients"):
        (tmp_path / link).symlink_to(tmp_path / "other")
    target = f"{tmp_path}/venv{stamp}" if stamp.startswith("-") else f"{tmp_path}/venv/{stamp}"
    done = subprocess.run(["make", f"VENV={tmp_path}/venv", "PYTHON=true", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stderr.splitlines()[0].endswith("is a symbolic link, so this would change another environment: "
                                                                        "remove it, or set VENV")
    assert not (tmp_path / "other" / ".installed").exists()
