"""`/v1/responses` with outputs that are more than text: calls and reasoning as separate items, through the official client."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minivllm.engine.chat_template import built_in_template
from tests.server import test_tools_enforced as enforced
from tests.server.test_tools import CALL, CLOCK, MODEL, PARIS, THINKING, TICK, WEATHER, ScriptedChat, scripted_chat

TOOLS: Any = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]
ENFORCED: Any = [{"type": "function", **tool["function"]} for tool in enforced.TOOLS]


@pytest.fixture(scope="module")
def tools(tokenizer_folder: Path) -> Iterator[ScriptedChat]:
    """A model with tools in the Hermes format and with reasoning."""
    with scripted_chat(tokenizer_folder, built_in_template("tool_chatml"), reasoning_parser="qwen3") as made:
        yield made


def create(made: ScriptedChat, **fields: Any) -> Any:
    return made.api.responses.create(**{"model": MODEL, "input": "hello", **fields})


def items_of(response: Any) -> list[tuple[str, ...]]:
    """The items of a response: type, status, and content."""
    found: list[tuple[str, ...]] = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, item.status, item.name, item.arguments))
        else:
            assert len(item.content) == 1
            found.append((item.type, item.status, item.content[0].text))
    return found


def replay(events: list[Any]) -> list[dict[str, Any]]:
    """The items that a stream's events add up to, each checked against its `done` events."""
    items: list[dict[str, Any]] = []
    for number, event in enumerate(events):
        assert event.sequence_number == number
        if event.type == "response.output_item.added":
            assert event.output_index == len(items), "an item starts after the previous one has ended"
            items.append({"id": event.item.id, "type": event.item.type, "text": "", "done": False})
            assert event.item.status == "in_progress"
        elif event.type.endswith(".delta"):
            item = items[event.output_index]
            assert item["id"] == event.item_id and not item["done"] and event.output_index == len(items) - 1
            item["text"] += event.delta
        elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
            assert event.text == items[event.output_index]["text"]
        elif event.type == "response.function_call_arguments.done":
            assert event.arguments == items[event.output_index]["text"]
        elif event.type == "response.output_item.done":
            item = items[event.output_index]
            assert event.item.id == item["id"]
            item |= {"done": True, "item": event.item}
    assert all(item["done"] for item in items)
    return items


THINKS = f"<think>\nhm, Paris\n</think>\n\nLet me look. {CALL}\n{TICK}"


@pytest.mark.parametrize("text, output", [
    (CALL, [("function_call", "completed", "get_weather", PARIS)]),
    (f"{CALL}\n{TICK}", [("function_call", "completed", "get_weather", PARIS), ("function_call", "completed", "clock", "{}")]),
    (THINKS, [("reasoning", "completed", "hm, Paris"), ("message", "completed", "Let me look."),
              ("function_call", "completed", "get_weather", PARIS), ("function_call", "completed", "clock", "{}")]),
    ("<think>\nhm\n</think>\n\nyes", [("reasoning", "completed", "hm"), ("message", "completed", "yes")]),
    ("no tool is needed", [("message", "completed", "no tool is needed")]),
    ("", [("message", "completed", "")]),
])
def test_reasoning_text_and_calls_are_items_in_their_order_complete_and_streamed(tools: ScriptedChat, text: str, output: Any) -> None:
    tools.generate(text)
    whole = create(tools, tools=TOOLS)
    assert items_of(whole) == output and whole.status == "completed"
    assert len({item.id for item in whole.output}) == len(output)
    with tools.api.responses.stream(model=MODEL, input="hello", tools=TOOLS) as stream:
        final = (list(stream), stream.get_final_response())[1]
    assert items_of(final) == output
    events = list(create(tools, tools=TOOLS, stream=True))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    items = replay(events)
    last = events[-1]
    assert last.type == "response.completed" and items_of(last.response) == output
    assert [item["item"] for item in items] == last.response.output
    assert [item["text"] for item in items] == [said[-1] for said in output]


