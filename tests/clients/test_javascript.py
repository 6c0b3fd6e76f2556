"""JavaScript clients: each file of tests in `javascript/` runs under node's test runner."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import ClientServer

FOLDER = Path(__file__).with_name("javascript")
INSTALLED = shutil.which("node") is not None and (FOLDER / "node_modules").is_dir()


@pytest.mark.skipif(not INSTALLED, reason="node and the packages are not installed: npm install --prefix tests/clients/javascript")
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.test.mjs")))
def test_javascript(capable: ClientServer, name: str) -> None:
    environment = {**os.environ, "CLIENTS_BASE_URL": capable.base_url, "CLIENTS_MODEL": capable.model}
    done = subprocess.run(["node", "--test", name], cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
