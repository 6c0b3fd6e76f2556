"""Every path except /health and the page needs an API key, and every response has a request id."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from minivllm.config import ServerConfig
from minivllm.server.page import FILES
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server


@pytest.fixture(scope="module")
def live(tokenizer_folder: Path) -> Iterator[LiveServer]:
    with scripted_server(ScriptedEngine(tokenizer_folder), api_key=("first-key", "second-key")) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url) as http:
        yield http


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_each_of_the_keys_is_accepted(live: LiveServer, key: str) -> None:
    with openai.OpenAI(base_url=live.url + "/v1", api_key=key) as api:
        assert api.models.list().data


@pytest.mark.parametrize("authorization", [
    None, "", "Bearer", "Bearer wrong", "Bearer first-ke", "Bearer first-keyy", "Basic first-key", "first-key", "Bearer FIRST-KEY",
    "Bearer first-key second-key", "Bearer \xff",
])
@pytest.mark.parametrize("method, path", [
    ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/version"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("GET", "/health/"),
    ("GET", "/health//"),
])
def test_without_a_key_everything_is_401(http: httpx.Client, method: str, path: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    response = http.request(method, path, headers=headers, json={"prompt": "x"})  # type: ignore[arg-type]
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error["type"] == "AuthenticationError" and error["code"] == "invalid_api_key"
    assert "first-key" not in response.text


def test_every_registered_path_but_health_and_the_pages_files_needs_a_key(live: LiveServer) -> None:
    from fastapi import FastAPI

    app = live.server.config.app
    assert isinstance(app, FastAPI)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    assert "/health" in paths
    open_paths = {path for path in paths if httpx.get(live.url + path).status_code != 401}
    assert open_paths == {"/health", *FILES}


def test_health_needs_no_key(live: LiveServer) -> None:
    assert httpx.get(live.url + "/health").status_code == 200


def test_the_official_client_raises_its_authentication_error(live: LiveServer) -> None:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="wrong") as api, pytest.raises(openai.AuthenticationError):
        api.models.list()


def test_a_request_id_is_returned_and_generated_if_missing_or_invalid(live: LiveServer) -> None:
    url = live.url + "/health"
    assert httpx.get(url, headers={"x-request-id": "my-id.7"}).headers["x-request-id"] == "my-id.7"
    generated = httpx.get(url).headers["x-request-id"]
    assert len(generated) == 32 and generated != httpx.get(url).headers["x-request-id"]
    assert len(httpx.get(url, headers={"x-request-id": "y" * 500}).headers["x-request-id"]) == 32
    assert len(httpx.get(live.url + "/v1/models").headers["x-request-id"]) == 32, "errors have one too"


def test_the_key_may_come_from_the_environment_and_a_configured_one_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIVLLM_API_KEY", raising=False)
    assert ServerConfig().keys() == ()
    monkeypatch.setenv("MINIVLLM_API_KEY", "from-env")
    assert ServerConfig().keys() == ("from-env",)
    assert ServerConfig(api_key=("given",)).keys() == ("given",)
