"""Parsers of tool calls and reasoning. A text gives the same events however it is cut into pieces."""
from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import from_json

from minivllm.engine.chat_template import built_in_template
from minivllm.output_parsers.events import ContentDelta, OutputEvent, ReasoningDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from minivllm.output_parsers.json_reader import JsonReader
from minivllm.output_parsers.json_text import is_object, object_text
from minivllm.output_parsers.pythonic import parse_python_call
from minivllm.output_parsers.reasoning import OutputStart, ReasoningParser, output_start
from minivllm.output_parsers.tool_calls import (
    HermesParser,
    Llama3JsonParser,
    NamedCallParser,
    PythonicParser,
    RequiredCallsParser,
    ToolParser,
    guess_parser,
)
from tests.server.test_tools import HELLO, MODEL, TOOLS, WEATHER, calls_of, join, scripted_chat

NAMES = ("f", "get_weather")
ParsedText = tuple[str, list[tuple[str, str]]]  # content, and the name and arguments of each call


def parse(parser: ToolParser, pieces: Sequence[str], cut_off: bool = False) -> ParsedText:
    """Parse the pieces, and check the order of the events. `cut_off`: by the token limit."""
    events: list[OutputEvent] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.finish(cut=cut_off)
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


def parse_whole(kind: Callable[[Any], ToolParser], text: str, cut_off: bool = False) -> ParsedText:
    return parse(kind(NAMES), [text], cut_off)


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

    monkeypatch.setattr("minivllm.output_parsers.pythonic.ast", SimpleNamespace(parse=forbidden))
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
    '<tool_call>{"arguments": {}}</tool_call>', " <tool_call> x", '<tool_call>{"name": "f", "arguments": {<}}</tool_call>',
    '<tool_call>{"name": "f", "arguments', '<tool_call>{"arguments": {"a": 1}, "na',
])
def test_text_that_is_not_a_call_of_a_known_tool_is_content_and_nothing_is_lost(text: str) -> None:
    assert parse_whole(HermesParser, text) == (text, [])


