"""Structured output: with any weights, seed and scheduling, the text matches its grammar.

The model is tiny and random. It would never write JSON by itself, so every valid character comes from the mask.
"""
from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import LLM, InvalidInput, SamplingParams, StructuredOutputs
from minivllm.config import EngineConfig
from minivllm.core.plan import StepPlan
from minivllm.engine import grammar_compiler, grammar_text
from minivllm.engine.client import ThreadClient
from minivllm.engine.grammar import fill_masks
from minivllm.engine.grammar_compiler import GrammarCompiler
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest
from minivllm.models.hub import ModelFiles
from minivllm.outputs import CompletionOutput, OutputDelta

pytestmark = pytest.mark.usefixtures("one_torch_thread")

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
}
CHOICES = ["yes", "no", "yesterday", 'é"\\\x7f😀\n']
COMPACT = StructuredOutputs(json=PERSON, disable_any_whitespace=True)


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


# name -> (structured_outputs, whether a text matches them)
KINDS: dict[str, tuple[StructuredOutputs, Callable[[str], object]]] = {
    "schema": (COMPACT, lambda text: is_person(text) and " " not in text),
    "schema as text": (StructuredOutputs(json=json.dumps(PERSON), whitespace_pattern="[ ]?"),
                       lambda text: is_person(text) and "\n" not in text),
    "regex": (StructuredOutputs(regex=r"[A-Z][a-z]{2,8} is \d{1,3}"), re.compile(r"[A-Z][a-z]{2,8} is \d{1,3}").fullmatch),
    "choice": (StructuredOutputs(choice=CHOICES), CHOICES.__contains__),
    "lark": (StructuredOutputs(grammar='start: "<" /[a-z]{1,5}/ ">" ("!" | "?")?'), re.compile(r"<[a-z]{1,5}>[!?]?").fullmatch),
    "gbnf": (StructuredOutputs(grammar='root ::= "x" digit digit\ndigit ::= [0-9]'), re.compile(r"x\d\d").fullmatch),
}


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def engine(folder: Path, **config: Any) -> LLM:
    return LLM(str(folder), **{"dtype": "float32", "device": "cpu", "max_model_len": 200, "num_gpu_blocks_override": 400, **config})


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with engine(folder) as llm:
        yield llm


def ask(llm: LLM, wanted: StructuredOutputs | dict[str, Any], prompt: Any = "the cat", **params: Any) -> CompletionOutput:
    asked = SamplingParams(**{"max_tokens": 120, "structured_outputs": wanted, **params})
    return llm.generate(prompt, asked, use_tqdm=False)[0].outputs[0]


# -- outputs match their grammar --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_seed_and_temperature_gives_an_output_that_matches_the_grammar(llm: LLM, kind: str) -> None:
    wanted, is_right = KINDS[kind]
    params = [SamplingParams(temperature=t, seed=seed, max_tokens=150, structured_outputs=wanted, top_k=k)
              for t in (0.0, 0.3, 1.0, 3.0) for seed in range(6) for k in (0, 5)]
    texts = set()
    for output in llm.generate(["the cat"] * len(params), params, use_tqdm=False):
        completion = output.outputs[0]
        assert completion.finish_reason == "stop" and completion.stop_reason is None and is_right(completion.text), completion
        texts.add(completion.text)
    assert len(texts) > 1 or kind == "choice"


def test_json_object_gives_an_object_or_the_beginning_of_one_at_the_token_limit(llm: LLM) -> None:
    for seed in range(20):
        output = ask(llm, {"json_object": True}, seed=seed, max_tokens=60)
        if output.finish_reason == "stop":
            assert isinstance(json.loads(output.text), dict)
        else:
            assert output.finish_reason == "length" and len(output.token_ids) == 60 and output.text.startswith("{")


def test_the_default_model_answers_in_the_requested_form(default_model: ModelFiles) -> None:
    """It has a real tokenizer, with tokens of many characters, and more than one EOS token."""
    with LLM(max_model_len=256, num_gpu_blocks_override=64) as llm:
        for kind, (wanted, is_right) in KINDS.items():
            for temperature in (0.0, 1.0):
                output = llm.chat([{"role": "user", "content": "Describe a person."}], SamplingParams(
                    temperature=temperature, seed=1, max_tokens=80, structured_outputs=wanted), use_tqdm=False)[0].outputs[0]
                assert output.finish_reason == "stop" and is_right(output.text), (kind, output)


