"""Tools and reasoning through the official client, with a scripted engine."""
from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minivllm.engine import chat_prompt
from minivllm.engine.chat_template import ChatTemplate, built_in_template
from minivllm.engine.template_traits import probe
from tests.server.scripted import EOS, LiveServer, ScriptedEngine, scripted_server

MODEL = "org/fake-model"
HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
TOOLS: Any = [WEATHER, CLOCK]
PARIS = '{"city": "Paris"}'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TICK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
THINKING = "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}{{ m.content }}{% endfor %}{{ reasoning_effort }}" \
           "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}<think></think>" \
           "{% elif open %}<think>\n{% endif %}{% endif %}"


@dataclass
class ScriptedChat:
    """A server with a scripted model, and a client for it."""

    engine: ScriptedEngine
    live: LiveServer
    api: openai.OpenAI

    def generate(self, *texts: str, ends: bool = True) -> None:
        """From now on, child c generates texts[c], or the last text if there are fewer."""
        encode = self.engine.tokenizer.encode

        def script(prompt: Any, params: Any, child: int) -> Any:
            stream = self.engine.tokenizer.stream(prompt)
            steps = [((t,), stream.push(t)) for t in encode(texts[min(child, len(texts) - 1)], add_special_tokens=False)]
            return [*steps, ((EOS,), "")] if ends else steps

        self.engine.script = script

    def chat(self, **fields: Any) -> Any:
        return self.api.chat.completions.create(**{"model": MODEL, "messages": HELLO, **fields})

    @property
    def prompt(self) -> str:
        return self.engine.tokenizer.decode(self.engine.seen[-1].prompt)


@contextlib.contextmanager
def scripted_chat(folder: Path, template: str, **settings: Any) -> Iterator[ScriptedChat]:
    engine = ScriptedEngine(folder, max_model_len=2048)
    engine.tokenizer.chat_template = ChatTemplate(template)
    with scripted_server(engine, **settings) as live, openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as api:
        yield ScriptedChat(engine, live, api)


@pytest.fixture(scope="module")
def tools(tokenizer_folder: Path) -> Iterator[ScriptedChat]:
    """A model whose template has tools, in the Hermes format."""
    with scripted_chat(tokenizer_folder, built_in_template("tool_chatml")) as made:
        yield made


@pytest.fixture(scope="module")
def thinker(tokenizer_folder: Path) -> Iterator[ScriptedChat]:
    with scripted_chat(tokenizer_folder, THINKING, reasoning_parser="qwen3", trust_request_chat_template=True) as made:
        yield made


