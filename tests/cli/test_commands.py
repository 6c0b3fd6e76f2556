"""`complete`, `chat`, `pull` and `collect-env` with a tiny model, or with a scripted engine if the order of events matters."""
from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli import remote
from minivllm.cli.local import LocalEngine
from minivllm.cli.main import main


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on the default address, whatever else runs on this machine."""
    monkeypatch.setattr(remote, "DEFAULT_URL", "http://127.0.0.1:9")


ENGINE_FLAGS = ["--dtype", "float32", "--device", "cpu", "--num-gpu-blocks-override", "64"]


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> str:
    return str(tiny_llama())


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_complete_prints_only_the_continuation_on_stdout(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    from minivllm import LLM, SamplingParams

    argv = ["complete", "the cat", "--model", folder, "--temperature", "0", "--max-tokens", "12", *ENGINE_FLAGS]
    assert main(argv) == 0
    output = capsys.readouterr().out
    with LLM(model=folder, dtype="float32", device="cpu", num_gpu_blocks_override=64) as llm:
        wanted = llm.generate("the cat", SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0].outputs[0].text
    assert output == wanted + "\n"


def test_complete_reads_stdin_for_a_dash(folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tail = ["--model", folder, "--temperature", "0", "--max-tokens", "5", *ENGINE_FLAGS]
    assert main(["complete", "the cat\n", *tail]) == 0
    direct = capsys.readouterr().out
    typed(monkeypatch, "the cat")
    assert main(["complete", "-", *tail]) == 0
    assert capsys.readouterr().out == direct


def test_a_prompt_longer_than_the_context_is_a_one_line_error(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "cat " * 300, "--model", folder, *ENGINE_FLAGS]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("minivllm: error: the prompt has") and "256" in error


def test_pull_prints_the_folder(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", folder]) == 0
    assert capsys.readouterr().out == folder + "\n"
    assert main(["pull", "/no/such/model"]) == 1


def test_collect_env_names_versions_hardware_and_the_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("MINIVLLM_API_KEY", "a-secret")
    assert main(["collect-env"]) == 0
    output = capsys.readouterr().out
    facts = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert facts["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}") and "torch" in facts
    assert str(tmp_path) in facts["cache"] and "MINIVLLM_API_KEY" in facts["settings"] and "a-secret" not in output
    assert any(line.startswith("CPU flags") for line in output.splitlines()) and any(line.startswith("GPU") for line in output.splitlines())


# -- chat, with a scripted engine ---------------------------------------------------------------------------------------


class ScriptedWords:
    """An engine that generates "<n>-th answer." word by word, and calls `at_step` before each word."""

    def __init__(self, folder: str) -> None:
        from minivllm.engine.tokenizer import Tokenizer

        self.tokenizer: Any = Tokenizer(folder)
        self.prompts: list[str] = []
        self.params: list[Any] = []
        self.answers = (f"{number}-th answer." for number in itertools.count())
        self.left: list[str] = []
        self.aborted: list[str] = []
        self.at_step: Callable[[], None] = lambda: None

    def info(self) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(generation_config={"temperature": 0.2, "top_k": 5, "eos_token_id": 1})

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any, lora_request: Any = None) -> None:
        from minivllm.errors import InvalidInput

        text = self.tokenizer.decode(prompt["prompt_token_ids"])
        if "too long" in text:
            raise InvalidInput("the prompt is too long", "prompt")
        self.prompts.append(text)
        self.params.append(params)
        self.left = next(self.answers).split(" ")

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        from minivllm.outputs import OutputDelta

        self.at_step()
        text = self.left.pop(0)
        return [OutputDelta("r", 0, (5,), text, finish_reason=None if self.left else "stop")]

    def abort_request(self, request_id: str) -> list[Any]:
        self.aborted.append(request_id)
        self.left = []
        return []

    def close(self) -> None:
        pass


@pytest.fixture
def words(folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedWords]:
    """Every engine that a command builds is replaced by this one."""
    from minivllm.engine import compose

    engine = ScriptedWords(folder)
    monkeypatch.setattr(compose, "build_engine", lambda config: engine)
    yield engine
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_chat_sends_the_whole_conversation_until_reset(
    words: ScriptedWords, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    typed(monkeypatch, "hello", "", "again", "/reset", "fresh", "/exit", "never")
    assert main(["chat", "--system", "be brief"]) == 0
    assert capsys.readouterr().out == "0-thanswer.\n1-thanswer.\n2-thanswer.\n"
    system = "<s>system: be brief</s>"
    assert words.prompts == [
        f"{system}<s>user: hello</s><s>assistant: ",
        f"{system}<s>user: hello</s><s>assistant: 0-thanswer.</s><s>user: again</s><s>assistant: ",
        f"{system}<s>user: fresh</s><s>assistant: ",
    ]


def test_system_starts_a_conversation_with_another_system_message(
    words: ScriptedWords, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    typed(monkeypatch, "hello", "/system be long", "hello", "/reset", "hello", "/system", "hello", "/systems")
    assert main(["chat", "--system", "be brief"]) == 0
    asked = "<s>user: hello</s><s>assistant: "
    long = "<s>system: be long</s>"
    assert words.prompts == [f"<s>system: be brief</s>{asked}", long + asked, long + asked, asked]
    assert "did you mean '/system'" in capsys.readouterr().err


def test_chat_uses_the_models_sampling_defaults_unless_flags_override_them(words: ScriptedWords, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "hello")
    assert main(["chat", "--temperature", "0.7", "--seed", "3"]) == 0
    params = words.params[0]
    assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 5, None)


def test_ctrl_c_stops_the_answer_and_the_conversation_continues(
    words: ScriptedWords, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    words.answers = iter(["one two three", "four"])
    words.at_step = lambda: os.kill(os.getpid(), signal.SIGINT) if len(words.left) == 2 else None
    typed(monkeypatch, "hello", "again")
    assert main(["chat"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "onetwo\nfour\n" and "(stopped)" in captured.err and len(words.aborted) == 1
    assert "<s>assistant: onetwo</s>" in words.prompts[1]


def test_ctrl_c_stops_a_completion_with_status_130(words: ScriptedWords, capsys: pytest.CaptureFixture[str]) -> None:
    words.at_step = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert main(["complete", "x"]) == 130
    assert capsys.readouterr().out == "0-th\n" and len(words.aborted) == 1


def test_a_message_that_does_not_fit_is_dropped_and_the_conversation_continues(
    words: ScriptedWords, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    typed(monkeypatch, "this is too long", "hello")
    assert main(["chat"]) == 0
    assert "error: the prompt is too long (/reset" in capsys.readouterr().err
    assert words.prompts == ["<s>user: hello</s><s>assistant: "]


def test_an_unknown_command_is_not_sent_to_the_model(
    words: ScriptedWords, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    typed(monkeypatch, "/rest", "/help")
    assert main(["chat"]) == 0
    assert words.prompts == [] and "did you mean '/reset'?" in capsys.readouterr().err


def test_a_model_without_a_template_cannot_chat(words: ScriptedWords, capsys: pytest.CaptureFixture[str]) -> None:
    words.tokenizer.chat_template = None
    assert main(["chat"]) == 1
    assert "no chat template" in capsys.readouterr().err


def test_settings_may_come_from_a_file(words: ScriptedWords, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"max_model_len": 99}))
    seen = []
    init = LocalEngine.__init__
    monkeypatch.setattr(
        LocalEngine, "__init__", lambda self, engine, values, lora: (seen.append(values), init(self, engine, values, lora))[1])
    typed(monkeypatch, "hello")
    assert main(["chat", "--config", str(file)]) == 0
    assert seen == [{"max_tokens": None}]


def test_debug_logging_leaves_out_numbas_line_per_compiled_instruction() -> None:
    code = ("import logging; from minivllm.server.terminal import configure_logging; configure_logging('debug');"
            "print(*(logging.getLogger(name).isEnabledFor(logging.DEBUG) for name in ('minivllm', 'numba.core.ssa')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr
