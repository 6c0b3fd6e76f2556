"""`run-batch --ray` in a real Ray cluster gives the file that `run-batch` gives. Skipped without Ray (`pip install minivllm[ray]`)."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli.main import main
from tests.cli.test_run_batch import ENGINE_FLAGS, request


@pytest.fixture
def ray_of_two_cpus() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'minivllm[ray]'")
    pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'minivllm[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def without_ids(path: Path) -> list[Any]:
    """The entries without what differs in each run."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items() if key not in ("id", "request_id", "created", "metrics")}
        return [plain(entry) for entry in value] if isinstance(value, list) else value

    return [plain(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_file_is_that_of_a_run_without_ray(ray_of_two_cpus: None, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    lines = [request(str(i), "/v1/completions", prompt=f"the cat {'and the hat ' * (i % 3)}", max_tokens=3 + i) for i in range(9)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([*lines, "not json"]), encoding="utf-8")
    command = ["run-batch", "-i", str(source), str(tiny_llama()), *ENGINE_FLAGS]
    plain, with_ray = tmp_path / "plain.jsonl", tmp_path / "ray.jsonl"
    assert main([*command, "-o", str(plain)]) == 0
    assert main([*command, "-o", str(with_ray), "--ray"]) == 0
    assert without_ids(with_ray) == without_ids(plain)
    assert [entry["custom_id"] for entry in without_ids(with_ray)] == [*map(str, range(9)), None]


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    source = tmp_path / "in.jsonl"
    source.write_text(request("a", "/v1/completions", prompt="x"), encoding="utf-8")
    assert main(["run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--ray"]) == 1
    assert "--ray needs Ray Data: pip install 'minivllm[ray]'" in capsys.readouterr().err
