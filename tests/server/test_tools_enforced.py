"""Enforced calls from a tiny random model: the grammar makes any output a call that matches the tools."""
from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from minivllm.config import EngineConfig
from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.grammar_compiler import GrammarCompiler
from minivllm.engine.json_schema import closed
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine.tool_schema import why_not
from minivllm.errors import InvalidInput
from minivllm.output_parsers.reasoning import CLOSE, OPEN
from minivllm.output_parsers.tool_calls import HermesParser
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams
from minivllm.server.output_spec import OutputSpec
from minivllm.server.run import start_engine
from minivllm.server.tools import Function, Tool, ToolSpec, tool_spec
from tests.conftest import write_tiny_tokenizer
from tests.server.scripted import serving
from tests.server.test_tools import calls_of, join

pytest.importorskip("llguidance")

HELLO: Any = [{"role": "user", "content": "the cat"}]
TEMPLATE = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"


def tool(name: str, **properties: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}}}


TOOLS = [tool("weather", city={"enum": ["Paris", "Rome"]}, days={"type": "integer", "minimum": 1, "maximum": 9}),
         tool("switch", on={"type": "boolean"}), {"type": "function", "function": {"name": "clock"}}]


def check(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "weather":
        assert value.keys() == {"city", "days"} and value["city"] in ("Paris", "Rome") and 1 <= value["days"] <= 9
    elif name == "switch":
        assert value in ({"on": True}, {"on": False})
    else:
        assert (name, value) == ("clock", {})


@contextlib.contextmanager
def server(folder: Path, **settings: Any) -> Iterator[openai.OpenAI]:
    tokenizer = Tokenizer(folder)
    tokenizer.chat_template = ChatTemplate(TEMPLATE)
    config = EngineConfig(model=str(folder), dtype="float32", device="cpu", max_num_batched_tokens=64, num_gpu_blocks_override=256)
    client = start_engine(config, process=False, log_level="warning")
    try:
        with serving(client, tokenizer, served_model_name=("tiny",), **settings) as live, \
                openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as api:
            yield api
    finally:
        client.close()


@pytest.fixture(scope="module")
def api(tiny_llama: Callable[..., Path]) -> Iterator[openai.OpenAI]:
    with server(tiny_llama()) as api:
        yield api


def chat(api: openai.OpenAI, **fields: Any) -> Any:
    return api.chat.completions.create(**{"model": "tiny", "messages": HELLO, "seed": 7, **fields})


def test_required_calls_match_the_tools_in_every_child_complete_and_streamed(api: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "n": 6, "parallel_tool_calls": False, "logprobs": True}
    whole = chat(api, **fields)
    names = set()
    for choice in whole.choices:
        ((name, arguments),) = calls_of(choice.message)
        check(name, arguments)
        names.add(name)
        assert choice.message.content is None and choice.finish_reason == "tool_calls"
    assert len(names) > 1, "the model chooses, not the grammar"
    chunks = list(chat(api, **fields, stream=True))
    assert [join(chunks, i).calls for i in range(6)] == [calls_of(choice.message) for choice in whole.choices]


def test_several_calls_are_possible(api: openai.OpenAI, tiny_llama: Callable[..., Path]) -> None:
    (bracket,) = Tokenizer(tiny_llama()).encode("]", add_special_tokens=False)  # banned, so that the array continues
    choice = chat(api, tools=TOOLS, tool_choice="required", max_tokens=180, logit_bias={str(bracket): -100}).choices[0]
    calls = calls_of(choice.message)
    assert len(calls) > 1 and choice.finish_reason == "length"
    for call in calls[:-1]:
        check(*call)


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("name", ["weather", "switch", "clock"])
def test_a_named_call_matches_its_function(api: openai.OpenAI, name: str) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": named(name), "n": 3}
    whole = chat(api, **fields)
    for choice in whole.choices:
        ((called, arguments),) = calls_of(choice.message)
        check(called, arguments)
        assert called == name and choice.finish_reason == "stop"
    chunks = list(chat(api, **fields, stream=True))
    assert [join(chunks, i).calls for i in range(3)] == [calls_of(choice.message) for choice in whole.choices]


def test_a_schema_of_an_enforced_call_may_be_recursive(api: openai.OpenAI) -> None:
    """A schema that refers to its own root and to its own parts, as one of several tools."""
    tree = tool("tree", leaf={"enum": ["x"]}, same={"$ref": "#/properties/leaf"}, left={"anyOf": [{"type": "null"}, {"$ref": "#"}]})
    whole = chat(api, tools=[tree], tool_choice="required", parallel_tool_calls=False, n=4, max_tokens=200)
    complete = [choice for choice in whole.choices if choice.finish_reason == "tool_calls"]
    assert complete
    for choice in complete:
        ((_, arguments),) = calls_of(choice.message)
        node = json.loads(arguments)
        while node is not None:
            assert node.keys() == {"leaf", "same", "left"} and node["leaf"] == node["same"] == "x"
            node = node["left"]


def test_an_enforced_call_follows_the_reasoning(tiny_llama: Callable[..., Path]) -> None:
    """A random model never ends its reasoning, so the first half of the test ends at the token limit."""
    with server(tiny_llama(), reasoning_parser="deepseek_r1") as api:
        for choice in (named("clock"), "required"):
            (cut_off,) = chat(api, tools=TOOLS, tool_choice=choice, max_tokens=30).choices
            assert cut_off.message.model_extra["reasoning"] and cut_off.message.content is None and cut_off.message.tool_calls is None
            assert cut_off.finish_reason == "length"
        closed: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>hm</think>"}]
        extra = {"continue_final_message": True}
        (answers,) = chat(api, tools=TOOLS, tool_choice=named("switch"), messages=closed, extra_body=extra).choices
        check(*calls_of(answers.message)[0])


def match(folder: Path, special: bool, spec: Callable[[dict[str, int]], OutputSpec], params: SamplingParams, text: str) -> Any:
    """Feed a text to the grammar of an output specification. Returns the matcher and whether it accepted the whole text."""
    from tokenizers import AddedToken

    write_tiny_tokenizer(folder)
    tokenizer = Tokenizer(folder)
    ids: dict[str, int] = {}
    if special:
        marks = (OPEN, CLOSE, HermesParser.OPEN, HermesParser.CLOSE)
        tokenizer._backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
        ids = {mark: tokenizer._backend.token_to_id(mark) for mark in marks}
    changed = spec(ids).apply(params)
    assert changed.skip_special_tokens is not special and changed.structured_outputs is not None
    matcher = GrammarCompiler(tokenizer, [1]).compile(changed.structured_outputs).deep_copy()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return matcher, matcher.try_consume_tokens(tokens) == len(tokens)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("start, text, accepted", [
    ("reasoning", 'hm {"on": 1} <b> x</think>\n\n{"on": true}', True),
    ("reasoning", 'hm</think>{"on":false}', True),
    ("reasoning", '{"on":false}', None),  # reasoning so far
    ("reasoning", 'hm</think>so: {"on":false}', False),
    ("reasoning", 'hm</think>{"off":false}', False),
    ("undecided", '<think>\nhm\n</think>\n\n{"on": true}', True),
    ("undecided", '{"on": true}', True),
    ("undecided", 'hm</think>{"on": true}', False),
    ("undecided", '<think>{"on": true}', None),
])
def test_the_grammar_applies_after_the_end_of_the_reasoning(
    tmp_path: Path, start: Any, text: str, accepted: bool | None, special: bool,
) -> None:
    tools = tool_spec([Tool.model_validate(tool) for tool in TOOLS], named("switch"), None)
    matcher, complete = match(tmp_path, special, lambda ids: OutputSpec(start=start, splits_reasoning=True, tools=tools, special_ids=ids),
                              SamplingParams(), text)
    assert complete == (accepted is not False)
    assert matcher.is_stopped() == (accepted is True)


ON = '<tool_call>\n{"name": "switch", "arguments": {"on": true}}\n</tool_call>'


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text, accepted", [
    ("no call {", True),
    (ON, True),
    (f"So: {ON}\n{ON} done", True),
    (f"<think>hm</think>{ON}", True),
    ('<tool_call>{"name": "clock", "arguments": {"any": ["thing"]}}</tool_call>', True),  # this tool is not strict
    ('<tool_call>{"name": "switch", "arguments": {"on"', None),
    ('<tool_call>{"name": "switch", "arguments": {"off"', False),
    ('<tool_call>{"name": "other"', False),
    ("<tool_call>so", False),
    (f"{ON[:-2]} ", False),
])
def test_a_strict_tool_is_enforced_although_the_model_is_free_to_call(
    tmp_path: Path, special: bool, text: str, accepted: bool | None,
) -> None:
    strict = {"type": "function", "function": {**TOOLS[1]["function"], "strict": True}}
    tools = tool_spec([Tool.model_validate(tool) for tool in (strict, TOOLS[2])], "auto", None)
    start: Any = "undecided" if "<think>" in text else "answer"
    matcher, complete = match(
        tmp_path, special,
        lambda ids: OutputSpec(start=start, splits_reasoning=True, tools=tools, call_format="hermes", special_ids=ids),
        SamplingParams(), text)
    assert complete == (accepted is not False)
    assert matcher.is_accepting() == (accepted is True) or not complete


