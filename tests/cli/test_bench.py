"""`minivllm bench`: complete runs against a scripted server and the canned server."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minivllm.cli.main import main
from tests.server.conftest import tokenizer_folder  # noqa: F401  # a fixture
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

QUIET = ["--disable-tqdm", "--max-token-id", "300"]


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:  # noqa: F811
    engine = ScriptedEngine(tokenizer_folder)
    engine.script = lambda prompt, params, child: [((7,), "word ")] * 250
    return engine


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine, api_key=("secret",)) as live:
        yield live


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIVLLM_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def serve(live: LiveServer, *flags: str) -> int:
    return main(["bench", "serve", "--base-url", live.url, "--api-key", "secret", *QUIET, *flags])


def test_a_run_sends_the_configured_requests_and_saves_its_figures(
    engine: ScriptedEngine, live: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    flags = ["--num-prompts", "12", "--random-input-len", "9", "--random-output-len", "6", "--max-concurrency", "4", "--ignore-eos",
             "--num-warmups", "2", "--goodput", "ttft:60000", "e2e:60000", "--save", str(file), "--save-detailed", "--plot", str(picture)]
    assert serve(live, *flags) == 0
    assert len(engine.seen) == 2 + 12
    assert all(len(r.prompt) == 9 and r.params.max_tokens == 6 and r.params.ignore_eos and r.params.temperature == 0 for r in engine.seen)
    record = json.loads(file.read_text())
    assert (record["completed"], record["failed"], record["total_input_tokens"], record["total_output_tokens"]) == (12, 0, 108, 72)
    assert record["events"] == 72
    assert record["request_goodput"] == pytest.approx(record["request_throughput"])
    assert [len(gaps) for gaps in record["itls"]] == [5] * 12
    assert {"mean_ttft_ms", "p99_itl_ms", "median_tpot_ms", "p90_e2el_ms", "date", "client_machine", "model_id"} <= set(record)
    assert "secret" not in file.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "Successful requests:                                  12" in out and "P99 ITL (ms)" in out


def test_several_client_processes_divide_the_requests(engine: ScriptedEngine, live: LiveServer, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    flags = ["--num-prompts", "5", "--random-output-len", "3", "--client-processes", "2", "--num-warmups", "0", "--save", str(file)]
    assert serve(live, *flags) == 0
    assert len(engine.seen) == 5
    assert json.loads(file.read_text())["total_output_tokens"] == 15


def test_chat_without_streaming_and_a_trace(
    engine: ScriptedEngine, live: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    assert serve(live, "--endpoint", "/v1/chat/completions", "--random-input-len", "4", "--num-prompts", "2", "--no-stream") == 0
    assert "TTFT" not in capsys.readouterr().out
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt": [5, 6], "output_length": 3, "timestamp": 0}\n{"input_length": 4, "output_length": 2, "timestamp": 5}\n')
    assert serve(live, "--dataset-name", "trace", "--dataset-path", str(trace), "--num-warmups", "0") == 0
    assert [(len(r.prompt), r.params.max_tokens) for r in engine.seen[-2:]] == [(2, 3), (4, 2)]


def test_failures_are_counted_printed_and_give_exit_status_1(
    engine: ScriptedEngine, live: LiveServer, capsys: pytest.CaptureFixture[str],
) -> None:
    engine.refuse = lambda prompt, params: ValueError("no") if len(engine.seen) % 2 else None
    engine.script = lambda prompt, params, child: [((7,), "x")] * 2
    failing = iter([None, None, "the device is gone", *[None] * 1000])
    engine.fail_step = lambda: next(failing)
    assert serve(live, "--num-prompts", "4", "--max-concurrency", "1", "--num-warmups", "0") == 1
    assert "requests failed: " in capsys.readouterr().err


def test_invalid_flags_are_refused_before_anything_is_sent(
    engine: ScriptedEngine, live: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    for flags, expected in [
        (["--goodput", "tft:5"], "goodput"), (["--percentile-metrics", "ttft,x"], "percentile_metrics"),
        (["--metric-percentiles", "101"], "metric_percentiles"), (["--dataset-name", "trace"], "dataset_path"),
        (["--endpoint", "/v1/chat/completions", "--prompt-format", "ids"], "prompt"), (["--save", str(tmp_path / "no" / "x")], "folder"),
        (["--plot", "x.gif"], ".png"), (["--random-range-ratio", "2"], "random_range_ratio"),
    ]:
        assert serve(live, *flags) == 1
        assert expected in capsys.readouterr().err
    assert main(["bench", "serve", "--base-url", live.url, *QUIET]) == 1
    assert "HTTP 401" in capsys.readouterr().err
    assert main(["bench", "serve", "--port", "1", *QUIET]) == 1
    assert "no OpenAI-compatible server answers at 127.0.0.1:1" in capsys.readouterr().err
    assert engine.seen == []


def test_a_first_request_that_fails_ends_the_run(engine: ScriptedEngine, live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(live, "--random-output-len", "100000", "--num-prompts", "3") == 1
    assert "the first request failed: HTTP 400" in capsys.readouterr().err


def test_a_misspelled_flag_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", "--request-rat", "4"])
    assert end.value.code == 2
    assert "--request-rate" in capsys.readouterr().err


def test_the_canned_server_shows_the_load_generators_maximum_rate(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--canned", "--num-prompts", "20", "--random-output-len", "30", "--client-processes", "2", "--disable-tqdm"]
    assert main(["bench", "serve", *flags]) == 0
    out = capsys.readouterr().out
    assert "Total generated tokens:                              600" in out
    assert "maximum rate of the load generator" in out


def test_offline_runs_print_and_save_their_figures(
    tiny_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    common = [str(tiny_llama()), "--input-len", "8", "--output-len", "4"]
    assert main(["bench", "latency", *common, "--num-iters", "2", "--batch-size", "2", "--output-json", str(tmp_path / "l.json")]) == 0
    assert "mean latency" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "l.json").read_text())["latencies"]) == 2
    assert main(["bench", "throughput", *common, "--num-prompts", "3", "--save", str(tmp_path / "t.json")]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["output_tokens"] == 12