def test_a_call_that_breaks_beyond_repair_ends_there_with_closed_brackets_and_the_rest_is_content() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1, "b": [2, {} <x>]}}</tool_call>'
    assert parse_whole(HermesParser, text) == ("<x>]}}</tool_call>", [("f", '{"a": 1, "b": [2, {} ]}')])
    for cut_off in ('{"', '{"a"', '{"a": 1', '{"a": 1, "b": [2'):
        at = text.index('{"a"') + len(cut_off)
        assert parse_whole(HermesParser, text[:at], cut_off=True) == ("", [("f", cut_off)]), "cut off by the length"
    assert parse_whole(HermesParser, '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>') == ("", ONE), "an end tag ends it"
    assert parse_whole(HermesParser, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>') == ("", ONE)


def test_a_call_can_follow_a_broken_one() -> None:
    good = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert parse_whole(HermesParser, "<tool_call>{" + good) == ("<tool_call>{", ONE)
    assert parse_whole(HermesParser, '<tool_call>{"name": "f", "arguments": {"b": ' + good) == ("", [("f", '{"b": null}'), *ONE])


@pytest.mark.parametrize("written, arguments", [
    ('{"a": "x\ny\tz"}', {"a": "x\ny\tz"}), ("{'a': 'it\\'s \"q\"'}", {"a": 'it\'s "q"'}), ('{"a": True, "b": None, "c": False}', None),
    ('{"a": [1, 2,],}', {"a": [1, 2]}), ('{"a": 1,, "b": 2}', {"a": 1, "b": 2}),
    ('{"a": 1 "b": [2 , {"c": 3} {}]}', {"a": 1, "b": [2, {"c": 3}, {}]}),
    ('{a: 1, b_c: Paris}', {"a": 1, "b_c": "Paris"}), ('{"a": NaN, "b": [-Infinity, undefined]}', {"a": None, "b": [None, None]}),
    ('{"a": [1, {"b": 2}', {"a": [1, {"b": 2}]}),
    ('{"a": +5, "b": 01234, "c": .5, "d": 1.2.3}', {"a": 5, "b": "01234", "c": 0.5, "d": "1.2.3"}),
    ('{"a": 1., "b": -.5e3, "c": 0.}', {"a": 1.0, "b": -500.0, "c": 0.0}),
    ('{"a": "\\d \\x41 \\u00e9 \\u12g \\\n"}', {"a": "\\d A \u00e9 \\u12g \\\n"}),
    ('{"a": -1.5e-3, "b": "\\ud83d\\ude00"}', {"a": -1.5e-3, "b": "\U0001f600"}),
    ('{"a": {"b": {}}, "c": []}', {"a": {"b": {}}, "c": []}), ('{"a":\u00a01}', {"a": 1}), ('{"a": 1, "a": 2}', {"a": 2}),
    ("{}", {}), ("null", {}), ("None", {}),
])
def test_usual_slips_of_models_are_corrected_so_that_arguments_are_json(written: str, arguments: Any) -> None:
    arguments = {"a": True, "b": None, "c": False} if arguments is None else arguments
    texts = [(HermesParser, f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>'),
             (Llama3JsonParser, f'{{"name": "f", "parameters": {written}}}'),
             (HermesParser, f"<tool_call>{{'arguments': {written}, 'name': 'f',}}</tool_call>")]
    for kind, text in texts[:2 if "[1, {" in written else 3]:  # a bracket that is missing is known only at the end of the call
        content, calls = parse_whole(kind, text)
        assert content == "" and [(name, json.loads(sent)) for name, sent in calls] == [("f", arguments)], text
        assert parse(kind(NAMES), list(text)) == (content, calls), "the same in a stream of single characters"


@pytest.mark.parametrize("written, arguments", [
    ('{"q":"SELECT "id" FROM t"}', {"q": 'SELECT "id" FROM t'}), ('{"q": "a "b", "c" d", "n": 1}', {"q": 'a "b", "c" d', "n": 1}),
    ('{"a": "He said "hi", then left."}', {"a": 'He said "hi", then left.'}), ("{'a': 'it's', 'b': 1}", {"a": "it's", "b": 1}),
    ('{"a": ["say "x" now", "y"], "b"c": 2}', {"a": ['say "x" now', "y"], 'b"c': 2}),
    ('{"a": "{"b": {"c": "d"}}", "e": "{"f": []}"}', {"a": '{"b": {"c": "d"}}', "e": '{"f": []}'}),
    ("""{"a": "curl -d '{"b": {"c": "d"}}' url"}""", {"a": """curl -d '{"b": {"c": "d"}}' url"""}),
    ('"{"a": "Paris"}"', {"a": "Paris"}), ('{"a": "x" "b": ["y" "z"]}', {"a": "x", "b": ["y", "z"]}),
    ("{city: New York, when: 12:30}", {"city": "New York", "when": "12:30"}),
    ('{"a":`x`}', {"a": "x"}), ('{"a": f(1, 2)}', {"a": "f(1, 2)"}),
    ("{a: [New York, Rome], b: <x>}", {"a": ["New York", "Rome"], "b": "<x>"}),
    ('{"city":"Paris', {"city": "Paris"}), ('{"a": ["x}', {"a": ["x"]}), ('{"a": "x", "b": "{c}', {"a": "x", "b": "{c"}),
    ('{"a": "x", // "b": "c\n"b": {"c": 1} /* d */ }', {"a": "x", "b": {"c": 1}}), ('{"a": [1, /**/ 2] // c\n}', {"a": [1, 2]}),
    ("{'a': 1, 2: 'b'}", {"a": 1, "2": "b"}), ("{path: /tmp/x, url: http://y/z}", {"path": "/tmp/x", "url": "http://y/z"}),
    ('{"a": 1}}', {"a": 1}), ('{"a": 1}, "arguments": {"b": 2}', {"a": 1}),
])
def test_a_raw_or_missing_quote_never_cuts_off_a_call(written: str, arguments: Any) -> None:
    for kind, text in ((HermesParser, f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'),
                       (HermesParser, f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>' * 2),
                       (HermesParser, f'<tool_call>{{"name": "f", "arguments": {written}}}'),
                       (Llama3JsonParser, f'{{"name": "f", "parameters": {written}}}')):
        content, calls = parse_whole(kind, text)
        assert content == "" and [json.loads(sent) for _, sent in calls] == [arguments] * (1 + (text.count("</tool_call>") == 2)), text
        assert parse(kind(NAMES), list(text)) == (content, calls), "the same in a stream of single characters"


def test_only_the_token_limit_leaves_arguments_open() -> None:
    text = '{"name": "f", "parameters": {"ab": [true, "c\\u00e9\\n"], "d": {"e": -1.5}}}'
    for end in range(len(text)):
        for kind, marked in ((HermesParser, "<tool_call>" + text[:end]), (Llama3JsonParser, text[:end])):
            content, calls = parse_whole(kind, marked)
            assert (content, calls) == (marked, []) or (content == "" and is_object(calls[0][1])), marked
            assert parse(kind(NAMES), list(marked)) == (content, calls)
            content, calls = parse_whole(kind, marked, cut_off=True)
            assert (content, calls) == (marked, []) or (content == "" and calls[0][1] in text), marked
    assert parse_whole(Llama3JsonParser, '{"name": "f", "arguments": {é') == ('{"name": "f", "arguments": {é', [])


def test_a_marker_in_a_string_ends_a_call_only_if_nothing_of_it_follows() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "write {} </tool_call> here"}}</tool_call>'
    assert parse_whole(HermesParser, text) == ("", [("f", '{"a": "write {} </tool_call> here"}')])


def test_surplus_brackets_and_a_second_call_without_its_marker_are_no_content() -> None:
    one = '{"name": "f", "arguments": {"a": 1}}'
    for kind, text in ((HermesParser, f"<tool_call>{one}\n{one}</tool_call>"),
                       (HermesParser, f"<tool_call>{one}}}, {one}}}\n</tool_call>\n"),
                       (Llama3JsonParser, f"{one}}}; {one}}}")):
        assert parse_whole(kind, text) == parse(kind(NAMES), list(text)) == ("", ONE * 2)
    assert parse_whole(HermesParser, f"<tool_call>{one}\n{{x}}</tool_call>") == ("{x}</tool_call>", ONE)


@pytest.mark.parametrize("written, arguments", [
    ('from="USD", class=1, user-id="x", import=[{"class": 2}]', {"from": "USD", "class": 1, "user-id": "x", "import": [{"class": 2}]}),
    ('s="a\nb\tc\r\0"', {"s": "a\nb\tc\r\0"}), ('s="""a\nb""", t=\'\\d\'', {"s": "a\nb", "t": "\\d"}),
    ('s="a\\\nb"', {"s": "a\\\nb"}),
    ('e="\\ud83d\\ude00"', {"e": "\U0001f600"}),
    ("a=-1, b=(1, 2), c=true, d=True, e={}", {"a": -1, "b": [1, 2], "c": True, "d": True, "e": {}}),
    ("s='x=1, y=(2'", {"s": "x=1, y=(2"}), ("a=1, a=2", None), ("a=f(b=1)", None),
    ("a=float('nan')", None), ("a=NaN", None), ("a==1", None),
])
def test_parameters_with_reserved_names_and_raw_line_breaks_in_strings_are_python_calls(written: str, arguments: Any) -> None:
    text = f"[f({written})]"
    content, calls = parse_whole(PythonicParser, text)
    assert (content, calls) == (text, []) if arguments is None else [(n, json.loads(a)) for n, a in calls] == [("f", arguments)]
    assert parse(PythonicParser(NAMES), list(text)) == (content, calls)


def test_arguments_are_reported_while_they_are_written() -> None:
    parser = HermesParser(NAMES)
    assert parser.push('Hm <tool_call>{"name": "f", "arguments": {"city": "Par') == [
        ContentDelta("Hm"), ToolCallStart(0, "f"), ToolCallArguments(0, '{"city": "Par'),
    ]
    assert parser.push('is"') == [ToolCallArguments(0, "is")], "what follows decides whether the quote ends the string"
    assert parser.push("}}</tool_") == [ToolCallArguments(0, '"}'), ToolCallEnd(0)]
    assert parser.push("call>") == parser.finish() == []


def test_text_is_held_back_only_while_it_may_become_a_call() -> None:
    parser = HermesParser(NAMES)
    assert parser.push("The <tool") == [ContentDelta("The")]
    assert parser.push("box>") == [ContentDelta(" <toolbox>")]


def test_an_output_of_the_grammar_for_required_calls_is_parsed() -> None:
    text = '[{"name": "f", "parameters": {"a": 1}}, {"name":"get_weather","parameters":{}}]'
    assert parse_whole(RequiredCallsParser, text) == ("", [*ONE, ("get_weather", "{}")])
    assert parse_whole(RequiredCallsParser, text[:35], cut_off=True) == ("", [("f", '{"a": ')])
    assert parse_whole(RequiredCallsParser, text[:10]) == ("", []), "the array is never content"
    for end in range(len(text)):
        assert parse_whole(RequiredCallsParser, text[:end])[0] == ""


def test_an_output_of_the_grammar_for_a_named_function_is_its_arguments() -> None:
    assert parse(NamedCallParser("f"), ['{"a"', ": 1}"]) == ("", ONE)
    assert parse(NamedCallParser("f"), [""]) == ("", [])
    text = '{"a": {"b": [1.5, true, "c\\n\\u00e9 }"]}, "d": null}'
    for end in range(1, len(text) + 1):
        for pieces in ([text[:end]], list(text[:end])):
            content, [(name, arguments)] = parse(NamedCallParser("f"), pieces)
            assert (content, name) == ("", "f") and is_object(arguments), "a stop string may cut it off"
            content, [(name, arguments)] = parse(NamedCallParser("f"), pieces, cut_off=True)
            assert text.startswith(arguments) and len(arguments) >= end - 6, "the token limit leaves it open"


# -- independence of the pieces ---------------------------------------------------------------------------------------

CALL = '{"name": "f", "arguments": {"a": [1, "x\\"}"]}}'
FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "<tool", CALL, '{"name": "f"}', '{"name": "g"',
    '"name": "f", ', '"parameters": {"b": null}', "{", "}", "[", "]", "(", ")", ",", ";", " ", "\n", '"', "'", "\\", "f(a=1)", "f(",
    f"<tool_call>{CALL[:-4]}", CALL[:-2], CALL[:-1], '"id", "name" FROM', "`x`", '"arguments": {', ', "b": ', "<", "/", "// c\n", "/* c */",
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


@pytest.mark.parametrize("make", [
    HermesParser, Llama3JsonParser, PythonicParser, RequiredCallsParser, lambda names: NamedCallParser("f"),
    *(partial(kind, exclusive=True) for kind in (HermesParser, Llama3JsonParser, PythonicParser)),
], ids=["hermes", "llama3_json", "pythonic", "required", "named", "hermes or format", "llama3_json or format", "pythonic or format"])
@given(text=TEXTS, positions=st.lists(st.integers(0, 500), max_size=12))
@example(text=f"a <tool_call>{CALL}</tool_call> \n<tool_call>{CALL}", positions=list(range(200)))
@example(text=f"{CALL} ;\n<|python_tag|>{CALL};", positions=list(range(200)))
@example(text="<|python_start|> [f(a=1) , get_weather(s='x')]<|python_end|> x", positions=list(range(200)))
@example(text=f"[ {CALL} ,{CALL}] ", positions=list(range(200)))
def test_any_pieces_of_any_text_give_the_same_calls_and_content(make: Any, text: str, positions: list[int]) -> None:
    for cut_off in (True, False):
        content, calls = parse_whole(make, text, cut_off)
        assert parse(make(NAMES), cut(text, positions), cut_off) == (content, calls)
        if make in (HermesParser, Llama3JsonParser):
            assert all(is_object(arguments) for _, arguments in calls[:len(calls) - cut_off]), "only the token limit leaves a call open"
    if make is RequiredCallsParser:
        return
    if isinstance(make, partial):
        assert not calls or text.rstrip().endswith(content.strip()), "calls are at the start only"
    elif not calls:
        assert content == text, "nothing is lost"
    if make is PythonicParser:
        assert all(is_object(arguments) for _, arguments in calls)
    rest = iter(text)
    assert all(char in rest for char in content), "content is the text without the calls"


JSON = st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=12)


@given(JSON, st.sampled_from([None, 1]), st.booleans())
def test_every_json_object_is_read_unchanged(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert object_text(text) == (text if isinstance(value, dict) else None)
    assert is_object(text) == isinstance(value, dict)


@given(st.lists(st.sampled_from(['{"a":', "}", *'{}[],:"\\ue1.-+\'', "tru", "null", "E5", " ", "\n", "01"]), max_size=9).map("".join))
def test_what_is_read_is_json_and_what_breaks_can_be_closed(text: str) -> None:
    read = object_text(text)
    assert read is None or isinstance(json.loads(read), dict)
    pieces: list[str] = []
    reader = JsonReader()
    reader.write = pieces.append  # type: ignore[method-assign]
    if not all(map(reader.push, "{" + text)) and reader.depth:
        reader.close()
        assert isinstance(json.loads("".join(pieces)), dict)


def test_only_an_object_is_one() -> None:
    for text in ('{"a": 1', "[1]", "5", "", '{"a": 1}}', "{'a': 1}"):
        assert not is_object(text), text
    assert is_object('{"a": ' + "[" * 50_000 + "]" * 50_000 + "}")


@pytest.mark.parametrize("text", ['{"a": 1 2', '{"a": 1}}'])
def test_pydantics_partial_parser_accepts_texts_that_can_no_longer_become_json(text: str) -> None:
    """Why `JsonReader` exists: a broken call must be noticed where it breaks."""
    assert from_json(text, allow_partial=True) == {"a": 1}
    assert not all(map(JsonReader().push, text))


KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(KEYS, JSON, max_size=3)), min_size=1, max_size=3)


