"""Fixtures for all tests of the server. No torch."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.server.scripted import LiveServer


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    """A tiny model with random weights."""
    return tiny_llama()


@pytest.fixture(scope="module")
def api(live: LiveServer) -> Iterator[openai.OpenAI]:
    """OpenAI's client of the test file's server, `live`."""
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as api:
        yield api


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder for scripted engines."""
    from tests.conftest import write_tiny_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the machine's certificates: each HTTP client would load them, which takes longer than most tests, and here all is plain HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("no_certificates")))
        yield