scalars = st.sampled_from([
    {"type": "integer", "minimum": -3, "maximum": 120}, {"type": "boolean"}, {"type": "null"}, {"const": "é\n"},
    {"enum": [1, "x", None, [2]]}, {"type": "string", "maxLength": 4}, {"type": "string", "pattern": "^[a-c]{2}$"},
    {"type": "string", "format": "date"}, {"type": "number", "minimum": 0, "maximum": 1},
])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(lambda item, low: {"type": "array", "items": item, "minItems": low, "maxItems": low + 1}, inner, st.integers(0, 1))
    objects = st.builds(
        lambda properties, required: {"type": "object", "properties": properties, "required": [n for n in properties if n in required],
                                      "additionalProperties": False},
        st.dictionaries(st.sampled_from(["a", "b c", "é", 'q"']), inner, max_size=3), st.sets(st.sampled_from(["a", "é", 'q"'])))
    return arrays | objects | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))


@settings(max_examples=40)
@given(schema=st.recursive(scalars, containers, max_leaves=5), seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 0.7, 1.5]))
def test_outputs_under_random_schemas_validate(llm: LLM, schema: dict[str, Any], seed: int, temperature: float) -> None:
    output = ask(llm, StructuredOutputs(json=schema, disable_any_whitespace=True), seed=seed, temperature=temperature, max_tokens=180)
    if output.finish_reason == "length":  # a number may have any number of digits
        assert "number" in json.dumps(schema)
        return
    assert output.finish_reason == "stop"
    jsonschema.validate(json.loads(output.text), schema)


@given(choices=st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12), min_size=1, max_size=4))
@settings(max_examples=40)
def test_choices_may_hold_any_text(llm: LLM, choices: list[str]) -> None:
    assert ask(llm, {"choice": choices}, seed=1).text in choices


# -- the end of an output ---------------------------------------------------------------------------------------------


def test_an_output_that_cannot_continue_ends_at_once_even_with_min_tokens_and_ignore_eos(llm: LLM) -> None:
    for more in ({}, {"min_tokens": 50}, {"ignore_eos": True}):
        output = ask(llm, {"choice": ["the end"]}, **more)
        assert (output.text, output.finish_reason, output.stop_reason) == ("the end", "stop", None), more
        assert llm.llm_engine.core.tokenizer.decode(output.token_ids) == "the end", "no EOS was drawn"


def test_eos_is_allowed_only_where_the_output_may_end(llm: LLM) -> None:
    eos = llm.llm_engine.core.eos_token_ids[0]
    towards_eos = {"logit_bias": {eos: 100.0}}
    output = ask(llm, {"regex": "(ab){3}(ab)*"}, **towards_eos)
    assert output.text == "ababab" and output.token_ids[-1] == eos and output.finish_reason == "stop"
    output = ask(llm, {"regex": "(ab){3}(ab)*"}, min_tokens=20, **towards_eos)
    assert len(output.token_ids) >= 20 and re.fullmatch("(ab){10,}", output.text)


def test_an_output_that_may_end_does_so_where_other_settings_ban_every_next_token(llm: LLM) -> None:
    """min_tokens bans EOS, and bad_words the other tokens. A short output is better than one that violates the settings."""
    output = ask(llm, {"regex": "ab(cd)?"}, min_tokens=10, bad_words=["c"])
    assert (output.text, output.finish_reason) == ("ab", "stop")
    assert len(output.token_ids) == len(llm.llm_engine.core.tokenizer.encode("ab"))


def test_a_stop_string_ends_the_output_before_its_grammar_does(llm: LLM) -> None:
    output = ask(llm, {"regex": "abcdef"}, stop="cd")
    assert (output.text, output.stop_reason) == ("ab", "cd")
    output = ask(llm, {"regex": "abcdef"}, stop="ef")  # at the same token
    assert (output.text, output.stop_reason) == ("abcd", "ef")
    output = ask(llm, {"regex": "abcdef"}, stop="fg")
    assert (output.text, output.stop_reason) == ("abcdef", None)


