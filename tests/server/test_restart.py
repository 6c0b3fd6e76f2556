"""`--restart-engine`: a dead engine is started again, and clients are told. The engines are scripted ones in processes of their own."""
from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minivllm.config import ServerConfig
from minivllm.engine import restarts
from minivllm.engine.client import ThreadClient
from minivllm.engine.messages import DeadMessage, EngineInfo, ObeyedMessage, ReadyMessage
from minivllm.engine.process import ProcessClient
from minivllm.engine.restarts import RestartCounter
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import LoRARequest
from minivllm.errors import InvalidInput
from minivllm.server import errors
from tests.server.scripted import ScriptedEngine, serving


def build_engine(folder: Path) -> Any:
    """An engine whose outputs are as long as wanted."""
    engine = ScriptedEngine(folder, max_model_len=10**6)
    engine.script = lambda prompt, params, child: [((5,), "a")] * (params.max_tokens or 1)
    return engine


def build_once(folder: Path, marker: Path) -> Any:
    """The first engine works, and later ones cannot be built."""
    if marker.exists():
        raise MemoryError("no memory for weights")
    marker.touch()
    return build_engine(folder)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(errors, "RESTART_RETRY_AFTER", "0.1")
    yield


def kill(client: ProcessClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)


def test_a_killed_engine_is_started_again_and_openais_client_waits_for_it(tokenizer_folder: Path) -> None:
    client = ProcessClient.start_with(partial(build_engine, tokenizer_folder), restarts=1)
    try:
        with serving(client, Tokenizer(tokenizer_folder)) as live, openai.OpenAI(base_url=live.url + "/v1", api_key="x") as api:
            request: dict[str, Any] = {"model": client.info.model, "prompt": [5, 6, 7]}
            stream = api.completions.create(**request, max_tokens=200_000, stream=True)
            next(stream)
            kill(client)
            with pytest.raises(openai.APIError, match="being started again, and its running requests have ended"):
                list(stream)
            health = httpx.get(live.url + "/health")
            assert health.status_code == 503 and health.json()["error"]["code"] == "engine_restarting"
            assert health.headers["retry-after"] == "0.1"
            answer = api.with_options(max_retries=600).completions.create(**request, max_tokens=3)
            assert answer.choices[0].text == "aaa"
            assert httpx.get(live.url + "/health").status_code == 200
            assert (client.metrics.finished["error"], client.metrics.finished["length"]) == (1, 1)
            assert not live.server.should_exit
    finally:
        client.close()


def test_an_engine_that_cannot_be_started_again_is_dead_in_the_end(
    tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    client = ProcessClient.start_with(partial(build_once, tokenizer_folder, tmp_path / "built"), restarts=1)
    gone = threading.Event()
    client.on_death(gone.set)
    kill(client)
    assert gone.wait(60)
    assert client.dead == "MemoryError: no memory for weights" and not client.restarting
    assert "exit code -9" in caplog.text and "ended 2 times in a row" in caplog.text
    client.close()


def test_closing_ends_the_wait_for_a_restart(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 1000.0)
    monkeypatch.setattr(restarts, "LONGEST_PAUSE", 1000.0)
    client = ProcessClient.start_with(partial(build_engine, tokenizer_folder), restarts=1)
    kill(client)
    while not client.restarting:
        pass
    client.close()
    assert client._receiver is not None and not client._receiver.is_alive()


def test_a_new_engine_has_the_adapters_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ThreadClient()
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
    monkeypatch.setattr(client, "_send", sent.put)
    monkeypatch.setattr(client, "_may_restart", lambda: True)
    info: Any = EngineInfo(model="m", model_folder="", tokenizer_folder=None, max_model_len=8, vocab_size=8, eos_token_ids=(), device="cpu",
                           dtype="float32", num_blocks=8, block_size=4, generation_config={})
    client._receive(ReadyMessage(info))
    for name in ("kept", "dropped"):
        client.load_adapter(LoRARequest(name, 1, "folder"))
        client._receive(ObeyedMessage(sent.get().number))
    client.unload_adapter("dropped")
    client._receive(ObeyedMessage(sent.get().number))
    client._receive(DeadMessage("lost"))
    client._ended = False  # the next engine has been started
    client._receive(ReadyMessage(info))
    again = sent.get()
    assert again.request.lora_name == "kept" and sent.empty()
    assert client.restarting, "no request may come before the adapter"
    client._receive(ObeyedMessage(again.number))
    assert client.dead is None and not client.restarting


def test_pauses_before_restarts_grow_and_a_steady_engine_starts_the_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    counter = RestartCounter(7, clock=lambda: now)
    pauses = []
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 1.0)
    while counter.ended():
        pauses.append(counter.pause)
        counter.ready()
        now += restarts.STEADY_SECONDS - 1
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    counter.ready()
    now += restarts.STEADY_SECONDS
    assert counter.ended() and counter.pause == 1


def test_restarts_need_a_process() -> None:
    with pytest.raises(InvalidInput, match="own process"):
        ServerConfig(restart_engine=1, engine_process=False)
    with pytest.raises(InvalidInput, match="at least 0, got -1"):
        ServerConfig(restart_engine=-1)
