"""The effect of disconnects, failed steps and full queues on blocks and on other requests. The tests control each step of a tiny engine."""
from __future__ import annotations

import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from minivllm.config import EngineConfig
from minivllm.engine.client import ThreadClient
from minivllm.engine.compose import build_engine
from minivllm.engine.engine import EngineCore
from minivllm.engine.process import ProcessClient
from minivllm.engine.tokenizer import Tokenizer
from minivllm.server.run import start_engine
from tests.server.scripted import LiveServer, serving

PATH = "/v1/completions"
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "max_num_batched_tokens": 64, "num_gpu_blocks_override": 128, "block_size": 4,
}
SHARED = list(range(5, 25))


class Stepped:
    """An engine whose steps wait for permits while it is held."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.config = EngineConfig(model=str(folder), **{**SETTINGS, **settings})
        self.permits = threading.Semaphore(0)
        self.held = False
        self.waiting = threading.Event()  # set while a step waits for its permit
        self.aborts: queue.SimpleQueue[str] = queue.SimpleQueue()  # ids of aborted requests

    def build(self) -> EngineCore:
        engine = self.engine = build_engine(self.config)
        step = engine.step

        def held_step() -> Any:
            if self.held:
                self.waiting.set()
                self.permits.acquire()
            return step()

        engine.step = held_step  # type: ignore[method-assign]
        return engine

    def hold(self) -> None:
        self.held = True

    def one_step(self) -> None:
        """Run from the start of one step to the start of the next. Commands are handled between them."""
        assert self.waiting.wait(30)
        self.waiting.clear()
        self.permits.release()

    def release(self) -> None:
        self.held = False
        self.permits.release()


@contextmanager
def stepped(folder: Path, **settings: Any) -> Iterator[tuple[Stepped, LiveServer]]:
    steps = Stepped(folder, **settings)
    client = ThreadClient.start_with(steps.build)
    abort = client.abort

    def spy(request_id: str) -> None:
        abort(request_id)
        steps.aborts.put(request_id)

    client.abort = spy  # type: ignore[method-assign]
    try:
        with serving(client, Tokenizer(folder)) as live:
            yield steps, live
    finally:
        steps.release()
        client.close()


@pytest.fixture(scope="module")
def greedy(folder: Path) -> Callable[..., str]:
    """The greedy output of an engine without other requests."""
    from minivllm import LLM, SamplingParams

    def ask(prompt: list[int], max_tokens: int) -> str:
        with LLM(model=str(folder), **SETTINGS) as llm:
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            return llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0].text

    return ask


def body(prompt: Any, max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


def post(live: LiveServer, request: dict[str, Any]) -> httpx.Response:
    return httpx.post(live.url + PATH, json=request, timeout=60)


@pytest.mark.parametrize("more", [
    {"stream": True}, {"stream": False}, {"stream": True, "n": 4}, {"stream": False, "n": 4}, {"prompt": [SHARED, SHARED[:9]], "n": 2},
], ids=["stream", "whole", "stream n=4", "whole n=4", "two prompts n=2"])
def test_the_blocks_of_a_disconnected_client_are_free_one_step_later(folder: Path, more: dict[str, Any]) -> None:
    with stepped(folder) as (steps, live):
        steps.hold()
        raw = json.dumps(body(SHARED, 100) | more).encode()
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            for _ in range(4):
                steps.one_step()
            assert steps.waiting.wait(30)
            assert steps.engine.stats().used_blocks > 0
        for _ in more.get("prompt", [0]):  # one abort per prompt
            steps.aborts.get(timeout=30)
        steps.release()  # the next step; the aborts are handled after it
        assert httpx.post(live.url + "/reset_prefix_cache").status_code == 200  # handled after all earlier commands
        stats = steps.engine.stats()
        assert (stats.used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)
        assert stats.num_steps <= 6
        steps.engine.scheduler.check()


def test_a_full_queue_refuses_with_429_and_the_queued_requests_are_answered(folder: Path) -> None:
    with stepped(folder, max_num_seqs=1, max_queue=1) as (steps, live), ThreadPoolExecutor(2) as pool:
        steps.hold()
        first = pool.submit(post, live, body(SHARED, 3))
        steps.one_step()  # the request runs now
        assert steps.waiting.wait(30)
        second = pool.submit(post, live, body(SHARED, 3))
        while httpx.get(live.url + "/load").json()["server_load"] < 2:
            pass
        thirds = [post(live, body(SHARED, 3, stream=stream)) for stream in (False, True)]  # refused while the engine is held
        for third in thirds:
            assert third.status_code == 429 and int(third.headers["retry-after"]) >= 1, third.text
            assert third.json()["error"]["type"] == "RateLimitError" and third.headers["content-type"] == "application/json"
        steps.release()
        assert first.result(60).status_code == second.result(60).status_code == 200
        assert post(live, body(SHARED, 3)).status_code == 200, "later the queue has room again"


def test_a_failed_step_fails_only_its_own_requests_and_leaves_nothing_in_the_prefix_cache(folder: Path, greedy: Callable[..., str]) -> None:
    with stepped(folder, max_num_seqs=1) as (steps, live), ThreadPoolExecutor(2) as pool:
        steps.hold()
        launch = steps.engine.executor.launch

        def broken(plan: Any) -> Any:
            steps.engine.executor.launch = launch  # type: ignore[method-assign]
            raise RuntimeError("out of memory at /secret/place")

        steps.engine.executor.launch = broken  # type: ignore[method-assign]
        failing = pool.submit(post, live, body(SHARED, 5))
        assert steps.waiting.wait(30)
        waiting = pool.submit(post, live, body(SHARED[::-1], 5))  # waits, because there is only one row
        while httpx.get(live.url + "/load").json()["server_load"] < 2:
            pass
        steps.release()
        answer = failing.result(60)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "generation_failed" and "secret" not in answer.text
        assert waiting.result(60).json()["choices"][0]["text"] == greedy(SHARED[::-1], 5)
        again = post(live, body(SHARED, 5)).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "the failed step's blocks were reused"
        assert again["choices"][0]["text"] == greedy(SHARED, 5)
        third = post(live, body(SHARED, 5)).json()
        assert third["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "blocks of a successful step are reused"
        assert steps.engine.stats().used_blocks == 0


def test_after_an_engine_process_is_killed_everything_is_503(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        client = start_engine(EngineConfig(model=str(folder), **SETTINGS), process=True, log_level="error")
    assert isinstance(client, ProcessClient) and client._process is not None and client._process.pid is not None
    try:
        with serving(client, Tokenizer(folder)) as live, ThreadPoolExecutor(4) as pool:
            with httpx.stream("POST", live.url + PATH, json=body(SHARED, 200, stream=True), timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                waiting = [pool.submit(post, live, body(SHARED, 200)) for _ in range(3)]
                os.kill(client._process.pid, signal.SIGKILL)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in rest[-2] or json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_dead"
            assert {future.result(60).status_code for future in waiting} <= {200, 503}
            while client.dead is None:  # until the client has seen the end of the pipe
                pass
            requests = [
                ("GET", "/health"), ("GET", "/v1/models"), ("GET", "/v1/models/x"), ("POST", PATH), ("POST", "/v1/chat/completions"),
                ("POST", "/v1/responses"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/reset_prefix_cache"),
                ("POST", "/abort_requests"), ("GET", "/load"),
            ]
            for method, path in requests:
                answer = httpx.request(method, live.url + path, json={"prompt": "x", "input": "x", "tokens": [5], "all": True})
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead", (path, answer.text)
    finally:
        client.close()
