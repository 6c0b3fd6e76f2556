"""pydantic-ai, over chat completions and over responses, with each of its ways to get structured output."""
from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("pydantic_ai", reason="pydantic-ai-slim[openai] is not installed: pip install -e '.[clients]'")

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.conftest import ClientServer

QUESTION = "What is the weather in Paris?"


class Report(BaseModel):
    """The final answer."""

    city: str
    summary: str


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def model(request: pytest.FixtureRequest, capable: ClientServer) -> Any:
    return request.param(capable.model, provider=OpenAIProvider(base_url=capable.base_url, api_key=capable.api_key))


def with_weather(model: Any, **settings: Any) -> Agent[None, Any]:
    agent: Agent[None, Any] = Agent(model, **settings)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"sunny in {city}"

    return agent


def test_text_and_a_tool_over_two_turns(model: Any) -> None:
    agent = with_weather(model, instructions="Be brief.")
    first = agent.run_sync(QUESTION)
    assert first.output == "The result is sunny in Paris."
    second = agent.run_sync("And the weather in Rome?", message_history=first.all_messages())
    assert second.output == "The result is sunny in Rome."


@pytest.mark.parametrize("output", [ToolOutput, NativeOutput])
def test_structured_output_beside_a_tool(model: Any, output: Any) -> None:
    agent = with_weather(model, output_type=output(Report))
    assert agent.run_sync(QUESTION).output == Report(city="Paris", summary="sunny in Paris")


@pytest.mark.parametrize("output", [ToolOutput, NativeOutput])
def test_streamed_structured_output_beside_a_tool(model: Any, output: Any) -> None:
    async def run() -> tuple[int, Any]:
        async with with_weather(model, output_type=output(Report)).run_stream(QUESTION) as result:
            partial = [part async for part in result.stream_output(debounce_by=None)]
            return len(partial), await result.get_output()

    count, report = asyncio.run(run())
    assert report == Report(city="Paris", summary="sunny in Paris") and count > 1


def test_streamed_text(model: Any) -> None:
    async def run() -> list[str]:
        async with Agent(model).run_stream("Hello there") as result:
            return [delta async for delta in result.stream_text(delta=True, debounce_by=None)]

    deltas = asyncio.run(run())
    assert "".join(deltas) == "You said: Hello there" and len(deltas) > 3


def test_a_real_small_model_fills_a_native_schema(small: ClientServer) -> None:
    class Paris(BaseModel):
        name: str
        is_a_city: bool

    model = OpenAIChatModel(small.model, provider=OpenAIProvider(base_url=small.base_url, api_key=small.api_key))
    agent: Agent[None, Any] = Agent(model, output_type=NativeOutput(Paris), model_settings={"temperature": 0, "max_tokens": 64})
    assert isinstance(agent.run_sync("Describe Paris as JSON.").output, Paris)


def test_prompted_output(model: Any) -> None:
    agent: Agent[None, Any] = Agent(model, output_type=PromptedOutput(Report, template="Answer as JSON. {schema}"))
    with_keys = "The weather in Paris with the keys 'city' and 'summary'."
    assert isinstance(agent.run_sync(with_keys).output, Report)
