"""A trace names a request's parameters and prompt once, and has a largest size. Both keep it replayable."""
from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from minivllm.core.scheduler import SchedulerConfig
from minivllm.core.trace import RecordingScheduler, TraceWriter, read, replay
from minivllm.engine_request import EngineRequest
from minivllm.sampling_params import SamplingParams
from tests.core.test_trace import answer


def run(path: Path, *, max_bytes: int = 1 << 20, n: int = 6, shared: bool = False) -> None:
    config = SchedulerConfig(num_blocks=60, block_size=4, max_num_batched_tokens=64, max_model_len=64)
    scheduler = RecordingScheduler(config, TraceWriter(path, config, max_bytes=max_bytes))
    params = SamplingParams(n=n, max_tokens=8, temperature=0.7, ignore_eos=True, bad_words_token_ids=tuple((7, i) for i in range(300)))
    for name in ("a", "b"):
        own = params if shared else SamplingParams(n=n, max_tokens=8, ignore_eos=True, bad_words_token_ids=((7, 8),) * 300)
        scheduler.add(EngineRequest(name, tuple(range(20 + ord(name) - 97)), own), 3)
    now = 0.0
    while scheduler.has_unfinished():
        plan = scheduler.schedule(now)
        assert plan is not None
        scheduler.update(plan, answer(plan), {}, now)
        now += 1.0
    scheduler.writer.close()


@pytest.mark.parametrize("shared", [False, True], ids=["own parameters", "shared parameters"])
def test_parameters_and_prompts_are_written_once_per_request(tmp_path: Path, shared: bool) -> None:
    run(tmp_path / "few.jsonl", n=1, shared=shared)
    run(tmp_path / "many.jsonl", n=12, shared=shared)
    few, many = ((tmp_path / name).read_text() for name in ("few.jsonl", "many.jsonl"))
    assert few.count("bad_words_token_ids") == many.count("bad_words_token_ids") == 2
    assert all(step.mismatch is None for step in replay(read(tmp_path / "many.jsonl")))


def test_recording_ends_at_the_largest_size_after_a_whole_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    with caplog.at_level(logging.WARNING):
        run(path, max_bytes=12_000)
    assert 4_000 < path.stat().st_size <= 12_000 and sum("largest size" in message for message in caplog.messages) == 1
    assert all(json.loads(line) for line in path.read_text().splitlines())
    steps = list(replay(read(path)))
    assert steps and all(step.mismatch is None for step in steps)
