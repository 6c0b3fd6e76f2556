"""LangChain's standard integration tests for chat models, unmodified, over chat completions and over responses."""
from __future__ import annotations

import inspect
from typing import Any

import pytest

WHY = "not installed: pip install -e '.[clients]'"
pytest.importorskip("langchain_tests", reason=f"langchain-tests is {WHY}")
langchain_openai = pytest.importorskip("langchain_openai", reason=f"langchain-openai is {WHY}")

from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.clients.conftest import ClientServer

for function in vars(ChatModelIntegrationTests).values():
    if inspect.iscoroutinefunction(function):
        pytest.mark.asyncio(function)


class TestLangChainChat(ChatModelIntegrationTests):
    USE_RESPONSES = False

    @pytest.fixture(autouse=True)
    def server(self, capable: ClientServer) -> None:
        type(self)._server = capable

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return langchain_openai.ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        server: ClientServer = type(self)._server
        return {"model": server.model, "base_url": server.base_url, "api_key": server.api_key, "use_responses_api": self.USE_RESPONSES,
                "stream_usage": True}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return type(self)._server.model


class TestLangChainResponses(TestLangChainChat):
    USE_RESPONSES = True
