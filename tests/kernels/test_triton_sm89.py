"""Every Triton kernel compiled for an RTX 4060, without that GPU: at most 99 KB of shared memory per block, and no spilled registers."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_kernels_fit_an_rtx_4060_and_decode_kernels_spill_no_registers() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"].split()[0] for row in rows} == {"decode", "prefill"}
    for row in rows:
        assert row["shared"] <= 99 * 1024, row
        assert row["spills"] <= (0 if row["kernel"].startswith("decode") else 64), row
