"""Server settings of vLLM's launch lines: HTTPS, a Unix socket, and a path below which a proxy serves."""
from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.errors import InvalidInput
from minivllm.server.run import bind_unix, check_certificate, readiness
from tests.conftest import write_tiny_tokenizer
from tests.server.scripted import ScriptedEngine, scripted_server
from tests.server.test_run import INFO
from tests.server.test_tools import scripted_chat


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certificate")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return cert, key


def test_https(tokenizer_folder: Path, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    trusted = ssl.create_default_context(cafile=cert)
    with scripted_server(ScriptedEngine(tokenizer_folder), ssl_certfile=cert, ssl_keyfile=key) as live:
        with httpx.Client(verify=trusted) as http:
            answer = http.post(live.url + "/v1/completions", json={"prompt": "a", "max_tokens": 3, "stream": True})
        assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert "https://127.0.0.1:7" in readiness(INFO, ServerConfig(ssl_certfile=cert, ssl_keyfile=key), 7, "m", False, 1.0)


def test_a_wrong_certificate_is_an_error_before_the_model_is_loaded(tmp_path: Path, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    check_certificate(ServerConfig(ssl_certfile=cert, ssl_keyfile=key))
    for wrong, param in (({"ssl_certfile": key}, "ssl_certfile"), ({"ssl_keyfile": str(tmp_path / "missing")}, "ssl_keyfile")):
        with pytest.raises(InvalidInput, match="give PEM files") as caught:
            check_certificate(ServerConfig(**{"ssl_certfile": cert, "ssl_keyfile": key, **wrong}))
        assert caught.value.param == param
    with pytest.raises(InvalidInput, match="ssl_keyfile is missing"):
        ServerConfig(ssl_certfile=cert)


def test_a_unix_socket(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with scripted_server(ScriptedEngine(tokenizer_folder), uds=path) as live:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as http:
            assert http.get(live.url + "/health").status_code == 200
        with pytest.raises(InvalidInput, match="is in use"):
            bind_unix(path)
    assert Path(path).is_socket()  # this server has ended, so the next one replaces the file
    bind_unix(path).close()
    with pytest.raises(InvalidInput, match="cannot listen on the Unix socket"):
        bind_unix(str(tmp_path / "missing" / "socket"))
    assert f"curl --unix-socket {path} http://localhost/v1" in readiness(INFO, ServerConfig(uds=path), 0, "m", False, 1.0)


def test_a_proxy_may_keep_or_remove_the_root_path(tokenizer_folder: Path) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), root_path="/llm", api_key=("k",)) as live, httpx.Client(
            headers={"authorization": "Bearer k"}) as http:
        assert httpx.get(live.url + "/llm/health").status_code == 200  # open, with the prefix too
        assert httpx.get(live.url + "/llm/v1/models").status_code == 401
        for prefix in ("", "/llm"):
            answer = http.post(f"{live.url}{prefix}/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200, answer.text
        assert http.get(live.url + "/openapi.json").json()["servers"] == [{"url": "/llm"}]
    with pytest.raises(InvalidInput, match="must begin with /"):
        ServerConfig(root_path="llm")


def test_default_chat_template_kwargs_reach_every_request_and_are_overridden_by_its_own(
    tokenizer_folder: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    template = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    defaults = {"mood": "calm", "unread": 1}
    with scripted_chat(tokenizer_folder, template, default_chat_template_kwargs=defaults) as made:
        assert "does not read unread" in caplog.text
        made.chat()
        assert made.prompt.startswith("calm")
        made.chat(extra_body={"chat_template_kwargs": {"mood": "wild"}})
        assert made.prompt.startswith("wild")
