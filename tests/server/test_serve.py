"""`minivllm serve` as a process with a tiny real model: its messages and its end."""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil


@dataclass
class Process:
    """A running command, with its lines of stderr as they arrive."""

    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()

    def wait_for(self, start: str) -> str:
        """Wait for the first line that starts with this text."""
        def found() -> list[str]:
            return [line for line in self.lines if line.startswith(start)]

        with self.changed:
            assert self.changed.wait_for(found, timeout=120), "".join(self.lines)
        return found()[0]

    def ends(self) -> tuple[int, str]:
        status = self.popen.wait(60)
        self.reader.join(60)
        return status, "".join(self.lines)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()


@contextmanager
def command(*args: str, module: str = "minivllm") -> Iterator[Process]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    popen = subprocess.Popen(
        [sys.executable, "-m", module, *args], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield Process(popen)
    finally:
        if popen.poll() is None:
            os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()


def url_of(process: Process) -> str:
    return process.wait_for("ready after").split(" at ")[1].split()[0]


def test_serve_describes_the_server_prints_a_working_curl_line_and_ends_cleanly_on_ctrl_c(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    with command("serve", str(folder), "--port", "0", "--dtype", "float32", "--served-model-name", "tiny") as server:
        url, curl = url_of(server), server.wait_for("curl ")
        assert server.wait_for("model").split()[1:] == ["tiny,", "float32", "on", "cpu"]
        assert "256 tokens" in server.wait_for("context") and "blocks of 16 tokens" in server.wait_for("KV cache")
        if shutil.which("curl"):
            answer = json.loads(subprocess.run(["sh", "-c", curl], capture_output=True, check=True, timeout=60).stdout)
            assert answer["choices"][0]["message"]["role"] == "assistant" and answer["model"] == "tiny"
        body = {"prompt": "the cat", "max_tokens": 240, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(server.popen.pid, signal.SIGINT)  # like a terminal: to the engine's process too
            assert [line for line in lines if line][-1] == "data: [DONE]"
        status, output = server.ends()
    assert status == 0 and output.endswith("stopped\n"), output
    assert "Traceback" not in output and "Error" not in output, output


def test_the_older_command_serves_and_ends_with_status_0_on_sigterm(tiny_llama: Callable[..., Path]) -> None:
    module = "minivllm.entrypoints.openai.api_server"
    with command("--model", str(tiny_llama()), "--port", "0", "--no-engine-process", module=module) as server:
        assert httpx.get(url_of(server) + "/health").status_code == 200
        server.popen.send_signal(signal.SIGTERM)
        status, output = server.ends()
    assert status == 0 and "Traceback" not in output, output


def test_ctrl_c_while_loading_ends_cleanly(tiny_llama: Callable[..., Path]) -> None:
    with command("serve", str(tiny_llama()), "--port", "0") as server:
        server.wait_for("minivllm ")  # "... loading"
        os.killpg(server.popen.pid, signal.SIGINT)
        status, output = server.ends()
    assert status == 0 and "Traceback" not in output and "ready" not in output, output


def test_a_port_in_use_is_a_one_line_error_before_loading() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with command("serve", "/no/such/model", "--port", str(port)) as server:
            status, output = server.ends()
    assert status == 1
    assert output.startswith(f"minivllm: error: port {port} on 127.0.0.1 is in use") and "--port" in output and output.count("\n") == 1


def test_a_missing_model_is_a_one_line_error() -> None:
    with command("serve", "/no/such/model", "--port", "0") as server:
        status, output = server.ends()
    assert status == 1 and "Traceback" not in output, output
    error = next(line for line in output.splitlines() if "error" in line.lower())
    assert error.startswith("minivllm: error:") and "/no/such/model" in error

def test_a_killed_engine_is_reported_and_ends_the_server_with_status_1(tiny_llama: Callable[..., Path]) -> None:
    with command("serve", str(tiny_llama()), "--port", "0", "--dtype", "float32") as server:
        url = url_of(server)
        body = {"prompt": [5], "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            engine = next(p for p in psutil.Process(server.popen.pid).children() if "spawn_main" in " ".join(p.cmdline()))
            engine.kill()
            rest = [line for line in lines if line]
        assert "engine_dead" in "".join(rest) or rest[-1] == "data: [DONE]"
        status, text = server.ends()
    assert status == 1 and "the engine process ended unexpectedly (exit code -9)" in text and "start the server again" in text