def test_the_events_of_a_call_come_in_openais_order(tools: ScriptedChat) -> None:
    tools.generate(CALL)
    events = list(create(tools, tools=TOOLS, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    fragments = kinds.count("function_call_arguments.delta")
    assert fragments > 1, "arguments are streamed as they are written"
    assert kinds == ["created", "in_progress", "output_item.added", *["function_call_arguments.delta"] * fragments,
                     "function_call_arguments.done", "output_item.done", "completed"]
    added = events[2].item
    assert (added.type, added.name, added.arguments, added.status) == ("function_call", "get_weather", "", "in_progress")
    assert added.call_id.startswith("call_") and added.id.startswith("fc_") and events[-2].item.call_id == added.call_id


def test_the_prompt_contains_the_tools_and_the_response_repeats_the_request(tools: ScriptedChat) -> None:
    tools.generate("fine")
    response = create(tools, tools=TOOLS, tool_choice="auto", parallel_tool_calls=False)
    assert json.dumps(WEATHER) in tools.prompt and '"clock"' in tools.prompt
    assert [tool.name for tool in response.tools] == ["get_weather", "clock"] and response.parallel_tool_calls is False
    create(tools, tools=TOOLS, tool_choice="none")
    assert "get_weather" not in tools.prompt


def test_items_that_are_sent_back_give_the_same_prompt_as_in_a_chat(tools: ScriptedChat) -> None:
    tools.generate(THINKS)
    first = create(tools, tools=TOOLS)
    results: Any = [{"type": "function_call_output", "call_id": item.call_id, "output": f"result of {item.name}"}
                    for item in first.output if item.type == "function_call"]
    tools.generate("done")
    for items in ([item.model_dump() for item in first.output], [item.model_dump(exclude_none=True) for item in first.output]):
        answer = create(tools, tools=TOOLS, input=[{"role": "user", "content": "hello"}, *items, *results])
        assert answer.output_text == "done"
    sent = list(tools.engine.seen[-1].prompt)
    calls = [{"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
             for item in first.output if item.type == "function_call"]
    tools.chat(tools=[WEATHER, CLOCK], messages=[
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": "Let me look.", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": result["call_id"], "content": result["output"]} for result in results),
    ])
    assert sent == list(tools.engine.seen[-1].prompt)


def test_earlier_reasoning_goes_to_templates_that_take_it_and_is_named_as_ignored_otherwise(
    tokenizer_folder: Path, tools: ScriptedChat,
) -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    items = [{"role": "user", "content": "x"}, reasoning, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]
    with scripted_chat(tokenizer_folder, THINKING, reasoning_parser="qwen3") as thinker:
        response = httpx.post(thinker.live.url + "/v1/responses", json={"input": items})
        assert response.status_code == 200 and "x-minivllm-ignored" not in response.headers
        assert thinker.prompt.startswith("[user]x[assistant]hmyes[user]and?")
        create(thinker, reasoning={"effort": "high"})
        assert "high[assistant]" in thinker.prompt
        create(thinker, reasoning={"effort": "none", "summary": None})
        assert "none[assistant]" in thinker.prompt
    assert httpx.post(tools.live.url + "/v1/responses", json={"input": items}).headers["x-minivllm-ignored"] == "input.1"
    empty = [items[0], {"type": "reasoning", "summary": []}, *items[2:]]
    assert httpx.post(tools.live.url + "/v1/responses", json={"input": empty}).headers["x-minivllm-ignored"] == "input.1"


def test_reasoning_is_not_in_the_output_text_and_its_tokens_are_counted(tools: ScriptedChat) -> None:
    tools.generate("<think>hm hm</think>yes")
    response = create(tools, include=["message.output_text.logprobs"])
    assert response.output_text == "yes"
    usage = response.usage
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    logprobs = response.output[1].content[0].logprobs
    answer = usage.output_tokens - usage.output_tokens_details.reasoning_tokens
    assert answer <= len(logprobs) <= answer + 1, "one token may contain the end of the reasoning and the start of the answer"
    tools.generate("yes")
    assert create(tools).usage.output_tokens_details.reasoning_tokens == 0


def test_an_output_that_is_cut_off_leaves_its_last_item_incomplete(tools: ScriptedChat) -> None:
    cut = f"{TICK}\n{CALL[:-20]}"
    limit = len(tools.engine.tokenizer.encode(cut, add_special_tokens=False))
    tools.generate(cut, ends=False)
    for whole in (create(tools, tools=TOOLS, max_output_tokens=limit),
                  list(create(tools, tools=TOOLS, max_output_tokens=limit, stream=True))[-1].response):
        assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
        clock, weather = items_of(whole)
        assert clock[1:3] == ("completed", "clock") and weather[1:3] == ("incomplete", "get_weather")


def test_a_required_call_that_is_cut_leaves_no_message_and_what_is_returned_can_be_sent_back(tools: ScriptedChat) -> None:
    text = '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'
    for end in range(0, len(text), 6):
        tools.generate(text[:end], ends=False)
        whole = create(tools, tools=TOOLS, tool_choice="required", max_output_tokens=200)
        assert {item.type for item in whole.output} <= {"function_call"} and whole.status == "incomplete"
        last = list(create(tools, tools=TOOLS, tool_choice="required", stream=True))[-1].response
        assert items_of(last) == items_of(whole)
        create(tools, tools=TOOLS, input=[{"role": "user", "content": "x"}, *(item.model_dump() for item in whole.output),
                                          {"role": "user", "content": "y"}])


def test_with_a_text_format_the_output_is_either_calls_or_text_of_that_format(tools: ScriptedChat) -> None:
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}}
    text = '{"a": "<tool_call>"}'
    call = ("function_call", "completed", "get_weather", '{"city": "Paris"}')
    for written, wanted in ((text, ("message", "completed", text)), (CALL, call)):
        tools.generate(written)
        assert items_of(create(tools, tools=TOOLS, text=form)) == [wanted]
        assert items_of(list(create(tools, tools=TOOLS, text=form, stream=True))[-1].response) == [wanted]
        assert tools.engine.seen[-1].params.structured_outputs.kind == "grammar"


