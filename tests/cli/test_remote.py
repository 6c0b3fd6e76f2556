"""`chat` and `complete` with a running server: --url, and a minivllm server on the default port."""
from __future__ import annotations

import io
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli import remote
from minivllm.cli.main import main
from tests.server.conftest import tokenizer_folder  # noqa: F401  # a fixture
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIVLLM_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(remote, "DEFAULT_URL", "http://127.0.0.1:9")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Models that a command would have loaded in its process; loading fails."""
    from minivllm.engine import compose
    from minivllm.errors import ModelError

    loads: list[str | None] = []

    def build(config: Any) -> Any:
        loads.append(config.model)
        raise ModelError("loaded here")

    monkeypatch.setattr(compose, "build_engine", build)
    return loads


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:  # noqa: F811
    engine = ScriptedEngine(tokenizer_folder)
    engine.script = lambda prompt, params, child: [((7,), "Hel"), ((8,), "lo "), ((9,), f"{len(engine.seen) + 1}")]
    return engine


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with scripted_server(engine, served_model_name=("scripted",)) as live:
        yield live


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_complete_streams_from_the_server_of_url(engine: ScriptedEngine, live: LiveServer, loads: list[Any],
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "the cat", "--url", live.url, "--temperature", "0.5", "--top-k", "3", "--seed", "7"]) == 0
    params = engine.seen[0].params
    assert capsys.readouterr().out == "Hello 1\n" and not loads
    assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0.5, 3, 7, 128)


@pytest.mark.parametrize("tail", ["/v1", "/", ""])
def test_chat_sends_the_whole_conversation_to_the_server(engine: ScriptedEngine, live: LiveServer, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str], tail: str) -> None:
    typed(monkeypatch, "hello", "again")
    assert main(["chat", "--url", live.url + tail, "--system", "be brief"]) == 0
    assert capsys.readouterr().out == "Hello 1\nHello 2\n"
    assert len(engine.seen[1].prompt) > len(engine.seen[0].prompt) and engine.seen[0].params.max_tokens != 128


def test_a_server_on_the_default_port_is_used_and_a_line_says_so(
        engine: ScriptedEngine, live: LiveServer, loads: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(remote, "DEFAULT_URL", live.url)
    assert main(["complete", "x"]) == 0 and main(["complete", "x", "--model", "scripted"]) == 0
    assert f"(using scripted of the server at {live.url}; --local loads a model here instead)" in capsys.readouterr().err and not loads
    for flags, why in ((["--local"], ""), (["--model", "a/b"], f"(a server runs at {live.url}, but it has scripted, not a/b"),
                       (["--block-size", "32"], "but --block-size is a setting of an engine here: loading a second model")):
        assert main(["complete", "x", *flags]) == 1
        assert why in capsys.readouterr().err
    assert loads == [None, "a/b", None] and len(engine.seen) == 2


def test_a_key_is_sent_and_a_missing_one_is_named(engine: ScriptedEngine, loads: list[Any], monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(engine, api_key=("secret",)) as live:
        assert main(["complete", "x", "--url", live.url]) == 1
        assert "status 401" in (error := capsys.readouterr().err) and "give --api-key" in error
        assert main(["complete", "x", "--url", live.url, "--api-key", "secret"]) == 0
        monkeypatch.setattr(remote, "DEFAULT_URL", live.url)
        assert main(["complete", "x"]) == 1 and loads == [None]
        assert "it needs a key" in capsys.readouterr().err
        monkeypatch.setenv("MINIVLLM_API_KEY", "secret")
        assert main(["complete", "x"]) == 0


@pytest.mark.parametrize(("flags", "words"), [
    (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9 (Connection refused): start one with `minivllm serve`"),
    (["--url", "ftp://x"], "url 'ftp://x' is not a server's address"),
    (["--url", "http://127.0.0.1:9", "--local"], "--local and --url contradict each other"),
    (["--url", "http://127.0.0.1:9", "--dtype", "float32"], "--dtype: a setting of an engine in this process"),
    (["--url", "http://127.0.0.1:9", "--api-key", "schlüssel"], "api_key must be plain ASCII"),
])
def test_a_wrong_address_is_a_one_line_error(capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert main(["complete", "x", *flags]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_model_that_the_server_lacks_is_refused(live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "x", "--url", live.url, "--model", "other"]) == 1
    assert "has scripted, not 'other'" in capsys.readouterr().err


def test_an_error_of_the_server_is_shown(engine: ScriptedEngine, live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "x " * 5000, "--url", live.url]) == 1
    assert "the server answered with status 400: " in capsys.readouterr().err


# -- other servers, with scripted events


PRESS = "press Ctrl-C here"


@pytest.fixture
def other() -> Iterator[Callable[..., str]]:
    """Starts a server that answers with these bodies: of GET, and the lines of POST."""
    servers: list[ThreadingHTTPServer] = []

    def start(events: list[Any], models: Any = ({"id": "m", "owned_by": "x"},)) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.answer(json.dumps({"data": models}).encode())

            def do_POST(self) -> None:
                requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.answer(b"")
                for e in events:
                    if e == PRESS:
                        os.kill(os.getpid(), signal.SIGINT)
                        ended.put(self.rfile.read(1))  # returns when the client has shut down the connection
                        return
                    self.wfile.write(f"data: {e if isinstance(e, str) else json.dumps(e)}\r\n\r\n: a comment\r\n\r\n".encode())

            def log_message(self, *args: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    requests: list[dict[str, Any]] = []
    ended: queue.Queue[bytes] = queue.Queue()
    start.requests, start.ended = requests, ended  # type: ignore[attr-defined]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def delta(**fields: str) -> dict[str, Any]:
    return {"choices": [{"delta": fields}]}


def test_reasoning_is_shown_and_is_not_part_of_the_next_prompt(other: Any, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    url = other([delta(role="assistant"), delta(reasoning_content="hm"), delta(content="yes"), {"choices": []}, "[DONE]"])
    typed(monkeypatch, "one", "two")
    assert main(["chat", "--url", url]) == 0
    assert capsys.readouterr().out == "hm\n\nyes\n" * 2
    assert other.requests[1]["messages"] == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"},
                                             {"role": "user", "content": "two"}]


def test_ctrl_c_ends_the_answer_and_the_connection_but_not_a_chat(other: Any, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "x", "--url", other([{"choices": [{"text": "one "}]}, PRESS])]) == 130
    typed(monkeypatch, "hello")
    assert main(["chat", "--url", other([delta(content="two"), PRESS])]) == 0
    captured = capsys.readouterr()
    assert captured.out == "one \ntwo\n" and "(stopped)" in captured.err
    assert [other.ended.get(timeout=30) for _ in range(2)] == [b"", b""]


@pytest.mark.parametrize(("events", "words"), [
    ([delta(content="x")], "ended the answer early (the connection was closed)"),
    ([{"error": {"message": "boom"}}], "the server's answer failed: boom"), ([{"error": "boom"}], "the server's answer failed: 'boom'"),
    (["{"], "ended the answer early"), (["5"], "an event is no object: 5"),
])
def test_a_broken_answer_is_a_one_line_error(other: Any, capsys: pytest.CaptureFixture[str], events: list[Any], words: str) -> None:
    assert main(["complete", "x", "--url", other(events)]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_another_programs_server_on_the_default_port_is_not_used(other: Any, loads: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for models in ([{"id": "m", "owned_by": "someone"}], [], "x", [{}]):
        monkeypatch.setattr(remote, "DEFAULT_URL", other([], models))
        assert main(["complete", "x"]) == 1
    assert loads == [None] * 4 and not other.requests
