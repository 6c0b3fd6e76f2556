"""`/v1/responses` through the official client: the chat endpoint's outputs as output items and named events."""
from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.scripted import EOS, LiveServer, ScriptedEngine, scripted_server

MODEL = "org/fake-model"
PATH = "/v1/responses"


@pytest.fixture(scope="module")
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    """Generates "one two" and stops."""
    engine = ScriptedEngine(tokenizer_folder)
    engine.script = lambda prompt, params, child: [((5,), "one "), ((6,), "two"), ((EOS,), "")]
    return engine


@pytest.fixture(scope="module")
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine) as live:
        yield live


def refused(live: LiveServer, **body: Any) -> dict[str, Any]:
    response = httpx.post(live.url + PATH, json=body)
    assert response.status_code == 400, response.text
    return dict(response.json()["error"])


def test_a_response_has_its_text_its_status_and_its_usage(api: openai.OpenAI) -> None:
    response = api.responses.create(model=MODEL, input="hello", metadata={"a": "b"}, instructions="be brief")
    assert response.output_text == "one two" and response.status == "completed" and response.incomplete_details is None
    assert response.usage is not None and response.usage.output_tokens == 3 and response.usage.input_tokens_details.cached_tokens == 4
    assert response.metadata == {"a": "b"} and response.instructions == "be brief" and response.model == MODEL
    assert response.id.startswith("resp_") and response.output[0].id


def test_an_output_cut_by_max_output_tokens_is_incomplete_with_that_reason(api: openai.OpenAI) -> None:
    response = api.responses.create(model=MODEL, input="hello", max_output_tokens=1)
    assert response.output_text == "one " and response.status == "incomplete"
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"


def test_the_events_of_a_stream_come_in_openais_order_and_add_up(api: openai.OpenAI) -> None:
    events = list(api.responses.create(model=MODEL, input="hello", stream=True))
    assert [event.type for event in events] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "one two"
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == "one two" and last.response.usage is not None


def test_the_clients_own_accumulator_gives_the_complete_response(api: openai.OpenAI) -> None:
    with api.responses.stream(model=MODEL, input="hello") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "one two"


def test_items_and_instructions_become_the_chats_messages(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    first = api.responses.create(model=MODEL, input="hello")
    items: Any = [
        {"role": "user", "content": "hello"}, *[item.model_dump(exclude_none=True) for item in first.output],
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "and now?"}]},
    ]
    api.responses.create(model=MODEL, input=items, instructions="be brief")
    wanted = engine.tokenizer.apply_chat_template([
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "one two"},
        {"role": "user", "content": "and now?"},
    ])
    assert list(engine.seen[-1].prompt) == wanted


def test_sampling_fields_reach_the_engine(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    api.responses.create(model=MODEL, input="x", temperature=0.5, top_p=0.25, max_output_tokens=7, extra_body={"seed": 3, "top_k": 9})
    params = engine.seen[-1].params
    assert (params.temperature, params.top_p, params.max_tokens, params.seed, params.top_k) == (0.5, 0.25, 7, 3, 9)


def test_log_probabilities_are_returned_if_included(api: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    response = api.responses.create(model=MODEL, input="x", include=include, top_logprobs=2)
    part = response.output[0].content[0]  # type: ignore[union-attr, index]
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [2, 2, 2]  # type: ignore[union-attr]
    stream = api.responses.create(model=MODEL, input="x", include=include, stream=True)
    deltas = [event for event in stream if event.type == "response.output_text.delta"]
    assert [entry.logprob for delta in deltas for entry in delta.logprobs] == [-0.5, -0.5, -0.5]


def test_fields_without_effect_are_accepted_and_named(live: LiveServer) -> None:
    body = {"input": "x", "store": False, "user": "me", "include": ["reasoning.encrypted_content"], "truncation": "disabled", "tools": [],
            "tool_choice": "auto", "reasoning": {"effort": None}, "background": False, "previous_response_id": None}
    response = httpx.post(live.url + PATH, json=body)
    assert response.status_code == 200, response.text
    assert set(response.headers["x-minivllm-ignored"].split(", ")) == {"user", "include.0"}
    assert response.json()["store"] is False


@pytest.mark.parametrize("change, param", [
    ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [5]}, "input.0"), ({"input": [{"role": "user"}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type"),
    ({"input": [{"type": "item_reference", "id": 1}]}, "input.0.id"),
    ({"input": [{}]}, "input.0.role"), ({"input": [{"role": "usr", "content": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": "x", "nam": 1}]}, "input.0.nam"), ({"input": None}, "input"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"conversation": "c"}, "conversation"),
    ({"background": True}, "background"), ({"truncation": "some"}, "truncation"), ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 9999}, "max_output_tokens"),
    ({"include": ["everything"]}, "include.0"), ({"top_logprobs": 2}, "top_logprobs"), ({"temperature": 3}, "temperature"),
    ({"tools": [{"type": "functon", "name": "f", "parameters": {}}]}, "tools.0.type"), ({"max_tokens": 5}, "max_tokens"), ({"n": 2}, "n"),
    ({"stream_options": {}}, "stream_options"), ({"stream": True, "stream_options": {"continuous_usage_stats": True}},
                                                  "stream_options.continuous_usage_stats"),
])
def test_a_wrong_field_is_400_under_the_name_the_client_used(live: LiveServer, change: dict[str, Any], param: str) -> None:
    assert refused(live, **{"input": "x", **change})["param"] == param


def test_every_field_of_the_official_sdk_has_a_class() -> None:
    import typing

    from openai.types.responses import response_create_params

    from minivllm.server.responses_protocol import ResponsesRequest

    sdk = set(typing.get_type_hints(response_create_params.ResponseCreateParamsBase))
    ours = {*ResponsesRequest.model_fields, *ResponsesRequest.INERT, *ResponsesRequest.UNSUPPORTED}
    assert sdk <= ours, sdk - ours
    assert len(ours) == sum(map(len, (ResponsesRequest.model_fields, ResponsesRequest.INERT, ResponsesRequest.UNSUPPORTED)))


def test_a_failure_in_the_middle_of_a_stream_is_a_failed_response(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(1))
    engine.fail_step = lambda: "no /secret" if engine.steps > 1 else None
    with scripted_server(engine) as live, httpx.stream("POST", live.url + PATH, json={"input": "x", "stream": True}) as response:
        lines = response.iter_lines()
        while "delta" not in next(lines):
            pass
        assert engine.gate is not None
        engine.gate.release()
        last = json.loads([line for line in lines if line.startswith("data: ")][-1].removeprefix("data: "))
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error" and "secret" not in json.dumps(last)


@pytest.mark.parametrize("more", [{"max_output_tokens": 9999}, {"input": "cat " * 3000}, {"input": "cat " * 3000, "max_output_tokens": 5}])
def test_too_long_an_input_is_described_by_the_names_of_this_api(live: LiveServer, more: dict[str, Any]) -> None:
    error = refused(live, **{"input": "x", **more})
    assert error["code"] == "context_length_exceeded" and "input" in error["message"]
    assert "messages" not in error["message"] and "max_completion_tokens" not in error["message"]
