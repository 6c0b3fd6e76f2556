"""Parsers of tool calls and reasoning. A text gives the same events however it is cut into pieces."""
from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json

from minivllm.server.json_calls import JsonScanner, is_object
from minivllm.server.output_events import ContentDelta, OutputEvent, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from minivllm.server.reasoning import OutputStart, ReasoningParser, output_start
from minivllm.server.tool_parsers import (
    HermesParser,
    Llama3JsonParser,
    NamedCallParser,
    PythonicParser,
    RequiredCallsParser,
    ToolParser,
    guess_parser,
    parse_python_call,
)

NAMES = ("f", "get_weather")
ParsedText = tuple[str, list[tuple[str, str]]]  # content, and the name and arguments of each call


def parse(parser: ToolParser, pieces: Sequence[str]) -> ParsedText:
    """Parse the pieces, and check the order of the events."""
    events: list[OutputEvent] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.finish()
    assert parser.finish() == [], "no event is reported twice"
    content, calls, is_open = "", [], False
    for event in events:
        if isinstance(event, ContentDelta):
            assert event.text and not is_open
            content += event.text
        elif isinstance(event, ToolCallStart):
            assert not is_open and event.index == len(calls)
            is_open = True
            calls.append((event.name, ""))
        elif isinstance(event, ToolCallArguments):
            assert is_open and event.fragment and event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.fragment)
        else:
            assert isinstance(event, ToolCallEnd) and is_open and event.index == len(calls) - 1
            is_open = False
    assert not is_open, "every call that starts ends"
    return content, calls


def parse_whole(kind: Callable[[Any], ToolParser], text: str) -> ParsedText:
    return parse(kind(NAMES), [text])


# -- formats ----------------------------------------------------------------------------------------------------------

ONE = [("f", '{"a": 1}')]