@dataclass
class Joined:
    """The message that a stream's chunks add up to."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]
    finish_reason: str | None


def join(chunks: Any, index: int = 0) -> Joined:
    content = reasoning = ""
    calls: list[dict[str, str]] = []
    finish_reason = None
    for choice in (c for chunk in chunks for c in chunk.choices if c.index == index):
        assert finish_reason is None, "the finish reason is in the last chunk"
        finish_reason = choice.finish_reason
        content += choice.delta.content or ""
        delta_reasoning = (choice.delta.model_extra or {}).get("reasoning")
        assert delta_reasoning == (choice.delta.model_extra or {}).get("reasoning_content")
        reasoning += delta_reasoning or ""
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(calls) and call.type == "function" and call.function.name
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            else:
                assert call.index == len(calls) - 1 and call.function.name is None
            calls[call.index]["arguments"] += call.function.arguments
    assert len({c["id"] for c in calls}) == len(calls)
    return Joined(content, reasoning, [(c["name"], c["arguments"]) for c in calls], finish_reason)


def calls_of(message: Any) -> list[tuple[str, str]]:
    assert all(c.type == "function" and c.id.startswith("call_") for c in message.tool_calls or ())
    return [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]


# -- calls that the model chooses to make -----------------------------------------------------------------------------


def test_the_prompt_contains_the_tools_and_a_call_is_returned_as_a_call(tools: ScriptedChat) -> None:
    tools.generate(CALL)
    choice = tools.chat(tools=TOOLS).choices[0]
    assert calls_of(choice.message) == [("get_weather", PARIS)] and choice.message.content is None
    assert choice.finish_reason == "tool_calls"
    assert json.dumps(WEATHER) in tools.prompt and '"clock"' in tools.prompt
    assert tools.prompt.endswith("<|im_start|>assistant\n")


def test_parallel_calls_and_content_around_them_are_separated_complete_and_streamed(tools: ScriptedChat) -> None:
    tools.generate(f"Let me look. {CALL}\n{TICK}")
    choice = tools.chat(tools=TOOLS, tool_choice="auto").choices[0]
    wanted = [("get_weather", PARIS), ("clock", "{}")]
    assert (choice.message.content, calls_of(choice.message)) == ("Let me look.", wanted)
    streamed = join(tools.chat(tools=TOOLS, stream=True))
    assert streamed == Joined("Let me look.", "", wanted, "tool_calls")


def test_arguments_are_streamed_in_fragments_and_the_name_once(tools: ScriptedChat) -> None:
    tools.generate(CALL)
    deltas = [c for chunk in tools.chat(tools=TOOLS, stream=True) for c in chunk.choices[0].delta.tool_calls or ()]
    assert [d.function.name for d in deltas] == ["get_weather"] + [None] * (len(deltas) - 1)
    assert len(deltas) > 5 and all(d.function.arguments for d in deltas[1:])


def test_the_clients_stream_helper_gets_the_calls(tools: ScriptedChat) -> None:
    tools.generate(f"{CALL}{TICK}")
    with tools.api.chat.completions.stream(model=MODEL, messages=HELLO, tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    assert calls_of(final.choices[0].message) == [("get_weather", PARIS), ("clock", "{}")]


def test_an_answer_without_calls_is_text(tools: ScriptedChat) -> None:
    tools.generate("It is <b>sunny</b>.")
    choice = tools.chat(tools=TOOLS).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It is <b>sunny</b>.", None, "stop")
    assert join(tools.chat(tools=TOOLS, stream=True)) == Joined("It is <b>sunny</b>.", "", [], "stop")


def test_a_call_of_an_unknown_tool_is_content(tools: ScriptedChat) -> None:
    text = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
    tools.generate(text)
    choice = tools.chat(tools=TOOLS).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    tools.generate(CALL)
    assert tools.chat().choices[0].message.content == CALL, "without tools the output is not parsed"


def test_a_call_that_is_cut_off_has_the_finish_reason_length(tools: ScriptedChat) -> None:
    tools.generate(CALL[:CALL.index('"Paris')], ends=False)
    choice = tools.chat(tools=TOOLS).choices[0]
    assert calls_of(choice.message) == [("get_weather", '{"city": ')] and choice.finish_reason == "length"
    assert join(tools.chat(tools=TOOLS, stream=True)) == Joined("", "", [("get_weather", '{"city": ')], "length")


def test_text_that_was_held_back_is_sent_at_the_end(tools: ScriptedChat) -> None:
    tools.generate("2 <tool_c")
    assert tools.chat(tools=TOOLS).choices[0].message.content == "2 <tool_c"
    assert join(tools.chat(tools=TOOLS, stream=True)).content == "2 <tool_c"


def test_without_parallel_calls_only_the_first_is_returned(tools: ScriptedChat) -> None:
    tools.generate(f"{CALL}{TICK}")
    assert calls_of(tools.chat(tools=TOOLS, parallel_tool_calls=False).choices[0].message) == [("get_weather", PARIS)]
    assert join(tools.chat(tools=TOOLS, parallel_tool_calls=False, stream=True)).calls == [("get_weather", PARIS)]


def test_with_tool_choice_none_the_prompt_has_no_tools(tools: ScriptedChat) -> None:
    tools.generate(CALL)
    choice = tools.chat(tools=TOOLS, tool_choice="none").choices[0]
    assert choice.message.content == CALL and choice.message.tool_calls is None and "clock" not in tools.prompt


def test_several_choices_are_parsed_separately_with_log_probabilities(tools: ScriptedChat) -> None:
    tools.generate(CALL, "No need.", f"So: {TICK}")
    wanted = [(None, [("get_weather", PARIS)], "tool_calls"), ("No need.", [], "stop"), ("So:", [("clock", "{}")], "tool_calls")]
    fields: dict[str, Any] = {"tools": TOOLS, "n": 3, "logprobs": True, "top_logprobs": 1, "extra_body": {"return_token_ids": True}}
    whole = tools.chat(**fields)
    assert [(c.message.content, calls_of(c.message), c.finish_reason) for c in whole.choices] == wanted
    chunks = list(tools.chat(**fields, stream=True, stream_options={"include_usage": True}))
    for i, (content, calls, reason) in enumerate(wanted):
        assert join(chunks, i) == Joined(content or "", "", calls, reason)
        own = [c for chunk in chunks for c in chunk.choices if c.index == i]
        entries = [e for c in own if c.logprobs for e in c.logprobs.content or ()]
        assert entries == whole.choices[i].logprobs.content and len(entries) > 3
        assert [t for c in own for t in (c.model_extra or {}).get("token_ids", ())] == whole.choices[i].model_extra["token_ids"]
    assert chunks[-1].usage == whole.usage


# -- enforced calls ---------------------------------------------------------------------------------------------------


def test_required_calls_are_enforced_by_a_grammar_of_all_parameters(tools: ScriptedChat) -> None:
    tools.generate('[{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "clock", "parameters": {}}]')
    wanted = [("get_weather", PARIS), ("clock", "{}")]
    choice = tools.chat(tools=TOOLS, tool_choice="required").choices[0]
    assert (choice.message.content, calls_of(choice.message), choice.finish_reason) == (None, wanted, "tool_calls")
    assert join(tools.chat(tools=TOOLS, tool_choice="required", stream=True)) == Joined("", "", wanted, "tool_calls")
    structure = tools.engine.seen[-1].params.structured_outputs
    assert structure is not None and structure.kind == "json"
    schema = json.loads(str(structure.json))
    assert [call["properties"]["name"]["enum"] for call in schema["items"]["anyOf"]] == [["get_weather"], ["clock"]]
    assert schema["items"]["anyOf"][0]["properties"]["parameters"] == WEATHER["function"]["parameters"]
    assert schema["minItems"] == 1 and "maxItems" not in schema
    tools.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert '"maxItems":1' in str(tools.engine.seen[-1].params.structured_outputs)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_a_choice_among_some_of_the_tools_hides_the_others(tools: ScriptedChat) -> None:
    tools.generate(f"So: {TICK}")
    choice = tools.chat(tools=TOOLS, tool_choice=allowed("auto", "clock")).choices[0]
    assert calls_of(choice.message) == [("clock", "{}")] and "clock" in tools.prompt and "get_weather" not in tools.prompt
    tools.generate('[{"name": "clock", "parameters": {}}]')
    assert calls_of(tools.chat(tools=TOOLS, tool_choice=allowed("required", "clock")).choices[0].message) == [("clock", "{}")]
    assert "get_weather" not in str(tools.engine.seen[-1].params.structured_outputs)
    response = tools.api.responses.create(model=MODEL, input="hi", tools=[{"type": "function", **tool["function"]} for tool in TOOLS],
                                             tool_choice={"type": "allowed_tools", "mode": "required",
                                                          "tools": [{"type": "function", "name": "clock"}]})
    assert [item.name for item in response.output if item.type == "function_call"] == ["clock"]


@pytest.mark.parametrize(("choice", "param"), [
    (allowed("auto", "clok"), "tool_choice.allowed_tools.tools.0"), (allowed("auto"), "tool_choice.allowed_tools.tools"),
    (allowed("none", "clock"), "tool_choice.allowed_tools.mode"), ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
    ({**allowed("auto", "clock"), "x": 1}, "tool_choice.allowed_tools"),
])
def test_a_wrong_choice_among_some_of_the_tools_is_refused(tools: ScriptedChat, choice: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tools.chat(tools=TOOLS, tool_choice=choice)
    assert caught.value.param == param


ARRAY = '[\n{\n "name": "get_weather", "parameters": {"city": "Paris"}},\n{"name": "clock", "parameters": {}}]'


@pytest.mark.parametrize("fields", [{}, {"parallel_tool_calls": False}, {"stop": ["clock"]}, {"n": 2}], ids=str)
def test_the_form_of_required_calls_is_never_content_wherever_they_are_cut(tools: ScriptedChat, fields: Any) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", **fields}
    for end in range(0, len(ARRAY), 3):
        tools.generate(ARRAY[:end], ends="stop" in fields)
        choice = tools.chat(**fields).choices[-1]
        assert choice.message.content is None
        assert choice.finish_reason == ("length" if "stop" not in fields else "tool_calls" if choice.message.tool_calls else "stop")
        chunks = list(tools.chat(**fields, stream=True))
        assert all(c.delta.content is None for chunk in chunks for c in chunk.choices), "in the first chunk too"
        assert join(chunks, choice.index).calls == calls_of(choice.message)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_named_call_that_is_cut_has_no_content(tools: ScriptedChat, legacy: bool) -> None:
    fields: dict[str, Any] = {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}} if legacy else {
        "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    for text in ("", '{"ci'):
        tools.generate(text, ends=False)
        assert tools.chat(**fields).choices[0].message.content is None
        assert all(c.delta.content is None for chunk in tools.chat(**fields, stream=True) for c in chunk.choices)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}, "auto"], ids=str)
def test_the_server_accepts_the_calls_that_it_has_cut_off(tools: ScriptedChat, choice: Any) -> None:
    """Whatever an answer was, the next turn of its conversation is possible."""
    text = ARRAY if choice == "required" else CALL if choice == "auto" else PARIS
    for end in range(0, len(text), 5):
        tools.generate(text[:end], ends=False)
        message = tools.chat(tools=TOOLS, tool_choice=choice).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "1"} for call in message.tool_calls or ()]
        for sent in (message.model_dump(), message.model_dump(exclude_none=True)):
            tools.chat(tools=TOOLS, messages=[*HELLO, sent, *results, *HELLO])
        for call in message.tool_calls or ():
            assert call.function.arguments in tools.prompt or json.dumps(call.function.arguments)[1:-1] in tools.prompt


@pytest.mark.parametrize("legacy", [False, True])
def test_the_output_for_a_named_function_is_its_arguments_and_finishes_with_stop(tools: ScriptedChat, legacy: bool) -> None:
    tools.generate(PARIS)
    fields: dict[str, Any] = {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}} if legacy else {
        "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    choice = tools.chat(**fields).choices[0]
    called = choice.message.function_call if legacy else choice.message.tool_calls[0].function
    assert (called.name, called.arguments, choice.message.content, choice.finish_reason) == ("get_weather", PARIS, None, "stop")
    assert json.loads(str(tools.engine.seen[-1].params.structured_outputs.json)) == WEATHER["function"]["parameters"]
    if not legacy:
        assert join(tools.chat(**fields, stream=True)) == Joined("", "", [("get_weather", PARIS)], "stop")


def test_a_strict_schema_is_enforced_by_a_grammar_in_every_format(tools: ScriptedChat, tokenizer_folder: Path) -> None:
    strict: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    tools.generate('[{"name": "get_weather", "parameters": {"city": "Paris"}}]')
    assert calls_of(tools.chat(tools=[strict], tool_choice="required").choices[0].message) == [("get_weather", PARIS)]
    tools.generate(CALL)
    assert calls_of(tools.chat(tools=[strict, CLOCK]).choices[0].message) == [("get_weather", PARIS)]
    assert tools.engine.seen[-1].params.structured_outputs.kind == "grammar"
    for name, text in WRITTEN.items():
        with scripted_chat(tokenizer_folder, BARE, tool_call_parser=name) as made:
            made.generate(text)
            assert calls_of(made.chat(tools=[CLOCK, strict]).choices[0].message) == [("get_weather", PARIS), ("clock", "{}")]
            assert made.engine.seen[-1].params.structured_outputs.kind == "grammar"


def test_the_clients_parse_helper_which_needs_strict_tools_works(tools: ScriptedChat) -> None:
    import pydantic

    class GetWeather(pydantic.BaseModel):
        city: str

    tools.generate(CALL)
    parsed = tools.api.chat.completions.parse(
        model=MODEL, messages=HELLO, tools=[openai.pydantic_function_tool(GetWeather, name="get_weather")],
    ).choices[0].message.tool_calls
    assert parsed is not None and parsed[0].function.parsed_arguments == GetWeather(city="Paris")


PERSON: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": {
    "type": "object", "properties": {"name": {"type": "string"}, "note": {"type": "string"}}, "required": ["name"]}}}
TAGGED = '{"name": "clock", "note": "<tool_call>{\\"name\\": \\"clock\\"}</tool_call> <|python_tag|>{} [clock()]"}'
WRITTEN = {"hermes": f"{CALL}\n{TICK}", "pythonic": '[get_weather(city="Paris"), clock()]',
           "llama3_json": '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "clock", "parameters": {}}'}


@pytest.mark.parametrize("form", [PERSON, {"type": "json_object"}], ids=["schema", "object"])
@pytest.mark.parametrize("call_format", WRITTEN)
def test_with_a_response_format_the_output_is_either_calls_or_text_of_that_format(
    tokenizer_folder: Path, call_format: str, form: Any,
) -> None:
    """Agent libraries send both with every request. The text may look like a call."""
    with scripted_chat(tokenizer_folder, BARE, tool_call_parser=call_format) as made:
        wanted = [("get_weather", PARIS), ("clock", "{}")]
        for parallel in (True, False):
            fields: Any = {"tools": TOOLS, "response_format": form, "parallel_tool_calls": parallel}
            made.generate(WRITTEN[call_format])
            choice = made.chat(**fields).choices[0]
            assert (choice.message.content, calls_of(choice.message), choice.finish_reason) == (None, wanted[:1 + parallel], "tool_calls")
            assert join(made.chat(**fields, stream=True)) == Joined("", "", wanted[:1 + parallel], "tool_calls")
            made.generate(TAGGED)
            choice = made.chat(**fields).choices[0]
            assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (TAGGED, None, "stop")
            assert join(made.chat(**fields, stream=True)) == Joined(TAGGED, "", [], "stop")
            assert made.engine.seen[-1].params.structured_outputs.kind == "grammar"


def test_with_required_calls_the_response_format_waits_for_a_turn_without(tools: ScriptedChat) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice, text in (("required", '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'), (named, PARIS)):
        tools.generate(text)
        message = tools.chat(tools=TOOLS, tool_choice=choice, response_format=PERSON).choices[0].message
        assert calls_of(message) == [("get_weather", PARIS)]
        assert '"note"' not in str(tools.engine.seen[-1].params.structured_outputs.json)
    tools.chat(tools=TOOLS, tool_choice="none", response_format=PERSON)
    assert '"note"' in str(tools.engine.seen[-1].params.structured_outputs.json)


def test_a_structure_that_cannot_stand_beside_calls_is_refused(tools: ScriptedChat) -> None:
    with pytest.raises(openai.BadRequestError, match="send no tools") as refused:
        tools.chat(tools=TOOLS, extra_body={"structured_outputs": {"regex": "a+"}})
    assert refused.value.param == "structured_outputs.regex"
    tools.generate("yes")
    assert tools.chat(tools=TOOLS, extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content == "yes"


def test_references_in_the_schemas_of_several_tools_refer_to_their_own_tool(tools: ScriptedChat) -> None:
    """The grammar's schema contains the schemas of all tools, and "#" must still refer to the tool's own."""
    def tool(name: str, properties: Any, **more: Any) -> Any:
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties, **more}}}

    def schema_of(*sent: Any) -> Any:
        tools.generate('[{"name": "a", "parameters": {}}]')
        tools.chat(tools=list(sent), tool_choice="required")
        return json.loads(str(tools.engine.seen[-1].params.structured_outputs.json))

    schema = schema_of(
        tool("a", {"x": {"$ref": "#/$defs/X"}}, **{"$defs": {"X": {"type": "integer"}}}),
        tool("b", {"x": {"$ref": "#/$defs/X"}}, **{"$defs": {"X": {"type": "string"}}}),
        tool("c", {"tree": {"$ref": "#"}, "$ref": {"const": {"$ref": "#"}}}, **{"$id": "https://example.org/c"}),
        tool("d", {"plain": {"type": "null"}}))
    parts = [call["properties"]["parameters"] for call in schema["items"]["anyOf"]]
    assert parts[:3] == [{"$ref": f"#/$defs/tool{i}"} for i in range(3)] and parts[3]["properties"] == {"plain": {"type": "null"}}
    assert schema["$defs"]["tool0"]["properties"] == {"x": {"$ref": "#/$defs/tool0/$defs/X"}}
    assert schema["$defs"]["tool1"]["$defs"] == {"X": {"type": "string"}}
    assert schema["$defs"]["tool2"]["properties"] == {"tree": {"$ref": "#/$defs/tool2"}, "$ref": {"const": {"$ref": "#"}}}
    assert "$id" not in schema["$defs"]["tool2"]


@pytest.mark.parametrize("depth", [900, 1400, 60_000])
def test_arguments_that_are_nested_deep_are_written_or_refused(tools: ScriptedChat, depth: int) -> None:
    function = {"name": "f", "arguments": '{"a":' + "[" * depth + "]" * depth + "}"}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    response = httpx.post(tools.live.url + "/v1/chat/completions", json={"messages": [*HELLO, called]})
    assert response.status_code == 200 or any(why in response.text for why in ("context length", "nested too deep")), response.text


# -- calls and results sent back --------------------------------------------------------------------------------------


def test_a_message_with_calls_can_be_sent_back_unchanged_with_the_results(tools: ScriptedChat) -> None:
    tools.generate(f"Let me look. {CALL}{TICK}")
    answer = tools.chat(tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": f"result {i}"} for i, call in enumerate(answer.tool_calls)]
    tools.generate("Sunny.")
    tools.chat(tools=TOOLS, messages=[*HELLO, answer.model_dump(), *results])
    assert f"<|im_start|>assistant\nLet me look.\n{CALL}\n{TICK}<|im_end|>\n" in tools.prompt
    responses = "\n".join(f"<tool_response>\nresult {i}\n</tool_response>" for i in range(2))
    assert f"<|im_start|>user\n{responses}<|im_end|>\n" in tools.prompt


def test_templates_get_arguments_as_objects_and_results_with_the_name_of_their_function(tokenizer_folder: Path) -> None:
    with scripted_chat(tokenizer_folder, "{{ messages | tojson }}{{ tools }}") as made:
        messages: Any = [*HELLO, {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}, "index": 0},
            {"id": "b", "type": "function", "function": {"name": "clock", "arguments": ""}},
        ]}, {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "noon"}]}]
        made.chat(messages=messages, tools=TOOLS, tool_choice="none")
        written = json.JSONDecoder().raw_decode(made.prompt)[0]
        assert written[1]["content"] is None and [c["function"]["arguments"] for c in written[1]["tool_calls"]] == [{"city": "Paris"}, {}]
        assert written[2] == {"role": "tool", "content": "noon", "tool_call_id": "b", "name": "clock"}
        assert made.prompt.endswith("None"), "tool_choice none: no tools"


# -- the older fields functions and function_call ---------------------------------------------------------------------


def test_functions_are_answered_in_their_own_form_which_can_be_sent_back(tools: ScriptedChat) -> None:
    functions: Any = [WEATHER["function"]]
    tools.generate(f"{CALL}{CALL}")
    choice = tools.chat(functions=functions, function_call="auto").choices[0]
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None and choice.message.content is None
    assert (choice.message.function_call.name, choice.message.function_call.arguments) == ("get_weather", PARIS)
    deltas = [c.choices[0].delta.function_call for c in tools.chat(functions=functions, stream=True) if c.choices[0].delta.function_call]
    assert [d.name for d in deltas] == ["get_weather"] + [None] * (len(deltas) - 1)
    assert "".join(d.arguments for d in deltas) == PARIS
    result = {"role": "function", "name": "get_weather", "content": "sunny"}
    tools.chat(functions=functions, messages=[*HELLO, choice.message.model_dump(), result])
    assert CALL in tools.prompt and "<tool_response>\nsunny\n" in tools.prompt


# -- the format of calls ----------------------------------------------------------------------------------------------

BARE = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}{{ tools }}"


@pytest.mark.parametrize("name, text", [
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "clock", "parameters": {}}'),
    ("pythonic", "[get_weather(city='Paris'), clock()]"),
    ("hermes", CALL + TICK),
])
def test_the_format_can_be_set(tokenizer_folder: Path, name: str, text: str) -> None:
    with scripted_chat(tokenizer_folder, BARE, tool_call_parser=name, enable_auto_tool_choice=True) as made:
        made.generate(text)
        wanted = [("get_weather", PARIS), ("clock", "{}")]
        assert calls_of(made.chat(tools=TOOLS).choices[0].message) == wanted
        assert join(made.chat(tools=TOOLS, stream=True)).calls == wanted


def test_auto_can_be_turned_off(tokenizer_folder: Path) -> None:
    with scripted_chat(tokenizer_folder, built_in_template("tool_chatml"), enable_auto_tool_choice=False) as made:
        with pytest.raises(openai.BadRequestError, match="--enable-auto-tool-choice"):
            made.chat(tools=TOOLS)
        made.chat(tools=TOOLS, tool_choice="none")


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template, why", [(PLAIN, "no place for tools"), (BARE, "none of hermes")])
def test_tools_work_with_a_template_without_them_or_with_an_unknown_format(
    tokenizer_folder: Path, template: str, why: str, caplog: pytest.LogCaptureFixture,
) -> None:
    """Auto, required and named choices, calls and results: described by a generic prompt in the Hermes format."""
    caplog.set_level("INFO", "minivllm.server.chat")
    wanted = [("get_weather", PARIS)]
    with scripted_chat(tokenizer_folder, template) as made:
        assert not caplog.records
        made.generate(f"Let me look. {CALL}")
        choice = made.chat(tools=TOOLS).choices[0]
        assert (choice.message.content, calls_of(choice.message), choice.finish_reason) == ("Let me look.", wanted, "tool_calls")
        assert join(made.chat(tools=TOOLS, stream=True)) == Joined("Let me look.", "", wanted, "tool_calls")
        assert json.dumps(WEATHER) in made.prompt and '"clock"' in made.prompt
        results = [{"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sunny"}]
        made.generate("Sunny.")
        made.chat(tools=TOOLS, messages=[*HELLO, choice.message.model_dump(), *results])
        assert f"Let me look.\n{CALL}" in made.prompt and "<tool_response>\nsunny\n</tool_response>" in made.prompt
        made.generate('[{"name": "get_weather", "parameters": {"city": "Paris"}}]')
        assert calls_of(made.chat(tools=TOOLS, tool_choice="required").choices[0].message) == wanted
        made.generate(PARIS)
        named: Any = {"type": "function", "function": {"name": "get_weather"}}
        assert calls_of(made.chat(tools=TOOLS, tool_choice=named).choices[0].message) == wanted
        assert "Weather of a city" in made.prompt
        made.chat(tools=TOOLS, tool_choice="none")
        assert "clock" not in made.prompt
    (record,) = caplog.records
    assert "format hermes, described by a generic prompt" in record.message and why in record.message


@pytest.mark.parametrize("template, settings, says", [
    (PLAIN, {}, "format hermes, described by a generic prompt: the chat template has no place for tools"),
    (PLAIN, {"tool_call_parser": "pythonic"}, "format pythonic, described by a generic prompt: the chat template has no place for tools"),
    (built_in_template("tool_chatml"), {}, "format hermes, as the chat template shows"),
    (BARE, {"tool_call_parser": "llama3_json"}, "format llama3_json, set by --tool-call-parser"),
])
def test_the_format_of_calls_is_logged_at_the_start_with_the_flag_that_turns_auto_on(
    tokenizer_folder: Path, template: str, settings: Any, says: str, caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "minivllm.server.chat")
    with scripted_chat(tokenizer_folder, template, enable_auto_tool_choice=True, **settings):
        assert [record.message for record in caplog.records] == [f"tool calls: {says}"]


@pytest.mark.parametrize("name, text", [
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}'),
    ("pythonic", "[get_weather(city='Paris')]"), ("hermes", CALL),
])
def test_a_parser_that_is_set_without_a_template_for_tools_describes_its_format(tokenizer_folder: Path, name: str, text: str) -> None:
    with scripted_chat(tokenizer_folder, PLAIN, tool_call_parser=name) as made:
        made.generate(text)
        message = made.chat(tools=TOOLS).choices[0].message
        assert calls_of(message) == [("get_weather", PARIS)]
        made.chat(tools=TOOLS, messages=[*HELLO, message.model_dump(), {"role": "tool", "content": "sunny"}, *HELLO])
        assert f"<assistant>{text}<user><tool_response>\nsunny\n</tool_response>\nhello" in made.prompt, "the model sees what it wrote"


def test_markers_that_are_special_tokens_reach_the_parser(tokenizer_folder: Path) -> None:
    from tokenizers import AddedToken

    from minivllm.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_folder)
    tokenizer._backend.add_special_tokens([AddedToken("<tool_call>", special=True)])
    tokenizer._special_ids |= {tokenizer._backend.token_to_id("<tool_call>")}
    engine = ScriptedEngine(tokenizer_folder, max_model_len=2048)
    engine.tokenizer = tokenizer
    tokenizer.chat_template = ChatTemplate(built_in_template("tool_chatml"))
    with scripted_server(engine) as live:
        httpx.post(live.url + "/v1/chat/completions", json={"messages": HELLO, "tools": TOOLS})
        assert engine.seen[-1].params.skip_special_tokens is False
        httpx.post(live.url + "/v1/chat/completions", json={"messages": HELLO})
        assert engine.seen[-1].params.skip_special_tokens is True


# -- reasoning --------------------------------------------------------------------------------------------------------


def test_reasoning_is_separated_complete_and_streamed(thinker: ScriptedChat) -> None:
    thinker.generate("<think>\nHm. Yes.\n</think>\n\nParis.")
    message = thinker.chat().choices[0].message
    assert message.content == "Paris." and message.model_extra["reasoning"] == message.model_extra["reasoning_content"] == "Hm. Yes."
    assert join(thinker.chat(stream=True)) == Joined("Paris.", "Hm. Yes.", [], "stop")


def test_with_a_template_that_opens_the_tag_the_output_starts_with_reasoning(thinker: ScriptedChat) -> None:
    thinker.generate("Hm.</think>Paris.")
    fields: Any = {"extra_body": {"chat_template_kwargs": {"open": True}}}
    message = thinker.chat(**fields).choices[0].message
    assert (message.content, message.model_extra["reasoning"]) == ("Paris.", "Hm.")
    assert join(thinker.chat(stream=True, **fields)) == Joined("Paris.", "Hm.", [], "stop")
    thinker.generate("Hm, cut", ends=False)
    choice = thinker.chat(**fields).choices[0]
    assert (choice.message.content, choice.message.model_extra["reasoning"], choice.finish_reason) == (None, "Hm, cut", "length")


@pytest.mark.parametrize("content", ["", None, "Pa"])
@pytest.mark.parametrize("writes_reasoning", [True, False])
def test_a_cut_answer_is_continued_where_it_ended_also_in_its_reasoning(
    thinker: ScriptedChat, content: str | None, writes_reasoning: bool,
) -> None:
    template = "{% for m in messages %}[{{ m.role }}]"
    template += "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}" if writes_reasoning else ""
    fields: Any = {"messages": [*HELLO, {"role": "assistant", "content": content, "reasoning": "Hm, cut"}],
                   "extra_body": {"chat_template": template + "{{ m.content }}{% endfor %}", "continue_final_message": True}}
    thinker.generate("ris." if content else " off.</think>Paris.")
    message = thinker.chat(**fields).choices[0].message
    assert (message.content, message.model_extra["reasoning"]) == (("ris.", None) if content else ("Paris.", " off."))
    ends = "<think>\nHm, cut" if not content else "<think>\nHm, cut\n</think>\nPa" if writes_reasoning else "[assistant]Pa"
    assert thinker.prompt.endswith(ends)


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none", "extra_body": {"chat_template": THINKING.replace("_effort", "")}},
                                    {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}], ids=["effort", "kwargs"])
def test_with_thinking_turned_off_the_whole_output_is_the_answer(thinker: ScriptedChat, fields: Any) -> None:
    thinker.generate("Paris.</think>")
    assert thinker.chat(**fields).choices[0].message.content == "Paris.</think>"
    assert thinker.prompt.endswith("<think></think>")


def test_a_structure_applies_to_the_answer_and_not_to_the_reasoning(thinker: ScriptedChat) -> None:
    form: Any = {"type": "json_object"}
    thinker.generate('<think>{</think>{"a": 1}')
    message = thinker.chat(response_format=form).choices[0].message
    assert (message.content, message.model_extra["reasoning"]) == ('{"a": 1}', "{")
    assert thinker.engine.seen[-1].params.structured_outputs.kind == "grammar"
    thinker.chat(response_format=form, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert thinker.engine.seen[-1].params.structured_outputs.kind == "json_object"
    with pytest.raises(openai.BadRequestError, match="enable_thinking"):
        thinker.chat(extra_body={"structured_outputs": {"regex": "a+"}})


def test_reasoning_can_be_left_out(thinker: ScriptedChat) -> None:
    thinker.generate("<think>Hm.</think>Paris.")
    message = thinker.chat(extra_body={"include_reasoning": False}).choices[0].message
    assert (message.content, message.model_extra["reasoning"]) == ("Paris.", None)
    assert join(thinker.chat(stream=True, extra_body={"include_reasoning": False})) == Joined("Paris.", "", [], "stop")


def test_the_template_gets_the_effort_and_earlier_reasoning(thinker: ScriptedChat) -> None:
    messages: Any = [*HELLO, {"role": "assistant", "content": "a", "reasoning": "because "}, *HELLO]
    thinker.generate("x")
    thinker.chat(messages=messages, reasoning_effort="low")
    assert thinker.prompt == "[user]hello[assistant]because a[user]hellolow[assistant]"


def test_template_variables_that_the_template_does_not_use_are_named_as_ignored(thinker: ScriptedChat) -> None:
    body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinkin": False, "open": False}}
    response = httpx.post(thinker.live.url + "/v1/chat/completions", json=body)
    assert response.headers["x-minivllm-ignored"] == "chat_template_kwargs.enable_thinkin"


def test_reasoning_that_the_template_does_not_use_is_named_as_ignored(tools: ScriptedChat) -> None:
    body = {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}, *HELLO]}
    response = httpx.post(tools.live.url + "/v1/chat/completions", json=body)
    assert response.headers["x-minivllm-ignored"] == "messages.0.reasoning_content"


def test_a_request_may_have_a_template_if_the_server_trusts_its_clients(thinker: ScriptedChat, tools: ScriptedChat) -> None:
    thinker.generate("x")
    thinker.chat(extra_body={"chat_template": "mine: {{ messages[0].content }}"})
    assert thinker.prompt == "mine: hello"
    with pytest.raises(openai.BadRequestError, match="not valid Jinja"):
        thinker.chat(extra_body={"chat_template": "{% if"})
    with pytest.raises(openai.BadRequestError, match="--trust-request-chat-template"):
        tools.chat(extra_body={"chat_template": "mine"})


def test_reasoning_and_calls_are_parsed_together_and_reasoning_contains_no_calls(tokenizer_folder: Path) -> None:
    with scripted_chat(tokenizer_folder, built_in_template("tool_chatml"), reasoning_parser="deepseek_r1") as made:
        made.generate(f"I could {TICK}, but\n</think>\n\nSo: {CALL}")
        choice = made.chat(tools=TOOLS).choices[0]
        assert choice.message.model_extra["reasoning"] == f"I could {TICK}, but"
        assert (choice.message.content, calls_of(choice.message)) == ("So:", [("get_weather", PARIS)])
        assert join(made.chat(tools=TOOLS, stream=True)) == Joined("So:", f"I could {TICK}, but", [("get_weather", PARIS)], "tool_calls")


@pytest.mark.parametrize("with_tools", [False, True])
def test_the_event_loop_does_not_wait_while_a_new_template_is_tried(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, with_tools: bool,
) -> None:
    on_loop: list[bool] = []

    def spy(*args: Any) -> Any:
        on_loop.append(asyncio._get_running_loop() is not None)
        return probe(*args)

    monkeypatch.setattr(chat_prompt, "probe", spy)
    new = f"{{# new {with_tools} #}}" + built_in_template("tool_chatml")
    with scripted_chat(tokenizer_folder, new, trust_request_chat_template=True) as made:
        made.generate("Hi.")
        fields: Any = {"tools": TOOLS} if with_tools else {}
        made.chat(**fields)
        made.chat(**fields, extra_body={"chat_template": new + " "})
        made.chat(tools=TOOLS)
    assert len(on_loop) >= 2 and not any(on_loop)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_reach_the_model_where_the_template_writes_them_beside_a_system_message_only(tokenizer_folder: Path, choice: str) -> None:
    source = ("{% if messages[0].role == 'system' %}{{ messages[0].content }}"
              "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}{% endif %}"
              "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    with scripted_chat(tokenizer_folder, source) as made:
        made.generate(CALL if choice == "auto" else '[{"name": "get_weather", "parameters": {"city": "Paris"}}]')
        answer = made.chat(tools=TOOLS, tool_choice=choice).choices[0].message
        assert "Weather of a city" in made.prompt and '"clock"' in made.prompt
    assert [call.function.name for call in answer.tool_calls] == ["get_weather"]
