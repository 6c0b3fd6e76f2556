"""LangChain: agents, and tools beside a response format."""
from __future__ import annotations

from typing import Any

import pytest

WHY = "not installed: pip install -e '.[clients]'"
pytest.importorskip("langchain", reason=f"langchain is {WHY}")
pytest.importorskip("langchain_openai", reason=f"langchain-openai is {WHY}")

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.clients.conftest import ClientServer

QUESTION = "What is the weather in Paris?"


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


class Report(BaseModel):
    """The final answer."""

    city: str
    summary: str


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def llm(request: pytest.FixtureRequest, capable: ClientServer) -> ChatOpenAI:
    return ChatOpenAI(model=capable.model, base_url=capable.base_url, api_key=capable.api_key, max_retries=0,
                      use_responses_api=request.param)


def test_an_agent_calls_a_tool_and_answers_with_its_result_over_two_turns(llm: ChatOpenAI) -> None:
    agent = create_agent(llm, [get_weather])
    first = agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"]
    assert [type(m) for m in first] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert first[1].tool_calls[0]["args"] == {"city": "Paris"} and first[-1].text == "The result is sunny in Paris."
    second = agent.invoke({"messages": [*first, HumanMessage("And the weather in Rome?")]})["messages"]
    assert second[-1].text == "The result is sunny in Rome."


@pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy])
def test_an_agent_with_a_response_format_calls_a_tool_and_ends_with_the_format(llm: ChatOpenAI, strategy: Any) -> None:
    result = create_agent(llm, [get_weather], response_format=strategy(Report)).invoke({"messages": [HumanMessage(QUESTION)]})
    assert result["structured_response"] == Report(city="Paris", summary="sunny in Paris")
    calls = [call for message in result["messages"] if isinstance(message, AIMessage) for call in message.tool_calls]
    assert calls[0]["name"] == "get_weather"


def test_an_agent_streams_its_tokens(llm: ChatOpenAI) -> None:
    agent = create_agent(llm, [get_weather])
    chunks = [chunk for chunk, _ in agent.stream({"messages": [HumanMessage(QUESTION)]}, stream_mode="messages")]
    texts = [chunk.text for chunk in chunks if isinstance(chunk, AIMessage)]
    assert "".join(texts) == "The result is sunny in Paris." and len(texts) > 5


@pytest.mark.parametrize("strict", [None, True])
def test_tools_bound_with_a_response_format_may_be_called_or_not(llm: ChatOpenAI, strict: bool | None) -> None:
    bound = llm.bind_tools([get_weather], response_format=Report, **({} if strict is None else {"strict": strict}))
    call = bound.invoke(QUESTION)
    assert [c["args"] for c in call.tool_calls] == [{"city": "Paris"}]
    answer = bound.invoke([HumanMessage(QUESTION), call, ToolMessage("mild", tool_call_id=call.tool_calls[0]["id"])])
    assert answer.additional_kwargs["parsed"] == Report(city="Paris", summary="mild")
    streamed: Any = None
    for chunk in bound.stream(QUESTION):
        streamed = chunk if streamed is None else streamed + chunk
    assert [c["args"] for c in streamed.tool_calls] == [{"city": "Paris"}]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_by_every_method(llm: ChatOpenAI, method: Any) -> None:
    structured = llm.with_structured_output(Report, method=method, include_raw=True)
    result: Any = structured.invoke("The weather in Paris as JSON with the keys 'city' and 'summary'.")
    assert isinstance(result["parsed"], Report) and result["parsing_error"] is None


def test_a_real_small_model_fills_a_schema_and_streams(small: ClientServer) -> None:
    llm = ChatOpenAI(model=small.model, base_url=small.base_url, api_key=small.api_key, temperature=0, max_tokens=64)

    class Paris(BaseModel):
        name: str
        is_a_city: bool

    assert isinstance(llm.with_structured_output(Paris, method="json_schema").invoke("Describe Paris as JSON."), Paris)
    question = "What is the capital of France?"
    assert llm.invoke(question).text == "".join(chunk.text for chunk in llm.stream(question)) != ""