FORM = StructuredOutputsParams(json={"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]})
FORMAT_CASES = {
    "hermes": [(ON, True), (f"{ON}\n{ON}", True), ('{"city": "Rome"}', True), ("So: " + ON, False), ('{"city": "Oslo"}', False),
               ('<tool_call>{"name": "switch", "arguments": {"off"', False),
               ('<tool_call>{"name": "clock", "arguments": {"x": 1}}</tool_call>', True),
               ('<think>hm</think>{"city": "Rome"}', True), (f"<think>hm</think>{ON}", True), ("<think>hm</think>no", False)],
    "llama3_json": [('{"name": "switch", "parameters": {"on": true}}', True), ('{"city": "Rome"}', True), ("No.", False),
                    ('{"name": "switch", "parameters": {"on": true}}; {"name": "clock", "parameters": {}}', True),
                    ('{"name": "switch", "parameters": {"off', False), ('{"name": "other', False)],
    "pythonic": [("[switch(on=true)]", True),
                 ('[clock(a="x", b=[1, {"c": null}]), switch(on=false)]', True), ("[switch()]", False),
                 ("[switch(off=", False), ('{"city": "Rome"}', True), ("No.", False),
                 ("[other(", False), ("[switch(on=tru]", False)],
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("call_format, text, accepted", [(name, *case) for name, cases in FORMAT_CASES.items() for case in cases])
def test_the_grammar_of_calls_or_format(tmp_path: Path, call_format: str, special: bool, text: str, accepted: bool) -> None:
    strict = {"type": "function", "function": {**TOOLS[1]["function"], "strict": True}}
    tools = tool_spec([Tool.model_validate(tool) for tool in (strict, TOOLS[2])], "auto", None)
    start: Any = "undecided" if "<think>" in text else "answer"
    matcher, complete = match(
        tmp_path, special,
        lambda ids: OutputSpec(start=start, splits_reasoning=True, tools=tools, call_format=call_format, special_ids=ids, formatted=True),
        SamplingParams(structured_outputs=FORM), text)
    assert complete == accepted and (not accepted or matcher.is_accepting())


@pytest.mark.parametrize("text, accepted", [
    ("No call {here}.", True), ('{"name": "switch", "parameters": {"on": true}}', True), ('{"name": "switch", "parameters": {"off"', False),
    (' {"nam": 1}', False), ("So: <|python_tag|>{", False), ("", True),
])
def test_a_strict_tool_is_enforced_in_the_format_of_llama(tmp_path: Path, text: str, accepted: bool) -> None:
    strict = {"type": "function", "function": {**TOOLS[1]["function"], "strict": True}}
    tools = tool_spec([Tool.model_validate(strict)], "auto", None)
    matcher, complete = match(tmp_path, False, lambda ids: OutputSpec(tools=tools, call_format="llama3_json", special_ids=ids),
                              SamplingParams(), text)
    assert complete == accepted and (not accepted or matcher.is_accepting())


@pytest.mark.parametrize("text, accepted", [
    ("No call [here].", True), ("[f(b=1)]", True), ('[f(a="x", b=1, c={"d":1})]', True), ("[f(b=1, c={})]", True), ("[f(a=", True),
    ("[f()]", False), ("[f(c=", False), ("[f(b=1, a=", False), ("[f(b=1, d=", False), ("[f(b=true", False), (" [1]", False), ("", True),
    ("So: <|python_start|>[", False), ("[g(a=2)]", True), ("[g()]", True), ("[g(e=3)]", True), ("[g(a=2, e=3)]", True),
    ("[h()]", True), ("[h(a", False),
])
def test_a_strict_tool_is_enforced_in_pythons_syntax(tmp_path: Path, text: str, accepted: bool) -> None:
    schemas = {"f": {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"$ref": "#/$defs/x"}, "i": True},
                     "required": ["b"], "$defs": {"x": {"type": "object"}}},
               "g": {"properties": {"a": {"const": 2}, "e": {"const": 3}}}, "h": {}}
    sent = [{"type": "function", "function": {"name": name, "parameters": schema, "strict": True}} for name, schema in schemas.items()]
    tools = tool_spec([Tool.model_validate(one) for one in sent], "auto", None)
    matcher, complete = match(tmp_path, False, lambda ids: OutputSpec(tools=tools, call_format="pythonic", special_ids=ids),
                              SamplingParams(), text)
    assert complete == accepted and (not accepted or text == "[f(a=" or matcher.is_accepting())


@pytest.mark.parametrize("call_format", FORMAT_CASES)
def test_a_random_model_writes_either_calls_or_the_format(tiny_llama: Callable[..., Path], call_format: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads(str(FORM.json))}}
    strict = [{"type": "function", "function": {**t["function"], "strict": True}} for t in TOOLS[1:]]
    with server(tiny_llama(), tool_call_parser=call_format) as api:
        fields: Any = {"tools": strict, "response_format": form, "n": 8, "max_tokens": 100}
        whole = chat(api, **fields)
        chunks = list(chat(api, **fields, stream=True))
        kinds = set()
        for i, answer in enumerate(whole.choices):
            joined = join(chunks, i)
            assert (joined.calls, joined.content or None) == (calls_of(answer.message), answer.message.content)
            if answer.finish_reason == "length":
                continue
            kinds.add(answer.finish_reason)
            if answer.message.tool_calls:
                assert answer.message.content is None
                assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls_of(answer.message))
            else:
                assert json.loads(answer.message.content) == {"city": "Rome"}
        assert kinds


