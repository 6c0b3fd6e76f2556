"""Command-line flags made from the fields of a config dataclass, so names, defaults and help texts cannot drift apart.

    max_model_len: int | None = option(None, "longest prompt + output")
        ──▶  --max-model-len N          longest prompt + output
        ──▶  max_model_len = 4096       in a file given with --config

A flag that was not given leaves no trace in the parsed arguments (`argparse.SUPPRESS`), so a file's value is known to be
overridden only when the user really typed the flag.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from minivllm.errors import InvalidInput, NotSupportedYet, nearest

Config = TypeVar("Config")

_PARSE = {"int": int, "int | None": int, "float": float, "float | None": float, "str": str, "str | None": str, "tuple[str, ...]": str}


class Parser(argparse.ArgumentParser):
    """Argparse with exact flag names only, and errors that name the nearest flag."""

    def __init__(self, *args: Any, not_yet: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.not_yet = dict(not_yet or {})  # flags known elsewhere that are not built yet: name -> what it is

    def error(self, message: str) -> NoReturn:
        """One line and a hint; the usage of forty flags would bury it."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, extras: Sequence[str]) -> NoReturn:
        """End the program over arguments that nothing took. Exit status 2, as for every wrong command line."""
        flags = [arg.split("=", 1)[0] for arg in extras if arg.startswith("--")]
        if not flags:
            self.error(f"unexpected argument {extras[0]!r}")
        for flag in flags:
            what = self.not_yet.get(flag[2:].replace("-", "_").removeprefix("no_"))
            if what is not None:
                self.error(f"{flag} ({what}) is not supported yet: leave it out")
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        self.error(f"unknown flag {flags[0]}{nearest(flags[0], known)}")


def normalise(argv: Iterable[str]) -> list[str]:
    """`--max_model_len=8` as `--max-model-len=8`: both spellings are in use."""
    args = list(argv)
    fixed: list[str] = []
    for i, arg in enumerate(args):
        if arg == "--":  # what follows are no flags
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
                        help="folder, .gguf file or hub id; the embedded SmolLM2-135M-Instruct if left out")


def add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE",
                        help="JSON, TOML or YAML file with any of the flags below; the command line wins over it")


def given(args: argparse.Namespace, *configs: type) -> dict[str, Any]:
    """Every setting that the user made, from `--config` and the command line, checked against the fields of `configs`."""
    fields = {f.name for config in configs for f in dataclasses.fields(config)}
    values = _from_file(getattr(args, "config", None), fields)
    values |= {name: value for name, value in vars(args).items() if name in fields}
    positional = getattr(args, "model_argument", None)
    if positional is not None:
        if values.get("model", positional) != positional and "model" in vars(args):
            raise InvalidInput(f"two models were given, {positional!r} and --model {values['model']!r}: give one", "model")
        values["model"] = positional
    return values


def build(config: type[Config], values: Mapping[str, Any]) -> Config:
    """The config that `values` describe; names of other configs in it are passed over."""
    mine = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        if f.name in values:
            value = values[f.name]
            if str(f.type).startswith("tuple"):
                value = tuple(value) if isinstance(value, list) else (value,)
            mine[f.name] = value
    return config(**mine)


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
    except Exception as error:  # each parser has its own error; all of them mean the same to the user
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"{path} is not a valid config file: {line}", "config") from None
    if not isinstance(data, dict):
        raise InvalidInput(f"{path} must hold settings by name, got a {type(data).__name__}", "config")
    return data
