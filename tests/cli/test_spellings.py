"""What users of other programs write: their flags, commands and numbers get the meaning here, or a hint."""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from minivllm.cli import numbers, spellings
from minivllm.cli.main import build_parser, main
from minivllm.cli.serve import GROUPS
from tests.cli.test_flags import no_engine_starts, parsed, refused  # noqa: F401  # a fixture

# -- numbers


@pytest.mark.parametrize(("text", "value"), [
    ("32768", 32768), ("32_768", 32768), ("32k", 32000), ("32K", 32768), ("1M", 2**20), ("1m", 10**6), ("25.6k", 25600), ("2G", 2**31),
    ("2g", 2 * 10**9), ("2GB", 2 * 10**9), ("2GiB", 2**31), ("512MiB", 512 * 2**20), ("512 MB", 512 * 10**6), ("1.5G", 3 * 2**29),
    ("2Gi", 2**31), ("1T", 2**40), ("-1", -1), ("+5", 5), (" 7 ", 7), ("0.5k", 500), ("512B", 512),
])
def test_a_whole_number_may_have_a_unit(text: str, value: int) -> None:
    assert numbers.whole_number(text) == value


@pytest.mark.parametrize("text", ["", "k", "32q", "1.5", "25.601K", "0x10", "1e3", "32,768", "inf", "nan", "1 2", "--5", "9" * 5000, "²",
                                  "1kk"])
def test_another_text_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number") as error:
        numbers.whole_number(text)
    assert len(str(error.value)) < 200


def test_numbers_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    engine, server = parsed("--max-model-len", "32k", "--kv-cache-memory-bytes", "2GiB", "--gpu-memory-utilization", "95%",
                            "--kv-offloading-size", "512MiB", "--max-body-size=8M")
    assert (engine.max_model_len, engine.kv_cache_memory_bytes, engine.gpu_memory_utilization) == (32000, 2**31, 0.95)
    assert (engine.kv_offloading_size, server.max_body_size) == (0.5, 8 * 2**20)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"max-model-len": "4K", "gpu-memory-utilization": "80%", "kv-offloading-size": "2G", "model": "32k"}))
    engine, _ = parsed("--config", str(file))
    assert (engine.max_model_len, engine.gpu_memory_utilization, engine.kv_offloading_size, engine.model) == (4096, 0.8, 2.0, "32k")


def test_bench_and_trace_read_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()[0]
    args = parser.parse_args(["bench", "serve", "--num-prompts", "1k", "--random-input-len", "2K"])
    assert (args.num_prompts, args.random_input_len) == (1000, 2048)
    assert main(["trace", "--synthetic", "3", "--compare", "max_num_batched_tokens=1K"]) == 0
    assert main(["trace", "--synthetic", "3", "--compare", "max_num_batched_tokens=1q"]) == 1
    assert "max_num_batched_tokens is of type int, got '1q'" in capsys.readouterr().err


# -- flags


@pytest.mark.parametrize(("argv", "field", "value"), [
    (["-m", "a/b"], "model", "a/b"), (["--model-path=a/b"], "model", "a/b"), (["-hf", "a/b:Q4_K_M"], "model", "a/b:Q4_K_M"),
    (["-c", "4096"], "max_model_len", 4096), (["--ctx-size", "4k"], "max_model_len", 4000), (["--num_ctx=8K"], "max_model_len", 8192),
    (["-np", "4"], "max_num_seqs", 4), (["--max-running-requests", "4"], "max_num_seqs", 4),
    (["--mem-fraction-static", "0.8"], "gpu_memory_utilization", 0.8), (["--torch-dtype", "bfloat16"], "dtype", "bfloat16"),
    (["--cache-dir", "/x"], "download_dir", "/x"), (["-ctk", "q8_0", "--cache-type-v=q8_0"], "kv_cache_dtype", "int8"),
    (["-ctv", "f16", "--dtype", "half", "-ctk", "f16"], "kv_cache_dtype", "float16"),
    (["--kv-cache-dtype", "fp8_e4m3"], "kv_cache_dtype", "fp8"),
])
def test_another_programs_flag_has_the_meaning_here(argv: list[str], field: str, value: Any) -> None:
    assert getattr(parsed(*argv)[0], field) == value