@pytest.mark.parametrize("text, content, calls", [
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", ONE),
    ('Let me look.\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "Let me look.", ONE),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call> \n<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>\n',
     "", [*ONE, ("get_weather", "{}")]),
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", ONE),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", ONE),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"id": 7.5, "x": [{"name": 1}], "name": "f", "arguments": {"a": {"b": ["}", "\\""]}}}', "",
     [("f", '{"a": {"b": ["}", "\\""]}}')]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call> Done.', "Done.", ONE),
    ("no call, a <tool and an end <tool_c", "no call, a <tool and an end <tool_c", []),
])
def test_hermes(text: str, content: str, calls: Any) -> None:
    assert parse_whole(HermesParser, text) == (content, calls)


@pytest.mark.parametrize("text, content, calls", [
    ('{"name": "f", "parameters": {"a": 1}}', "", ONE),
    ('\n{"type": "function", "name": "f", "parameters": {"a": 1}}', "", ONE),
    ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", ONE),
    ('{"name": "f", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": {}}', "", [*ONE, ("get_weather", "{}")]),
    ('{"name": "f", "parameters": {"a": 1}}\n{"name": "f", "arguments": {"a": 1}}', "", ONE * 2),
    ('{"name": "f", "parameters": {"a": 1}}; <|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", ONE * 2),
    ('I call <|python_tag|>{"name": "f", "parameters": {"a": 1}}', "I call", ONE),
    ('An object: {"name": "f", "parameters": {}}', 'An object: {"name": "f", "parameters": {}}', []),
    ('{"name": "Bob", "age": 7}', '{"name": "Bob", "age": 7}', []),
    ("Paris.", "Paris.", []),
])
def test_llama3_json(text: str, content: str, calls: Any) -> None:
    assert parse_whole(Llama3JsonParser, text) == (content, calls)


@pytest.mark.parametrize("text, content, calls", [
    ("[f(a=1)]", "", ONE),
    ("[f(a=1), get_weather()]", "", [*ONE, ("get_weather", "{}")]),
    ("<|python_start|>[f(a=1)]<|python_end|>", "", ONE),
    (" [ f( a = 1 ), ] ", "", ONE),
    ("""[f(s="a, b)]", t='it\\'s', x=[1, (-2.5, None)], y={"k": True, "j": false})]""", "",
     [("f", '{"s": "a, b)]", "t": "it\'s", "x": [1, [-2.5, null]], "y": {"k": true, "j": false}}')]),
    ("[1] says so, f(a=1)", "[1] says so, f(a=1)", []),
    ("[g(a=1)]", "[g(a=1)]", []),
    ("[f(a=1), g(a=1)]", ", g(a=1)]", ONE),
    ("[f(1)]", "[f(1)]", []),
    ("[f(**{})]", "[f(**{})]", []),
    ("[f(a=open('/etc/passwd'))]", "[f(a=open('/etc/passwd'))]", []),
    ("[f(a=f'{1}')]", "[f(a=f'{1}')]", []),
    ("[f(a=1 if 1 else 2)]", "[f(a=1 if 1 else 2)]", []),
    ("[f(a=b'x')]", "[f(a=b'x')]", []),
    ("[f(a=1e999)]", "[f(a=1e999)]", []),
    ("[f(a={1: 2})]", "[f(a={1: 2})]", []),
    ("[]", "[]", []),
    ("Paris.", "Paris.", []),
])
def test_pythonic(text: str, content: str, calls: Any) -> None:
    assert parse_whole(PythonicParser, text) == (content, calls)


@pytest.mark.parametrize("value", [
    "(" * 10_000, "[" * 10_000, "-" * 100_000 + "1", "not " * 100_000 + "1", "a" + ".b" * 100_000, "x" + "[1]" * 50_000, "9" * 10_000,
    "1" + "+1" * 50_000, "'" + "\\x" * 1000 + "'", "'\0'", "'\ud800'", "lambda: " * 10_000 + "1",
], ids=lambda value: value[:8].encode("unicode_escape").decode())
def test_an_attack_on_pythons_compiler_is_content(value: str) -> None:
    text = f"[f(a={value})]"
    content, calls = parse_whole(PythonicParser, text)
    assert (content, calls) == (text, []) or json.loads(calls[0][1])


def test_chains_of_operators_or_keywords_and_strings_with_a_prefix_never_reach_pythons_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was called")

    monkeypatch.setattr("minivllm.server.tool_parsers.ast", SimpleNamespace(parse=forbidden))
    for value in ("--1", "+ -1", "not 1", "lambda: 1", "1 if 1 else 2", "f'{1}'", "b'x'", "1 + 1 ** 2", "a @ b"):
        assert parse_python_call(f"f(a={value})") is None, value


def test_only_python_literals_are_accepted() -> None:
    assert parse_python_call("f(a=1, b='x')") == ("f", '{"a": 1, "b": "x"}')
    for text in ("f", "f(", "f)(", "f(a=b)", "f(a=1)(b=2)", "f(a=[x for x in y])", "f(a=...)", "f(a:=1)", "f(a=1j)", "(a=1)", ""):
        assert parse_python_call(text) is None, text


@pytest.mark.parametrize("text", [
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "<tool_call>", "<tool_call>{", "<tool_call>[]</tool_call>",
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>', '<tool_call>{"name": 1}</tool_call>', "</tool_call>",
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>", '<tool_call>{"arguments": {}}</tool_call>', " <tool_call> x",
    '<tool_call>{"name": "f", "arguments', '<tool_call>{"arguments": {"a": 1}, "na',
])
def test_text_that_is_not_a_call_of_a_known_tool_is_content_and_nothing_is_lost(text: str) -> None:
    assert parse_whole(HermesParser, text) == (text, [])


def test_a_call_that_breaks_after_its_start_keeps_its_arguments_and_the_rest_is_content() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1,,}}</tool_call>'
    assert parse_whole(HermesParser, text) == (",}}</tool_call>", [("f", '{"a": 1,')])
    assert parse_whole(HermesParser, text[:40]) == ("", [("f", '{"')]), "cut off by the length"


def test_a_call_can_follow_a_broken_one() -> None:
    good = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert parse_whole(HermesParser, "<tool_call>{" + good) == ("<tool_call>{", ONE)
    assert parse_whole(HermesParser, '<tool_call>{"name": "f", "arguments": {"b": ' + good) == ("", [("f", '{"b": '), *ONE])


def test_arguments_are_reported_while_they_are_written() -> None:
    parser = HermesParser(NAMES)
    assert parser.push('Hm <tool_call>{"name": "f", "arguments": {"city": "Par') == [
        ContentDelta("Hm"), ToolCallStart(0, "f"), ToolCallArguments(0, '{"city": "Par'),
    ]
    assert parser.push('is"') == [ToolCallArguments(0, 'is"')]
    assert parser.push("}}</tool_") == [ToolCallArguments(0, "}"), ToolCallEnd(0)]
    assert parser.push("call>") == parser.finish() == []


def test_text_is_held_back_only_while_it_may_become_a_call() -> None:
    parser = HermesParser(NAMES)
    assert parser.push("The <tool") == [ContentDelta("The")]
    assert parser.push("box>") == [ContentDelta(" <toolbox>")]


def test_an_output_of_the_grammar_for_required_calls_is_parsed() -> None:
    text = '[{"name": "f", "parameters": {"a": 1}}, {"name":"get_weather","parameters":{}}]'
    assert parse_whole(RequiredCallsParser, text) == ("", [*ONE, ("get_weather", "{}")])
    assert parse_whole(RequiredCallsParser, text[:35]) == ("", [("f", '{"a": ')])
    assert parse_whole(RequiredCallsParser, text[:10]) == (text[:10], [])


def test_an_output_of_the_grammar_for_a_named_function_is_its_arguments() -> None:
    assert parse(NamedCallParser("f"), ['{"a"', ": 1}"]) == ("", ONE)
    assert parse(NamedCallParser("f"), [""]) == ("", [])


# -- independence of the pieces ---------------------------------------------------------------------------------------

CALL = '{"name": "f", "arguments": {"a": [1, "x\\"}"]}}'
FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "<tool", CALL, '{"name": "f"}', '{"name": "g"',
    '"name": "f", ', '"parameters": {"b": null}', "{", "}", "[", "]", "(", ")", ",", ";", " ", "\n", '"', "'", "\\", "f(a=1)", "f(",
    "get_weather(s='x,]')", "x", "=", ":", "-1", "1.5e3", "true", "nul", "é", "\u2028", "\U0001f389", "\x00",
)
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.lists(st.sampled_from([f"<tool_call>{CALL}</tool_call>", CALL, "; ", " so ", "[f(a=1), get_weather()]", f"[{CALL}, {CALL}]"]),
             max_size=5).map("".join),
    st.text(max_size=20),
)