def test_the_last_token_allowed_by_max_tokens_may_complete_the_grammar(llm: LLM) -> None:
    length = len(ask(llm, {"choice": ["the end"]}, temperature=0).token_ids)
    assert ask(llm, {"choice": ["the end"]}, temperature=0, max_tokens=length).finish_reason == "stop"
    assert ask(llm, {"choice": ["the end"]}, temperature=0, max_tokens=length - 1).finish_reason == "length"


def test_each_child_follows_the_grammar_independently(llm: LLM) -> None:
    params = SamplingParams(n=6, seed=2, temperature=2.0, max_tokens=120, structured_outputs=COMPACT, logprobs=1)
    outputs = llm.generate("the hat", params, use_tqdm=False)[0].outputs
    assert all(is_person(output.text) for output in outputs) and len({output.text for output in outputs}) == 6
    assert all(output.logprobs is not None and len(output.logprobs) == len(output.token_ids) for output in outputs)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted, field, says", [
    ({}, "structured_outputs", "exactly one of"), ({"json": {}, "regex": "a"}, "structured_outputs", "got json, regex"),
    ({"jsn": {}}, "structured_outputs", "did you mean 'json'"), ({"json": "{"}, "structured_outputs.json", "not valid JSON"),
    ({"json": [1]}, "structured_outputs.json", "JSON schema"), ({"json": {"type": float("nan")}}, "structured_outputs.json", "plain JSON"),
    ({"json": {"a": object()}}, "structured_outputs.json", "plain JSON"), ({"regex": ""}, "structured_outputs.regex", "non-empty"),
    ({"regex": "a" * 20_000}, "structured_outputs.regex", "at most"), ({"choice": []}, "structured_outputs.choice", "non-empty list"),
    ({"choice": "ab"}, "structured_outputs.choice", "list"), ({"choice": ["a", ""]}, "structured_outputs.choice", "non-empty strings"),
    ({"choice": ["a" * 200_000]}, "structured_outputs.choice", "at most"), ({"grammar": 3}, "structured_outputs.grammar", "string"),
    ({"grammar": "\ud800"}, "structured_outputs.grammar", "surrogate"),
    ({"json": {"const": "\ud800"}}, "structured_outputs.json", "surrogate"),
    ({"json": {"enum": ["x" * 200_000]}}, "structured_outputs.json", "at most"),
    ({"json": json.loads('{"a":' * 80 + "1" + "}" * 80)}, "structured_outputs.json", "nested deeper"),
    ({"json": "[" * 100_000}, "structured_outputs.json", "not valid JSON"),
    ({"json_object": 1}, "structured_outputs.json_object", "true or false"),
    ({"regex": "a", "whitespace_pattern": " "}, "structured_outputs", "for JSON"),
    ({"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True}, "structured_outputs", "exclude each other"),
    (["json"], "structured_outputs", "a dict"),
])
def test_invalid_structured_outputs_are_refused_on_construction(wanted: Any, field: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(says)) as error:
        SamplingParams(structured_outputs=wanted)
    assert error.value.param == field and len(str(error.value)) < 400


