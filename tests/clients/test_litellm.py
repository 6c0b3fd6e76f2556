"""litellm: its mapping of errors, its context fallback, tools and responses."""
from __future__ import annotations

import asyncio
from typing import Any

import pytest

litellm = pytest.importorskip("litellm", reason="litellm is not installed: pip install -e '.[clients]'")

from pydantic import BaseModel

from tests.clients.conftest import ClientServer

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


class Report(BaseModel):
    city: str
    summary: str


def configuration(server: ClientServer, provider: str = "openai") -> dict[str, Any]:
    return {"model": f"{provider}/{server.model}", "api_base": server.base_url, "api_key": server.api_key, "max_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_text_complete_streamed_and_asynchronous(capable: ClientServer, provider: str) -> None:
    server = configuration(capable, provider)
    messages = [{"role": "user", "content": "Hello"}]
    assert litellm.completion(messages=messages, **server).choices[0].message.content == "You said: Hello"
    chunks = litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **server)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "You said: Hello"
    assert asyncio.run(litellm.acompletion(messages=messages, **server)).choices[0].message.content == "You said: Hello"
    assert litellm.text_completion(prompt="Hello", **server).choices[0].text.startswith("You said: Hello"[:9])


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_tools_beside_a_response_format_over_two_turns(capable: ClientServer, provider: str) -> None:
    server: dict[str, Any] = {**configuration(capable, provider), "tools": [WEATHER], "response_format": Report}
    message = litellm.completion(messages=ASK, **server).choices[0].message
    assert message.tool_calls[0].function.arguments == '{"city": "Paris"}'
    history = [*ASK, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "mild"}]
    answer = litellm.completion(messages=history, **server).choices[0].message.content
    assert Report.model_validate_json(answer) == Report(city="Paris", summary="mild")
    rebuilt = litellm.stream_chunk_builder(list(litellm.completion(messages=ASK, stream=True, **server)))
    assert rebuilt.choices[0].message.tool_calls[0].function.arguments == '{"city": "Paris"}'


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
@pytest.mark.parametrize("fields", [{"max_tokens": 200_000}, {"messages": [{"role": "user", "content": "word " * 60_000}]}],
                         ids=["output", "prompt"])
def test_a_context_overflow_is_recognized_and_the_fallback_answers(capable: ClientServer, provider: str, fields: dict[str, Any]) -> None:
    request: dict[str, Any] = {"messages": ASK, **configuration(capable, provider), **fields}
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**request)


def test_a_router_falls_back_to_a_model_with_a_larger_context(capable: ClientServer, small: ClientServer) -> None:
    def deployment(name: str, server: ClientServer) -> dict[str, Any]:
        return {"model_name": name, "litellm_params": configuration(server)}

    router = litellm.Router(model_list=[deployment("small", small), deployment("large", capable)],
                            context_window_fallbacks=[{"small": ["large"]}], num_retries=0)
    long = [{"role": "user", "content": "word " * 3000}]
    assert router.completion(model="small", messages=long).choices[0].message.content.startswith("You said: word")


def test_an_unknown_model_is_not_found(capable: ClientServer) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**configuration(capable), "model": "openai/nope"}, messages=ASK)


def test_responses_complete_and_streamed(capable: ClientServer) -> None:
    server = configuration(capable)
    assert litellm.responses(input="Hello", **server).output[0].content[0].text == "You said: Hello"
    deltas = [e.delta for e in litellm.responses(input="Hello", stream=True, **server) if e.type == "response.output_text.delta"]
    assert "".join(deltas) == "You said: Hello"