def cut(text: str, positions: Sequence[int]) -> list[str]:
    at = sorted({0, len(text), *(position % (len(text) + 1) for position in positions)})
    return [text[a:b] for a, b in itertools.pairwise(at)]


@pytest.mark.parametrize("make", [HermesParser, Llama3JsonParser, PythonicParser, RequiredCallsParser, lambda names: NamedCallParser("f")],
                         ids=["hermes", "llama3_json", "pythonic", "required", "named"])
@given(text=TEXTS, positions=st.lists(st.integers(0, 500), max_size=12))
@example(text=f"a <tool_call>{CALL}</tool_call> \n<tool_call>{CALL}", positions=list(range(200)))
@example(text=f"{CALL} ;\n<|python_tag|>{CALL};", positions=list(range(200)))
@example(text="<|python_start|> [f(a=1) , get_weather(s='x')]<|python_end|> x", positions=list(range(200)))
@example(text=f"[ {CALL} ,{CALL}] ", positions=list(range(200)))
def test_any_pieces_of_any_text_give_the_same_calls_and_content(make: Any, text: str, positions: list[int]) -> None:
    content, calls = parse_whole(make, text)
    assert parse(make(NAMES), cut(text, positions)) == (content, calls)
    if not calls:
        assert content == text, "nothing is lost"
    rest = iter(text)
    assert all(char in rest for char in content), "content is the text without the calls"


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=12),
       st.sampled_from([None, 1]), st.booleans())
def test_the_scanner_accepts_every_json_text(value: Any, indent: int | None, ascii_only: bool) -> None:
    scanner = JsonScanner()
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert all(map(scanner.push, text))
    assert is_object(text) == isinstance(value, dict)


@given(st.lists(st.sampled_from(['{"a":', "}", *'{}[],:"\\ue1.-+', "tru", "null", "E5", " ", "\n", "01"]), max_size=9).map("".join))
def test_the_scanner_accepts_only_json(text: str) -> None:
    try:
        valid = isinstance(json.loads(text), dict)
    except ValueError:
        valid = False
    assert is_object(text) == valid


def test_a_string_has_no_control_characters_and_no_unknown_escapes() -> None:
    for inside in ("\n", "\t", "\x00", "\\x", "\\u12g4", "\\"):
        assert not is_object('{"a": "' + inside + '"}'), inside
    assert is_object('{"a": "\x7f\u2028\\n\\u00e9"}')