@given(calls=CALLS, positions=st.lists(st.integers(0, 900), max_size=12), loose=st.booleans())
def test_any_calls_in_any_pieces_are_found_with_their_arguments_as_json(
    calls: list[tuple[str, dict[str, Any]]], positions: list[int], loose: bool,
) -> None:
    """`loose`: written with Python's `repr`, as models do."""
    def write(value: Any) -> str:
        return repr(value) if loose else json.dumps(value)

    texts = {
        HermesParser: "\n".join(f"<tool_call>\n{write({'name': name, 'arguments': args})}\n</tool_call>" for name, args in calls),
        Llama3JsonParser: "; ".join(write({"name": name, "parameters": args}) for name, args in calls),
        PythonicParser: "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in args.items())})" for n, args in calls) + "]",
    }
    for kind, text in texts.items():
        content, found = parse(kind(NAMES), cut(text, positions))
        assert (content, found) == parse_whole(kind, text)
        assert content == "" and [(name, json.loads(sent)) for name, sent in found] == calls, text


INSERTED = ("", '"', '"id" FROM', ",", "}", "]", "{", ":", "'", " so ", "`", "\\", "<", "/", " // c\n", "/*")
SLIPS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), st.sampled_from(INSERTED)), min_size=1, max_size=3)


@given(call=CALLS, slips=SLIPS, positions=st.lists(st.integers(0, 300), max_size=12), cut_off=st.booleans())
def test_any_slips_in_any_pieces_give_complete_arguments_or_content(
    call: list[tuple[str, dict[str, Any]]], slips: list[tuple[int, int, str]], positions: list[int], cut_off: bool,
) -> None:
    text = json.dumps({"name": call[0][0], "parameters": call[0][1]})
    for at, deleted, inserted in slips:
        at %= len(text) + 1
        text = text[:at] + inserted + text[at + deleted:]
    for kind, written in ((Llama3JsonParser, text), (HermesParser, f"<tool_call>{text}</tool_call>"), (HermesParser, f"<tool_call>{text}")):
        content, calls = parse_whole(kind, written, cut_off)
        assert parse(kind(NAMES), cut(written, positions), cut_off) == (content, calls)
        assert all(is_object(arguments) for _, arguments in calls[:len(calls) - cut_off]), written
        assert calls or content == written


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
    ("within", " more</think>\n\nyes", " more", "yes"),
    ("within", "</think>yes", "", "yes"),
    ("answer", "<think>yes</think>", "", "<think>yes</think>"),
])
def test_reasoning_is_separated_from_the_answer(start: OutputStart, text: str, reasoning: str, content: str) -> None:
    assert split(start, [text]) == (reasoning, content)