@pytest.mark.parametrize(("argv", "words"), [
    (["serve", "-ngl", "99"], "-ngl is not a flag of minivllm: a model is as a whole on the GPU"),
    (["serve", "--n_gpu_layers=99"], "--n-gpu-layers is not a flag of minivllm"), (["chat", "--threads", "4"], "set OMP_NUM_THREADS"),
    (["complete", "-p", "hello"], "give the prompt as the argument"), (["serve", "--cpu"], "use --device cpu"),
    (["chat", "-v"], "use --log-level debug"), (["serve", "-xyz"], "unknown flag -xyz"),
    (["ps"], "curl http://127.0.0.1:8000/v1/models"), (["show", "x"], "config.json in the folder"), (["cht"], "did you mean 'chat'?"),
    (["run_batc"], "did you mean 'run_batch'?"),
    (["serve", "-ctk", "q8_0"], "-ctk and -ctv must have the same value here: give both, or use --kv-cache-dtype"),
    (["serve", "-ctk", "q8_0", "-ctv", "f16"], "-ctk and -ctv must have the same value here"),
    (["serve", "-ctk", "q4_0", "-ctv", "q4_0"], "argument --kv-cache-dtype: invalid choice: 'q4_0'"),
])
def test_a_flag_or_command_without_a_counterpart_gets_a_hint(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize(("argv", "words"), [
    (["serve", "-pp", "2"], "pipeline_parallel_size=2 (pipeline parallelism) is not supported yet"),
    (["serve", "-tp", "0"], "tensor_parallel_size must be at least 1, got 0"),
    (["serve", "--tp-size", "0"], "tensor_parallel_size must be at least 1, got 0"),
    (["serve", "--load-in-4bit"], "load_in_4bit=True (quantization='bitsandbytes' quantizes to 4 bits, 'int8' to 8) is not supported yet"),
    (["serve", "--gpu-memory-utilization", "90"], "gpu_memory_utilization must be in (0, 1], got 90.0; 90% is 0.9"),
])
def test_what_is_not_built_is_refused_by_the_name_here(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert main(argv) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("theirs", "ours"), [("run", "chat"), ("ls", "list"), ("generate", "complete"), ("start", "serve")])
def test_another_programs_command_is_ours(capsys: pytest.CaptureFixture[str], theirs: str, ours: str) -> None:
    error = refused(capsys, theirs, *(["x"] if ours == "complete" else []), "--nonsense")
    assert f"minivllm {ours}: error: unknown flag --nonsense" in error


def test_the_tables_name_only_flags_and_commands_that_exist_and_none_of_ours() -> None:
    commands = build_parser()[1]
    ours = {flag for command in commands.values() for flag, action in command._option_string_actions.items()
            if action.help != argparse.SUPPRESS}
    hidden = {flag for command in commands.values() for flag in command._option_string_actions}
    assert set(spellings.FLAGS.values()) <= hidden
    serve = {flag for flag, action in commands["serve"]._option_string_actions.items() if action.help != argparse.SUPPRESS}
    assert not serve & (set(spellings.FLAGS) | set(spellings.FLAG_HINTS))
    assert not set(spellings.FLAGS) & set(spellings.FLAG_HINTS) and "--model" in ours
    assert set(spellings.COMMANDS.values()) <= set(commands)
    assert not set(commands) & (set(spellings.COMMANDS) | set(spellings.COMMAND_HINTS))


# -- help


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_serve_begins_with_the_six_flags_that_a_home_user_needs(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "serve")
    flags = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")]
    assert flags[:6] == ["--host", "--port", "--api-key", "--max-model-len", "--gpu-memory-utilization", "--served-model-name"]
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["positional arguments", *GROUPS, "more", "this command"]
    assert text.index("--host") < 500  # nothing long stands in front


def test_the_examples_in_the_help_of_trace_run_and_show_columns_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [line.split("  ")[0].split() for line in map(str.strip, help_of(capsys, "trace").splitlines())
                if line.startswith("minivllm trace --synthetic")]
    assert examples
    for argv in examples:
        assert main(argv[1:]) == 0
        rows = [line.rsplit(None, 2)[1:] for line in capsys.readouterr().out.splitlines()[3:]]
        assert sum(left != right for left, right in rows) > len(rows) / 2


# -- list and rm


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models of this program's cache, and one of the hub's."""
    import huggingface_hub.constants

    cache = tmp_path / "cache"
    monkeypatch.setenv("MINIVLLM_CACHE", str(cache))
    hub = tmp_path / "hub" / "models--owner--name"
    for folder in (cache / "downloads", cache / "models" / "m-1f0c", hub / "blobs", hub / "refs", hub / "snapshots" / ("a" * 40)):
        folder.mkdir(parents=True)
    (cache / "downloads" / "m.gguf").write_bytes(b"x" * 1000)
    (cache / "models" / "m-1f0c" / "model.safetensors").write_bytes(b"x" * 3000)
    (cache / "models" / "m-1f0c.lock").touch()
    (hub / "blobs" / "b").write_bytes(b"x" * 2048)
    (hub / "refs" / "main").write_text("a" * 40)
    (hub / "snapshots" / ("a" * 40) / "model.safetensors").symlink_to(hub / "blobs" / "b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return tmp_path


def test_list_shows_every_model_with_its_size(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert rows[1:4] == [["m-1f0c", "converted", "2.9", "KiB"], ["owner/name", "hub", "2.0", "KiB"], ["m.gguf", "download", "1000", "B"]]
    assert rows[4] == ["total", "5.9", "KiB"]


def test_rm_removes_what_list_names_and_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", "-y", "m-1f0c", "owner/name"]) == 0
    assert "removed, 4.9 KiB free" in capsys.readouterr().err
    assert sorted(str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file() and ".locks" not in file.parts) == [
        "cache/downloads/m.gguf"]


def test_rm_of_a_gguf_file_removes_its_conversion(cache: Path) -> None:
    from minivllm.models.cache import conversion_folder

    folder = conversion_folder(cache / "cache" / "downloads" / "m.gguf")
    folder.mkdir()
    assert main(["rm", "-y", "m.gguf"]) == 0
    assert not folder.exists() and (cache / "cache" / "models" / "m-1f0c").exists()


def test_rm_spares_another_repository_with_the_same_commit(cache: Path) -> None:
    import shutil

    other = cache / "hub" / "models--owner--other"
    shutil.copytree(cache / "hub" / "models--owner--name", other, symlinks=True)
    assert main(["rm", "-y", "owner/other"]) == 0
    assert not other.exists() and (cache / "hub" / "models--owner--name" / "blobs" / "b").exists()


@pytest.mark.parametrize("name", ["../x", "/etc", ".", "", "m", "downloads/m.gguf", "cache", "m-1f0c.lock", "~", "owner"])
def test_rm_refuses_what_is_not_an_entry(cache: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = sorted(cache.rglob("*"))
    assert main(["rm", "-y", "m.gguf", name]) == 1
    assert f"{name!r} is not in the cache" in capsys.readouterr().err and sorted(cache.rglob("*")) == before


def test_rm_asks_before_it_removes(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["rm", "m.gguf"]) == 1
    assert "no terminal to confirm in: give --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer, status in (("", 1), ("n", 1), ("y", 0)):
        assert (cache / "cache" / "downloads" / "m.gguf").exists()
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert main(["rm", "m.gguf"]) == status
    assert not (cache / "cache" / "downloads" / "m.gguf").exists()


def test_an_empty_cache_is_an_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from minivllm.models import cache

    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(cache, "_hub_entries", list)
    assert main(["ls"]) == 0
    assert "total" in capsys.readouterr().out and not (tmp_path / "none").exists()