@pytest.mark.parametrize("text", ['{"a": 1 2', '{"a": 1}}'])
def test_pydantics_partial_parser_accepts_texts_that_can_no_longer_become_json(text: str) -> None:
    """Why `JsonScanner` exists: a broken call must be noticed where it breaks."""
    assert from_json(text, allow_partial=True) == {"a": 1}
    assert not all(map(JsonScanner().push, text))


@pytest.mark.parametrize("value", ['"\\ud800"', "[" * 300 + "]" * 300], ids=["lone surrogate", "deep nesting"])
def test_pydantics_partial_parser_rejects_json_that_the_scanner_accepts(value: str) -> None:
    text = '{"a": ' + value + "}"
    with pytest.raises(ValueError, match=r"hex escape|recursion"):
        from_json(text, allow_partial=True)
    assert is_object(text)


@given(value=st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=4))
def test_any_arguments_are_returned_unchanged(value: dict[str, Any]) -> None:
    arguments = json.dumps(value)
    text = '<tool_call>{"name": "f", "arguments": ' + arguments + "}</tool_call>"
    assert parse_whole(HermesParser, text) == ("", [("f", arguments)])
    calls = parse_whole(PythonicParser, f"[f(a={value!r})]")[1]
    assert [json.loads(arguments) for _, arguments in calls] == [{"a": value}]


# -- the format -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template, wanted", [
    ('return a json object within <tool_call></tool_call> tags', "hermes"),
    ("<tool_call>\n<function=example_function_name>", None),
    ('Respond in the format {"name": function name, "parameters": dictionary}. {{- "<|python_tag|>" }} "parameters": ', "llama3_json"),
    ("in the format of [func_name1(params_name1=params_value1), func_name2(params)]", "pythonic"),
    ("{{ messages }}", None),
])
def test_a_parser_is_guessed_if_the_template_is_clear(template: str, wanted: str | None) -> None:
    assert guess_parser(template) == wanted


# -- reasoning --------------------------------------------------------------------------------------------------------

def split(start: OutputStart, pieces: Sequence[str]) -> tuple[str, str]:
    """The reasoning and the content of a text."""
    parser = ReasoningParser(start)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    reasoning = [event.text for event in events if isinstance(event, ReasoningDelta)]
    return "".join(reasoning), "".join(event.text for event in events if isinstance(event, ContentDelta))


@pytest.mark.parametrize("start, text, reasoning, content", [
    ("undecided", "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
    ("undecided", " yes", "", " yes"),
    ("undecided", "<think>\n\n</think>\n\nyes", "", "yes"),
    ("undecided", "<thin", "", "<thin"),
    ("reasoning", "hm\n</think>\n\nyes </think>", "hm", "yes </think>"),
    ("reasoning", "<think>hm</think>yes", "hm", "yes"),
    ("reasoning", "hm, cut of", "hm, cut of", ""),
    ("answer", "<think>yes</think>", "", "<think>yes</think>"),
])
def test_reasoning_is_separated_from_the_answer(start: OutputStart, text: str, reasoning: str, content: str) -> None:
    assert split(start, [text]) == (reasoning, content)


@given(text=st.lists(st.sampled_from(["<think>", "</think>", "<th", "</", " ", "\n", "a", "b ", ">"]), max_size=10).map("".join),
       start=st.sampled_from(["undecided", "reasoning", "answer"]), positions=st.lists(st.integers(0, 60), max_size=10))
def test_any_pieces_of_any_text_give_the_same_reasoning(text: str, start: OutputStart, positions: list[int]) -> None:
    reasoning, content = split(start, [text])
    assert split(start, cut(text, positions)) == (reasoning, content)
    if start == "answer":
        assert (reasoning, content) == ("", text)


@pytest.mark.parametrize("parser, prompt, continued, wanted", [
    ("qwen3", "<|im_start|>assistant\n", "", "undecided"),
    ("qwen3", "<|im_start|>assistant\n<think>\n", "", "reasoning"),
    ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", "answer"),
    ("deepseek_r1", "<|Assistant|>", "", "reasoning"),
    ("deepseek_r1", "<|Assistant|></think>", "", "answer"),
    ("qwen3", "... <think> so", "<think> so", "reasoning"),
    ("deepseek_r1", "... well", "well", "answer"),
])
def test_the_prompt_determines_how_the_output_starts(parser: str, prompt: str, continued: str, wanted: str) -> None:
    assert output_start(parser, prompt, continued) == wanted
