"""vLLM's structural tags: free text in which a trigger starts a tag that encloses JSON of a schema."""
from __future__ import annotations

from typing import Any

import pytest

from minivllm.engine.grammar_compiler import GrammarCompiler
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.server.structured import ResponseFormat
from tests.conftest import write_tiny_tokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TAG: dict[str, Any] = {"structures": [{"begin": "<function=weather>", "schema": SCHEMA, "end": "</function>"}], "triggers": ["<function="]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return Tokenizer(folder)


@pytest.mark.parametrize(("text", "allowed"), [
    ("the cat", True), ('ok <function=weather>{"city": "Rome"}</function> done', True), ("a < b", True),
    ('<function=weather>{"town"', False), ("<function=other>", False), ('<function=weather>{"city": "Rome"} and', False),
])
def test_text_is_free_and_tags_follow_their_schema(tokenizer: Tokenizer, text: str, allowed: bool) -> None:
    compiler = GrammarCompiler(tokenizer, [1])
    matcher = compiler.compile(StructuredOutputsParams(structural_tag=TAG)).deep_copy()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert (matcher.validate_tokens(tokens) == len(tokens)) == allowed


def test_a_response_format_of_this_type() -> None:
    found = ResponseFormat(type="structural_tag", **TAG).structure("response_format")
    assert found == StructuredOutputsParams(structural_tag=TAG)
    with pytest.raises(InvalidInput, match="triggers is only for type structural_tag"):
        ResponseFormat(type="text", triggers=["a"]).structure("response_format")


@pytest.mark.parametrize(("change", "message"), [
    ({"structures": []}, "must have"), ({"triggers": []}, "must have"), ({"triggers": ["<other"]}, "begins with none of the triggers"),
    ({"structures": [{"begin": "<function=", "schema": SCHEMA}]}, "structures.0 must be"), ({"structures": [5]}, "structures.0 must be"),
])
def test_a_wrong_tag_is_an_error_that_names_the_part(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        StructuredOutputsParams(structural_tag={**TAG, **change})
