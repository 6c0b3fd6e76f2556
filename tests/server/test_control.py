"""Endpoints for operators (load, the prefix cache, aborting by id), and truncated prompts."""
from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minivllm.server.control import NOT_BUILT
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

PATH = "/v1/completions"


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(0))
    engine.script = lambda prompt, params, child: [((5,), "x")] * 40
    return engine


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


def ask(live: LiveServer, answers: dict[str, Any], **body: Any) -> threading.Thread:
    def post() -> None:
        answers[body["request_id"]] = httpx.post(live.url + PATH, json=body, timeout=60)

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def test_abort_requests_ends_only_the_named_requests(engine: ScriptedEngine, live: LiveServer) -> None:
    answers: dict[str, Any] = {}
    threads = [ask(live, answers, prompt=[[5], [6]], n=2, request_id="mine", max_tokens=40),
               ask(live, answers, prompt=[7], request_id="other", max_tokens=3)]
    while httpx.get(live.url + "/load").json()["server_load"] < 2:  # both have arrived before the first step
        pass
    engine.run_until(lambda: len(engine.seen) == 3)
    response = httpx.post(live.url + "/abort_requests", json={"request_ids": ["mine", "unknown"]})
    assert response.json() == {"aborted": ["cmpl-mine"]}
    assert engine.gate is not None
    engine.gate.release(100)
    for thread in threads:
        thread.join(60)
    assert {choice["finish_reason"] for choice in answers["mine"].json()["choices"]} == {"abort"}
    assert answers["mine"].json()["id"] == "cmpl-mine"
    assert [choice["finish_reason"] for choice in answers["other"].json()["choices"]] == ["length"]


@pytest.mark.parametrize(("path", "body", "prefix"), [
    ("/v1/embeddings", {"input": [[5], [6]]}, "embd-"), ("/score", {"text_1": [[5]], "text_2": [[6]]}, "score-")])
def test_abort_requests_ends_embeddings_and_scores(
    engine: ScriptedEngine, live: LiveServer, path: str, body: dict[str, Any], prefix: str,
) -> None:
    answers: dict[str, Any] = {}
    other = ask(live, answers, prompt=[7], request_id="other", max_tokens=3)
    engine.wait_until(lambda: len(engine.requests) == 1)  # its first step waits, so that later commands are handled together
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, live.url + path, json={**body, "request_id": "mine"}, timeout=60)
        while httpx.get(live.url + "/load").json()["server_load"] < 2:
            pass
        aborted = httpx.post(live.url + "/abort_requests", json={"request_ids": ["mine"]}).json()
        assert engine.gate is not None
        engine.gate.release(100)
        assert aborted == {"aborted": [f"{prefix}mine"]}
        assert answer.result().json()["error"]["code"] == "aborted"
    other.join(60)


