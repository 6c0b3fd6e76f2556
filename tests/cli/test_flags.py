"""Flags are generated from the config dataclasses. A wrong command line is a one-line error with the nearest valid flag."""
from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli.flags import build, given
from minivllm.cli.main import COMMANDS, build_parser, guarded, main
from minivllm.config import EngineConfig, ServerConfig
from minivllm.errors import EngineDead, InvalidInput


@pytest.fixture(autouse=True)
def no_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test whose command line should have been refused but would load a model."""
    import minivllm.server.run

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the command line was not refused")

    monkeypatch.setattr(minivllm.server.run, "start_engine", refuse)


def parsed(*argv: str) -> tuple[EngineConfig, ServerConfig]:
    """The configs that a `serve` command line gives."""
    from minivllm.cli.flags import normalize

    args, extras = build_parser()[0].parse_known_args(normalize(["serve", *argv]))
    assert not extras
    values = given(args, EngineConfig, ServerConfig)
    return build(EngineConfig, values), build(ServerConfig, values)


def one_of(f: dataclasses.Field[Any]) -> tuple[list[str], Any]:
    """Arguments that set a field to a value other than its default, and that value."""
    kind = str(f.type)
    if kind.startswith("bool"):
        return [], not f.default
    if f.metadata.get("choices"):
        value = next(choice for choice in f.metadata["choices"] if choice != f.default)
        return [value], value
    if kind.startswith("int"):
        return ["77"], 77
    if kind.startswith("float"):
        return ["0.5"], 0.5
    if kind.startswith("dict"):
        value = {"method": "ngram", "num_speculative_tokens": 2} if f.name == "speculative_config" else {"key": 1}
        return [json.dumps(value)], value
    if f.name == "quantization":
        return ["fp8"], "fp8"
    return ["word"], ("word",) if kind.startswith("tuple") else "word"


@pytest.mark.parametrize("config, f", [(c, f) for c in (EngineConfig, ServerConfig) for f in dataclasses.fields(c)],
                         ids=lambda x: getattr(x, "name", getattr(x, "__name__", "")))
def test_every_field_has_a_flag_in_both_spellings(config: type, f: dataclasses.Field[Any]) -> None:
    argument, value = one_of(f)
    if f.name == "root_path":
        argument, value = ["/llm"], "/llm"
    if f.name == "pooler_config":
        argument, value = ['{"normalize": false}'], {"normalize": False}
    if f.name == "silent_timeout":
        argument, value = ["50"], 50.0
    if f.name == "max_body_size":
        argument, value = ["7777"], 7777
    # Some flags need another one.
    others = ["--allowed-origins=https://a"] if f.name in ("allowed_methods", "allowed_headers", "allow_credentials") else []
    others += {"ssl_keyfile": ["--ssl-certfile=c"], "ssl_certfile": ["--ssl-keyfile=k"]}.get(f.name, [])
    others += ["--max-replicas=2"] if f.name in ("target_queue", "upscale_delay", "downscale_delay") else []
    others += ["--data-parallel-size=2", "--restart-engine=1"] if f.name == "silent_timeout" else []
    others += ["--enable-lora"] if f.name in ("max_loras", "max_lora_rank", "max_cpu_loras") else []
    for name in (f.name.replace("_", "-"), f.name):
        flag = f"--{name}" if value is not False else f"--no-{name}"
        found = parsed(flag, *argument, *others)[config is ServerConfig]
        assert getattr(found, f.name) == value
        if argument:
            assert getattr(parsed(f"{flag}={argument[0]}", *others)[config is ServerConfig], f.name) == value


def test_without_flags_all_settings_are_defaults() -> None:
    assert parsed() == (EngineConfig(), ServerConfig())


def test_the_model_is_an_argument_or_a_flag_but_not_two_different_ones() -> None:
    assert parsed("org/model")[0].model == parsed("--model", "org/model")[0].model == "org/model"
    with pytest.raises(InvalidInput, match="two models"):
        parsed("org/model", "--model", "org/other")


def test_keys_and_names_may_be_repeated() -> None:
    engine, server = parsed("org/model", "--api-key", "a", "c/d", "--api-key", "b")
    assert server.api_key == ("a", "c/d", "b") and engine.model == "org/model"
    _, server = parsed("--api-key", "a", "--api-key", "b", "--served-model-name", "x", "y", "--served-model-name", "z")
    assert server.api_key == ("a", "b") and server.served_model_name == ("x", "y", "z")


def test_a_model_behind_a_key_is_refused(tmp_path: Path) -> None:
    for flag in ("--api-key", "--admin-key"):
        for model in ("org/model", "org/model:Q4_K_M", "m.gguf", str(tmp_path)):
            with pytest.raises(InvalidInput, match=f"{flag} takes several keys, and the last one looks like a model: write MODEL") as error:
                parsed(flag, "secret", model)
            assert "secret" not in str(error.value) and model not in str(error.value)  # it may be a key
    for flag in ("--api-key", "--served-model-name", "--lora-modules", "--lora-folders", "--allowed-headers"):
        with pytest.raises(InvalidInput, match=f"the last one looks like a model: write MODEL in front of {flag}"):
            parsed(flag, "a", "gemma3-270m")
    assert parsed("--lora-folders", str(tmp_path), str(tmp_path))[1].lora_folders == (str(tmp_path),) * 2
    named = parsed("--model", "org/model", "--served-model-name", "a", "org/b")
    assert (named[0].model, named[1].served_model_name) == ("org/model", ("a", "org/b"))
    assert parsed("--api-key", "org/key")[1].api_key == ("org/key",)  # one value is a key
    assert parsed("--api-key", "a", "b")[1].api_key == ("a", "b")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one-line error of a wrong command line, which exits with status 2."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("argv, words", [
    (["serve", "--max-model-length", "5"], "unknown flag --max-model-length; did you mean '--max-model-len'?"),
    (["serve", "--prot=80"], "did you mean '--port'?"),
    (["serve", "--enable_prefix_cacheing"], "did you mean '--enable-prefix-caching'?"),
    (["serve", "--no-such-log-requests"], "unknown flag --no-such-log-requests"),
    (["serve", "--tool_call_parser=hermse"], "argument --tool-call-parser: invalid choice: 'hermse'"),
    (["serve", "--port", "many"], "argument --port: must be a whole number such as 32768, 32k (32,000) or 32K (32,768), got 'many'"),
    (["serve", "--dtype", "flot32"], "argument --dtype: invalid choice: 'flot32'"),
    (["serve", "--max-model", "5"], "unknown flag --max-model"),
    (["serve", "a", "b"], "unexpected argument 'b'"),
    (["chat", "--skip-tokenizer-init"], "unknown flag --skip-tokenizer-init"),
    (["server"], "unknown command 'server'; did you mean 'serve'?"),
    ([], "required: COMMAND"),
])
def test_a_wrong_command_line_is_a_one_line_error_with_status_2(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize("argv, words", [
    (["serve", "--max-model-len", "0"], "max_model_len must be at least 1, got 0"),
    (["serve", "--port", "70000"], "port must be between 0 and 65535"),
    (["serve", "--api-key", ""], "api_key must not be empty"),
    (["serve", "--host", "no.such.host.invalid"], "host 'no.such.host.invalid' is not an address"),
    (["serve", "--chat-template", "/no/such/file"], "chat_template: cannot read /no/such/file"),
    (["serve", "--config", "/no/such/file"], "cannot read the config file /no/such/file"),
    (["complete", "x", "--temperature", "-1"], "temperature must be in [0, inf)"),
    (["complete", ""], "the prompt is empty"),
])
def test_a_wrong_value_is_a_one_line_error_with_status_1(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("minivllm: error: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("suffix, text", [
    (".json", json.dumps({"port": 9000, "max-model-len": 64, "api_key": ["a", "b"]})),
    (".toml", 'port = 9000\nmax-model-len = 64\napi_key = ["a", "b"]\n'),
    (".yaml", "port: 9000\nmax_model_len: 64\napi-key: [a, b]\n"),
])
def test_settings_may_come_from_a_file_and_the_command_line_overrides_them(tmp_path: Path, suffix: str, text: str) -> None:
    file = tmp_path / ("settings" + suffix)
    file.write_text(text)
    engine, server = parsed("--config", str(file), "--port", "9001")
    assert engine.max_model_len == 64 and server.port == 9001 and server.api_key == ("a", "b")


@pytest.mark.parametrize("text, words", [
    ('{"prot": 1}', "unknown setting 'prot'; did you mean 'port'?"),
    ('{"quantization": "modelopt"}', "quantization must be one of awq, bitsandbytes,"),
    ("[1]", "got a list"),
    ("{", "not a valid config file"),
    ('{"port": "many"}', "port must be a whole number"),
    ('{"port": true}', "port must be a whole number"),
    ('{"api_key": [1]}', "api_key must be a list of strings"),
    ('{"api_key": 5}', "api_key must be a list of strings"),
    ('{"permissive": "yes"}', "permissive must be True or False"),
])
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=None) as caught:
        parsed("--config", str(file))
    assert words in str(caught.value)


def test_help_and_version_load_neither_torch_nor_the_web_server() -> None:
    code = (
        "import sys; from minivllm.cli.main import main\n"
        "for argv in (['--help'], ['serve', '--help'], ['--version']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'fastapi', 'pydantic', 'uvicorn', 'transformers', 'numpy', 'tokenizers'}\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & heavy))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert output.splitlines()[-1] == "[]"


@pytest.mark.parametrize("error, status, line", [
    (InvalidInput("bad thing", "field"), 1, "minivllm: error: bad thing\n"),
    (EngineDead("it died"), 1, "minivllm: error: it died\n"),
    (KeyboardInterrupt(), 130, ""),
    (ModuleNotFoundError("no", name="fancy.part"), 1, "minivllm: error: the package 'fancy.part' is missing"),
])
def test_an_error_that_the_user_can_fix_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str,
) -> None:
    def run() -> int:
        raise error

    assert guarded(run) == status
    assert capsys.readouterr().err.startswith(line)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


def test_every_command_is_a_module_with_add_parser_and_run() -> None:
    import importlib

    for name in COMMANDS:
        module = importlib.import_module(f"minivllm.cli.{name}")
        assert callable(module.add_parser) and callable(module.run)