def test_only_json_can_follow_reasoning() -> None:
    with pytest.raises(InvalidInput, match="enable_thinking") as refused:
        OutputSpec(start="reasoning", splits_reasoning=True).apply(SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+")))
    assert refused.value.param == "structured_outputs.regex"


ODD: Any = {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "required": ["a"], "properties": {
    "a": {"enum": ["x"]}, "b": {"type": "nothing"}, "c": {"enum": [1], "not": {"const": 2}}}}}}


@pytest.mark.parametrize("choice", ["required", named("odd"), named("switch")])
def test_a_tool_whose_schema_cannot_be_enforced_is_left_open_there_and_named(api: openai.OpenAI, choice: Any) -> None:
    fields: Any = {"tools": [TOOLS[1], ODD], "tool_choice": choice, "parallel_tool_calls": False, "n": 4, "max_tokens": 60}
    raw = api.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, seed=7, **fields)
    enforced = choice in ("required", named("odd"))
    assert raw.headers.get("x-minivllm-ignored") == ("tools.1.function.parameters" if enforced else None)
    found = [call for answer in raw.parse().choices if answer.finish_reason != "length" for call in calls_of(answer.message)]
    assert found
    for name, arguments in found:
        value = json.loads(arguments)
        assert value in ({"on": True}, {"on": False}) if name == "switch" else value["a"] == "x" and value.keys() <= {"a", "b", "c"}
    flat = [{"type": "function", **t["function"]} for t in (TOOLS[1], ODD)]
    answer = api.responses.with_raw_response.create(model="tiny", input="x", tools=flat, tool_choice="required", max_output_tokens=20)
    assert answer.headers["x-minivllm-ignored"] == "tools.1.parameters"