def test_abort_requests_accepts_a_full_response_id_or_all(engine: ScriptedEngine, live: LiveServer) -> None:
    for body in ({"request_ids": ["cmpl-a-1"]}, {"all": True}):
        answers: dict[str, Any] = {}
        thread = ask(live, answers, prompt=[5], request_id="a-1", max_tokens=40)
        engine.run_until(lambda: len(engine.requests) == 1)
        assert httpx.post(live.url + "/abort_requests", json=body).json() == {"aborted": ["cmpl-a-1"]}
        engine.run_until(lambda: not engine.requests)
        thread.join(60)
        assert answers["a-1"].json()["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("body", [{}, {"request_ids": []}, {"request_ids": ["a"], "all": True}, {"request_ids": [5]}, {"ids": ["a"]}])
def test_abort_requests_without_a_target_is_400(live: LiveServer, body: dict[str, Any]) -> None:
    assert httpx.post(live.url + "/abort_requests", json=body).status_code == 400


def test_a_request_id_that_is_in_use_or_invalid_is_400(engine: ScriptedEngine, live: LiveServer) -> None:
    answers: dict[str, Any] = {}
    thread = ask(live, answers, prompt=[5], request_id="same", max_tokens=3)
    engine.wait_until(lambda: len(engine.requests) == 1)
    error = httpx.post(live.url + PATH, json={"prompt": [5], "request_id": "same"})
    assert error.status_code == 400 and error.json()["error"]["param"] == "request_id"
    assert httpx.post(live.url + PATH, json={"prompt": [5], "request_id": "a\nb"}).status_code == 400
    assert engine.gate is not None
    engine.gate.release(10)
    thread.join(60)
    assert answers["same"].status_code == 200, "the first one is unaffected"


def test_load_counts_running_requests(engine: ScriptedEngine, live: LiveServer) -> None:
    assert httpx.get(live.url + "/load").json()["server_load"] == 0
    answers: dict[str, Any] = {}
    thread = ask(live, answers, prompt=[[5], [6]], request_id="two", max_tokens=3)
    engine.wait_until(lambda: len(engine.requests) >= 1)
    assert httpx.get(live.url + "/load").json()["server_load"] == 1
    assert engine.gate is not None
    engine.gate.release(10)
    thread.join(60)
    assert httpx.get(live.url + "/load").json()["server_load"] == 0


def test_the_prefix_cache_can_be_reset(engine: ScriptedEngine, live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(engine, "reset_prefix_cache", lambda: calls.append(True))
    assert httpx.post(live.url + "/reset_prefix_cache").json() == {"status": "ok"}
    assert calls == [True]


def test_paths_of_other_servers_are_404_and_say_what_they_are(live: LiveServer) -> None:
    with httpx.Client(base_url=live.url) as http:
        for path, what in NOT_BUILT.items():
            for method, whole in (("POST", path), ("GET", path), ("DELETE", path + "/id"), ("POST", path + "/a/b")):
                if path.startswith("/v1/responses") and method == "GET":
                    continue  # the id of a response
                response = http.request(method, whole)
                error = response.json()["error"]
                assert response.status_code == 404 and error["code"] == "not_supported" and what in error["message"]
                assert response.headers["x-should-retry"] == "false"
        assert "x-should-retry" not in http.post("/v1/moderationsx").headers


def test_the_official_client_does_not_retry_what_is_not_built(live: LiveServer) -> None:
    sent: list[str] = []
    transport = httpx.Client(event_hooks={"request": [lambda request: sent.append(request.url.path)]})
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=2, http_client=transport) as api:
        calls: list[Callable[[], object]] = [
            lambda: api.moderations.create(input="x"), lambda: api.images.generate(prompt="x"),
            lambda: api.audio.speech.create(input="x", model="m", voice="alloy"),
            lambda: api.audio.transcriptions.create(file=("a.wav", b"x"), model="m"), lambda: api.files.list(),
            lambda: api.files.create(file=("a.jsonl", b"{}"), purpose="batch"), lambda: api.files.delete("f"),
            lambda: api.batches.retrieve("b"), lambda: api.batches.cancel("b"), lambda: api.fine_tuning.jobs.list(),
            lambda: api.vector_stores.list(), lambda: api.conversations.create(), lambda: api.containers.list(),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError, match="is not supported yet"):
                call()
    assert len(sent) == len(calls), sent


@pytest.mark.parametrize("body, left", [
    ({"truncate_prompt_tokens": 2}, [7, 8]), ({"truncate_prompt_tokens": 9}, [5, 6, 7, 8]), ({"truncate_prompt_tokens": 256}, [5, 6, 7, 8]),
])
def test_a_prompt_keeps_its_last_tokens_when_it_is_truncated(
    engine: ScriptedEngine, live: LiveServer, body: dict[str, Any], left: list[int],
) -> None:
    engine.gate = None
    usage = httpx.post(live.url + PATH, json={"prompt": [5, 6, 7, 8], "max_tokens": 1, **body}).json()["usage"]
    assert list(engine.seen[-1].prompt) == left and usage["prompt_tokens"] == len(left)


def test_truncate_prompt_tokens_minus_1_leaves_room_for_the_output(engine: ScriptedEngine, live: LiveServer) -> None:
    engine.gate = None
    for fields, room in (({"max_tokens": 56}, 56), ({}, 16)):
        assert httpx.post(live.url + PATH, json={"prompt": [5] * 300, "truncate_prompt_tokens": -1, **fields}).status_code == 200
        assert len(engine.seen[-1].prompt) == 256 - room


def test_an_echo_is_the_truncated_prompt(engine: ScriptedEngine, live: LiveServer) -> None:
    engine.gate = None
    text = "the cat and the hat"
    tokens = engine.tokenizer.encode(text)
    body = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1, "truncate_prompt_tokens": 2}
    choice = httpx.post(live.url + PATH, json=body).json()["choices"][0]
    assert choice["text"] == engine.tokenizer.decode(tokens[-2:]) + "x"
    assert len(choice["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize("value", [0, -2, 257, "2"])
def test_an_invalid_truncation_is_400(live: LiveServer, value: Any) -> None:
    response = httpx.post(live.url + PATH, json={"prompt": [5], "truncate_prompt_tokens": value})
    assert response.status_code == 400 and json.loads(response.text)["error"]["param"] == "truncate_prompt_tokens"


def test_hints_name_no_file_of_the_page_and_other_servers_apis_are_named(live: LiveServer) -> None:
    for path, words in (("/api/chat", "Ollama's API"), ("/completion", "llama.cpp's API"), ("/chat", "there is nothing at")):
        message = httpx.get(live.url + path).json()["error"]["message"]
        assert words in message and "static" not in message


def test_server_info_names_no_folder_and_not_whether_code_of_the_model_may_run(live: LiveServer) -> None:
    shown = httpx.get(live.url + "/server_info").json()["engine"]
    assert shown["block_size"] and not {"model", "model_folder", "tokenizer_folder", "trust_remote_code"} & shown.keys()
