"""What SDKs and agents send: answers with fields that the client added, one value under two names, tools that OpenAI runs."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from minivllm.engine.chat_template import built_in_template
from tests.server.test_tools import CALL, CLOCK, HELLO, PARIS, WEATHER, ScriptedChat, scripted_chat

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
FLAT = {"type": "function", **WEATHER["function"]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}


@pytest.fixture(scope="module")
def chat(tokenizer_folder: Path) -> Iterator[ScriptedChat]:
    with scripted_chat(tokenizer_folder, built_in_template("tool_chatml")) as chat:
        chat.generate("fine")
        yield chat


def send(chat: ScriptedChat, path: str, **body: Any) -> httpx.Response:
    base = {"messages": HELLO} if path == CHAT else {"input": "hello"}
    return httpx.post(chat.live.url + path, json={**base, **body})


def ignored(response: httpx.Response) -> set[str]:
    assert response.status_code == 200, response.text
    return set(filter(None, response.headers.get("x-minivllm-ignored", "").split(", ")))


def param(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["param"])


# -- answers that come back ------------------------------------------------------------------------------------------


class City(BaseModel):
    city: str


def test_every_dump_of_an_answer_of_the_sdk_is_accepted_in_the_next_turn_and_gives_the_same_prompt(chat: ScriptedChat) -> None:
    tools: Any = [openai.pydantic_function_tool(City, name="get_weather")]
    result = [{"role": "tool", "tool_call_id": "call_1", "content": "mild"}]
    for text, after in (("fine", HELLO), (CALL, result)):
        chat.generate(text)
        parsed = chat.api.chat.completions.parse(model="org/fake-model", messages=HELLO, tools=tools).choices[0].message
        for call in parsed.tool_calls or ():
            call.id = "call_1"
            assert isinstance(call.function.parsed_arguments, City)
        prompts = []
        for dump in (parsed, parsed.model_dump(), parsed.to_dict(), parsed.model_dump(exclude_none=True), json.loads(parsed.to_json())):
            chat.api.chat.completions.create(model="org/fake-model", messages=[*HELLO, dump, *after], tools=tools)  # type: ignore[misc]
            prompts.append(chat.prompt)
        assert len(set(prompts)) == 1 and ("Paris" if text == CALL else "fine") in prompts[0]
    chat.generate("fine")


def test_every_dump_of_a_response_of_the_sdk_is_accepted_in_the_next_turn(chat: ScriptedChat) -> None:
    result = [{"type": "function_call_output", "call_id": "call_1", "output": "mild"}]
    for text, after in (('{"city": "Paris"}', HELLO), (CALL, result)):
        chat.generate(text)
        make: Any = {"model": "org/fake-model", "input": HELLO}
        make |= {"text_format": City} if text != CALL else {"tools": [{**FLAT, "strict": True, "parameters": SCHEMA}]}
        parsed = chat.api.responses.parse(**make)
        for item in parsed.output:
            if item.type == "function_call":
                item.call_id = "call_1"
        prompts = []
        for items in (parsed.output, [item.model_dump() for item in parsed.output], [item.to_dict() for item in parsed.output],
                      [item.model_dump(exclude_unset=True) for item in parsed.output]):
            chat.api.responses.create(model="org/fake-model", input=[*HELLO, *items, *after])  # type: ignore[misc]
            prompts.append(chat.prompt)
        assert len(set(prompts)) == 1 and "Paris" in prompts[0]
    chat.generate("fine")


ANSWER: dict[str, Any] = {"role": "assistant", "content": "yes"}
CALLED: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {
    "name": "get_weather", "arguments": PARIS}}]}


@pytest.mark.parametrize("more, named", [
    ({"parsed": None}, ""), ({"parsed": {"a": 1}}, "parsed"), ({"refusal": None}, ""), ({"refusal": ""}, ""), ({"audio": None}, ""),
    ({"annotations": []}, "annotations"), ({"annotations": None}, ""), ({"function_call": None}, ""), ({"tool_calls": None}, ""),
    ({"tool_calls": []}, ""), ({"name": None, "tool_call_id": None}, ""), ({"reasoning_content": None, "reasoning": None}, ""),
    ({"reasoning_content": ""}, ""), ({"images": []}, ""), ({"thinking_blocks": None}, ""), ({"thinking_blocks": []}, ""),
    ({"reasoning_details": []}, ""), ({"provider_specific_fields": {"refusal": None}}, "provider_specific_fields"),
])
def test_what_clients_add_to_an_answer_and_carries_nothing_changes_nothing(chat: ScriptedChat, more: dict[str, Any], named: str) -> None:
    send(chat, CHAT, messages=[*HELLO, ANSWER, *HELLO])
    plain = chat.prompt
    found = ignored(send(chat, CHAT, messages=[*HELLO, {**ANSWER, **more}, *HELLO]))
    assert found == ({f"messages.1.{named}"} if named else set()) and chat.prompt == plain


def test_no_content_beside_calls_has_any_form(chat: ScriptedChat) -> None:
    result = {"role": "tool", "tool_call_id": "c", "content": "mild"}
    prompts = set()
    for content in ({"content": None}, {"content": []}, {}):
        message = {name: value for name, value in CALLED.items() if name != "content"} | content
        assert ignored(send(chat, CHAT, messages=[*HELLO, message, result])) == set()
        prompts.add(chat.prompt)
    assert len(prompts) == 1
    assert param(send(chat, CHAT, messages=[*HELLO, {"role": "user", "content": []}])) == "messages.1.content"


def test_a_refusal_is_the_text_of_its_message(chat: ScriptedChat) -> None:
    send(chat, CHAT, messages=[*HELLO, {"role": "assistant", "content": "I cannot"}, *HELLO])
    plain, part = chat.prompt, {"type": "refusal", "refusal": "I cannot"}
    for message in ({"role": "assistant", "content": None, "refusal": "I cannot"}, {"role": "assistant", "content": [part]}):
        assert ignored(send(chat, CHAT, messages=[*HELLO, message, *HELLO])) == set() and chat.prompt == plain
    assert ignored(send(chat, RESPONSES, input=[*HELLO, {"type": "message", "role": "assistant", "content": [part]}, *HELLO])) == set()
    assert chat.prompt == plain
    assert param(send(chat, CHAT, messages=[*HELLO, {**ANSWER, "refusal": "no"}])) == "messages.1.refusal"
    assert param(send(chat, CHAT, messages=[{**HELLO[0], "refusal": "no"}])) == "messages.0.refusal"


def test_what_an_answer_carries_and_this_server_cannot_take_is_refused(chat: ScriptedChat) -> None:
    for name, value in (("audio", {"id": "a"}), ("images", [{}]), ("thinking_blocks", [{}]), ("reasoning_details", [{}])):
        assert param(send(chat, CHAT, messages=[*HELLO, {**ANSWER, name: value}])) == f"messages.1.{name}"


def test_truncation_is_accepted_and_too_long_an_input_is_an_error_all_the_same(chat: ScriptedChat) -> None:
    assert ignored(send(chat, RESPONSES, truncation="disabled")) == set()
    response = send(chat, RESPONSES, truncation="auto")
    assert ignored(response) == {"truncation"} and response.json()["truncation"] == "auto"
    error = send(chat, RESPONSES, truncation="auto", input="cat " * 3000).json()["error"]
    assert error["code"] == "context_length_exceeded"


# -- one value under two names ---------------------------------------------------------------------------------------

FORMAT = {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}
OLD_CALL = {"name": "get_weather", "arguments": PARIS}


@pytest.mark.parametrize("same, different", [
    ({"guided_grammar": 'start: "a"', "structured_outputs": {"grammar": 'start: "a"'}}, {"guided_grammar": 'start: "b"'}),
    ({"guided_json": SCHEMA, "structured_outputs": {"json": json.dumps(SCHEMA)}, "response_format": FORMAT}, {"guided_json": {}}),
    ({"guided_json": json.dumps(SCHEMA), "response_format": FORMAT, "guided_whitespace_pattern": None}, {"guided_json": {}}),
    ({"guided_regex": "a+", "structured_outputs": {"regex": "a+"}}, {"structured_outputs": {"regex": "b"}}),
    ({"guided_choice": ["a", "b"], "structured_outputs": {"choice": ["a", "b"]}}, {"guided_choice": ["b", "a", "c"]}),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"json_object": True}}, {"structured_outputs": {"regex": "b"}}),
    ({"functions": [WEATHER["function"]], "tools": [WEATHER]}, {"functions": [CLOCK["function"]]}),
    ({"functions": [WEATHER["function"]], "tools": [WEATHER], "function_call": "auto", "tool_choice": "auto"}, {"function_call": "none"}),
    ({"tools": [WEATHER], "function_call": {"name": "get_weather"},
      "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}, {"function_call": {"name": "clock"}}),
    ({"tools": [WEATHER], "function_call": "auto"}, {"function_call": "none"}),
    ({"messages": [*HELLO, {**ANSWER, "reasoning": "hm", "reasoning_content": "hm"}]},
     {"messages": [*HELLO, {**ANSWER, "reasoning": "hm", "reasoning_content": "ha"}]}),
    ({"messages": [*HELLO, {**CALLED, "function_call": OLD_CALL}]},
     {"messages": [*HELLO, {**CALLED, "function_call": {**OLD_CALL, "name": "clock"}}]}),
    ({"max_tokens": 9, "max_completion_tokens": 9}, {}),
], ids=lambda value: "+".join(value)[:60])
def test_equal_values_under_two_names_are_one_value_and_different_ones_are_an_error(
    chat: ScriptedChat, same: dict[str, Any], different: dict[str, Any],
) -> None:
    assert ignored(send(chat, CHAT, **same)) <= {"messages.1.reasoning_content"}
    if different:
        assert send(chat, CHAT, **{**same, **different}).status_code == 400


def test_the_one_value_reaches_the_engine(chat: ScriptedChat) -> None:
    grammar = 'start: "a"'
    send(chat, CHAT, guided_grammar=grammar, structured_outputs={"grammar": grammar})
    structure = chat.engine.seen[-1].params.structured_outputs
    assert structure is not None and structure.grammar == grammar


# -- tools that OpenAI's servers run ---------------------------------------------------------------------------------

HOSTED: list[dict[str, Any]] = [
    {"type": "web_search", "external_web_access": False}, {"type": "web_search_preview", "search_context_size": "low"},
    {"type": "local_shell"}, {"type": "shell"}, {"type": "apply_patch"}, {"type": "custom", "name": "patch", "format": {"type": "text"}},
    {"type": "file_search", "vector_store_ids": ["v"]}, {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "mcp", "server_label": "m", "server_url": "https://example.org"}, {"type": "image_generation"}, {"type": "computer"},
    {"type": "computer_use_preview", "display_width": 1}, {"type": "namespace", "name": "n", "tools": [FLAT]}, {"type": "tool_search"},
    {"type": "programmatic_tool_calling"},
]


@pytest.mark.parametrize("path, function", [(CHAT, WEATHER), (RESPONSES, FLAT)])
@pytest.mark.parametrize("tool", HOSTED, ids=lambda tool: str(tool["type"]))
def test_a_tool_that_no_server_here_can_run_is_left_out_and_named(
    chat: ScriptedChat, path: str, function: dict[str, Any], tool: dict[str, Any],
) -> None:
    kind = tool["type"]
    send(chat, path, tools=[function])
    plain = chat.prompt
    response = send(chat, path, tools=[tool, function], tool_choice="auto")
    assert ignored(response) == {f"tools.0.{kind}"} and chat.prompt == plain
    if path == RESPONSES:
        assert [tool["name"] for tool in response.json()["tools"]] == ["get_weather"]
    assert ignored(send(chat, path, tools=[tool])) == {f"tools.0.{kind}"} and "get_weather" not in chat.prompt, "no tool is left"
    for choice in ({"type": kind}, {"type": kind, "name": "x"}):
        for tools in ([tool, function], [tool]):
            assert param(send(chat, path, tools=tools, tool_choice=choice)) == "tool_choice.type"
    refused = send(chat, path, tools=[tool], tool_choice="required")
    assert param(refused) == "tool_choice" and kind in refused.json()["error"]["message"] and "both" not in refused.text


def test_a_wrong_function_beside_a_tool_that_is_left_out_keeps_its_index(chat: ScriptedChat) -> None:
    assert param(send(chat, RESPONSES, tools=[HOSTED[0], {**FLAT, "name": "bad name"}])) == "tools.1.name"
    assert param(send(chat, CHAT, tools=[HOSTED[0], {"type": "function", "function": {"name": "bad name"}}])) == "tools.1.function.name"
    for misspelled in ("functon", "Function", "func"):
        assert param(send(chat, CHAT, tools=[{**WEATHER, "type": misspelled}])) == "tools.0.type"
        assert param(send(chat, RESPONSES, tools=[{**FLAT, "type": misspelled}])) == "tools.0.type"


def test_fields_that_agents_send_with_every_request_have_no_effect(chat: ScriptedChat) -> None:
    extra: dict[str, Any] = {"client_metadata": {"session": "s"}, "prompt_cache_key": "k", "service_tier": "auto", "safety_identifier": "i"}
    for path in (CHAT, RESPONSES, "/v1/completions"):
        body = {"prompt": "x"} if path == "/v1/completions" else {}
        assert ignored(httpx.post(chat.live.url + path, json={**(body or ({"messages": HELLO} if path == CHAT else {"input": "x"})),
                                                             **extra})) == set(extra)
    more: dict[str, Any] = {"include": ["reasoning.encrypted_content"], "store": False, "parallel_tool_calls": False, "stream": True,
                            "reasoning": {"effort": None, "summary": "auto"}, "text": {"verbosity": "medium"}, "max_tool_calls": 3}
    assert ignored(send(chat, RESPONSES, **more)) == {"include.0", "reasoning.summary", "max_tool_calls"}


# What Codex CLI 0.171 sends, shortened: `codex exec` with `wire_api = "responses"`.
CODEX: dict[str, Any] = {
    "model": "org/fake-model", "stream": True, "instructions": "You are an agent.", "tool_choice": "auto", "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"}, "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
    "client_metadata": {"session_id": "s", "x-codex-turn-metadata": "{}"},
    "tools": [{**FLAT, "strict": False}, {"type": "namespace", "name": "agents", "description": "", "tools": [FLAT]},
              {"type": "web_search", "external_web_access": False}],
    "input": [{"type": "message", "id": f"msg_{i}", "role": role, "content": [{"type": "input_text", "text": text}]}
              for i, (role, text) in enumerate([("developer", "rules"), ("developer", "more rules"), ("user", "say hello")])],
}


def test_a_turn_of_codex_calls_a_tool_and_gets_its_answer(chat: ScriptedChat) -> None:
    def events(body: dict[str, Any]) -> list[dict[str, Any]]:
        response = httpx.post(chat.live.url + RESPONSES, json=body)
        assert ignored(response) == {"tools.1.namespace", "tools.2.web_search", "prompt_cache_key", "client_metadata", "include.0",
                                     "reasoning.summary"}
        return [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: ")]

    chat.generate(CALL)
    items = [event["item"] for event in events(CODEX) if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in items] == ["function_call"] and "say hello" in chat.prompt
    result = {"type": "function_call_output", "id": "fco_1", "call_id": items[0]["call_id"], "output": "mild"}
    chat.generate("All done.")
    last = events({**CODEX, "input": [*CODEX["input"], *items, result]})[-1]
    assert last["type"] == "response.completed" and last["response"]["output"][0]["content"][0]["text"] == "All done."
    assert "Paris" in chat.prompt and "mild" in chat.prompt


def test_a_call_of_a_tool_with_a_text_is_a_call_with_one_argument(chat: ScriptedChat) -> None:
    items = [{"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "a\n+b"},
             {"type": "custom_tool_call_output", "call_id": "c", "output": "done"}]
    assert ignored(send(chat, RESPONSES, input=[*HELLO, *items])) == set()
    custom = chat.prompt
    function = {"type": "function_call", "call_id": "c", "name": "patch", "arguments": json.dumps({"input": "a\n+b"})}
    send(chat, RESPONSES, input=[*HELLO, function, {**items[1], "type": "function_call_output"}])
    assert chat.prompt == custom


def test_parts_of_either_api_are_accepted_in_both(chat: ScriptedChat) -> None:
    send(chat, CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "yes"}]}])
    plain = chat.prompt
    for kind in ("text", "input_text", "output_text"):
        for more in ({}, {"annotations": [], "logprobs": [], "parsed": None}):
            message = {"role": "user", "content": [{"type": kind, "text": "yes", **more}]}
            for path, field in ((CHAT, "messages"), (RESPONSES, "input")):
                assert ignored(send(chat, path, **{field: [message]})) == set() and chat.prompt == plain
    for path, field in ((CHAT, "messages"), (RESPONSES, "input")):
        message = {"role": "user", "content": [{"type": "text", "text": "yes", "annotations": [{}], "cache_control": {"type": "e"}}]}
        assert ignored(send(chat, path, **{field: [message]})) == {f"{field}.0.content.0.annotations", f"{field}.0.content.0.cache_control"}


def test_no_alternatives_without_logprobs_request_nothing(chat: ScriptedChat) -> None:
    assert ignored(send(chat, CHAT, top_logprobs=0, logprobs=False)) == set()
    assert param(send(chat, CHAT, top_logprobs=1)) == "top_logprobs"


STRICT = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}" \
         "{{ raise_exception('System message must be at the beginning.') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
FIRST_ONLY = "{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% endif %}" \
             "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [STRICT, FIRST_ONLY])
def test_several_system_messages_at_the_start_are_one_for_a_template_that_takes_one(tokenizer_folder: Path, template: str) -> None:
    with scripted_chat(tokenizer_folder, template) as chat:
        chat.generate("fine")
        more = [*CODEX["input"], {"role": "assistant", "content": "hi"}, {"role": "user", "content": "go on"}]
        assert send(chat, RESPONSES, instructions=CODEX["instructions"], input=more).status_code == 200
        assert chat.prompt.startswith("[system]You are an agent.\n\nrules\n\nmore rules[user]say hello[assistant]hi[user]go on")
        send(chat, CHAT, messages=[{"role": "system", "content": "be brief"}, *HELLO])
        assert chat.prompt.startswith("[system]be brief[user]hello")


# -- nulls that carry nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, body, names", [
    (CHAT, {"foo": None}, {"foo"}), (RESPONSES, {"foo": None}, {"foo"}), ("/v1/completions", {"prompt": "x", "foo": None}, {"foo"}),
    (CHAT, {"messages": [{**HELLO[0], "foo": None}]}, {"messages.0.foo"}), (CHAT, {"stream": True, "stream_options": {"foo": None}},
                                                                          {"stream_options.foo"}),
    (CHAT, {"messages": [*HELLO, {**CALLED, "tool_calls": [{**CALLED["tool_calls"][0], "thought_signature": None}]}]},
     {"messages.1.tool_calls.0.thought_signature"}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "foo": None}]}]}, {"messages.0.content.0.foo"}),
    (CHAT, {"tools": [{**WEATHER, "foo": None}]}, {"tools.0.foo"}), (RESPONSES, {"tools": [{**FLAT, "foo": None}]}, {"tools.0.foo"}),
    (RESPONSES, {"input": [{**HELLO[0], "foo": None, "status": None}]}, {"input.0.foo"}),
    (RESPONSES, {"text": {"format": {"type": "text", "foo": None}}}, {"text.format.foo"}),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "c", "schema": SCHEMA, "foo": None}}}, {"text.format.foo"}),
    (CHAT, {"response_format": {"type": "text", "foo": None}}, {"response_format.foo"}),
    (RESPONSES, {"input": [*HELLO, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": None}]},
     {"input.1.namespace"}),
])
def test_an_unknown_field_with_null_is_accepted_and_named(chat: ScriptedChat, path: str, body: dict[str, Any], names: set[str]) -> None:
    fields: dict[str, Any] = {"messages": HELLO} if path == CHAT else {} if "prompt" in body else {"input": "hello"}
    assert ignored(httpx.post(chat.live.url + path, json={**fields, **body})) == names
    assert httpx.post(chat.live.url + path, json=json.loads(json.dumps({**fields, **body}).replace("null", "1"))).status_code == 400


def test_a_result_without_content_is_an_empty_text(chat: ScriptedChat) -> None:
    prompts = set()
    call = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": PARIS}
    for content in ("", None, []):
        assert ignored(send(chat, CHAT, messages=[*HELLO, CALLED, {"role": "tool", "tool_call_id": "c", "content": content}])) == set()
        prompts.add(chat.prompt)
        result = {"type": "function_call_output", "call_id": "c", "output": content}
        assert ignored(send(chat, RESPONSES, input=[*HELLO, call, result])) == set()
        prompts.add(chat.prompt)
    assert ignored(send(chat, CHAT, messages=[*HELLO, CALLED, {"role": "tool", "tool_call_id": "c"}])) == set()
    assert len({*prompts, chat.prompt}) == 1


def test_an_answer_without_content_is_accepted_in_responses_too(chat: ScriptedChat) -> None:
    send(chat, CHAT, messages=[*HELLO, {"role": "assistant", "content": None}, *HELLO])
    plain = chat.prompt
    for content in ({"content": None}, {"content": []}, {"content": ""}, {}):
        assert ignored(send(chat, RESPONSES, input=[*HELLO, {"role": "assistant", "type": "message", **content}, *HELLO])) == set()
        assert chat.prompt == plain
    assert param(send(chat, RESPONSES, input=[{"role": "user", "content": None}])) == "input.0.content"
    assert param(send(chat, RESPONSES, input=[{"role": "user"}])) == "input.0.content"


def test_an_input_item_whose_type_is_null_is_a_message(chat: ScriptedChat) -> None:
    send(chat, RESPONSES, input=HELLO)
    plain = chat.prompt
    response = send(chat, RESPONSES, input=[{"type": None, "id": None, **HELLO[0]}])
    assert ignored(response) == set() and chat.prompt == plain
    listed = chat.api.responses.input_items.list(response.json()["id"]).data
    assert listed[0].type == "message" and listed[0].id
