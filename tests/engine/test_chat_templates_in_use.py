# ruff: noqa: E501  templates are easier to compare if each turn is a line
"""Chat templates in the styles of well-known models: each gets conversations in the form that it can write, and loses nothing.

The templates are short ones written here. Each has the traits of its family: how it reads content, calls, ids and roles.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.engine.chat_prompt import ChatOptions, takes_tools, template_traits, write_chat
from minivllm.engine.chat_template import ChatTemplate, built_in_template
from minivllm.errors import InvalidInput

# content as text, tools and calls in the Hermes format (Qwen 2.5 and 3, Hermes)
QWEN = """{%- if tools %}<system>{{ messages[0].content if messages[0].role == 'system' }}
{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% elif messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}
{%- for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}<{{ m.role }}>{{ m.content }}
{%- elif m.role == 'assistant' %}<assistant>{% if '</think>' in (m.content or '') %}{{ m.content.split('</think>')[-1] }}
{%- elif m.content %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>
{%- endfor %}{% elif m.role == 'tool' %}<user><tool_response>{{ m.content }}</tool_response>{% endif %}{% endfor %}"""
# one call in a message, trimmed content, results in the role ipython (Llama 3.1)
LLAMA = """{{- bos_token }}{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif %}<assistant>{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{
m.tool_calls[0].function.arguments | tojson }}}{% elif m.role in ['tool', 'ipython'] %}<ipython>{{ m.content | tojson }}
{%- else %}<{{ m.role }}>{% if tools and m.role == 'user' and loop.index0 < 2 %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{{ m.content | trim }}{% endif %}{% endfor %}"""
# ids of nine letters or digits, system text only in front of the last user message (Mistral Nemo)
NEMO = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}
{%- endif %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}{% if loop.last and system is defined %}[INST]{{ system + '\n\n' + m.content }}[/INST]
{%- else %}[INST]{{ m.content }}[/INST]{% endif %}{% elif m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS][{% for c in m.tool_calls %}
{%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + ', "id": "' + c.id + '"}' }}{% endfor %}]
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{% elif m.role == 'tool' %}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}
{{- '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}' }}{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}
{%- endfor %}{% if tools %}[AVAILABLE_TOOLS]{% for t in tools %}{{ t.function | tojson }}{% endfor %}{% endif %}"""
# no system role, strict alternation (Gemma)
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"""
# tests `content is none` for calls, concatenates arguments as text (DeepSeek)
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<User>' + m.content }}
{%- elif m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}{{ '<call>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}
{%- elif m.role == 'assistant' %}{{ '<Assistant>' + m.content.split('</think>')[-1] }}{% elif m.role == 'tool' %}{{ '<output>' + m.content }}{% endif %}{% endfor %}"""
# iterates over parts (LLaVA and other multimodal templates)
PARTS = """{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"""
# parts for users, text for the system (mixed)
MIXED = """{% for m in messages %}{% if m.role == 'user' %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
{%- else %}{{ m.content + '|' }}{% endif %}{% endfor %}"""
# takes both (Llama 3.2 vision, SmolVLM)
EITHER = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"""
# ChatML without tools (SmolLM2, Phi)
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# arguments as XML parameters of a mapping (Qwen 3 Coder, GLM)
XML = """{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>
{%- for name, value in c.function.arguments.items() %}<parameter={{ name }}>{{ value }}</parameter>{% endfor %}</function>{% endfor %}{% endfor %}"""
# no `tool_calls is defined`: null would be iterated over; prints content without looking (functionary, Granite)
GRANITE = """{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}{% if 'tool_calls' in m %}
{%- for c in m.tool_calls %}<|tool_call|>{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{% endif %}{% endfor %}"""
# leaves out the roles that it does not know (Command-R's style of branches)
COHERE = """{% for m in messages %}{% if m.role == 'user' %}<USER>{{ m.content }}{% elif m.role == 'assistant' %}<CHATBOT>{{ m.content }}{% endif %}{% endfor %}"""
# alternation of the messages without calls and results; text beside calls is left out; ids of at least nine characters (Mistral Small)
SMALL = """{%- if messages[0].role == 'system' %}[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT]{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}{% set ns = namespace(n=0) %}{% for m in turns %}
{%- if m.role != 'tool' and not m.get('tool_calls') %}{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% set ns.n = ns.n + 1 %}{% endif %}
{%- if m.role == 'user' %}{% if tools is not none and m == users[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls is defined %}[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length < 9 %}{{ raise_exception('too short') }}{% endif %}{{ (c.function | tojson)[:-1] + ', "id": "' + c.id[-9:] + '"}' }}{% endfor %}]
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{% elif m.role == 'tool' %}{% if m.tool_call_id | length < 9 %}{{ raise_exception('too short') }}{% endif %}[TOOL_RESULTS]{{ m.content | string + m.tool_call_id[-9:] }}
{%- endif %}{% endfor %}"""
# `tools is defined` instead of `if tools`: it must be absent, not null (a Phi 4 mini template)
PHI = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% elif tools is defined %}{% set system = '' %}{% endif %}
{%- if system is defined %}<|system|>{{ system }}{% if tools is defined %}{% for t in tools %}<|tool|>{{ t.function | tojson }}<|/tool|>{% endfor %}{% endif %}<|end|>{% endif %}
{%- for m in messages %}{% if m.role == 'tool' %}<|tool_response|>{{ m.content | tojson }}<|end|>{% elif m.role != 'system' %}<|{{ m.role }}|>{% if m.content %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls %}<|tool_call|>{{ c.function | tojson }}<|/tool_call|>{% endfor %}<|end|>{% endif %}{% endfor %}"""
# tools, but no earlier calls; null content is iterated over (Kimi K2)
KIMI = """{% if tools %}<|im_system|>{{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"""
ALL = {"small": SMALL, "phi": PHI, "kimi": KIMI, "qwen": QWEN, "llama": LLAMA, "nemo": NEMO, "gemma": GEMMA, "deepseek": DEEPSEEK, "parts": PARTS, "mixed": MIXED, "either": EITHER,
       "chatml": CHATML, "xml": XML, "granite": GRANITE, "cohere": COHERE, "tool_chatml": built_in_template("tool_chatml")}

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
USER = {"role": "user", "content": "How is the weather?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def call(call_id: str = "call_0123456789abcdef01234567", city: str = "Paris", arguments: str | None = None) -> dict[str, Any]:
    text = json.dumps({"city": city}) if arguments is None else arguments
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": text}}


def assistant(*calls: Any, content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), "refusal": None, "name": None}


def result(call_id: str = "call_0123456789abcdef01234567", content: str = "sunny") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def write(source: str, messages: Sequence[Any], tools: Any = None, tool_use: str | None = None, **options: Any) -> str:
    return write_chat(ChatTemplate(source, tool_use), messages, ChatOptions(
        tools=tools or (), variables={"bos_token": "<s>", "eos_token": "</s>"}, **options))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("with_tools", [False, True])
def test_every_template_writes_every_text_of_a_conversation_with_tools(name: str, with_tools: bool) -> None:
    """System message, question, call, result, answer, question: whatever the template takes or refuses."""
    messages = [SYSTEM, USER, assistant(call()), result(), {"role": "assistant", "content": "It is fine."}, {"role": "user", "content": "And Rome?"}]
    for chat in (messages, messages[1:], messages[:4]):
        for form in ("text", "parts"):
            sent = [{**m, "content": [{"type": "text", "text": m["content"]}]} if form == "parts" and m["content"] else m for m in chat]
            text = write(ALL[name], sent, TOOLS if with_tools else None)
            places = [text.index(m["content"]) for m in chat if m["content"] and m["role"] != "system"]
            assert places == sorted(places)
            assert chat[0] is USER or "Be brief." in text
            assert "weather" in text and "Paris" in text and "None" not in text
            assert not with_tools or "Weather of a city" in text
            assert '\\"' not in text.replace(json.dumps(json.dumps("sunny")), ""), "no JSON inside a JSON string"
            assert "{'city'" not in text, "no Python in place of JSON"


def test_what_is_found_out_about_each_template() -> None:
    traits = {name: template_traits(source, True) for name, source in ALL.items()}
    assert {name for name, t in traits.items() if t.tools} == {"qwen", "llama", "nemo", "small", "phi", "kimi", "xml", "granite", "tool_chatml"}
    assert {name for name, t in traits.items() if t.calls is None} == {"gemma", "parts", "mixed", "either", "chatml", "cohere", "kimi"}
    assert {name for name, t in traits.items() if t.system is None} == {"gemma", "cohere"}
    assert {name for name, t in traits.items() if t.user == "parts"} == {"parts", "mixed"}
    assert (traits["mixed"].assistant, traits["mixed"].system, traits["parts"].system) == ("text", "text", "parts")
    calls = {name: t.calls for name, t in traits.items() if t.calls is not None}
    assert {name for name, c in calls.items() if c.arguments == "text"} == {"deepseek", "granite"}
    assert {name for name, c in calls.items() if c.short_ids} == {"nemo"}
    assert {name for name, c in calls.items() if not c.several} == {"llama"}
    assert {name: c.beside_text for name, c in calls.items() if c.beside_text != "kept"} == {
        "deepseek": "split", "llama": "split", "nemo": "split", "small": "dropped"}
    assert {name for name, c in calls.items() if not c.raw_arguments} == {"xml"}
    assert not calls["granite"].null_content and calls["deepseek"].null_content


def test_user_text_in_parts_reaches_a_template_that_iterates_over_parts() -> None:
    two = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert write(PARTS, [USER]) == "<user>How is the weather?"
    assert write(PARTS, [{"role": "user", "content": two}]) == "<user>onetwo"
    assert write(CHATML, [{"role": "user", "content": two}], add_generation_prompt=False) == "<|im_start|>user\none\ntwo<|im_end|>\n"
    assert write(MIXED, [SYSTEM, USER]) == "Be brief.|How is the weather?"
    assert write(PARTS, [USER, {"role": "assistant", "content": "It"}], add_generation_prompt=False, continue_final_message=True
                 ) == "<user>How is the weather?<assistant>It"


@pytest.mark.parametrize("template, messages, where", [
    ("{% for m in messages %}{% for part in m.body %}{{ part }}{% endfor %}{% endfor %}", [USER], "messages.0.content"),
    ("{{ messages[-1].content }}", [USER, {"role": "assistant", "content": "Fine."}, USER], "messages.0.content"),
    ("always the same", [USER], "messages.0.content"),
    (QWEN, [USER, {"role": "critic", "content": "No."}], "messages.1.content"),
])
def test_a_text_that_the_template_leaves_out_is_refused_by_name(template: str, messages: Any, where: str) -> None:
    with pytest.raises(InvalidInput, match="leaves this message") as refused:
        write(template, messages)
    assert refused.value.param == where


@pytest.mark.parametrize("template", ["{{ messages[0].content | trim | upper }}", "{{ messages[0].content.split('</think>')[-1] }}",
                                      "{{ messages[0].content | tojson }}", "{{ messages[0].content | replace('é', 'e') | truncate(9) }}"])
def test_a_template_may_change_a_text(template: str) -> None:
    write(template, [{"role": "user", "content": ' <think>hm</think> "é" and some more text\n'}])
    write(template, [{"role": "user", "content": "  "}])


def test_null_content_stays_null_where_the_template_tests_for_it_and_is_empty_where_it_would_be_written() -> None:
    assert "<call>weather\n```json\n{\"city\": \"Paris\"}\n```" in write(DEEPSEEK, [USER, assistant(call()), result()])
    assert "<|end_of_role|><|tool_call|>weather" in write(GRANITE, [USER, assistant(call())], TOOLS)
    no_key = {"role": "assistant", "tool_calls": [call()]}
    assert write(DEEPSEEK, [USER, no_key]) == write(DEEPSEEK, [USER, assistant(call())])
    null_calls = {"role": "assistant", "content": "Fine.", "tool_calls": None, "function_call": None}
    for source in (GRANITE, NEMO, LLAMA):
        assert "Fine." in write(source, [USER, null_calls, USER])
    assert write(CHATML, [USER, {"role": "assistant", "content": None}, USER]).count("assistant\n<|im_end|>") == 1, "an answer may be empty"


def test_text_beside_a_call_is_not_lost_and_neither_is_the_call() -> None:
    for name in ALL:
        text = write(ALL[name], [USER, assistant(call(), content="Let me look."), result(), {"role": "assistant", "content": "Fine."}, USER])
        assert text.index("Paris") < text.index("sunny"), name
        assert text.index("Let me look.") < text.index("Paris"), name


def test_arguments_that_are_no_json_reach_the_template_as_their_text() -> None:
    """A call that was cut off by the token limit comes back with its conversation."""
    for name, source in ALL.items():
        for raw in ('{"city": "Par', "[1]", "nonsense"):
            text = write(source, [USER, assistant(call(arguments=raw)), result()], TOOLS)
            assert raw in text or json.dumps(raw) in text, name
        assert write(source, [USER, assistant(call(arguments=""))], TOOLS) == write(source, [USER, assistant(call(arguments="{}"))], TOOLS)


def test_the_servers_own_ids_become_ids_of_nine_letters_or_digits_where_the_template_demands_them() -> None:
    ids = ["call_0123456789abcdef01234567", "toolu_9", "ab12CD34e"]
    text = write(NEMO, [USER, assistant(*map(call, ids)), *(result(i, f"result {i}") for i in ids), USER])
    written = [text.split(f'"content": result {i}, "call_id": "')[1][:9] for i in ids]
    assert written[2] == ids[2], "an id that fits is kept"
    assert len({*written}) == 3 and all(w.isalnum() and text.count(f'"{w}"') == 2 for w in written), "call and result have the same id"
    assert ids[0] in write(XML + "{{ messages[1].tool_calls[0].id }}", [USER, assistant(call())]), "elsewhere, the template gets the client's"
    no_ids = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}} for _ in range(2)]
    text = write(NEMO, [USER, assistant(*no_ids), {"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}])
    first, second = (text.split(f'"content": {content}, "call_id": "')[1][:9] for content in "ab")
    assert first != second and text.index(first) < text.index(second)


def test_several_calls_are_written_one_by_one_where_the_template_takes_one_in_a_message() -> None:
    messages = [USER, assistant(call("a"), call("b", "Rome"), content="Look."), result("b", "rain"), result("a", "sun"), USER]
    text = write(LLAMA, messages, TOOLS)
    assert text.index("Paris") < text.index('"sun"') < text.index("Rome") < text.index('"rain"')
    assert text.count("<assistant>") == 3, "the text is a message too"


def test_ids_that_occur_again_in_a_later_turn_belong_to_that_turn() -> None:
    turn = [USER, assistant(call("0"), call("1", "Rome"))]
    messages = [*turn, result("1", "rain"), result("0", "sun"), *turn, result("0", "snow"), result("1", "fog"), result("9", "lost call")]
    text = write(LLAMA, messages, TOOLS)
    places = [text.index(f'"{content}"') for content in ("sun", "rain", "snow", "fog", "lost call")]
    assert places == sorted(places) and text.count("Paris") == text.count("Rome") == 2


def test_a_system_message_is_the_beginning_of_the_first_user_message_where_there_is_no_such_role() -> None:
    assert write(GEMMA, [SYSTEM, USER]) == "<s><start_of_turn>user\nBe brief.\n\nHow is the weather?<end_of_turn>\n"
    assert write(GEMMA, [SYSTEM]) == "<s><start_of_turn>user\nBe brief.<end_of_turn>\n"
    assert write(GEMMA, [{"role": "developer", "content": "Be brief."}, USER]) == write(GEMMA, [SYSTEM, USER])
    assert write(COHERE, [SYSTEM, USER]) == "<USER>Be brief.\n\nHow is the weather?"
    two = [result("a", "sun"), result("b", "rain")]
    text = write(GEMMA, [USER, assistant(call("a"), call("b", "Rome")), *two, USER], TOOLS)
    assert text.count("<start_of_turn>user") == 2, "roles alternate: results and the question after them are one message"


def test_a_second_template_for_tools_is_used_for_tools_and_for_earlier_calls() -> None:
    """If it cannot do without tools, earlier calls are text."""
    assert "Weather of a city" in write(CHATML, [USER], TOOLS, tool_use=QWEN)
    assert "<tool_call>" in write(COHERE, [USER, assistant(call()), result()], tool_use=QWEN)
    needs_tools = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + QWEN
    assert not write(COHERE, [USER, assistant(call()), result()], tool_use=needs_tools).startswith("{")
    assert takes_tools(ChatTemplate(COHERE, needs_tools)) and not takes_tools(ChatTemplate(COHERE))


def test_the_generic_prompt_can_be_chosen_although_the_template_has_a_place_for_tools() -> None:
    text = write(NEMO, [USER, assistant(call()), result(), USER], TOOLS, call_format="pythonic", generic_tools=True)
    assert "[the_function(argument='value')]" in text and "[weather(city='Paris')]" in text and "AVAILABLE_TOOLS" not in text


def test_tools_that_the_template_cannot_write_are_described_by_the_generic_prompt_in_the_same_format() -> None:
    """As templates do that write a signature: they need a description, and parameters with one type."""
    signature = "{% for t in tools or [] %}{{ t.function.name + '(' }}{% for name, p in t.function.parameters.properties.items() %}" \
                "{{ name + ': ' + p.type }}{% endfor %}{{ ') ' + t.function.description }}{% endfor %}" + KIMI.partition("{% endif %}")[2]
    assert write(signature, [USER], TOOLS).startswith("weather(city: string) Weather of a city<|user|>")
    odd: list[Any] = [{"type": "function", "function": {"name": "clock"}}, {"type": "function", "function": {
        "name": "f", "description": "", "parameters": {"type": "object", "properties": {"x": {"anyOf": [{"type": "null"}]}}}}}]
    for tool in odd:
        text = write(signature, [USER], [*TOOLS, tool], call_format="llama3_json")
        assert json.dumps(tool) in text and '{"name": "the_function", "parameters"' in text and "How is the weather?" in text
    with pytest.raises(InvalidInput, match="must alternate"):
        write(SMALL, [USER, USER], TOOLS)
    text = write(KIMI, [USER, assistant(call()), result()], TOOLS, call_format="llama3_json")
    assert '{"name": "weather", "parameters": {"city": "Paris"}}' in text, "earlier calls are in the format of the model's parser"


TURNS = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=4)


@given(name=st.sampled_from(sorted(ALL)), turns=TURNS, system=st.booleans(), with_tools=st.booleans(), parts=st.booleans())
def test_no_text_of_any_conversation_is_lost(name: str, turns: Any, system: bool, with_tools: bool, parts: bool) -> None:
    """Turns of a question, 0 to 3 calls with or without text, their results, and mostly an answer."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "sys0"}] if system else []
    for i, (calls, beside, answered, reordered) in enumerate(turns):
        messages.append({"role": "user", "content": f"ask{i}."})
        if calls:
            sent = [call(f"call_{i}_{j}_0123456789", f"city{i}{j}.") for j in range(calls)]
            results = [result(one["id"], f"res{i}{j}.") for j, one in enumerate(sent)]
            messages += [assistant(*sent, content=f"beside{i}." if beside else None), *(reversed(results) if reordered else results)]
        if answered or i + 1 < len(turns):
            messages.append({"role": "assistant", "content": f"say{i}."})
    sent_messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} if parts and m["content"] else m for m in messages]
    text = write(ALL[name], sent_messages, TOOLS if with_tools else None)
    for i, message in enumerate(messages):
        assert message["content"] is None or message["content"] in text, (i, message)
        assert all(json.loads(one["function"]["arguments"])["city"] in text for one in message.get("tool_calls", ()))


# -- what is lost or refused in one conversation only -------------------------------------------------------------------


TURN = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
START = "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
TWO_TOOLS = [*TOOLS, {"type": "function", "function": {"name": "clock", "description": "Time of day"}}]


@pytest.mark.parametrize("source", [
    START + "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}{% endif %}" + TURN,  # only beside a system message
    "{% if tools and messages[-1].role == 'user' %}{{ tools | tojson }}{% endif %}" + START + "{% endif %}" + TURN,  # not in an agent's second step
    "{% for t in tools or [] if t.function.parameters %}{{ t | tojson }}{% endfor %}" + START + "{% endif %}" + TURN,
    "{% if tools %}{{ tools[0] | tojson }}{% endif %}" + START + "{% endif %}" + TURN,
])
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, assistant(call()), result()]])
def test_tools_that_the_template_leaves_out_of_this_conversation_get_the_generic_prompt(source: str, messages: Any) -> None:
    text = write(source, messages, TWO_TOOLS)
    for wanted in ("Weather of a city", "Time of day", '"city"', *(m["content"] for m in messages if m["content"])):
        assert wanted in text


@pytest.mark.parametrize("with_tools", [False, True])
def test_text_beside_calls_is_kept_with_calls_as_text_where_the_template_drops_it(with_tools: bool) -> None:
    chat = [USER, assistant(call(), content="IMPORTANT PLAN"), result(), {"role": "assistant", "content": "Fine."}, USER]
    text = write(SMALL, chat, TOOLS if with_tools else None)
    places = [text.index(part) for part in ("IMPORTANT PLAN", "Paris", "sunny", "Fine.")]
    assert places == sorted(places)


def test_calls_that_the_template_writes_only_in_the_last_turn_are_text() -> None:
    source = TURN.replace("{% endfor %}", "{% if loop.last or loop.nextitem is defined and loop.nextitem.role == 'tool' and loop.length < 4 %}"
                          "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}{% endif %}{% endfor %}").replace("m.content", "m.content or ''")
    assert "<tool_call>" not in write(source, [USER, assistant(call()), result()])
    text = write(source, [USER, assistant(call()), result(), {"role": "assistant", "content": "Fine."}, USER])
    assert "<tool_call>" in text and "Paris" in text


FIRST_ONLY = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}" \
             "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LATER = {"role": "system", "content": "Now be long."}
ANSWER = {"role": "assistant", "content": "Fine."}


def test_a_later_system_message_that_the_template_refuses_is_a_part_of_the_users() -> None:
    assert write(FIRST_ONLY, [SYSTEM, USER, ANSWER, LATER, USER]) == \
        "<system>Be brief.<user>How is the weather?<assistant>Fine.<user>Now be long.\n\nHow is the weather?"
    assert write(FIRST_ONLY, [USER, LATER]) == "<user>How is the weather?\n\nNow be long."
    for chat in ([USER, ANSWER, LATER, USER], [SYSTEM, USER, ANSWER, LATER, USER], [USER, ANSWER, USER, LATER], [USER, LATER, ANSWER, USER]):
        for name, source in ALL.items():
            assert "Now be long." in write(source, chat), name
            assert "Now be long." in write(source, chat, TOOLS), name


DEVELOPER = "{% if messages[0].role == 'developer' or messages[0].role == 'system' %}<developer>{{ messages[0].content }}{% set rest = messages[1:] %}" \
            "{% else %}{% set rest = messages %}{% endif %}{% for m in rest if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("first, second", [("system", "developer"), ("developer", "system"), ("developer", "developer"), ("system", "system")])
@pytest.mark.parametrize("refuses", [False, True])
def test_system_and_developer_messages_are_one_where_the_template_takes_one(first: str, second: str, refuses: bool) -> None:
    source = DEVELOPER + ("{% for m in messages[1:] if m.role in ('system', 'developer') %}{{ raise_exception('late') }}{% endfor %}" if refuses else "")
    chat = [{"role": first, "content": "one"}, {"role": second, "content": "two"}, USER]
    assert write(source, chat) == "<developer>one\n\ntwo<user>How is the weather?"
    assert write(source, [chat[1], USER]) == "<developer>two<user>How is the weather?"
    assert write(source, [chat[0], USER, ANSWER, chat[1], USER]).endswith("<user>two\n\nHow is the weather?")


def test_what_is_lost_is_found_out_with_the_variables_and_keys_of_the_request() -> None:
    def written(source: str, chat: Any, **variables: Any) -> str:
        return write_chat(ChatTemplate(source), chat, ChatOptions(variables=variables))

    chat, turn = [USER, ANSWER, USER], "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    keeps = "{% for m in messages %}{% if keep_history or loop.last %}" + turn
    assert "Fine." in written(keeps, chat, keep_history=True)
    last_only = "{% for m in messages %}{% if not last_only or loop.last %}" + turn
    assert "Fine." in written(last_only, chat)
    named = "{% for m in messages %}{% if not m.name %}" + turn
    assert "How" in written(named, [USER])
    for source, messages, variables in (
        (keeps, chat, {}), (last_only, chat, {"last_only": True}), (named, [{**USER, "name": "bob"}], {}),
        (named.replace("not m.name", "m.name != 'bob'"), [{**USER, "name": "bob"}], {}),
    ):
        with pytest.raises(InvalidInput, match="leaves this message") as refused:
            written(source, messages, **variables)
        assert refused.value.param == "messages.0.content"


@pytest.mark.parametrize("content", [5, True, {"a": 1}, 1.5, {"type": "text", "text": "x"}])
def test_content_of_another_type_is_refused_by_name(content: Any) -> None:
    with pytest.raises(InvalidInput, match=r"messages\.0\.content must be a string, a list of text parts or null") as refused:
        write(CHATML, [{"role": "user", "content": content}])
    assert refused.value.param == "messages.0.content"


def test_null_ids_are_made_and_ids_that_are_no_strings_are_refused() -> None:
    assert "Paris" in write(NEMO, [USER, assistant({**call(), "id": None}), {**result(), "tool_call_id": None}])
    for chat, where in (([USER, assistant({**call(), "id": 7}), result()], "messages.1.tool_calls.0.id"),
                        ([USER, assistant(call()), {**result(), "tool_call_id": 7}], "messages.2.tool_call_id")):
        with pytest.raises(InvalidInput, match="must be a string, got 7") as refused:
            write(NEMO, chat)
        assert refused.value.param == where


def test_parts_are_joined_where_the_template_reads_one() -> None:
    two = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
    assert write(source, [{"role": "system", "content": two}, {"role": "user", "content": two}]) == "<system>one\ntwo<user>one\ntwo"
    mixed = "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
    assert write(mixed, [{"role": "system", "content": two}, {"role": "user", "content": two}]) == "one\ntwoonetwo"


def test_only_a_request_that_was_written_is_logged_as_one_with_a_generic_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with pytest.raises(InvalidInput, match="must alternate"):
        write(SMALL, [USER, USER], TOOLS)
    assert not caplog.records
    write(SMALL, [USER, assistant(call(), content="Let me look."), result(), ANSWER, USER], TOOLS)
    assert [r.getMessage() for r in caplog.records if "generic prompt" in r.getMessage() and "messages.1.content" in r.getMessage()]


def test_a_refused_conversation_of_many_messages_is_refused_for_its_first_fault() -> None:
    chat = [SYSTEM, USER, USER, LATER, {"role": "developer", "content": "x"}, *[USER] * 50]
    with pytest.raises(InvalidInput, match="must alternate"):
        write(SMALL, chat, TOOLS)


@pytest.mark.parametrize("content", [b"x", [{"type": "text", "text": b"x"}], object()])
def test_texts_that_are_no_strings_do_not_become_the_name_of_their_type(content: Any) -> None:
    with pytest.raises(InvalidInput) as refused:
        write(CHATML, [USER, {"role": "user", "content": content}])
    assert str(refused.value.param).startswith("messages.1.content")


@pytest.mark.parametrize("tools", [[5], [{"type": "function"}], {"a": 1}, "weather", [{"function": {"name": 5}}], [TOOLS[0], {"name": None}]])
@pytest.mark.parametrize("source", [QWEN, CHATML])
def test_tools_of_another_form_are_refused_by_name(source: str, tools: Any) -> None:
    with pytest.raises(InvalidInput, match="must be") as refused:
        write(source, [USER], tools)
    assert str(refused.value.param).startswith("tools")


def test_a_flat_tool_is_written_or_gets_the_generic_prompt() -> None:
    flat = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    assert '"clock"' in write(QWEN, [USER], [flat])
    assert '"clock"' in write(NEMO, [USER], [flat, *TOOLS])


def test_an_empty_system_message_adds_no_blank_lines() -> None:
    for content in ("", None, "  "):
        assert write(GEMMA, [{"role": "system", "content": content}, USER]) == write(GEMMA, [USER])
    assert write(FIRST_ONLY, [SYSTEM, {"role": "system", "content": ""}, USER]) == write(FIRST_ONLY, [SYSTEM, USER])
