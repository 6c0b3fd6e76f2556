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
import psutil
import pytest

from minivllm.cli.main import main
from minivllm.config import EngineConfig, ServerConfig
from minivllm.engine import restarts
from minivllm.engine.autoscaling import ScalingPolicy
from minivllm.engine.replica import ReplicaProcess, share_machine
from minivllm.engine.replica_slots import ReplicaSlots, ReplicaState
from minivllm.engine.replicas import RoutedClient
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.server.run import build_engine as server_engine
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
        info = readiness(client.info, ServerConfig(data_parallel_size=2, max_replicas=4), 8000, "m", False, 1.0)
        assert "replicas  2, up to 4 under load, each with such a KV cache" in info


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


def test_load_starts_a_replica_and_its_end_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history: list[tuple[int, str]] = []
    set_state = ReplicaSlots.__setitem__

    def recorded(slots: ReplicaSlots, number: int, state: ReplicaState) -> None:
        history.append((number, state.value))
        set_state(slots, number, state)

    monkeypatch.setattr(ReplicaSlots, "__setitem__", recorded)
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", max_num_seqs=1, num_gpu_blocks_override=256)
    scaling = ScalingPolicy(least=1, most=2, target_queue=1.0, upscale_delay=0.0, downscale_delay=0.0)
    client = RoutedClient.start_with(partial(server_engine, config, "error"), scaling=scaling, keeper_period=0.05,
                                     prepare=partial(share_machine, "cpu", 1, "max_replicas"))
    second = client._replicas[1]
    assert isinstance(second, ReplicaProcess)
    try:
        with serving(client, Tokenizer(folder)) as live, ThreadPoolExecutor(6) as pool:
            def answer(number: int) -> str:
                body = {"prompt": [5, 6, 7 + number], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
                return str(httpx.post(live.url + "/v1/completions", json=body, timeout=60).raise_for_status().json()["choices"][0]["text"])

            alone = [answer(number) for number in range(6)]
            while (1, "live") not in history:
                assert list(pool.map(answer, range(6))) == alone
            process = psutil.Process(second.pid)
            live.wait_until(lambda: client.replica_states == ("live", "stopped"))
            assert history == [(0, "live"), *((1, state) for state in ("starting", "live", "draining", "stopping", "stopped"))]
            assert httpx.get(live.url + "/health").json() == {"status": "ok", "replicas": 1, "live": 1, "states": ["live", "stopped"]}
            assert not process.is_running()
            assert [answer(number) for number in range(6)] == alone
    finally:
        client.close()


def test_settings_that_do_not_fit_replicas_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput, match="data_parallel_size must be between 1 and 1024, got 0"):
        ServerConfig(data_parallel_size=0)
    with pytest.raises(InvalidInput, match="data_parallel_size needs engines in processes"):
        ServerConfig(data_parallel_size=2, engine_process=False)
    with pytest.raises(InvalidInput, match="data_parallel_backend=ray runs engines in Ray's processes"):
        ServerConfig(data_parallel_backend="ray", engine_process=False)
    for settings, message in (
        ({"data_parallel_size": 3, "max_replicas": 2}, r"max_replicas must be between data_parallel_size \(3\) and 1024, got 2"),
        ({"max_replicas": 2, "engine_process": False}, "max_replicas needs engines in processes"),
        ({"target_queue": 2.0}, "target_queue has no effect without max_replicas: give both, or neither"),
        ({"downscale_delay": 2.0}, "downscale_delay has no effect without max_replicas"),
        ({"max_replicas": 2, "target_queue": 0.0}, "target_queue must be above 0, got 0.0"),
        ({"max_replicas": 2, "upscale_delay": -1.0}, "upscale_delay must be at least 0, got -1.0"),
        ({"data_parallel_size": 2, "silent_timeout": 60.0}, "silent_timeout has no effect without replicas that are started again"),
        ({"restart_engine": 2, "silent_timeout": 60.0}, "silent_timeout has no effect without replicas that are started again"),
        ({"max_replicas": 2, "restart_engine": 2, "silent_timeout": 10.0}, "silent_timeout must be above 10 s, got 10"),
    ):
        with pytest.raises(InvalidInput, match=message):
            ServerConfig(**settings)  # type: ignore[arg-type]
    assert ServerConfig(max_replicas=1, upscale_delay=0.0, downscale_delay=0.0).has_replicas
    with pytest.raises(InvalidInput, match="replicas are for minivllm serve"):
        EngineConfig.from_kwargs(data_parallel_size=2)
    for flags in (["-dp", "2"], ["--max-replicas", "2"]):
        assert main(["serve", *flags, "--trace", "t.jsonl"]) == 1
        assert "trace records one engine of this machine" in capsys.readouterr().err
    assert main(["serve", "--max-replicas", "2", "--max-queue", "5"]) == 1
    assert "no queue is longer than target_queue (5) with max_queue=5" in capsys.readouterr().err


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
    with pytest.raises(InvalidInput, match="max_replicas=3 needs 6 GPUs"):
        share_machine("cuda", 2, "max_replicas", 0, 3)
    threads: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    share_machine("cpu", 1, "max_replicas", 0, 3)
    assert threads == [2]
