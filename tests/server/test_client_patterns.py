"""Errors contain the words that widespread clients search for, when they decide to shorten a conversation, wait, or leave a field out."""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minivllm.core.scheduler import QueueFull
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

LONG: dict[str, tuple[str, dict[str, Any]]] = {  # 256 tokens are the context
    "completion": ("/v1/completions", {"prompt": [5] * 200, "max_tokens": 57}),
    "completion, prompt alone": ("/v1/completions", {"prompt": [5] * 256}),
    "completion, text": ("/v1/completions", {"prompt": "x" * 70_000}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 256}),
    "chat, messages alone": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "cat " * 300}]}),
    "responses": ("/v1/responses", {"input": "hello", "max_output_tokens": 256}),
    "responses, input alone": ("/v1/responses", {"input": "cat " * 300}),
}
# Client -> a pattern that it searches for, case-insensitively, in the text of a context overflow (its JSON body). Restated as data.
OVERFLOW = {
    "litellm": r"this model's maximum context length is",
    "langchain-openai": r"context_length_exceeded",
    "crewai": r"maximum context length",
    "programs that read the limit": r"maximum context length is (\d+) tokens",
    "programs that ask for less": r"reduce the length of the (messages|prompt|input)",
}
# The same for the numbers; the second form is for a prompt that is too long alone.
NUMBERS = r"context length is (\d+) tokens\. however, (you requested (\d+) tokens \((\d+) in the (messages|prompt|input), (\d+) in the " \
          r"completion\)|your (messages|prompt|input) resulted in (\d+) (tokens|characters))\. please reduce"


@pytest.fixture(scope="module")
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(tokenizer_folder)


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("stream", [False, True])
def test_clients_recognize_a_context_overflow_and_can_read_its_numbers(live: LiveServer, case: str, stream: bool) -> None:
    path, body = LONG[case]
    response = httpx.post(live.url + path, json={**body, "stream": stream})
    assert response.status_code == 400
    text = response.text.lower()
    for client, pattern in OVERFLOW.items():
        assert re.search(pattern, text), (client, text)
    found = re.search(NUMBERS, text)
    assert found and int(found[1]) == 256, text
    if found[3]:
        assert int(found[3]) == int(found[4]) + int(found[6]) > 256
    else:
        assert int(found[8]) >= 256


def test_an_overflow_is_not_taken_for_a_rate_limit(live: LiveServer) -> None:
    path, body = LONG["chat"]
    assert not re.search(r"rate[\s_\-]*limit", httpx.post(live.url + path, json=body).text.lower())


def test_a_full_queue_is_a_rate_limit(live: LiveServer, engine: ScriptedEngine) -> None:
    engine.refuse = lambda prompt, params: QueueFull("Rate limit reached: 4 requests wait already", "max_queue")
    try:
        response = httpx.post(live.url + "/v1/completions", json={"prompt": "x"})
    finally:
        engine.refuse = lambda prompt, params: None
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "rate_limit_exceeded" and re.search(r"rate[\s_\-]*limit", response.text.lower())


@pytest.mark.parametrize("path, body", [("/v1/completions", {"prompt": "x"}), ("/v1/responses", {"input": "x"}),
                                        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})])
def test_an_unknown_model_and_an_unsupported_field_have_openais_words_and_codes(live: LiveServer, path: str, body: dict[str, Any]) -> None:
    error = httpx.post(live.url + path, json={**body, "model": "gpt-9"}).json()["error"]
    assert error["code"] == "model_not_found" and error["message"].startswith("The model `gpt-9` does not exist")
    field = {"/v1/completions": ("suffix", "end"), "/v1/responses": ("background", True), "/v1/chat/completions": ("prediction", {})}[path]
    error = httpx.post(live.url + path, json={**body, field[0]: field[1]}).json()["error"]
    assert error["code"] == "unsupported_parameter" and error["param"] == field[0]
    assert re.search(r"Unsupported parameter: '(\w+)'", error["message"])[1] == field[0]  # type: ignore[index]


def test_a_wrong_key_and_no_key_have_openais_code_and_words(tokenizer_folder: Path) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), api_key=("key",)) as live:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            response = httpx.get(live.url + "/v1/models", headers=headers)
            error = response.json()["error"]
            assert response.status_code == 401 and error["code"] == "invalid_api_key" and "Incorrect API key provided" in error["message"]


def test_an_unknown_field_has_a_code(live: LiveServer) -> None:
    message = {"role": "user", "content": "x", "zzz": 1}
    for path, body in (("/v1/completions", {"prompt": "x", "zzz": 1}), ("/v1/chat/completions", {"messages": [message]}),
                       ("/v1/responses", {"input": [message]})):
        assert httpx.post(live.url + path, json=body).json()["error"]["code"] == "unknown_parameter"
