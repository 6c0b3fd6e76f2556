"""Command-line flags generated from the fields of a config dataclass, so names, defaults and help texts always agree.

    max_model_len: int | None = option(None, "longest prompt + output")
        ──▶  --max-model-len N          longest prompt + output
        ──▶  max_model_len = 4096       in a file given with --config

A flag that was not given is absent from the parsed arguments (`argparse.SUPPRESS`), so it does not override a value of the file.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from minivllm.errors import InvalidInput, NotSupportedYet, nearest

ConfigType = TypeVar("ConfigType")

_PARSE = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str, "str | None": str, "tuple[str, ...]": str}


class CommandParser(argparse.ArgumentParser):
    """Accepts only exact flag names. Errors name the nearest flag."""

    def __init__(self, *args: Any, not_yet: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.not_yet = dict(not_yet or {})  # flags of vLLM that are not built yet: name -> feature

    def error(self, message: str) -> NoReturn:
        """One line with a hint: the usage text of forty flags would hide the error."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, extras: Sequence[str]) -> NoReturn:
        """Exit because of unknown arguments, with status 2 as for every wrong command line."""
        flags = [arg.split("=", 1)[0] for arg in extras if arg.startswith("--")]
        if not flags:
            self.error(f"unexpected argument {extras[0]!r}")
        for flag in flags:
            what = self.not_yet.get(flag[2:].replace("-", "_").removeprefix("no_"))
            if what is not None:
                self.error(f"{flag} ({what}) is not supported yet: leave it out")
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        self.error(f"unknown flag {flags[0]}{nearest(flags[0], known)}")


def normalize(argv: Iterable[str]) -> list[str]:
    """Replace `--max_model_len=8` by `--max-model-len=8`: users write both."""
    args = list(argv)
    fixed: list[str] = []
    for i, arg in enumerate(args):
        if arg == "--":  # the rest are not flags
            return fixed + args[i:]
        name, equals, value = arg.partition("=")
        fixed.append(name.replace("_", "-") + equals + value if name.startswith("--") else arg)
    return fixed


def add_config_flags(
    parser: argparse.ArgumentParser, config: type, title: str, *, only: Iterable[str] | None = None, skip: Iterable[str] = (),
) -> None:
    """One flag for each field of `config`."""
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(config):
        if (only is None or f.name in only) and f.name not in skip:
            _add_flag(group, f)


def _add_flag(group: argparse._ArgumentGroup, f: dataclasses.Field[Any]) -> None:
    kind, flag = str(f.type), "--" + f.name.replace("_", "-")
    text = f.metadata["help"].replace("%", "%%")
    if f.default not in (None, (), ""):
        text += f" (default: {'on' if f.default is True else 'off' if f.default is False else f.default})"
    common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
    if kind in ("bool", "bool | None"):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        return
    parse = _PARSE[kind]
    metavar = f.metadata.get("metavar") or ("N" if parse is int else "X" if parse is float else f.name.split("_")[-1].upper())
    if kind.startswith("tuple"):
        group.add_argument(flag, action="extend", nargs=f.metadata["nargs"], metavar=metavar, **common)
    elif f.metadata.get("choices"):
        group.add_argument(flag, choices=f.metadata["choices"], **common)
    else:
        group.add_argument(flag, type=parse, metavar=metavar, **common)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_argument", nargs="?", metavar="MODEL",
                        help="folder, .gguf file or hub id (default: the embedded SmolLM2-135M-Instruct)")


def add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE",
                        help="JSON, TOML or YAML file with any of the flags below; flags on the command line override it")


def given(args: argparse.Namespace, *configs: type) -> dict[str, Any]:
    """The user's settings from `--config` and the command line, checked against the fields of `configs`."""
    fields = {f.name for config in configs for f in dataclasses.fields(config)}
    values = _from_file(getattr(args, "config", None), fields)
    values |= {name: value for name, value in vars(args).items() if name in fields}
    positional = getattr(args, "model_argument", None)
    if positional is not None:
        if values.get("model", positional) != positional and "model" in vars(args):
            raise InvalidInput(f"two models were given, {positional!r} and --model {values['model']!r}: give only one", "model")
        values["model"] = positional
    return values


def build(config: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """The config with these values. Names of other configs are ignored."""
    own = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        if f.name in values:
            value = values[f.name]
            if str(f.type).startswith("tuple"):
                value = tuple(value) if isinstance(value, list) else (value,)
            own[f.name] = value
    return config(**own)


def _from_file(path: str | None, fields: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    from minivllm.config import FLAGS_NOT_YET

    values = {}
    for key, value in _read(Path(path)).items():
        name = str(key).replace("-", "_")
        if name in FLAGS_NOT_YET:
            raise NotSupportedYet(f"{path}: {key} ({FLAGS_NOT_YET[name]}) is not supported yet: leave it out", name)
        if name not in fields:
            raise InvalidInput(f"{path}: unknown setting {key!r}{nearest(name, fields)}", name)
        values[name] = value
    return values


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            import tomllib

            data: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            data = yaml.safe_load(text) or {}
        else:
            data = json.loads(text)
    except ImportError:
        raise InvalidInput(f"reading {path} needs the package pyyaml: install it, or write the file as JSON or TOML", "config") from None
    except OSError as error:
        raise InvalidInput(f"cannot read the config file {path}: {error.strerror}", "config") from None
    except Exception as error:  # each parser has its own kinds of errors
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"{path} is not a valid config file: {line}", "config") from None
    if not isinstance(data, dict):
        raise InvalidInput(f"{path} must contain settings by name, got a {type(data).__name__}", "config")
    return data