def test_a_strict_tool_that_cannot_be_enforced_is_refused_by_name(api: openai.OpenAI) -> None:
    strict = {"type": "function", "function": {**ODD["function"], "strict": True}}
    for choice in ("required", "auto"):
        with pytest.raises(openai.BadRequestError, match="cannot be enforced, and the function is strict") as refused:
            chat(api, tools=[TOOLS[1], strict], tool_choice=choice)
        assert refused.value.param == "tools.1.function.parameters"


@pytest.mark.parametrize("parameters, keys", [
    ({"type": "object", "properties": {}}, set()), ({"type": "object"}, set()), ({}, set()), (None, set()),
    ({"type": "object", "properties": {"a": {"enum": [1]}}}, {"a"}),
])
def test_a_forced_call_has_declared_keys_only(api: openai.OpenAI, parameters: Any, keys: set[str]) -> None:
    one: Any = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for choice in (named("f"), "required"):
        answers = chat(api, tools=[one], tool_choice=choice, n=4, parallel_tool_calls=False, max_tokens=180).choices
        assert all(json.loads(calls_of(answer.message)[0][1]).keys() <= keys for answer in answers)


def test_a_forced_call_may_have_other_keys_if_its_schema_says_so(api: openai.OpenAI) -> None:
    one: Any = {"type": "function", "function": {"name": "f", "parameters": {"properties": {}, "additionalProperties": {"enum": [1]}}}}
    answers = chat(api, tools=[one], tool_choice=named("f"), n=6, max_tokens=60).choices
    assert any(calls_of(answer.message)[0][1][:3] not in ("{}", "") for answer in answers)


