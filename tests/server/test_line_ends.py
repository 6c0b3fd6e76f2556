"""Clients that cut a stream with `str.splitlines` read every event whole, whatever the model writes."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minivllm.engine.chat_template import ChatTemplate, built_in_template
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams
from minivllm.server.errors import encode, encode_text
from minivllm.server.formatters import CompletionFormatter, PreparedRequest
from minivllm.server.logprobs import NumberedTokens
from tests.server.scripted import EOS, LiveServer, ScriptedEngine, scripted_server

LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where `str.splitlines` splits
TEXTS = st.lists(st.text(st.one_of(st.sampled_from(LINE_ENDS + '"\\'), st.characters(exclude_categories=["Cs"])), min_size=1), min_size=1,
                 max_size=4)
WEATHER: Any = {"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "x"}),
    "completions with logprobs": ("/v1/completions", {"prompt": "x", "logprobs": 1}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    "chat with logprobs": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}),
    "responses": ("/v1/responses", {"input": "x"}),
}


def test_the_list_of_line_ends_is_complete() -> None:
    every = "".join(map(chr, range(0x110000)))
    assert {c for c in every if len(f"a{c}b".splitlines()) > 1} == set(LINE_ENDS)


@given(st.text(st.one_of(st.sampled_from(LINE_ENDS + '"\\'), st.characters())))
def test_json_is_one_line_and_the_same_from_both_encoders(text: str) -> None:
    whole = encode({"text": text}).decode()
    assert len(whole.splitlines()) == 1
    assert whole.encode() == encode_text('{"text":', text, "}")
    assert json.loads(whole)["text"] == text.encode("utf-8", "replace").decode()


@given(TEXTS)
def test_a_plain_stream_has_the_same_bytes_from_the_callback_and_from_the_task(texts: list[str]) -> None:
    prepared = PreparedRequest(id="x", created=1, model="m", fingerprint="f", prompts=(
        EngineRequest(request_id="x", prompt_token_ids=(5,), params=SamplingParams(), arrival_time=0.0),), stream=True)
    first, second = CompletionFormatter(prepared, NumberedTokens()), CompletionFormatter(prepared, NumberedTokens())
    for formatter in (first, second):
        formatter.events(0, [OutputDelta("x", 0, (5,), "begin")])
    for text in texts:
        delta = [OutputDelta("x", 0, (5,), text)]
        assert first.events(0, delta) == second.text_events(delta)


@pytest.fixture(scope="module")
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(tokenizer_folder)


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url) as http:
        yield http


def events_of_a_simple_client(body: str) -> list[dict[str, Any]]:
    """The data of each event, for a client that cuts lines with `splitlines` and takes every line for a field."""
    events = []
    for line in body.splitlines():
        name, colon, value = line.partition(": ")
        assert line == "" or (colon and name in ("data", "event")), line
        if name == "data" and value != "[DONE]":
            events.append(json.loads(value))
    return events


def text_of(event: dict[str, Any]) -> str:
    if "choices" in event:
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in event["choices"])
    return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""


@pytest.mark.parametrize("name", REQUESTS)
@given(texts=TEXTS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_client_that_uses_splitlines_reads_every_stream(http: httpx.Client, engine: ScriptedEngine, name: str, texts: list[str]) -> None:
    path, body = REQUESTS[name]
    engine.script = lambda prompt, params, child: [*(((7,), text) for text in texts), ((EOS,), "")]
    response = http.post(path, json={**body, "stream": True})
    assert "".join(map(text_of, events_of_a_simple_client(response.content.decode()))) == "".join(texts)


def test_it_reads_tool_arguments_and_reasoning(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder, max_model_len=2048)
    engine.tokenizer.chat_template = ChatTemplate(built_in_template("tool_chatml"))
    value = "a\u2028b\u2029c\x85d"
    arguments = json.dumps({"a": value}, ensure_ascii=False)
    text = f'<think>{value}</think>{value}<tool_call>{{"name": "w", "arguments": {arguments}}}</tool_call>'
    engine.script = lambda prompt, params, child: [*(((7,), c) for c in text), ((EOS,), "")]
    with scripted_server(engine, reasoning_parser="qwen3", tool_call_parser="hermes") as live:
        body = {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER], "stream": True}
        chunks = events_of_a_simple_client(httpx.post(live.url + "/v1/chat/completions", json=body).content.decode())
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(delta.get("reasoning", "") for delta in deltas) == value
        calls = [call["function"].get("arguments", "") for delta in deltas for call in delta.get("tool_calls", ())]
        assert json.loads("".join(calls)) == {"a": value}
        flat = {"input": "x", "tools": [{"type": "function", **WEATHER["function"]}], "stream": True}
        events = events_of_a_simple_client(httpx.post(live.url + "/v1/responses", json=flat).content.decode())
        done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
        assert json.loads(done["arguments"]) == {"a": value}


def test_errors_and_token_strings_are_one_line_too(http: httpx.Client) -> None:
    refused = http.post("/v1/completions", json={"prompt": "x", "model": "a\u2028b\u2029c\x85d"})
    assert refused.status_code == 404 and len(refused.content.decode().splitlines()) == 1
    tokens = http.post("/tokenize", json={"prompt": "a\u2028b", "return_token_strs": True})
    assert tokens.status_code == 200 and len(tokens.content.decode().splitlines()) == 1


def test_a_trace_of_requests_may_contain_them(tmp_path: Path) -> None:
    from minivllm.benchmarks.serving import _lines

    record = {"prompt": f"a{LINE_ENDS}b"}
    (tmp_path / "trace.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert list(_lines(str(tmp_path / "trace.jsonl"))) == [(1, record)]
