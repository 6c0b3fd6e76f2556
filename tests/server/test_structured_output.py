"""Structured output over HTTP, from a tiny random model that would never write JSON without a grammar."""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pydantic
import pytest

from minivllm import LLM, SamplingParams
from minivllm.engine.tokenizer import Tokenizer
from tests.server.scripted import LiveServer, serving, serving_model

pytest.importorskip("llguidance")

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_batched_tokens": 64, "num_gpu_blocks_override": 128}
HELLO: Any = [{"role": "user", "content": "hello"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Pet(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")  # otherwise the model may add properties without end
    kind: Literal["cat", "dog"]
    age: Annotated[int, pydantic.Field(ge=0, le=30)]
    friends: Annotated[list[Literal["a", "b"]], pydantic.Field(max_length=2)]


SCHEMA = Pet.model_json_schema()
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True, "description": "a pet"}}


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[LiveServer]:
    """The engine runs in its own process, so structures and errors are pickled."""
    with serving_model(folder, process=True, **SETTINGS) as live:
        yield live


def complete(api: openai.OpenAI, **body: Any) -> str:
    choice = api.completions.create(model="tiny", prompt="the cat", max_tokens=120, extra_body=body).choices[0]
    assert choice.finish_reason == "stop"
    return choice.text


def test_the_sdks_parse_returns_objects_of_a_pydantic_class(api: openai.OpenAI) -> None:
    answer = api.chat.completions.parse(model="tiny", messages=HELLO, response_format=Pet, n=4, seed=1, max_completion_tokens=150)
    pets = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(pet, Pet) for pet in pets) and len({str(pet) for pet in pets}) > 1
    assert all(choice.finish_reason == "stop" for choice in answer.choices)


def test_streamed_chunks_add_up_to_the_object_that_llm_chat_returns(api: openai.OpenAI, folder: Path) -> None:
    fields: dict[str, Any] = dict(model="tiny", messages=HELLO, response_format=FORMAT, temperature=0, max_tokens=150)
    whole = api.chat.completions.create(**fields).choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in api.chat.completions.create(**fields, stream=True))
    assert whole == streamed and Pet.model_validate_json(streamed)
    with LLM(model=str(folder), **SETTINGS) as llm:
        params = SamplingParams(temperature=0, max_tokens=150, structured_outputs={"json": SCHEMA})
        assert llm.chat(HELLO, params, use_tqdm=False)[0].outputs[0].text == whole


def test_a_json_object_is_any_object_and_text_is_anything(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=200, seed=3,
                                         logit_bias={"94": 20})  # towards "}", so that it ends
    content = answer.choices[0].message.content or ""
    assert content.startswith("{") and (answer.choices[0].finish_reason == "length" or isinstance(json.loads(content), dict))
    text = [api.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=9, **more).choices[0].message.content
            for more in ({}, {"response_format": {"type": "text"}})]
    assert text[0] == text[1]


def test_responses_have_the_format_in_a_field_of_their_own(live: LiveServer, api: openai.OpenAI) -> None:
    answer = api.responses.create(model="tiny", input="hello", text={"format": {
        "type": "json_schema", "name": "pet", "schema": SCHEMA, "strict": True}}, max_output_tokens=150)
    assert Pet.model_validate_json(answer.output_text)
    for schema in (5, {"type": "objct"}):
        body = {"input": "hello", "text": {"format": {"type": "json_schema", "name": "pet", "schema": schema}}}
        response = httpx.post(live.url + "/v1/responses", json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == "text.format.schema", response.text


@pytest.mark.parametrize("body, right", [
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
     lambda text: Pet.model_validate_json(text) and " " not in text),
    ({"structured_outputs": {"regex": "[ab]{5}"}}, re.compile("[ab]{5}").fullmatch),
    ({"structured_outputs": {"choice": ["red", "green"], "json": None}}, ("red", "green").__contains__),
    ({"structured_outputs": {"grammar": 'root ::= "x" [0-9] "y"'}}, re.compile(r"x\dy").fullmatch),
    ({"response_format": FORMAT}, Pet.model_validate_json), ({"guided_json": SCHEMA}, Pet.model_validate_json),
    ({"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " "},
     lambda text: Pet.model_validate_json(text) and "\n" not in text),
    ({"guided_regex": "[ab]{5}"}, re.compile("[ab]{5}").fullmatch), ({"guided_choice": ["red", "green"]}, ("red", "green").__contains__),
    ({"guided_grammar": 'start: "x" /[0-9]/ "y"'}, re.compile(r"x\dy").fullmatch),
    ({"guided_choice": ["red"], "guided_decoding_backend": "auto", "response_format": {"type": "text"}}, ("red",).__contains__),
], ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_every_field_for_structured_output_works_with_completions(
    api: openai.OpenAI, body: dict[str, Any], right: Callable[[str], object],
) -> None:
    assert right(complete(api, **body))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("body, param", [
    ({"response_format": "json"}, "response_format"), ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "json_schem"}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schma": 1}}, "response_format.schma"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}},
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": 1}}},
     "response_format.json_schema.strict"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "stict": True}}},
     "response_format.json_schema.stict"),
    ({"structured_outputs": {}}, "structured_outputs"), ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"), ({"guided_regex": "a("}, "guided_regex"),
    ({"guided_json": "{"}, "guided_json"), ({"guided_json": {"type": "objct"}}, "guided_json"), ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "start: x"}, "guided_grammar"), ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"), ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ({"guided_json": {"enum": ["x" * 200_000]}}, "guided_json"), ({"guided_regex": "a" * 20_000}, "guided_regex"),
    ({"guided_regex": "[a-z]", "allowed_token_ids": [5]}, "guided_regex"),
], ids=lambda value: str(value)[:60])
def test_an_invalid_structure_is_400_and_names_the_field(live: LiveServer, path: str, body: dict[str, Any], param: str) -> None:
    prompt = {"prompt": "x"} if path == COMPLETIONS else {"messages": HELLO}
    for stream in (False, True):
        response = httpx.post(live.url + path, json={**prompt, **body, "max_tokens": 9, "stream": stream})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param and len(error["message"]) < 700, error


def test_a_permissive_server_names_the_unknown_fields_that_it_ignores(live: LiveServer, folder: Path) -> None:
    with serving(live.client, Tokenizer(folder), permissive=True) as permissive:
        response = httpx.post(permissive.url + COMPLETIONS, json={
            "prompt": "x", "structured_outputs": {"regex": "ab", "extra": 1}})
        assert response.json()["choices"][0]["text"] == "ab"
        assert response.headers["x-minivllm-ignored"] == "structured_outputs.extra"
