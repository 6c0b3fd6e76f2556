"""vLLM's settings: neutral values are accepted, refused ones are errors that name them, and inert ones print one line."""
from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from minivllm.cli.flags import build, given, normalize
from minivllm.cli.main import build_parser, main
from minivllm.compat.environment import HONORED, INERT, unknown_variables
from minivllm.compat.settings import ENGINE_SETTINGS, SERVER_SETTINGS, VllmSetting
from minivllm.config import EngineConfig, ServerConfig
from minivllm.errors import InvalidInput, NotSupportedYet

BOTH = [*ENGINE_SETTINGS, *SERVER_SETTINGS]


def name_of(setting: VllmSetting) -> str:
    return setting.name


def other_value(setting: VllmSetting) -> Any:
    """A value that requests something."""
    return not setting.default if isinstance(setting.default, bool) else "something"


def parsed(*argv: str) -> tuple[EngineConfig, ServerConfig]:
    """The configs that a `serve` command line gives."""
    args, extras = build_parser()[0].parse_known_args(normalize(["serve", *argv]))
    assert not extras
    values = given(args, EngineConfig, ServerConfig)
    return build(EngineConfig, values), build(ServerConfig, values)


def flag(setting: VllmSetting, value: Any) -> list[str]:
    name = setting.name.replace("_", "-")
    if isinstance(setting.default, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def test_no_name_is_a_setting_of_this_project_and_of_vllm_only() -> None:
    names = [setting.name for setting in BOTH]
    assert len(names) == len(set(names))
    assert not set(names) & {f.name for config in (EngineConfig, ServerConfig) for f in dataclasses.fields(config)}


@pytest.mark.parametrize("setting", ENGINE_SETTINGS, ids=name_of)
def test_neutral_values_of_a_keyword_are_accepted_without_a_line(setting: VllmSetting, capsys: pytest.CaptureFixture[str]) -> None:
    for value in (None, setting.default, *setting.neutral):
        assert EngineConfig.from_kwargs(**{setting.name: value}) == EngineConfig()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("setting", [s for s in ENGINE_SETTINGS if not s.built], ids=name_of)
def test_a_keyword_for_a_feature_that_is_not_built_is_refused_by_name(setting: VllmSetting) -> None:
    with pytest.raises(NotSupportedYet, match="is not supported yet: leave it out") as caught:
        EngineConfig.from_kwargs(**{setting.name: other_value(setting)})
    assert caught.value.param == setting.name and caught.value.message.startswith(f"{setting.name}=")


@pytest.mark.parametrize("setting", [s for s in ENGINE_SETTINGS if s.built], ids=name_of)
def test_a_keyword_without_effect_prints_one_line(setting: VllmSetting, capsys: pytest.CaptureFixture[str]) -> None:
    assert EngineConfig.from_kwargs(**{setting.name: other_value(setting)}) == EngineConfig()
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(f"minivllm: {setting.name}=") and "has no effect" in line


@pytest.mark.parametrize("setting", BOTH, ids=name_of)
def test_each_setting_is_a_hidden_flag_with_the_same_effect(setting: VllmSetting, capsys: pytest.CaptureFixture[str]) -> None:
    value = other_value(setting)
    for neutral in (setting.default, *setting.neutral):
        if neutral is not None:
            assert parsed(*flag(setting, neutral)) == (EngineConfig(), ServerConfig())
    assert capsys.readouterr().err == ""
    if setting.built:
        assert parsed(*flag(setting, value)) == (EngineConfig(), ServerConfig())
        assert "has no effect" in capsys.readouterr().err
    else:
        assert main(["serve", *flag(setting, value)]) == 1
        assert f"{setting.name}=" in capsys.readouterr().err


def test_the_help_shows_no_flag_that_only_vllm_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out.split()
    assert not {f"--{setting.name.replace('_', '-')}" for setting in BOTH} & set(shown)


@pytest.mark.parametrize("f", dataclasses.fields(EngineConfig), ids=lambda f: f.name)
def test_none_is_the_default_of_every_keyword(f: dataclasses.Field[Any]) -> None:
    assert EngineConfig.from_kwargs(**{f.name: None}) == EngineConfig()


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("dtype", "half", "float16"), ("dtype", "float", "float32"), ("dtype", torch.bfloat16, "bfloat16"), ("dtype", torch.half, "float16"),
    ("max_model_len", -1, None), ("max_model_len", "auto", None), ("load_format", "pt", "auto"),
])
def test_other_spellings_of_a_value(name: str, value: Any, expected: Any) -> None:
    assert getattr(EngineConfig.from_kwargs(**{name: value}), name) == expected


def test_older_rope_keywords_become_entries_of_hf_overrides() -> None:
    config = EngineConfig.from_kwargs(rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 2.0}, hf_overrides={"vocab_size": 5})
    assert config.hf_overrides == {"vocab_size": 5, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(("argv", "name", "expected"), [
    (["--dtype", "half"], "dtype", "float16"),
    (["--enforce-eager=True"], "enforce_eager", True),
    (["--enable-prefix-caching=false"], "enable_prefix_caching", False),
    (["--no-enable-prefix-caching=true"], "enable_prefix_caching", False),
    (["--enable-prefix-caching", "False", "--dtype", "auto"], "enable_prefix_caching", False),
    (["--disable-hybrid-kv-cache-manager", "--max-model-len", "64"], "max_model_len", 64),
    (["--max-model-len", "-1"], "max_model_len", None),
    (["--max-model-len", "auto"], "max_model_len", None),
    (["--hf-overrides.rope_scaling.factor", "2", "--hf-overrides.rope-theta=5"], "hf_overrides",
     {"rope_scaling": {"factor": 2}, "rope_theta": 5}),
    (["-tp", "1", "-pp=1", "-O3", "-q", "none"], "quantization", None),
    (["-q", "awq_marlin"], "quantization", "awq"),
    (["--quantization", "None"], "quantization", None),
])
def test_spellings_of_launch_lines(argv: list[str], name: str, expected: Any) -> None:
    assert getattr(parsed(*argv)[0], name) == expected


def test_server_aliases() -> None:
    server = parsed("--uvicorn-log-level", "trace", "--disable-uvicorn-access-log")[1]
    assert server.log_level == "debug" and not server.access_log
    with pytest.raises(InvalidInput, match="contradicts"):
        parsed("--uvicorn-log-level", "debug", "--log-level", "error")


@pytest.mark.parametrize(("typed", "hint"), [
    ("--no-enable-log-request", ""),  # a hidden flag is near, and no shown flag means something similar
    ("--enable-prefix-cache", "--enable-prefix-caching"), ("--no-enable-prefix-cache", "--no-enable-prefix-caching"),
    ("--max-model-length", "--max-model-len"),
])
def test_a_hint_names_a_flag_of_like_meaning_or_none(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", typed])
    error = capsys.readouterr().err
    assert (f"did you mean '{hint}'" in error) if hint else ("did you mean" not in error)


def test_environment_variables_of_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert unknown_variables(dict.fromkeys((*HONORED, *INERT, "PATH"), "1")) is None
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    server = parsed()[1]
    assert server.keys() == ("secret",) and server.log_level == "debug"
    assert capsys.readouterr().err.splitlines() == [
        "minivllm: VLLM_BATCH_INVARIANT: not read by minivllm, so what it would change stays unchanged"]
    assert parsed("--log-level", "error")[1].log_level == "error"
    monkeypatch.setenv("MINIVLLM_API_KEY", "mine")
    assert ServerConfig().keys() == ("mine",)
