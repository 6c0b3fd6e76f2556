"""Fixtures for tests of third-party clients: unmodified packages against a server on a real socket.

    capable   a server with the scripted model of `capable_model.py`, where the answer of a small model would decide the result
    small     a server with the embedded default model
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from minivllm.models.hub import ModelFiles

from tests.clients.capable_model import MODEL, CapableEngine, capable_server

ENVIRONMENT = {  # no client may send reports or download anything
    "OPENAI_AGENTS_DISABLE_TRACING": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.clients)


@dataclass(frozen=True)
class ClientServer:
    """What a client is configured with."""

    base_url: str
    model: str
    engine: CapableEngine | None = None
    api_key: str = "unused"

    @property
    def last_conversation(self) -> dict[str, Any]:
        """The messages and tools that the scripted model saw last."""
        assert self.engine is not None
        return self.engine.conversations[-1]


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing leaves the machine, no key of the user is used, and no client loads certificates, which takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "SSL_CERT_FILE"):
            patch.delenv(name, raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("no_certificates")))
        yield


@pytest.fixture(scope="session")
def capable(tmp_path_factory: pytest.TempPathFactory, environment: None) -> Iterator[ClientServer]:
    from tests.conftest import write_tiny_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    with capable_server(folder) as (engine, live):
        yield ClientServer(live.url + "/v1", MODEL, engine)


@pytest.fixture(scope="session")
def small(default_model: ModelFiles, environment: None) -> Iterator[ClientServer]:
    from minivllm.config import EngineConfig
    from minivllm.engine.tokenizer import Tokenizer
    from minivllm.server.run import start_engine
    from tests.server.scripted import serving

    client = start_engine(EngineConfig(max_model_len=1024, device="cpu"), process=False, log_level="warning")
    try:
        with serving(client, Tokenizer(Path(client.info.tokenizer_folder)), served_model_name=("small",)) as live:
            yield ClientServer(live.url + "/v1", "small")
    finally:
        client.close()