@pytest.mark.parametrize("wanted, field", [
    ({"regex": "a("}, "regex"), ({"regex": "a(?=b)"}, "regex"), ({"json": {"type": "objct"}}, "json"),
    ({"grammar": "start: foo"}, "grammar"), ({"grammar": "root ::= ("}, "grammar"),
    ({"json": {"$ref": "http://localhost/x.json"}}, "json"), ({"json": {"not": {}}}, "json"),
    ({"regex": "(" * 3000 + "a" + ")" * 3000}, "regex"), ({"json": {"enum": []}}, "json"),
    ({"json_object": True, "whitespace_pattern": "("}, "json_object"),
])
def test_a_grammar_that_cannot_be_compiled_is_refused_and_other_requests_continue(llm: LLM, wanted: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as error:
        ask(llm, wanted)
    assert error.value.param == f"structured_outputs.{field}" and len(str(error.value)) < 500
    assert ask(llm, {"choice": ["fine"]}).text == "fine"


def test_slashes_and_line_ends_in_a_regex_are_literal(llm: LLM) -> None:
    pairs = [("a/b", "a/b"), (r"a\/b", "a/b"), ("a\nb", "a\nb"), (r"a\nb", "a\nb"), ("^ab$", "ab"), ('"', '"'), ("#x", "#x"), (r"\\", "\\")]
    for regex, text in pairs:
        assert ask(llm, {"regex": regex}).text == text
    assert ask(llm, {"regex": "()"}).text == ""


def test_without_the_package_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with engine(folder) as llm, pytest.raises(InvalidInput, match="pip install llguidance"):
        ask(llm, {"regex": "a"})


def test_without_a_tokenizer_there_is_no_structured_output(folder: Path) -> None:
    with engine(folder, skip_tokenizer_init=True) as llm, pytest.raises(InvalidInput, match="needs a tokenizer"):
        ask(llm, {"regex": "a"}, prompt=[5, 6])


def test_beam_search_refuses_a_grammar(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="beam search"):
        llm.llm_engine.core.add_request("b", [5, 6], SamplingParams(structured_outputs={"regex": "a"}, logprobs=2), beam_search=True)


def steps_to_the_end(llm: LLM) -> list[OutputDelta]:
    deltas: list[OutputDelta] = []
    while llm.llm_engine.core.has_unfinished_requests():
        deltas += llm.llm_engine.core.step()
        llm.llm_engine.core.scheduler.check()
    return deltas


@pytest.mark.parametrize("ahead", [False, True])
def test_a_grammar_that_cannot_be_followed_ends_its_own_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """In one request other settings ban every token; in the other the automaton reaches its limit."""
    monkeypatch.setattr(grammar_text, "MAX_LEXER_STATES", 60)
    with engine(folder, async_scheduling=ahead) as llm:
        core = llm.llm_engine.core
        digits = [core.tokenizer.token_to_id(c) for c in "0123"]  # type: ignore[union-attr]
        core.add_request("conflict", [5, 6], SamplingParams(
            structured_outputs={"regex": "1[a-z]+"}, allowed_token_ids=digits, n=3, max_tokens=9))
        core.add_request("complex", [5, 6], SamplingParams(structured_outputs={"regex": "(.{1,9}a.*b){9}"}, max_tokens=60, seed=1, n=3))
        core.add_request("plain", [5, 6], SamplingParams(temperature=0, ignore_eos=True, max_tokens=40))
        core.add_request("fine", [5, 6], SamplingParams(structured_outputs={"regex": "[ab]{30}"}, max_tokens=40))
        ends: dict[tuple[str, int], OutputDelta] = {}
        while core.has_unfinished_requests():
            ends |= {(d.request_id, d.index): d for d in core.step() if d.finish_reason is not None}
            at_work = {s.request_id for s in core.scheduler.running if s.status.value != "finished"}
            assert not at_work & {request_id for request_id, _ in ends}
        assert len(ends) == 8
        for index in range(3):
            end = ends["conflict", index]
            assert end.finish_reason == "error" and "other settings" in str(end.error) and end.error_param == "structured_outputs.regex"
        assert ends["complex", 0].finish_reason == "error" and "too complex" in str(ends["complex", 0].error)
        assert (ends["plain", 0].finish_reason, ends["fine", 0].finish_reason) == ("length", "stop")
        assert core.stats().used_blocks == 0 and core._outputs._num_grammars == 0


@pytest.mark.parametrize("options, why", [
    ({"grammar": "start: " + " | ".join(f'"w{i}x"' for i in range(3000))}, "became too complex: Parser Error: Current row has"),
    ({"grammar": 'start: start "a"'}, "allows no text"),
    ({"json": {"$ref": "#"}}, "allows no text"),
], ids=["too many alternatives", "endless rule", "endless schema"])
def test_a_failed_grammar_gives_the_reason(llm: LLM, options: dict[str, Any], why: str) -> None:
    """The reason is in the grammar, since the requests have no other settings."""
    llm.llm_engine.core.add_request("x", [5, 6], SamplingParams(structured_outputs=options, max_tokens=9))
    (end,) = [delta for delta in steps_to_the_end(llm) if delta.finish_reason is not None]
    assert end.finish_reason == "error" and why in str(end.error) and "verbose" not in str(end.error)


@pytest.mark.parametrize("options, text", [
    ({"choice": ["a</s>b"]}, "a</s>b"),
    ({"regex": r"a<\/s>b"}, "a</s>b"),
    ({"json": {"const": "</s>"}}, '"</s>"'),
    ({"grammar": 'start: "a</s>" "b"'}, "a</s>b"),
], ids=["choice", "regex", "schema", "grammar"])
def test_a_grammar_may_require_the_text_of_a_special_token(llm: LLM, options: dict[str, Any], text: str) -> None:
    llm.llm_engine.core.add_request("x", [5, 6], SamplingParams(structured_outputs=options, max_tokens=30))
    deltas = steps_to_the_end(llm)
    assert "".join(delta.text for delta in deltas) == text and deltas[-1].finish_reason == "stop"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_child_whose_grammar_fails_ends_its_unfinished_siblings_in_the_same_step(folder: Path, ahead: bool) -> None:
    """An answer has one status for all children, so the outputs of the other children could not be returned."""
    with engine(folder, async_scheduling=ahead) as llm:
        core = llm.llm_engine.core
        allowed = [core.tokenizer.token_to_id(c) for c in "abc"]  # type: ignore[union-attr]
        options = {"regex": "a[0-9]|b{60}|c"}  # after one letter: no token is allowed, far from the end, complete
        core.add_request("x", [5, 6], SamplingParams(structured_outputs=options, allowed_token_ids=allowed, n=8, max_tokens=70, seed=1))
        core.add_request("fine", [5, 6], SamplingParams(structured_outputs={"regex": "b{20}"}, max_tokens=70))
        texts, steps = [""] * 8, []
        while core.has_unfinished_requests():
            deltas = core.step()
            core.scheduler.check()
            for delta in deltas:
                if delta.request_id == "x":
                    texts[delta.index] += delta.text
            steps.append({d.index: d for d in deltas if d.request_id == "x" and d.finish_reason is not None})
            if delta := next((d for d in deltas if d.request_id == "fine" and d.finish_reason is not None), None):
                assert delta.finish_reason == "stop", "another request notices nothing"
        ends = [step for step in steps if step]
        assert sum(map(len, ends)) == 8
        complete = {index: delta for step in ends[:-1] for index, delta in step.items()}
        assert complete and all(delta.finish_reason == "stop" and texts[index] == "c" for index, delta in complete.items())
        assert {texts[index][0] for index in ends[-1]} == {"a", "b"}, "the seed is one that has all three kinds"
        for delta in ends[-1].values():
            assert (delta.finish_reason, delta.error_param) == ("error", "structured_outputs.regex")
            assert "other settings" in str(delta.error)
        assert core.stats().used_blocks == 0 and core._outputs._num_grammars == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_ended_and_aborted_requests_leave_no_state_behind(folder: Path, ahead: bool) -> None:
    """With asynchronous scheduling, a step of the aborted request is still in flight when another request gets its id."""
    with engine(folder, async_scheduling=ahead) as llm:
        core = llm.llm_engine.core
        core.add_request("plain", [7], SamplingParams(max_tokens=50, ignore_eos=True))  # so that there is always a next step
        for steps in range(3, 7):
            core.add_request("x", [5, 6], SamplingParams(structured_outputs={"regex": "[a-f]{40}"}, max_tokens=50))
            core.add_request("y", [5, 6], SamplingParams(structured_outputs=COMPACT, n=3, max_tokens=90))
            for _ in range(steps):
                core.step()
            assert core._outputs._num_grammars == 4
            core.abort_request("x")
            core.abort_request("y")
            core.add_request("x", [5, 6], SamplingParams(structured_outputs={"regex": "ok"}, max_tokens=50))  # the same id again
            found: list[OutputDelta] = []
            while not found or found[-1].finish_reason is None:
                found += [delta for delta in core.step() if delta.request_id == "x"]
            assert "".join(delta.text for delta in found) == "ok" and found[-1].finish_reason == "stop"
            assert core._outputs._num_grammars == 0


# -- compilation ------------------------------------------------------------------------------------------------------


def test_a_grammar_is_compiled_once_and_the_least_recently_used_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    build = grammar_compiler.build_matcher
    monkeypatch.setattr(grammar_compiler, "build_matcher", lambda text, *rest: (compiled.append(text), build(text, *rest))[1])
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED", 2)
    compiler = GrammarCompiler(Tokenizer(folder), (1,))
    for name in "aabacab":
        wanted = StructuredOutputs(regex=name)
        compiler.compile(wanted)
        assert compiler.is_cached(wanted)
    assert [next(name for name in "abc" if f"/{name}/" in text) for text in compiled] == ["a", "b", "c", "b"]


def test_neither_steps_nor_an_abort_wait_while_a_grammar_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, gate, begun = grammar_compiler.build_matcher, threading.Event(), threading.Semaphore(0)

    def slow(*args: Any) -> Any:
        begun.release()
        gate.wait()
        return build(*args)

    monkeypatch.setattr(grammar_compiler, "build_matcher", slow)
    config = EngineConfig(model=str(folder), dtype="float32", device="cpu", max_model_len=200, num_gpu_blocks_override=100)
    client = ThreadClient.start(config)

    async def text(name: str, **params: Any) -> tuple[str, str | None]:
        deltas: list[OutputDelta] = []
        async for new in client.generate(EngineRequest(request_id=name, prompt_token_ids=(5, 6), params=SamplingParams(**params))):
            deltas += new
        return "".join(d.text for d in deltas), deltas[-1].finish_reason

    async def scenario() -> None:
        waiting, bad, gone = (
            asyncio.create_task(text(regex, structured_outputs={"regex": regex}, n=2 if regex == "gone" else 1))
            for regex in ("ok", "a(", "gone"))
        with pytest.raises(InvalidInput, match="structured_outputs"):  # its trial fails
            await bad
        for _ in range(2):  # there are two compile threads
            await asyncio.to_thread(begun.acquire)
        assert await text("plain", ignore_eos=True, max_tokens=20, detokenize=False) == ("", "length")
        assert not (waiting.done() or gone.done())
        client.abort("gone")
        assert await gone == ("", "abort")
        gate.set()
        assert await waiting == ("ok", "stop")
        assert await text("gone", structured_outputs={"regex": "back"}) == ("back", "stop")

    try:
        asyncio.run(scenario())
        assert client.stats().used_blocks == 0
    finally:
        gate.set()
        client.close()


# -- masks ------------------------------------------------------------------------------------------------------------


def allowed(words: np.ndarray[Any, Any]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_masks_are_written_for_drafts_up_to_the_first_that_the_grammar_forbids(folder: Path) -> None:
    """Verifying drafts needs one row per draft. The matcher itself does not move."""
    import llguidance

    tokenizer = Tokenizer(folder)
    compiler = GrammarCompiler(tokenizer, (1,))
    first, second = (compiler.compile(StructuredOutputs(regex=regex)).deep_copy() for regex in ("[ab]c[de]", "x"))
    a, b, c, d, e, x = (tokenizer.token_to_id(char) for char in "abcdex")
    assert a is not None and c is not None
    words = np.zeros((6, -(-compiler.num_tokens // 32)), np.int32)
    fill_masks(llguidance.LLExecutor(2), [(first, [a, c, a, a]), (second, [])], words)
    assert [allowed(row) for row in words] == [{a, b}, {c}, {d, e}, set(), set(), {x}]
    fill_masks(None, [(first, [])], words[:1])
    assert allowed(words[0]) == {a, b}


def test_ids_that_only_the_model_has_are_never_sampled(tiny_llama: Callable[..., Path]) -> None:
    """A model's embedding table may be padded, so it has more rows than the tokenizer has tokens."""
    with engine(tiny_llama(vocab_size=400)) as llm:
        known = llm.llm_engine.core.tokenizer.vocab_size
        assert known < 400 - 32
        for seed in range(8):
            output = ask(llm, {"regex": "[^x]{1,40}"}, seed=seed, temperature=5.0, logit_bias={known + 1: 100.0, 399: 100.0})
            assert max(output.token_ids) < known


# -- scheduling does not change tokens --------------------------------------------------------------------------------


def _requests() -> dict[str, tuple[list[int], SamplingParams]]:
    rng = random.Random(7)
    base = [rng.randrange(2, 320) for _ in range(60)]
    seeded = SamplingParams(temperature=1.5, seed=3, max_tokens=60)
    found: dict[str, tuple[list[int], SamplingParams]] = {}
    for i, (kind, (wanted, _)) in enumerate(KINDS.items()):
        found[kind] = (base[: 9 + 8 * i], replace(seeded, seed=i, structured_outputs=wanted))
    found["children"] = (base[:33], replace(seeded, n=3, structured_outputs=COMPACT))
    greedy = SamplingParams(temperature=0, max_tokens=60, stop='"age', presence_penalty=1.0)
    found["greedy"] = (base[:20], replace(greedy, structured_outputs=COMPACT))
    found["long"] = (base[:50], replace(seeded, structured_outputs=StructuredOutputs(regex="[a-f ]{50}"), min_tokens=10, logprobs=2))
    found["plain"] = (base[:40], replace(seeded, ignore_eos=True, max_tokens=40))
    found["plain children"] = (base[:21], replace(seeded, ignore_eos=True, n=2, max_tokens=30))
    return found


REQUESTS = _requests()
Answers = dict[str, tuple[int, ...]]


def answer_all(llm: LLM, names: list[str], drop_rows_at: int = -1) -> Answers:
    core, found, steps = llm.llm_engine.core, {}, 0  # type: ignore[var-annotated]
    for name in names:
        core.add_request(name, *REQUESTS[name])
    while core.has_unfinished_requests():
        if steps == drop_rows_at:
            core.executor.drop_rows()  # type: ignore[attr-defined]
            core.scheduler.readmit_all()
        for delta in core.step():
            assert delta.finish_reason in (None, "stop", "length"), delta
            found.setdefault(f"{delta.request_id}/{delta.index}", []).extend(delta.token_ids)
        core.scheduler.check()
        steps += 1
    assert core.stats().used_blocks == 0 and core._outputs._num_grammars == 0
    return {name: tuple(tokens) for name, tokens in found.items()}


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    """Each request alone, without prefix cache and asynchronous scheduling."""
    found: Answers = {}
    with engine(folder, enable_prefix_caching=False, async_scheduling=False) as llm:
        for name in REQUESTS:
            found |= answer_all(llm, [name])
    return found


@pytest.mark.parametrize("config", [
    {}, {"async_scheduling": True}, {"block_size": 3, "max_num_batched_tokens": 5, "async_scheduling": True},
    {"max_num_seqs": 2, "long_prefill_token_threshold": 4},
    {"enable_prefix_caching": False, "block_size": 1, "num_gpu_blocks_override": 900},
    {"block_size": 4, "num_gpu_blocks_override": 34, "max_model_len": 121, "async_scheduling": True},
    {"block_size": 4, "num_gpu_blocks_override": 34, "max_model_len": 121, "kv_offloading_size": 0.001},
], ids=lambda config: " ".join(f"{key}={value}" for key, value in config.items()) or "default")
def test_scheduling_does_not_change_tokens(folder: Path, answers: Answers, config: dict[str, Any]) -> None:
    with engine(folder, **{"async_scheduling": False, **config}) as llm:
        assert answer_all(llm, list(REQUESTS)) == answers
        assert answer_all(llm, list(REQUESTS)[::-1]) == answers  # with cached prefixes, in another order
        assert (llm.llm_engine.core.stats().num_preemptions > 0) == (config.get("num_gpu_blocks_override") == 34)


@pytest.mark.parametrize("step", [1, 7, 20])
def test_a_worker_that_loses_its_rows_does_not_change_tokens(folder: Path, answers: Answers, step: int) -> None:
    with engine(folder, async_scheduling=False) as llm:
        assert answer_all(llm, list(REQUESTS), drop_rows_at=step) == answers


def test_a_request_with_a_grammar_waits_for_its_own_result_and_does_not_delay_others(folder: Path) -> None:
    """With asynchronous scheduling, the plain request is in every plan, and the other one only in plans made after its own update."""
    with engine(folder, async_scheduling=True) as llm:
        core, plans = llm.llm_engine.core, []
        launch = core.executor.launch
        core.executor.launch = lambda plan: (plans.append(plan), launch(plan))[1]  # type: ignore[method-assign]
        core.add_request("plain", [5, 6, 7], SamplingParams(temperature=0, ignore_eos=True, max_tokens=30))
        core.add_request("grammar", [5, 6, 8], SamplingParams(temperature=0, max_tokens=12, structured_outputs={"regex": "a{12}"}))
        steps_to_the_end(llm)

    def places(name: str) -> list[int]:
        return [i for i, plan in enumerate(plans) if isinstance(plan, StepPlan) and name in plan.request_ids]

    assert places("plain") == list(range(30))
    tokens = places("grammar")
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(tokens))