def test_without_parallel_calls_only_one_call_is_returned(tools: ScriptedChat) -> None:
    tools.generate(f"{CALL}\n{TICK}")
    for response in (create(tools, tools=TOOLS, parallel_tool_calls=False),
                     list(create(tools, tools=TOOLS, parallel_tool_calls=False, stream=True))[-1].response):
        assert [item.name for item in response.output] == ["get_weather"]


@pytest.mark.parametrize("change, param", [
    ({"tools": [{"type": "function", "name": "bad name"}]}, "tools.0.name"), ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tools": [{"type": "function", "function": {"name": "clock"}}]}, "tools.0.name"),
    ({"tools": [TOOLS[1], TOOLS[1]]}, "tools.1.name"), ({"tools": [{**TOOLS[1], "descripton": "x"}]}, "tools.0.descripton"),
    ({"tools": [{**TOOLS[1], "parameters": {"type": "array"}}]}, "tools.0.parameters"),
    ({"tools": [{**TOOLS[1], "defer_loading": True}]}, "tools.0.defer_loading"), ({"tools": [{"name": "f"}]}, "tools.0.type"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "clok"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"input": [{"type": "function_call", "call_id": 5, "name": "clock", "arguments": "{}"}]}, "input.0.call_id"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "clock", "arguments": {}}]}, "input.0.arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input.0.output"),
    ({"input": [{"type": "reasoning", "summary": [], "content": [5]}]}, "input.0.content"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"), ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"), ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
])
def test_a_wrong_field_is_400_under_the_name_the_client_used(tools: ScriptedChat, change: dict[str, Any], param: str) -> None:
    response = httpx.post(tools.live.url + "/v1/responses", json={"input": "x", **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text
    assert "function.name" not in response.text, "names of the chat endpoint must not appear"


# -- enforced calls, from a real engine -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tiny_llama: Callable[..., Path]) -> Iterator[openai.OpenAI]:
    with enforced.server(tiny_llama()) as api:
        yield api


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "switch"}])
def test_an_enforced_call_matches_the_tools_complete_and_streamed(api: openai.OpenAI, choice: Any) -> None:
    fields: Any = {"model": "tiny", "input": "the cat", "tools": ENFORCED, "tool_choice": choice, "parallel_tool_calls": False}
    whole = api.responses.create(**fields, extra_body={"seed": 7})
    (call,) = whole.output
    assert call.type == "function_call" and whole.status == "completed"
    enforced.check(call.name, call.arguments)
    assert choice == "required" or call.name == "switch"
    (item,) = replay(list(api.responses.create(**fields, stream=True, extra_body={"seed": 7})))
    assert (item["item"].name, item["text"]) == (call.name, call.arguments)
