"""`/v1/embeddings` and `/score`: the vectors of `LLM.embed` for every form of input, and errors that name the field."""
from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from minivllm import LLM, PoolingParams
from minivllm.engine_request import EngineRequest
from minivllm.outputs import OutputDelta
from minivllm.server import cost, pooling
from tests.server.scripted import LiveServer, serving_model

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_batched_tokens": 32, "num_gpu_blocks_override": 128}
TEXTS = ["the cat", "the hat and", "then that other thing in the end " * 4, "a"]
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def offline(folder: Path) -> Iterator[LLM]:
    with LLM(model=str(folder), **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[LiveServer]:
    with serving_model(folder, process=False, max_queue=8, max_num_seqs=4, **SETTINGS) as live:
        yield live


def vectors(offline: LLM, texts: list[str], **params: Any) -> np.ndarray[Any, Any]:
    outputs = offline.embed(texts, pooling_params=PoolingParams(**params), use_tqdm=False)  # type: ignore[arg-type]
    return np.array([output.outputs.embedding for output in outputs])


def refused(live: LiveServer, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    response = httpx.post(live.url + path, json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_the_official_client_gets_the_vectors_of_llm_embed_in_both_encodings(api: openai.OpenAI, offline: LLM) -> None:
    wanted = vectors(offline, TEXTS)
    numbers = api.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert [entry.index for entry in numbers.data] == [0, 1, 2, 3]
    np.testing.assert_allclose([entry.embedding for entry in numbers.data], wanted, atol=1e-5)
    assert np.linalg.norm([entry.embedding for entry in numbers.data], axis=1) == pytest.approx(1)
    default = api.embeddings.create(model="tiny", input=TEXTS)  # the client asks for base64 and decodes it
    np.testing.assert_allclose([entry.embedding for entry in default.data], [entry.embedding for entry in numbers.data], atol=1e-6)
    encoded: Any = api.embeddings.create(model="tiny", input="the cat", encoding_format="base64").data[0].embedding
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(encoded), "<f4"), wanted[0], atol=1e-5)
    tokens = sum(len(offline.llm_engine.core.tokenizer.encode(text)) for text in TEXTS)
    assert (numbers.usage.prompt_tokens, numbers.usage.total_tokens, numbers.model) == (tokens, tokens, "tiny")


def test_all_four_forms_of_input_give_the_same_vectors(api: openai.OpenAI, offline: LLM) -> None:
    tokenizer = offline.llm_engine.core.tokenizer
    ids = [tokenizer.encode(text) for text in TEXTS]
    wanted = vectors(offline, TEXTS)
    for given, count in ((TEXTS[0], 1), (TEXTS, 4), (ids[0], 1), (ids, 4)):
        found = api.embeddings.create(model="tiny", input=given)  # type: ignore[arg-type]
        np.testing.assert_allclose([entry.embedding for entry in found.data], wanted[:count], atol=1e-5)


def test_dimensions_pooling_and_scaling_are_chosen_by_the_request(live: LiveServer, api: openai.OpenAI, offline: LLM) -> None:
    short = np.array(api.embeddings.create(model="tiny", input=TEXTS[0], dimensions=5).data[0].embedding)
    assert len(short) == 5 and np.linalg.norm(short) == pytest.approx(1)
    np.testing.assert_allclose(short, vectors(offline, TEXTS[:1], dimensions=5)[0], atol=1e-5)
    for body, params in (({"pooling_type": "MEAN"}, {"pooling_type": "MEAN"}), ({"use_activation": False}, {"use_activation": False}),
                         ({"normalize": False, "pooling_type": "MEAN"}, {"normalize": False, "pooling_type": "MEAN"})):
        response = httpx.post(live.url + "/v1/embeddings", json={"input": TEXTS, "user": "u", **body})
        assert response.headers["x-minivllm-ignored"] == "user"
        np.testing.assert_allclose([entry["embedding"] for entry in response.json()["data"]], vectors(offline, TEXTS, **params), atol=1e-4)


def test_texts_are_truncated_to_their_last_tokens(api: openai.OpenAI, offline: LLM) -> None:
    text = "the cat and the hat " * 200  # more tokens than the context
    tail = offline.llm_engine.core.tokenizer.encode(text)[-7:]
    found = api.embeddings.create(model="tiny", input=text, extra_body={"truncate_prompt_tokens": 7})
    assert found.usage.prompt_tokens == 7
    (wanted,) = offline.embed([tail], use_tqdm=False)  # type: ignore[list-item]
    np.testing.assert_allclose(found.data[0].embedding, wanted.outputs.embedding, atol=1e-5)
    assert api.embeddings.create(model="tiny", input=text, extra_body={"truncate_prompt_tokens": -1}).usage.prompt_tokens == 256


def test_more_inputs_than_the_queue_holds_take_turns(live: LiveServer, api: openai.OpenAI) -> None:
    texts = [f"the {i}" for i in range(60)]  # the engine takes 4 requests and 8 more
    several = api.embeddings.create(model="tiny", input=texts)
    assert [entry.index for entry in several.data] == list(range(60))
    for i in (0, 31, 59):
        alone = api.embeddings.create(model="tiny", input=texts[i])
        np.testing.assert_allclose(alone.data[0].embedding, several.data[i].embedding, atol=1e-5)
    assert httpx.get(live.url + "/load").json()["server_load"] == 0


def test_large_answers_are_written_by_a_thread(api: openai.OpenAI, offline: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "LARGE_ANSWER", 0)
    found = api.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    np.testing.assert_allclose([entry.embedding for entry in found.data], vectors(offline, TEXTS), atol=1e-5)


@pytest.mark.parametrize(("body", "param", "message"), [
    ({"input": "the cat", "dimensions": 33}, "dimensions", "at most 32, the size of this model's vectors, got 33"),
    ({"input": "the cat", "dimensions": 0}, "dimensions", "at least 1, got 0"),
    ({"input": "the cat", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64', got 'int8'"),
    ({"input": "the cat", "pooling_type": "CLS"}, "pooling_type", "'LAST' or 'MEAN', got 'CLS'"),
    ({"input": ""}, "input", "has an empty text"),
    ({"input": ["a", ""]}, "input", "has an empty text"),
    ({"input": []}, "input", "a string, a list of strings"),
    ({"input": [[]]}, "input", "non-empty lists of token ids"),
    ({"input": [400]}, "input", "token id 400 in input is outside the vocabulary"),
    ({"input": "the cat " * 200}, "input", "maximum context length is 256 tokens"),
    ({"input": "a", "truncate_prompt_tokens": 300}, "truncate_prompt_tokens", "from 1 to the context length 256"),
    ({"input": "a", "messages": []}, "messages", "is not supported yet"),
    ({"input": "a", "embed_dtype": "float16"}, "embed_dtype", "is not supported yet"),
    ({"input": "a", "dimension": 3}, "dimension", "did you mean 'dimensions'"),
    ({"input": "a", "priority": 3}, "priority", "priority has no effect on this server"),
    ({"input": ["a"] * 2049}, "input", "2049 texts, and one request may have 2048"),
    ({}, "input", "input is required"),
])
def test_a_wrong_field_is_named_with_its_value_and_a_fix(live: LiveServer, body: dict[str, Any], param: str, message: str) -> None:
    error = refused(live, "/v1/embeddings", **body)
    assert error["param"] == param and message in error["message"]


def test_a_model_that_does_not_exist_is_404(live: LiveServer) -> None:
    assert refused(live, "/v1/embeddings", 404, input="a", model="other")["param"] == "model"


def test_answers_with_too_many_numbers_are_refused(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MAX_NUMBERS", 100)
    assert "4 vectors of 32 numbers each make 128, and one answer may have 100" in refused(
        live, "/v1/embeddings", input=TEXTS)["message"]
    assert httpx.post(live.url + "/v1/embeddings", json={"input": TEXTS, "dimensions": 25}).status_code == 200


def test_the_numbers_of_all_answers_are_charged_to_the_key(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    running = live.server.running
    monkeypatch.setattr(running._numbers, "_limit", 100)
    assert refused(live, "/v1/embeddings", 429, input=TEXTS)["code"] == "rate_limit_exceeded"
    assert httpx.post(live.url + "/v1/embeddings", json={"input": TEXTS[:2]}).status_code == 200
    assert not running._numbers._kept and not running._tokens._kept


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_scores_are_the_cosines_of_the_vectors(live: LiveServer, offline: LLM, path: str, names: tuple[str, str]) -> None:
    found = vectors(offline, TEXTS)
    body = httpx.post(live.url + path, json={names[0]: TEXTS[0], names[1]: TEXTS[1:]}).json()
    assert [entry["score"] for entry in body["data"]] == pytest.approx([float(found[0] @ other) for other in found[1:]], abs=1e-5)
    assert [(entry["index"], entry["object"]) for entry in body["data"]] == [(0, "score"), (1, "score"), (2, "score")]
    pairs = httpx.post(live.url + path, json={names[0]: TEXTS[:2], names[1]: TEXTS[:2]}).json()
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx([1, 1])


def test_a_wrong_score_request_is_named(live: LiveServer) -> None:
    error = refused(live, "/score", text_1=["a", "b"], text_2=["a", "b", "c"])
    assert error["param"] == "text_1" and "text_1 has 2 texts and text_2 has 3" in error["message"]
    assert refused(live, "/score", text_1="a")["param"] == "text_2"
    assert "other names of it" in refused(live, "/score", text_1="a", queries="b", text_2="c")["message"]


def test_an_aborted_request_gets_an_error(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def generate(request: EngineRequest, shortcut: object = None) -> AsyncGenerator[list[OutputDelta], None]:
        yield [OutputDelta(request.request_id, 0, (), "", finish_reason="abort")]

    monkeypatch.setattr(live.client, "generate", generate)
    for texts in (TEXTS[:1], TEXTS):
        assert refused(live, "/v1/embeddings", 503, input=texts)["code"] == "aborted"
