"""Every path except /health and the page needs an API key, and every response has a request id."""
from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minivllm.config import ServerConfig
from minivllm.core.prefix_cache import root_hash
from minivllm.errors import InvalidInput
from minivllm.server import authentication
from minivllm.server.authentication import AccessRules, RefusalBrake
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


@pytest.mark.parametrize("name", ["authorization", "host", "content-type", "content-encoding", "origin", "sec-fetch-site"])
def test_a_header_that_decides_is_sent_once(live: LiveServer, name: str) -> None:
    """A proxy may check the first of two, and this server read the second."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # usual clients refuse to send these
        connection.sendall(f"GET /v1/models HTTP/1.1\r\n{name}: x\r\n{name.title()}: y\r\nconnection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400") and f"the header {name} occurs more than once: send it once".encode() in answer


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


FORM = {"content-type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize("headers, allowed", [
    ({}, True), ({"sec-fetch-site": "same-origin", "origin": "https://proxied.example"}, True), ({"origin": "null"}, False),
    ({"origin": "https://evil.example"}, False), ({"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, False),
    ({"sec-fetch-site": "cross-site"}, False), ({"origin": "https://evil.example", **FORM}, False),
    ({"origin": "http://localhost:8000", "host": "localhost:8000"}, True), ({"origin": "https://friend.example"}, True),
    ({"host": "evil.example"}, False), ({"host": "evil.example:8000"}, False), ({"host": "machine:8000"}, True),
    ({"host": "[::1]:80"}, True),
    ({"host": "192.168.0.7:8000"}, True), ({"host": "host.docker.internal:8000"}, True),
])
def test_a_web_page_cannot_change_anything(tokenizer_folder: Path, headers: dict[str, str], allowed: bool) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), allowed_origins=("https://friend.example",)) as live:
        for method, path in (("POST", "/reset_prefix_cache"), ("POST", "/v1/completions"), ("DELETE", "/v1/responses/x")):
            response = httpx.request(method, live.url + path, headers={"content-type": "application/json", **headers}, content=b"{}")
            assert (response.status_code == 403) is not allowed, (path, response.text)
        if "host" not in headers:
            assert httpx.get(live.url + "/health", headers=headers).status_code == 200


def test_allowed_hosts_are_the_only_names_of_the_server(tokenizer_folder: Path) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), allowed_hosts=("LLM.example",)) as live:
        assert httpx.get(live.url + "/health", headers={"host": "llm.example:80"}).status_code == 200
        error = httpx.get(live.url + "/health")
        assert error.status_code == 403 and "--allowed-hosts 127.0.0.1" in error.json()["error"]["message"]
    keyed = AccessRules.of(ServerConfig(api_key=("k",)))
    keyed.check_host("any.example")  # the page does not know the key
    AccessRules.of(ServerConfig(host="0.0.0.0")).check_host("gpu.corp.example")


def test_only_administrators_use_their_endpoints(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder)
    with scripted_server(engine, api_key=("a", "b"), admin_key=("root",)) as live, httpx.Client(base_url=live.url) as http:
        for key, status in (("a", 403), ("b", 403), ("root", 200)):
            headers = {"authorization": f"Bearer {key}"}
            assert http.post("/reset_prefix_cache", headers=headers).status_code == status
            with http.stream("GET", "/v1/engine/live", headers=headers) as view:
                assert view.status_code == status
    rules = AccessRules.of(ServerConfig())
    assert rules.is_admin("", ("127.0.0.1", 5)) and rules.is_admin("", None) and not rules.is_admin("", ("192.168.0.7", 5))
    for wrong in ({"api_key": ("x",), "admin_key": ("x",)}, {"api_key": ("x",), "admin_key": ("",)}):
        with pytest.raises(InvalidInput):
            ServerConfig(**wrong)  # type: ignore[arg-type]


def test_only_very_many_refusals_at_a_time_are_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "REFUSALS_PER_SECOND", 3)

    async def run(num_open: int, most_delayed: int = 100) -> list[bool]:
        brake = RefusalBrake(most_delayed)
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 7.5)
        with contextlib.ExitStack() as requests:
            for _ in range(num_open):
                requests.enter_context(brake.request("a"))
            tasks = [asyncio.ensure_future(brake.delay(owner)) for owner in "aaaaab"]
            for _ in range(3):
                await asyncio.sleep(0)
            done = [task.done() for task in tasks]
            assert [task.result() for task in tasks if task.done()].count(False) == done.count(False) * (most_delayed == 1)
            for task in tasks:
                task.cancel()
            return done

    assert asyncio.run(run(20)) == [True, True, True, False, False, True]
    assert asyncio.run(run(5)) == [True] * 6
    assert asyncio.run(run(20, most_delayed=1)) == [True, True, True, False, True, True], "a delayed refusal holds a connection"


def test_ids_belong_to_their_key(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(0))
    engine.script = lambda prompt, params, child: [((5,), "x")] * 40
    with scripted_server(engine, api_key=("a", "b"), admin_key=("root",)) as live, ThreadPoolExecutor(3) as pool:
        def post(key: str, path: str, body: dict[str, Any]) -> Any:
            return httpx.post(live.url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60).json()

        body = {"prompt": [5], "request_id": "same", "max_tokens": 40}
        answers = {}
        for count, key in enumerate("ab", 1):
            answers[key] = pool.submit(post, key, "/v1/completions", body)
            live.wait_until(lambda count=count: len(live.server.running) == count)  # type: ignore[misc]
        assert post("a", "/v1/completions", body)["error"]["param"] == "request_id", "in use by the same key"
        assert post("b", "/abort_requests", {"all": True}) == {"aborted": ["cmpl-same"]}, "only its own"
        engine.gate.release(3)  # type: ignore[union-attr]
        assert answers["b"].result(60)["choices"][0]["finish_reason"] == "abort" and engine.aborted == ["key2:cmpl-same"]
        assert post("root", "/abort_requests", {"all": True}) == {"aborted": ["cmpl-same"]}
        engine.gate.release(100)  # type: ignore[union-attr]
        assert answers["a"].result(60)["choices"][0]["finish_reason"] == "abort"


def test_cached_prefixes_belong_to_their_key_unless_they_are_shared(tokenizer_folder: Path) -> None:
    for settings, different in (({}, 3), ({"share_prefix_cache": True}, 1)):
        engine = ScriptedEngine(tokenizer_folder)
        with scripted_server(engine, api_key=("a", "b", "c"), **settings) as live:
            for key in "aabc":
                httpx.post(live.url + "/v1/completions", json={"prompt": [5]}, headers={"authorization": f"Bearer {key}"})
        assert len({root_hash(None, seen.request.cache_salt) for seen in engine.seen}) == different
        assert [seen.request.owner for seen in engine.seen] == ["key1", "key1", "key2", "key3"]


def test_the_key_may_come_from_the_environment_and_a_configured_one_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIVLLM_API_KEY", raising=False)
    assert ServerConfig().keys() == ()
    monkeypatch.setenv("MINIVLLM_API_KEY", "from-env")
    assert ServerConfig().keys() == ("from-env",)
    assert ServerConfig(api_key=("given",)).keys() == ("given",)