@given(text=st.lists(st.sampled_from(["<think>", "</think>", "<th", "</", " ", "\n", "a", "b ", ">"]), max_size=10).map("".join),
       start=st.sampled_from(["undecided", "reasoning", "within", "answer"]), positions=st.lists(st.integers(0, 60), max_size=10))
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
    ("qwen3", "... <think> so", "<think> so", "within"),
    ("qwen3", "... <think>\n", "<think>\n", "reasoning"),
    ("deepseek_r1", "... well", "well", "answer"),
])
def test_the_prompt_determines_how_the_output_starts(parser: str, prompt: str, continued: str, wanted: str) -> None:
    assert output_start(parser, prompt, continued) == wanted


# -- through the server -----------------------------------------------------------------------------------------------

def test_a_client_gets_complete_arguments_unless_the_finish_reason_is_length(tokenizer_folder: Path) -> None:
    open_string = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris}}\n</tool_call>'
    raw_quotes = '<tool_call>{"name": "get_weather", "arguments": {"city": "a "b" c"}}\n</tool_call>'
    flat: Any = [{"type": "function", **WEATHER["function"]}]
    with scripted_chat(tokenizer_folder, built_in_template("tool_chatml")) as made:
        for text, ends, city in ((open_string, True, "Paris"), (raw_quotes, True, 'a "b" c'), (open_string[:-14], False, None)):
            made.generate(text, ends=ends)
            arguments = json.dumps({"city": city}) if ends else '{"city": "Paris}'
            reason, status = ("tool_calls", "completed") if ends else ("length", "incomplete")
            choice = made.chat(tools=TOOLS).choices[0]
            assert (calls_of(choice.message), choice.finish_reason) == ([("get_weather", arguments)], reason)
            joined = join(made.chat(tools=TOOLS, stream=True))
            assert (joined.calls, joined.content, joined.finish_reason) == ([("get_weather", arguments)], "", reason)
            whole = made.api.responses.create(model=MODEL, input=HELLO, tools=flat)
            assert [(whole.status, item.status, item.arguments) for item in whole.output] == [(status, status, arguments)]
