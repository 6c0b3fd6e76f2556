"""The OpenAI Agents SDK, over chat completions and over responses."""
from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("agents", reason="openai-agents is not installed: pip install -e '.[clients]'")

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    handoff,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.clients.conftest import ClientServer

QUESTION = "What is the weather in Paris?"


@function_tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


class Report(BaseModel):
    city: str
    summary: str


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat", "responses"])
def model(request: pytest.FixtureRequest, capable: ClientServer) -> Iterator[Any]:
    client = AsyncOpenAI(base_url=capable.base_url, api_key=capable.api_key, max_retries=0)
    yield request.param(model=capable.model, openai_client=client)


def agent(model: Any, **settings: Any) -> Agent[Any]:
    return Agent(name="assistant", instructions="Be brief.", model=model, **settings)


async def streamed(agent: Agent[Any], question: str) -> tuple[Any, list[str]]:
    result = Runner.run_streamed(agent, question)
    deltas = [e.data.delta async for e in result.stream_events() if e.type == "raw_response_event"
              and e.data.type in ("response.output_text.delta", "response.function_call_arguments.delta")]
    return result.final_output, deltas


def test_an_agent_with_a_tool_and_no_output_type(model: Any) -> None:
    assert Runner.run_sync(agent(model, tools=[get_weather]), QUESTION).final_output == "The result is sunny in Paris."


def test_an_agent_with_a_tool_and_an_output_type(model: Any) -> None:
    assistant = agent(model, tools=[get_weather], output_type=Report)
    assert Runner.run_sync(assistant, QUESTION).final_output == Report(city="Paris", summary="sunny in Paris")


def test_a_streamed_run_with_a_tool_and_an_output_type(model: Any) -> None:
    output, deltas = asyncio.run(streamed(agent(model, tools=[get_weather], output_type=Report), QUESTION))
    assert output == Report(city="Paris", summary="sunny in Paris") and len(deltas) > 5


def test_an_output_type_without_tools(model: Any) -> None:
    assert Runner.run_sync(agent(model, output_type=Report), QUESTION).final_output.city == "Paris"


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_a_forced_first_call_beside_an_output_type(model: Any, choice: str) -> None:
    assistant = agent(model, tools=[get_weather], output_type=Report, model_settings=ModelSettings(tool_choice=choice))
    assert Runner.run_sync(assistant, "Hello!").final_output.summary.startswith("sunny in")


def test_a_session_keeps_the_history_of_calls(model: Any) -> None:
    assistant, session = agent(model, tools=[get_weather]), SQLiteSession("one")
    for city in ("Paris", "Rome"):
        result = Runner.run_sync(assistant, f"What is the weather in {city}?", session=session)
        assert result.final_output == f"The result is sunny in {city}."
    history = Runner.run_sync(assistant, QUESTION).to_input_list()
    again = Runner.run_sync(assistant, [*history, {"role": "user", "content": "weather in Rome?"}])
    assert again.final_output == "The result is sunny in Rome."


def test_a_handoff_to_another_agent(model: Any) -> None:
    expert = Agent(name="expert", model=model, tools=[get_weather])
    triage = Agent(name="triage", model=model, handoffs=[handoff(expert, tool_name_override="to_weather_expert")])
    result = Runner.run_sync(triage, QUESTION)
    assert result.last_agent.name == "expert" and result.final_output == "The result is sunny in Paris."


def test_conversation_state_on_the_server(capable: ClientServer) -> None:
    client = AsyncOpenAI(base_url=capable.base_url, api_key=capable.api_key, max_retries=0)
    assistant = agent(OpenAIResponsesModel(model=capable.model, openai_client=client), tools=[get_weather])

    async def two_turns() -> str:
        first = await Runner.run(assistant, QUESTION)
        second = await Runner.run(assistant, "And the weather in Rome?", previous_response_id=first.last_response_id)
        return str(second.final_output)

    assert asyncio.run(two_turns()) == "The result is sunny in Rome."
    contents = [m["content"] for m in capable.last_conversation["messages"]]
    assert QUESTION in contents and "sunny in Paris" in contents