# -- odd schemas of parameters ---------------------------------------------------------------------------------------


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("kind", [None, ["object", "null"], ["object"], "object"])
def test_parameters_whose_type_includes_an_object_are_those_of_an_object(kind: Any) -> None:
    function = Function(name="f", parameters={"type": kind, "properties": {"a": {"type": "string"}}})
    spec = tool_spec([Tool(function=function)], "required", None)
    assert spec is not None and spec.left_open() == []
    assert spec.for_template()[0]["function"]["parameters"]["type"] == "object" == spec.enforced_schemas()[0]["type"]
    with pytest.raises(InvalidInput, match="must be the schema of an object"):
        tool_spec([Tool(function=Function(name="f", parameters={"type": ["string", "null"]}))], None, None)


@pytest.mark.parametrize("levels", [26, 28, 29, 31, 70, 1000])
def test_a_tool_that_is_nested_too_deep_is_left_open_beside_the_others(levels: int) -> None:
    deep = Function(name="deep", parameters={"type": "object", "properties": {"q": {"type": "integer"}, "deep": nested(levels)}})
    for functions in ((deep,), (deep, Function(name="f", parameters=nested(2)))):
        for mode in ("required", "named"):
            spec = ToolSpec(mode=mode, functions=functions, named="deep" if mode == "named" else None)  # type: ignore[arg-type]
            opened = spec.left_open()
            assert opened == ([] if levels < 28 else ["tools.0.function.parameters"])
            StructuredOutputsParams(json=closed(spec.schema() or {}))
            assert why_not(closed(spec.schema() or {})) is None
    strict = ToolSpec(mode="auto", functions=(Function(name="f", strict=True, parameters=nested(200)),))
    with pytest.raises(InvalidInput, match="nested deeper"):
        strict.left_open()
