"""The fields of a request: each field of the official SDK and of vLLM belongs to one class."""
from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.shared_params import FunctionDefinition

from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams
from minivllm.server.chat_protocol import ChatMessage, ChatRequest
from minivllm.server.errors import ApiError
from minivllm.server.parsing import parse
from minivllm.server.protocol import CompletionRequest, StreamOptions, StrictModel
from minivllm.server.tools import Function, Tool, ToolCall


def known(kind: type[StrictModel]) -> set[str]:
    return {*kind.model_fields, *kind.INERT, *kind.UNSUPPORTED}


@pytest.mark.parametrize("ours, sdk", [
    (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
    (ChatRequest, chat_create_params.CompletionCreateParamsBase),
    (StreamOptions, ChatCompletionStreamOptionsParam),
    (ChatMessage, ChatCompletionUserMessageParam),
    (ChatMessage, ChatCompletionSystemMessageParam),
    (ChatMessage, ChatCompletionDeveloperMessageParam),
    (ChatMessage, ChatCompletionAssistantMessageParam),
    (ChatMessage, ChatCompletionToolMessageParam),
    (ChatMessage, ChatCompletionFunctionMessageParam),
    (ToolCall, ChatCompletionMessageFunctionToolCallParam),
    (Tool, ChatCompletionFunctionToolParam),
    (Function, FunctionDefinition),
], ids=lambda kind: kind.__name__)
def test_every_field_of_the_official_sdk_has_a_class(ours: type[StrictModel], sdk: type) -> None:
    assert set(typing.get_type_hints(sdk)) <= known(ours)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, ChatMessage, StreamOptions])
def test_no_field_has_two_classes(kind: type[StrictModel]) -> None:
    classes = [set(kind.model_fields), set(kind.INERT), set(kind.UNSUPPORTED)]
    assert sum(map(len, classes)) == len(set.union(*classes))


def test_every_sampling_parameter_is_honored_refused_or_derived() -> None:
    import dataclasses

    derived = {"logprobs", "max_tokens", "detokenize", "bad_words_token_ids", "structured_outputs", "output_kind", "pooling"}
    names = {f.name for f in dataclasses.fields(SamplingParams)} - derived
    assert names == set(CompletionRequest.SAMPLING) == set(ChatRequest.SAMPLING)
    assert set(CompletionRequest.SAMPLING) <= set(CompletionRequest.model_fields)


def requests(kind: type[StrictModel], **fields: Any) -> Any:
    import json

    base: Mapping[str, Any] = {"prompt": "x"} if kind is CompletionRequest else {"messages": [{"role": "user", "content": "x"}]}
    request = parse(kind, json.dumps({**base, **fields}).encode())
    ignored = request.ignored_fields(False)  # type: ignore[attr-defined]
    request.check()  # type: ignore[attr-defined]
    return request, ignored


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_unsupported_fields_accept_null_and_the_values_that_request_nothing(kind: type[StrictModel]) -> None:
    for name, harmless in kind.UNSUPPORTED.items():
        for value in (None, *harmless):
            assert requests(kind, **{name: value})[1] == [], name
        with pytest.raises(InvalidInput, match=f"{name} is not supported yet") as caught:
            requests(kind, **{name: "something else"})
        assert caught.value.param == name


def test_a_harmless_value_is_compared_with_its_type() -> None:
    with pytest.raises(InvalidInput):
        requests(ChatRequest, best_of=True)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_inert_fields_accept_anything_and_are_reported_unless_null(kind: type[StrictModel]) -> None:
    for name in kind.INERT:
        assert requests(kind, **{name: {"any": ["thing"]}})[1] == [name]
        assert requests(kind, **{name: None})[1] == []


def test_nested_inert_fields_are_reported() -> None:
    part = {"type": "text", "text": "x", "cache_control": {}}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "y", "annotations": []}]
    request, ignored = requests(ChatRequest, messages=messages, stream=True, stream_options={"include_obfuscation": False})
    request.conversation(ignored)
    assert set(ignored) == {"stream_options.include_obfuscation", "messages.1.annotations", "messages.0.content.0.cache_control"}


def test_a_list_of_a_million_wrong_elements_gives_one_error_quickly() -> None:
    for field in ("prompt", "stop", "stop_token_ids", "bad_words"):
        raw = b'{"prompt": "x", "%s": [%s null]}' % (field.encode(), b"1, " * 300_000)
        with pytest.raises((ApiError, InvalidInput)) as caught:
            parse(CompletionRequest, raw).check()
        assert len(str(caught.value)) < 1000
    with pytest.raises(ApiError) as refused:
        parse(ChatRequest, b'{"messages": [%s null]}' % (b"1, " * 300_000))
    assert refused.value.param == "messages.0"
