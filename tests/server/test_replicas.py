"""`--data-parallel-size`: the server with two replicas, each in a separate process."""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minivllm.cli.main import main
from minivllm.config import EngineConfig, ServerConfig
from minivllm.engine import restarts
from minivllm.engine.replica import ReplicaProcess, share_machine
from minivllm.engine.replicas import RoutedClient
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.server.run import readiness, start_engine
from tests.server.scripted import serving
from tests.server.test_restart import build_engine


@pytest.fixture
def client(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RoutedClient]:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.1)
    client = RoutedClient.start_with(partial(build_engine, tokenizer_folder), replicas=2, restarts=1)
    yield client
    client.close()


def test_a_killed_replica_ends_only_the_streams_that_it_had_and_the_server_continues(client: RoutedClient, tokenizer_folder: Path) -> None:
    with serving(client, Tokenizer(tokenizer_folder)) as live, openai.OpenAI(base_url=live.url + "/v1", api_key="x") as api:
        request: dict[str, Any] = {"model": client.info.model, "prompt": [5, 6, 7]}
        stream = api.completions.create(**request, max_tokens=200_000, stream=True)
        next(stream)
        assert httpx.get(live.url + "/health").json() == {"status": "ok", "replicas": 2, "live": 2, "states": ["live", "live"]}
        os.kill(holder_of_the_only_request(client).pid or 0, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="replica that computed this request has stopped after the output had begun"):
            list(stream)
        assert httpx.get(live.url + "/health").status_code == 200
        assert api.completions.create(**request, max_tokens=3).choices[0].text == "aaa"
        live.wait_until(lambda: client.num_live == 2)
        text = httpx.get(live.url + "/metrics").text
        assert text.count("minivllm:num_requests_running{") == 2 and 'engine="1"' in text
        assert httpx.get(live.url + "/server_info").json()["engine"]["data_parallel_size"] == 2
        info = readiness(client.info, ServerConfig(), 8000, "m", False, 1.0)
        assert "replicas  2, each with such a KV cache" in info


def holder_of_the_only_request(client: RoutedClient) -> ReplicaProcess:
    (placement,) = client._placements.values()
    assert placement.replica is not None
    holder = client._replicas[placement.replica]
    assert isinstance(holder, ReplicaProcess)
    return holder


def test_an_answer_that_is_not_streamed_survives_the_end_of_its_replica(client: RoutedClient, tokenizer_folder: Path) -> None:
    with serving(client, Tokenizer(tokenizer_folder)) as live, ThreadPoolExecutor(1) as pool:
        body = {"model": client.info.model, "prompt": [5, 6, 7], "max_tokens": 20_000, "logprobs": 1, "request_id": "long"}
        answer = pool.submit(httpx.post, live.url + "/v1/completions", json=body, timeout=60)
        live.wait_until(lambda: any(placement.begun for placement in client._placements.values()))
        holder = holder_of_the_only_request(client)
        os.kill(holder.pid or 0, signal.SIGKILL)
        choice = answer.result().json()["choices"][0]
        assert choice["text"] == "a" * 20_000 and len(choice["logprobs"]["tokens"]) == 20_000
    assert client.metrics.finished == {"stop": 0, "length": 1, "abort": 0, "error": 1}
    assert client._streams == {} and client._placements == {}


def test_settings_that_do_not_fit_replicas_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput, match="data_parallel_size must be between 1 and 1024, got 0"):
        ServerConfig(data_parallel_size=0)
    with pytest.raises(InvalidInput, match="data_parallel_size needs engines in processes"):
        ServerConfig(data_parallel_size=2, engine_process=False)
    with pytest.raises(InvalidInput, match="data_parallel_backend=ray runs engines in Ray's processes"):
        ServerConfig(data_parallel_backend="ray", engine_process=False)
    with pytest.raises(InvalidInput, match="replicas are for minivllm serve"):
        EngineConfig.from_kwargs(data_parallel_size=2)
    assert main(["serve", "-dp", "2", "--trace", "t.jsonl"]) == 1
    assert "trace records one engine of this machine" in capsys.readouterr().err


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidInput, match=r"data_parallel_backend=ray needs Ray: pip install 'minivllm\[ray\]'"):
        start_engine(EngineConfig(), process=True, log_level="error", ray=True)


def test_each_replica_gets_its_gpus_or_its_part_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for visible, number, expected in (("", 1, "2,3"), ("6,7,2,GPU-5", 1, "2,GPU-5"), ("6,7,2,3", 0, "6,7")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        share_machine("auto", 2, "data_parallel_size", number, 2)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    with pytest.raises(InvalidInput, match="data_parallel_size=3 needs 6 GPUs, 2 for each replica, and there are 4: give at most 2"):
        share_machine("cuda", 2, "data_parallel_size", 0, 3)
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    share_machine("cpu", 1, "max_replicas", 0, 3)
    assert threads == [2]
