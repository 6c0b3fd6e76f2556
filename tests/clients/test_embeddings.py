"""Embedding clients of LangChain and LlamaIndex: vectors of the default model, the same for single texts, lists and queries."""
from __future__ import annotations

import asyncio
import inspect
import math

import httpx
import pytest

pytest.importorskip("langchain_tests", reason="needs the clients extra")
pytest.importorskip("langchain_openai", reason="needs the clients extra")
pytest.importorskip("llama_index.embeddings.openai_like", reason="needs the clients extra")

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

from tests.clients.conftest import ClientServer

TEXTS = ["Paris is the capital of France.", "A page table maps pages to frames.", "The cat sat on the mat.", "2 + 2 = 4"]


def wanted(server: ClientServer, **fields: object) -> list[list[float]]:
    answer = httpx.post(server.base_url + "/embeddings", json={"input": TEXTS, **fields}, timeout=60).json()
    return [entry["embedding"] for entry in answer["data"]]


def langchain(server: ClientServer, **fields: object) -> OpenAIEmbeddings:
    """Without `check_embedding_ctx_length=False` it would send the token ids of OpenAI's own tokenizer."""
    return OpenAIEmbeddings(  # type: ignore[call-arg]
        model=server.model, base_url=server.base_url, api_key=server.api_key, check_embedding_ctx_length=False, **fields)  # type: ignore[arg-type]


def close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and max(abs(a - b) for a, b in zip(one, other, strict=True)) < 0.02  # bfloat16, in other batches


def test_langchain_embeds_documents_and_queries(small: ClientServer) -> None:
    embeddings = langchain(small, chunk_size=3)
    documents, expected = embeddings.embed_documents(TEXTS), wanted(small)
    assert all(map(close, documents, expected)) and len(documents) == 4
    assert close(embeddings.embed_query(TEXTS[2]), expected[2])
    assert close(asyncio.run(embeddings.aembed_query(TEXTS[3])), expected[3])
    short = langchain(small, dimensions=64).embed_query(TEXTS[0])
    assert len(short) == 64 and math.isclose(sum(x * x for x in short), 1, abs_tol=1e-4)


def test_langchain_finds_a_document_again(small: ClientServer) -> None:
    store = InMemoryVectorStore(langchain(small))
    store.add_documents([Document(page_content=text) for text in TEXTS])
    assert [store.similarity_search(text, k=1)[0].page_content for text in TEXTS] == TEXTS


def test_llama_index_embeds_texts_and_queries(small: ClientServer) -> None:
    embeddings = OpenAILikeEmbedding(model_name=small.model, api_base=small.base_url, api_key=small.api_key, embed_batch_size=3)
    expected = wanted(small)
    assert all(map(close, embeddings.get_text_embedding_batch(TEXTS), expected))
    assert close(embeddings.get_query_embedding(TEXTS[1]), expected[1])
    assert close(asyncio.run(embeddings.aget_text_embedding(TEXTS[0])), expected[0])
    short = OpenAILikeEmbedding(
        model_name=small.model, api_base=small.base_url, api_key=small.api_key, dimensions=64).get_text_embedding(TEXTS[0])
    assert close(short, wanted(small, dimensions=64)[0])


class TestLangChainStandard(EmbeddingsIntegrationTests):
    """LangChain's standard tests, unmodified."""

    @pytest.fixture(autouse=True)
    def server(self, small: ClientServer) -> None:
        type(self)._server = small

    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, object]:
        server: ClientServer = type(self)._server  # type: ignore[attr-defined]
        return {"model": server.model, "base_url": server.base_url, "api_key": server.api_key, "check_embedding_ctx_length": False}


for function in vars(EmbeddingsIntegrationTests).values():
    if inspect.iscoroutinefunction(function):
        pytest.mark.asyncio(function)
