"""Every failure has its status and OpenAI's shape, for any input, and reveals nothing about the machine."""
from __future__ import annotations

import difflib
import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minivllm.core.admission import QueueFull
from minivllm.errors import EngineDead, InvalidInput
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(tokenizer_folder)


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine, max_body_size=100_000, max_choices=16) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url) as http:
        yield http


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a response, after checking its shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and isinstance(body["error"]["type"], str)
    assert "Traceback" not in response.text and "/secret" not in response.text and "site-packages" not in response.text
    return dict(body["error"])


def test_the_base_requests_of_the_tests_below_are_valid(http: httpx.Client) -> None:
    assert http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200
    assert http.post(CHAT, json={"messages": HELLO}).status_code == 200


@pytest.mark.parametrize("body", [
    b"", b"{", b'{"prompt": "x"', b"not json", b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800"}', b'{"prompt": "x"} {}',
    b'{"prompt": ' + b"[" * 50_000 + b"]" * 49_000 + b"}", b'{"user": ' + b'{"a":' * 15_000 + b"1" + b"}" * 15_000 + b', "prompt": "x"}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b"\x00\x01\x02",
], ids=["empty", "open", "cut", "words", "bad utf-8", "lone surrogate", "two", "deep lists", "deep objects", "5000 digits", "binary"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_a_body_that_is_not_json_is_400(http: httpx.Client, path: str, body: bytes) -> None:
    error = error_of(http.post(path, content=body, headers={"content-type": "application/json"}), 400)
    assert error["code"] == "invalid_json" and error["message"].startswith("the body is not valid JSON")


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"null", b"true"])
def test_json_that_is_not_an_object_is_400(http: httpx.Client, body: bytes) -> None:
    assert "JSON object" in error_of(http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 400)["message"]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"temperature": "0.5"}, "temperature"),
    (COMPLETIONS, {"temperature": True}, "temperature"),
    (COMPLETIONS, {"temperature": 2.1}, "temperature"),
    (COMPLETIONS, {"temperature": -1}, "temperature"),
    (COMPLETIONS, {"top_p": 0}, "top_p"),
    (COMPLETIONS, {"top_p": 1.5}, "top_p"),
    (COMPLETIONS, {"top_k": -2}, "top_k"),
    (COMPLETIONS, {"min_p": 2}, "min_p"),
    (COMPLETIONS, {"presence_penalty": 3}, "presence_penalty"),
    (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"max_tokens": 1.5}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"n": 0}, "n"),
    (COMPLETIONS, {"n": 10**30}, "n"),
    (COMPLETIONS, {"n": 17}, "n"),
    (COMPLETIONS, {"seed": 2**63}, "seed"),
    (COMPLETIONS, {"seed": 1.5}, "seed"),
    (COMPLETIONS, {"stop": 5}, "stop"),
    (COMPLETIONS, {"stop": [""]}, "stop"),
    (COMPLETIONS, {"stop": ""}, "stop"),
    (COMPLETIONS, {"stop": "y" * 1025}, "stop"),
    (COMPLETIONS, {"stop": ["y" * 1024] * 17}, "stop"),
    (COMPLETIONS, {"stop": ["y"] * 1025}, "stop"),
    (COMPLETIONS, {"bad_words": ["y" * 1025]}, "bad_words"),
    (COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
    (COMPLETIONS, {"prompt": [[5]] * 17}, "prompt"),
    (COMPLETIONS, {"prompt": [[5]] * 9, "n": 2}, "n"),
    (COMPLETIONS, {"prompt": [5] * 257, "max_tokens": 1}, "prompt"),
    (COMPLETIONS, {"stop": ["a", 5]}, "stop"),
    (COMPLETIONS, {"stop": {"a": 1}}, "stop"),
    (COMPLETIONS, {"stop_token_ids": ["a"]}, "stop_token_ids"),
    (COMPLETIONS, {"stop_token_ids": [-1]}, "stop_token_ids"),
    (COMPLETIONS, {"logit_bias": {"cat": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"5": "x"}}, "logit_bias.5"),
    (COMPLETIONS, {"logit_bias": [1]}, "logit_bias"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (COMPLETIONS, {"min_tokens": 17}, "min_tokens"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"suffix": "end"}, "suffix"),
    (COMPLETIONS, {"stream": "yes"}, "stream"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag"),
    (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (COMPLETIONS, {"priority": 1}, "priority"),
    (COMPLETIONS, {"cache_salt": ""}, "cache_salt"),
    (COMPLETIONS, {"model": 5}, "model"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": 5}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], []]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], ["a"]]}, "prompt"),
    (COMPLETIONS, {"prompt": {"text": "x"}}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"guided_json": []}, "guided_json"),
    (COMPLETIONS, {"response_format": {"type": "jsn_object"}}, "response_format.type"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [1, 2]}, "messages.0"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "usr", "content": "x"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    (CHAT, {"messages": [*HELLO, {"role": "user", "content": []}]}, "messages.1.content"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages.0.nam"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages.0.tool_call_id"),
    (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages.0.name"),
    (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages.0.tool_calls.0.function"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": []}}]}]},
     "messages.0.tool_calls.0.function.arguments"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "argument": "{}"}}]}]},
     "messages.0.tool_calls.0.function.argument"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]},
     "messages.0.tool_calls.0.type"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content.0.type"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text"),
    (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "txt": 1}]}]}, "messages.0.content.0.txt"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"tools": []}, "tools"),
    (CHAT, {"tools": [{}]}, "tools.0.function"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools.0.function"),
    (CHAT, {"tools": [{"type": "functon", "function": {"name": "f"}}]}, "tools.0.type"),
    (CHAT, {"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools.0.function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools.1.function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools.0.function.params"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools.0.function.parameters"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools.0.function.parameters"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": 5}, "tool_choice"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "reqired"}, "tool_choice"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function"}}, "tool_choice"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "tool_choice"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    (CHAT, {"functions": []}, "functions"),
    (CHAT, {"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
    (CHAT, {"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
    (CHAT, {"functions": [{"name": "f"}], "tools": [{"type": "function", "function": {"name": "g"}}]}, "functions"),
    (CHAT, {"reasoning_effort": "hard"}, "reasoning_effort"),
    (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
    (CHAT, {"include_reasoning": False}, "include_reasoning"),
    (CHAT, {"chat_template": "x"}, "chat_template"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"web_search_options": {}}, "web_search_options"),
    (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    (CHAT, {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
]


@pytest.mark.parametrize("path, change, param", WRONG, ids=[f"{p[4:8]}:{json.dumps(c)[:60]}" for p, c, _ in WRONG])
def test_a_wrong_field_is_400_and_named(http: httpx.Client, path: str, change: dict[str, Any], param: str) -> None:
    base: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
    error = error_of(http.post(path, json={**base, **change}), 400)
    assert error["param"] == param, error
    assert param.split(".")[-1] in error["message"] or param.split(".")[0] in error["message"]


@pytest.mark.parametrize("change, message", [
    ({"cache_salt": ""}, "cache_salt should have at least 1 character, got ''"),
    ({"logprobs": -1}, "logprobs must be at most 20, got -1, which means all {vocabulary} tokens: request fewer, "),
    ({"prompt_logprobs": 21}, "prompt_logprobs must be at most 20, got 21: request fewer, "),
    ({"guided_json": False}, "guided_json must be a JSON schema (an object), got False"),
    ({"n": 17}, "prompts (1) times n (17) is 17 completions, and one request may have 16: "),
], ids=["salt", "all logprobs", "prompt logprobs", "no schema", "n"])
def test_an_error_says_what_was_sent_and_what_is_allowed(
    http: httpx.Client, engine: ScriptedEngine, change: dict[str, Any], message: str,
) -> None:
    error = error_of(http.post(COMPLETIONS, json={"prompt": "x", **change}), 400)
    assert error["message"].startswith(message.format(vocabulary=engine.info().vocab_size))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(http: httpx.Client, number: str) -> None:
    body = f'{{"prompt": "x", "temperature": {number}}}'
    assert error_of(http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}), 400)["param"] == "temperature"


def test_a_body_with_too_many_small_lists_is_refused_before_it_is_parsed(tokenizer_folder: Path) -> None:
    headers = {"content-type": "application/json"}
    with scripted_server(ScriptedEngine(tokenizer_folder)) as live:
        for body in (b'{"prompt": [' + b"[5]," * 100_000 + b"[5]]}", b'{"prompt": "x", "user": [' + b'{"a":1},' * 100_000 + b"1]}"):
            error = error_of(httpx.post(live.url + COMPLETIONS, content=body, headers=headers), 400)
            assert error["code"] == "too_many_values"
        for text in ("[" * 200_000, '\\"[{' * 70_000):  # brackets inside a string do not count, with and without escaped quotes
            error = error_of(httpx.post(live.url + COMPLETIONS, json={"prompt": text}), 400)
            assert error["code"] == "context_length_exceeded"


def test_max_completion_tokens_overrides_max_tokens_and_a_header_says_so(http: httpx.Client) -> None:
    response = http.post(CHAT, json={"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 3})
    assert response.json()["usage"]["completion_tokens"] == 3 and response.headers["x-minivllm-ignored"] == "max_tokens"
    assert "x-minivllm-ignored" not in http.post(CHAT, json={"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 3}).headers


@pytest.mark.parametrize("body", [
    b'{"prompt": "x", "prompt": "y"}', b'{"prompt": "x", "logit_bias": {"5": 1, "5": 2}}',
    b'{"prompt": "x", "user": {"a": [{"b": 1, "b": 1}]}}',
])
def test_a_key_that_occurs_twice_is_400(http: httpx.Client, body: bytes) -> None:
    error = http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert error.status_code == 400 and error.json()["error"]["code"] == "duplicate_key", error.text


def test_a_long_unknown_name_is_compared_with_nothing(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difflib, "get_close_matches", lambda *_, **__: pytest.fail("it would take seconds"))
    error = http.post(COMPLETIONS, json={"prompt": "x", "temperatura" * 500: 1})
    assert error.status_code == 400 and len(error.text) < 1000


def test_a_missing_prompt_is_named(http: httpx.Client) -> None:
    error = error_of(http.post(COMPLETIONS, json={"max_tokens": 1}), 400)
    assert error["param"] == "prompt" and error["code"] == "missing_required_parameter"


def test_an_unknown_field_is_refused_with_the_nearest_name(http: httpx.Client) -> None:
    error = error_of(http.post(COMPLETIONS, json={"prompt": "x", "temprature": 1}), 400)
    assert error["param"] == "temprature" and "did you mean 'temperature'" in error["message"]
    assert error_of(http.post(COMPLETIONS, json={"prompt": "x", "zzz": 1}), 400)["message"] == "unknown field 'zzz': leave it out"


def test_an_error_quotes_only_a_little_of_the_request(http: httpx.Client) -> None:
    long = "y" * 50_000
    for change in ({"stop": ["", long]}, {long: 1}, {"temperature": long}, {"model": long}):
        assert len(http.post(COMPLETIONS, json={"prompt": "x", **change}).content) < 2000


def test_inert_fields_are_accepted_and_named_in_a_header(http: httpx.Client) -> None:
    body = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    for path, base in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HELLO})):
        for stream in (False, True):
            response = http.post(path, json={**base, **body, "stream": stream})
            assert response.status_code == 200
            assert set(response.headers["x-minivllm-ignored"].split(", ")) == set(body)
    assert "x-minivllm-ignored" not in http.post(COMPLETIONS, json={"prompt": "x", "user": None}).headers


def test_a_permissive_server_ignores_unknown_fields_and_names_them(tokenizer_folder: Path) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), permissive=True) as live:
        response = httpx.post(live.url + COMPLETIONS, json={"prompt": "x", "temprature": 1, "a\r\nx-evil: 1": 2, "ü": 3})
        assert response.status_code == 200 and "x-evil" not in response.headers
        assert response.headers["x-minivllm-ignored"].startswith("temprature, ")
        error_of(httpx.post(live.url + COMPLETIONS, json={"prompt": "x", "tools": [], "use_beam_search": True}), 400)


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    error = error_of(http.post(COMPLETIONS, json={"prompt": "x", "model": "gpt-4"}), 404)
    assert error["param"] == "model" and error["code"] == "model_not_found" and error["type"] == "NotFoundError"
    assert "'org/fake-model'" in error["message"]


def test_an_unknown_path_is_404_with_the_nearest_path_and_a_wrong_method_is_405(http: httpx.Client) -> None:
    assert "did you mean '/v1/completions'" in error_of(http.post("/v1/completion", json={}), 404)["message"]
    for path in ("/v1/moderation", "/v1/nothing"):  # a path that exists only to say 501 is not suggested
        assert "moderations" not in error_of(http.post(path, json={}), 404)["message"]
    response = http.get(COMPLETIONS)
    assert "POST" in error_of(response, 405)["message"] and response.headers["allow"] == "POST"
    response = http.post("/v1/responses/resp_1")  # two endpoints
    assert "use DELETE or GET" in error_of(response, 405)["message"] and response.headers["allow"] == "DELETE, GET"
    error_of(http.get("/v1"), 404)
    error_of(http.get("/v1/models/"), 404)


def test_a_large_body_is_413_declared_or_not(http: httpx.Client) -> None:
    large = json.dumps({"prompt": "x" * 100_001}).encode()
    error_of(http.post(COMPLETIONS, content=large, headers={"content-type": "application/json"}), 413)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 10_000):
            yield large[start:start + 10_000]

    error_of(http.post(COMPLETIONS, content=pieces(), headers={"content-type": "application/json"}), 413)
    assert http.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200, "the connection is still good"


def test_a_compressed_body_is_415(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert "gzip" in error_of(http.post(COMPLETIONS, content=gzip.compress(b'{"prompt": "x"}'), headers=headers), 415)["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp", "multipart/x"])
def test_another_content_type_is_415(http: httpx.Client, content_type: str) -> None:
    error_of(http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": content_type}), 415)


def test_json_with_a_charset_is_json(http: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert http.post(COMPLETIONS, content=b'{"prompt": "x"}', headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_and_output_beyond_the_context_are_400_with_the_numbers(http: httpx.Client, stream: bool) -> None:
    error = error_of(http.post(COMPLETIONS, json={"prompt": [5] * 200, "max_tokens": 57, "stream": stream}), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
    assert all(number in error["message"] for number in ("256", "257", "200", "57", "to 56"))
    error = error_of(http.post(COMPLETIONS, json={"prompt": [5] * 256, "stream": stream}), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    error_of(http.post(CHAT, json={"messages": [{"role": "user", "content": "cat " * 300}], "stream": stream}), 400)
    error_of(http.post(CHAT, json={"messages": HELLO, "max_completion_tokens": 10**30, "stream": stream}), 400)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_engine_has_its_status_even_for_a_stream(http: httpx.Client, engine: ScriptedEngine, stream: bool) -> None:
    answers = [(InvalidInput("token id 999 in the prompt", "prompt"), 400), (QueueFull("the queue is full", "max_queue"), 429)]
    for refusal, status in answers:
        engine.refuse = lambda prompt, params, refusal=refusal: refusal  # type: ignore[misc]
        try:
            response = http.post(COMPLETIONS, json={"prompt": "x", "stream": stream})
        finally:
            engine.refuse = lambda prompt, params: None
        error_of(response, status)
        assert response.headers["content-type"] == "application/json"
    assert int(response.headers["retry-after"]) >= 1


def test_one_refused_prompt_ends_the_others_of_its_request(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.refuse = lambda prompt, params: InvalidInput("no", "prompt") if prompt[0] == 7 else None
    engine.script = lambda prompt, params, child: [((5,), "x")] * 200
    del engine.aborted[:]
    try:
        error_of(http.post(COMPLETIONS, json={"prompt": [[5], [6], [7]], "max_tokens": 200}), 400)
        engine.wait_until(lambda: len(engine.aborted) >= 2 or not engine.requests)
    finally:
        engine.refuse, engine.script = lambda prompt, params: None, engine.default_script


def test_a_failed_step_is_500_before_the_first_token_and_an_error_event_after_it(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder)
    with scripted_server(engine) as live:
        engine.fail_step = lambda: "CUDA error in /secret/kernel.cu"
        for stream in (False, True):
            assert error_of(httpx.post(live.url + COMPLETIONS, json={"prompt": "x", "stream": stream}), 500)["code"] == "generation_failed"
        engine.fail_step = lambda: None
        engine.gate = threading.Semaphore(1)
        with httpx.stream("POST", live.url + COMPLETIONS, json={"prompt": "x", "stream": True}) as response:
            assert response.status_code == 200
            events = response.iter_lines()
            assert json.loads(next(events).removeprefix("data: "))["choices"][0]["text"]
            engine.fail_step = lambda: "out of memory at /secret"
            engine.gate.release()
            rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[0].removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert len(rest) == 2 and "secret" not in rest[0]
        engine.fail_step, engine.gate = lambda: None, None
        assert httpx.post(live.url + COMPLETIONS, json={"prompt": "x"}).status_code == 200, "the server still works"
        assert httpx.get(live.url + "/health").status_code == 200


def test_the_official_client_raises_on_an_error_in_the_middle_of_a_stream(tokenizer_folder: Path) -> None:
    import openai

    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(2))
    engine.fail_step = lambda: "no" if engine.steps > 2 else None
    with scripted_server(engine) as live, openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as api:
        seen = []
        with pytest.raises(openai.APIError, match="a step of the engine failed"):
            for chunk in api.completions.create(model="org/fake-model", prompt="x", stream=True):
                seen.append(chunk.choices[0].text)
                if len(seen) == 2:
                    engine.gate.release()  # type: ignore[union-attr]
    assert len(seen) == 2


def test_a_dead_engine_is_503_everywhere(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder)

    def die() -> str:
        raise EngineDead("lost /secret/device at 0x7f00")

    with scripted_server(engine) as live:
        assert httpx.get(live.url + "/health").json() == {"status": "ok"}
        engine.fail_step = die
        assert error_of(httpx.post(live.url + COMPLETIONS, json={"prompt": "x"}), 503)["code"] == "engine_dead"
        for stream in (False, True):
            error_of(httpx.post(live.url + COMPLETIONS, json={"prompt": "x", "stream": stream}), 503)
            error_of(httpx.post(live.url + CHAT, json={"messages": HELLO, "stream": stream}), 503)
        error_of(httpx.get(live.url + "/health"), 503)
        error_of(httpx.get(live.url + "/v1/models"), 503)
        assert httpx.get(live.url + "/metrics").status_code == 200


def test_a_bug_is_500_without_details(http: httpx.Client, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("/secret/path at 0xdeadbeef")

    monkeypatch.setattr(engine.tokenizer, "encode", broken)
    error = error_of(http.post(COMPLETIONS, json={"prompt": "x"}), 500)
    assert "deadbeef" not in error["message"]


def test_version_and_metrics_respond(http: httpx.Client) -> None:
    from minivllm import __version__

    assert http.get("/version").json() == {"version": __version__}
    text = http.get("/metrics").text
    names = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits",
             "num_preemptions", "prompt_tokens", "generation_tokens", "request_success", "time_to_first_token_seconds",
             "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
             "request_prefill_time_seconds", "request_decode_time_seconds"]
    for name in names:
        assert f"minivllm:{name}" in text
    assert 'model_name="org/fake-model"' in text


def test_the_openapi_document_describes_the_request_bodies(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path, names in ((COMPLETIONS, {"prompt", "temperature", "stop"}), (CHAT, {"messages", "tools", "tool_choice"})):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert names <= set(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]["properties"])
