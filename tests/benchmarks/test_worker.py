"""The process that measures one engine. Wrong kernels or wrong token counts give no figures."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bench import models, run, worker
from minivllm.benchmarks.workloads import WorkloadRequest


class FakeEngine:
    """An engine that returns zeros at once."""

    dtype = "bfloat16"
    verdict: ClassVar[dict[str, Any]] = {"logits_apart": 0.01}
    short_by = 0

    def __init__(self, job: dict[str, Any]) -> None:
        self.started = 0

    def generate(self, requests: list[WorkloadRequest]) -> list[list[int]]:
        self.started += 1
        return [[0] * (r.output_len - (self.short_by if self.started > 1 else 0)) for r in requests]

    def generate_with_gaps(self, requests: list[WorkloadRequest]) -> tuple[list[list[int]], None]:
        return [[0] * r.output_len for r in requests], None

    def check_kernels(self) -> dict[str, Any]:
        return self.verdict


def rows_of(engine: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **job: Any) -> dict[str, dict[str, Any]]:
    monkeypatch.setitem(sys.modules, "bench.peers.minivllm_engine", type("module", (), {"Engine": engine}))
    full = {"engine": "minivllm", "device": "cuda", "threads": torch.get_num_threads(), "repeats": 1,
            "rows": ["c2", "nano8gb"], "check": True, "max_len": 4096, "started": time.time(), **job}
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(full)])
    worker.main()
    rows = [json.loads(line.removeprefix("BENCH ")) for line in capsys.readouterr().out.splitlines()]
    return {row.pop("row"): row for row in rows}


def test_a_row_that_is_named_twice_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both would send the same prompts to one engine."""
    monkeypatch.setattr(sys, "argv", ["run", "--rows", "bs1,ttft64,bs8,bs1"])
    with pytest.raises(SystemExit):
        run.parse()
    assert "a row is named twice: bs1. The second one would find its prompts in the prefix cache" in capsys.readouterr().err


def test_right_kernels_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(FakeEngine, monkeypatch, capsys)
    assert rows["kernels"] == {"logits_apart": 0.01} and rows["c2"]["value"] > 0 and rows["nano8gb"]["unit"] == "tok/s"


def test_wrong_kernels_have_no_figure_in_any_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = type("Wrong", (FakeEngine,), {"verdict": {"logits_apart": 3.0, "refused": "logits are 3 from the reference's"}})
    rows = rows_of(engine, monkeypatch, capsys)
    assert [rows[name] for name in ("c2", "nano8gb")] == [{"refused": "logits are 3 from the reference's"}] * 2
    on_cpu = rows_of(engine, monkeypatch, capsys, device="cpu")
    assert "value" in on_cpu["c2"] and "kernels" not in on_cpu  # on a CPU tokens are compared with those of Transformers instead


def test_a_missing_token_gives_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = type("Short", (FakeEngine,), {"short_by": 1})
    assert "WrongOutput" in rows_of(engine, monkeypatch, capsys)["c2"]["refused"]


def test_rows_of_long_prompts_count_their_tokens_and_read_cached_prompts_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[list[WorkloadRequest]] = []

    class Recorder(FakeEngine):
        def generate(self, requests: list[WorkloadRequest]) -> list[list[int]]:
            seen.append(requests)
            return super().generate(requests)

    rows = rows_of(Recorder, monkeypatch, capsys, rows=["long2x300", "longtpot3x100", "long1x4096", "longtpot1x4000"])
    assert rows["long2x300"]["unit"] == "s" and rows["longtpot3x100"]["unit"] == "ms"
    assert [rows[name]["refused"] for name in ("long1x4096", "longtpot1x4000")] == ["WrongOutput: the model holds 4096 tokens"] * 2
    long, cached = seen[-7:-6], seen[-3:]  # what follows the warm-ups
    assert [(len(r.prompt_token_ids), r.output_len) for r in long[0]] == [(300, 1)] * 2
    assert [[(len(r.prompt_token_ids), r.output_len) for r in run] for run in cached] == [[(100, 1)] * 3] * 2 + [[(100, 257)] * 3]
    assert len({r.prompt_token_ids for run in cached for r in run}) == 3


def test_no_prompt_of_a_row_begins_like_one_of_another_row_or_repetition() -> None:
    runs: list[list[WorkloadRequest]] = []

    class Recorder(FakeEngine):
        def generate(self, requests: list[WorkloadRequest]) -> list[list[int]]:
            runs.append(requests)
            return super().generate(requests)

    heads: list[set[tuple[int, ...]]] = []  # of the prompts that may share: all of a run, or of the runs of a repetition
    runs_that_share = {"prefix": 2, "longtpot1x300": 3}
    for name in ("c2", "c8", "mixed32", "ttft200", "ttft400", "bs1", "bs8", "long2x300", "long1x400", "longtpot1x300", "prefix", "nano"):
        runs.clear()
        worker.measure(name, Recorder({}), 2, 4096)
        together = runs_that_share.get(name, 1)
        heads += [{r.prompt_token_ids[:16] for run in runs[i : i + together] for r in run} for i in range(0, len(runs), together)]
    assert sum(map(len, heads)) == len(set().union(*heads)), "two rows or repetitions share 16 leading tokens"


def test_a_missing_vllm_is_a_clear_error(tmp_path: Path) -> None:
    models.write_config("tiny", tmp_path)
    job = {"engine": "vllm", "model": str(tmp_path), "dtype": "bfloat16", "device": "cuda", "threads": 1, "repeats": 1, "rows": ["bs1"],
           "check": True, "max_len": 4096, "load_format": "auto", "options": {}, "started": 0}
    hide = ("import sys, runpy; sys.modules['vllm'] = None; sys.argv = ['worker', sys.argv[1]]; "
            "runpy.run_module('bench.worker', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", hide, json.dumps(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("vLLM cannot be imported by this Python")


@pytest.mark.parametrize("flags, message", [
    (["--rows", "nano9gb"], "unknown row 'nano9gb'"),
    (["--engines", "sglang"], "unknown engine 'sglang'"),
    (["--load-format", "dummy", "--device", "cuda", "--model", "tiny"], "hf reads its weights from a file"),
    (["--load-format", "dummy", "--engines", "minivllm", "--model", "tiny"], "on --device cuda"),
])
def test_rows_that_cannot_be_measured_are_refused_at_once(flags: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bench.run", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr
