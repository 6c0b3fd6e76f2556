"""Command-line flags generated from the fields of a config dataclass, so names, defaults and help texts always agree.

    max_model_len: int | None = option(None, "longest prompt + output")
        ──▶  --max-model-len N          longest prompt + output
        ──▶  max_model_len = 4096       in a file given with --config

A flag that was not given is absent from the parsed arguments (`argparse.SUPPRESS`), so it does not override a value of the file.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from minivllm.cli.numbers import gibibytes, real_number, whole_number
from minivllm.cli.spellings import FLAG_HINTS, FLAGS, PAIRS
from minivllm.compat.settings import (
    ENGINE_ALIASES,
    ENGINE_SETTINGS,
    LIST_FLAGS,
    SERVER_ALIASES,
    SERVER_SETTINGS,
    SHORT_FLAGS,
    VALUES,
    VLLM_NAMES,
)
from minivllm.config import EngineConfig, own_settings
from minivllm.errors import InvalidInput, nearest

ConfigType = TypeVar("ConfigType")

_PARSE: dict[str, Callable[[str], Any]] = {
    "int": whole_number, "int | None": whole_number, "float": real_number, "float | None": real_number, "str": str, "str | None": str,
    "tuple[str, ...]": str,
}
_METAVARS: dict[Callable[[str], Any], str] = {whole_number: "N", real_number: "X", gibibytes: "GIB"}


class CommandParser(argparse.ArgumentParser):
    """Accepts only exact flag names, and a value for a switch (`--enforce-eager=True`). Errors name the nearest flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse; it calls this for the parser of a command too."""
        return super().parse_known_args(
            None if args is None else [self._switch(self._spelled(arg)) for arg in self._joined(self._paired(args))], namespace)

    def _paired(self, args: Sequence[str]) -> Sequence[str]:
        """Two flags of another program that are one here, as that one. Exits with a hint if only one is given, or if they differ."""
        for pair, here in PAIRS.items():
            if here not in self._option_string_actions or not any(arg.partition("=")[0] in (*pair[0], *pair[1]) for arg in args):
                continue
            values, rest = [""] * len(pair), list[str]()
            left = iter(args)
            for arg in left:
                flag, equals, value = arg.partition("=")
                side = next((i for i, names in enumerate(pair) if flag in names), None)
                if side is None:
                    rest.append(arg)
                else:
                    values[side] = value if equals else next(left, "")
            if len(set(values)) > 1:
                self.error(f"{pair[0][0]} and {pair[1][0]} must have the same value here: give both, or use {here}")
            args = [*rest, f"{here}={values[0]}"]
        return args

    def _joined(self, args: Sequence[str]) -> list[str]:
        """`--flag true` as `--flag=true`, for flags without a value."""
        joined: list[str] = []
        for arg in args:
            before = joined[-1] if joined else ""
            if arg.lower() in ("true", "false") and isinstance(self._option_string_actions.get(before), argparse.BooleanOptionalAction):
                joined[-1] = f"{before}={arg}"
            else:
                joined.append(arg)
        return joined

    def _spelled(self, arg: str) -> str:
        """Another program's flag by the name it has here. Exits with a hint for one without a counterpart."""
        flag, equals, value = arg.partition("=")
        own = self._option_string_actions.get(flag)
        if self._subparsers is not None or (own is not None and own.help != argparse.SUPPRESS):
            return arg
        here = FLAGS.get(flag)
        if here in self._option_string_actions:
            return here + equals + value
        if own is None and flag in FLAG_HINTS:
            self.error(f"{flag} is not a flag of minivllm: {FLAG_HINTS[flag]}")
        return arg

    def _switch(self, arg: str) -> str:
        """`--flag=True` as `--flag`, and `--flag=false` as `--no-flag`, for flags without a value."""
        flag, _, value = arg.partition("=")
        on = _SWITCH.get(value.lower())
        if on is None or not isinstance(self._option_string_actions.get(flag), argparse.BooleanOptionalAction):
            return arg
        return flag if on else flag.replace("--no-", "--", 1) if flag.startswith("--no-") else flag.replace("--", "--no-", 1)

    def error(self, message: str) -> NoReturn:
        """One line with a hint: the usage text of forty flags would hide the error."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, extras: Sequence[str]) -> NoReturn:
        """Exit because of unknown arguments, with status 2 as for every wrong command line."""
        flags = [arg.split("=", 1)[0] for arg in extras if re.match(r"-[^\d]", arg)]
        if not flags:
            self.error(f"unexpected argument {extras[0]!r}")
        known = {option for action in self._actions if action.help != argparse.SUPPRESS for option in action.option_strings}
        self.error(f"unknown flag {flags[0]}{_nearest_flag(flags[0], known)}")


def _nearest_flag(flag: str, known: Iterable[str]) -> str:
    """A hint. Flags are compared without words such as "enable": two switches of unlike things are no misspellings."""
    same = [option for option in known if option.startswith("--no-") == flag.startswith("--no-")]
    plain = {_WORDS.sub("", option): option for option in sorted(same) if option.startswith("--")}
    hint = nearest(_WORDS.sub("", flag), plain)
    return next((f"; did you mean {option!r}?" for name, option in plain.items() if repr(name) in hint), "")


_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_WORDS = re.compile(r"^--(no-)?(enable-|disable-|allow-|allowed-|use-)?")


def normalize(argv: Iterable[str], keep: Collection[str] = ()) -> list[str]:
    """Replace `--max_model_len=8` by `--max-model-len=8`, and `--x.key VALUE` by `--x {"key": VALUE}`: users write all of these.

    keep: arguments that stay as they are.
    """
    args, fixed, objects = list(argv), list[str](), dict[str, dict[str, Any]]()
    while args:
        arg = args.pop(0)
        if arg == "--":  # the rest are not flags
            return [*fixed, arg, *args]
        if arg in keep:
            fixed.append(arg)
            continue
        name, equals, value = arg.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        flag, _, path = name.partition(".")
        if not (path and flag.startswith("--")):
            fixed.append(name + equals + value)
            continue
        if not equals:
            value = args.pop(0) if args else ""
        inner = objects.setdefault(flag, {})
        *outer, last = path.replace("-", "_").split(".")
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = literal(value)
    return fixed + [f"{flag}={json.dumps(value)}" for flag, value in objects.items()]


def literal(text: str) -> Any:
    """The value that a text writes in JSON or Python, such as 4, true, None or {"a": 1}; else the text itself."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def add_config_flags(
    parser: argparse.ArgumentParser, config: type, title: str, *, only: Iterable[str] | None = None, skip: Iterable[str] = (),
) -> None:
    """One flag for each field of `config`, and hidden ones for the settings that only vLLM has."""
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(config):
        if (only is None or f.name in only) and f.name not in skip:
            _add_flag(group, f)
    if only is None:
        _add_hidden_flags(group, config)


def add_grouped_flags(parser: argparse.ArgumentParser, configs: Sequence[type], groups: Mapping[str, Sequence[str]], rest: str) -> None:
    """The flags of several configs under these titles; `rest` is the title of those that `groups` does not name."""
    left = {f.name: f for config in configs for f in dataclasses.fields(config)}
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, left.pop(name))
    group = parser.add_argument_group(rest)
    for f in left.values():
        _add_flag(group, f)
    for config in configs:
        _add_hidden_flags(group, config)


def _add_hidden_flags(group: argparse._ArgumentGroup, config: type) -> None:
    engine = config is EngineConfig
    for setting in ENGINE_SETTINGS if engine else SERVER_SETTINGS:
        _add_hidden_flag(group, setting.name, isinstance(setting.default, bool))
    for alias in ENGINE_ALIASES if engine else SERVER_ALIASES:
        _add_hidden_flag(group, alias.name, alias.negated)


def _add_hidden_flag(group: argparse._ArgumentGroup, name: str, switch: bool) -> None:
    """A flag of vLLM. It is parsed so that `own_settings` can accept or refuse its value."""
    flags = ("--" + name.replace("_", "-"), *SHORT_FLAGS.get(name, ()))
    hidden: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if switch:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **hidden)
    else:
        group.add_argument(*flags, type=literal, nargs="+" if name in LIST_FLAGS else None, **hidden)


def _add_flag(group: argparse._ArgumentGroup, f: dataclasses.Field[Any]) -> None:
    kind, flags = str(f.type), ("--" + f.name.replace("_", "-"), *SHORT_FLAGS.get(f.name, ()))
    text = f.metadata["help"].replace("%", "%%")
    if f.default not in (None, (), ""):
        text += f" (default: {'on' if f.default is True else 'off' if f.default is False else f.default})"
    common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
    if kind in ("bool", "bool | None"):
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        return
    parse = _parser_of(f)
    metavar = f.metadata.get("metavar") or _METAVARS.get(parse, f.name.split("_")[-1].upper())
    if kind.startswith("tuple"):
        group.add_argument(*flags, action="extend", nargs="+", metavar=metavar, **common)
    elif f.metadata.get("choices"):
        group.add_argument(*flags, choices=f.metadata["choices"], type=_spelled_here(f.name, parse), **common)
    else:
        group.add_argument(*flags, type=_spelled_here(f.name, parse), metavar=metavar, **common)


def _parser_of(f: dataclasses.Field[Any]) -> Callable[[str], Any]:
    """From a text to a value of the field."""
    return gibibytes if f.name == "kv_offloading_size" else _PARSE.get(str(f.type), str)


def _spelled_here(name: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse`, except for vLLM's spellings of some values."""
    @functools.wraps(parse)  # argparse shows the name of the type in errors
    def read(text: str) -> Any:
        values = VALUES.get(name, {})
        return values[text] if text in values else parse(text)

    return read


def _json_object(text: str) -> dict[str, Any]:
    value = literal(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


_PARSE["dict[str, Any] | None"] = _json_object


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_argument", nargs="?", metavar="MODEL",
                        help="folder, .gguf file, hub id, or gemma3-270m (default: the embedded SmolLM2-135M-Instruct)")


def add_config_file(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--config", metavar="FILE",
                        help="JSON, TOML or YAML file with any of these flags; flags on the command line override it")


def given(args: argparse.Namespace, *configs: type) -> dict[str, Any]:
    """The user's settings from `--config` and the command line, checked against the fields of `configs`."""
    fields = {f.name for config in configs for f in dataclasses.fields(config)}
    names = fields | VLLM_NAMES
    values = _from_file(getattr(args, "config", None), names, fields)
    values = own_settings(values | {name: value for name, value in vars(args).items() if name in names}, fields)
    positional = getattr(args, "model_argument", None)
    if positional is not None:
        if values.get("model", positional) != positional and "model" in vars(args):
            raise InvalidInput(f"two models were given, {positional!r} and --model {values['model']!r}: give only one", "model")
        values["model"] = positional
    if values.get("model") is None:
        _refuse_model_as_value(args)
    return values


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def _refuse_model_as_value(args: argparse.Namespace) -> None:
    """`--api-key KEY MODEL` reads MODEL as a second key: the default model would be served. So does any flag that takes several values."""
    for name, values in vars(args).items():
        if isinstance(values, list) and len(values) > 1 and isinstance(values[-1], str) and _looks_like_a_model(name, values[-1]):
            flag, kind = "--" + name.replace("_", "-"), "keys" if name.endswith("_key") else "values"
            raise InvalidInput(f"{flag} takes several {kind}, and the last one looks like a model: write MODEL in front of {flag}. If it "
                               f"is not the model, write it before the other {kind}, or name the model with --model", name)


def _looks_like_a_model(name: str, value: str) -> bool:
    from minivllm.models.packaged import PACKAGED  # loads numpy, which --help does not need

    if value.endswith(".gguf") or value.lower() in PACKAGED or (Path(value) / "config.json").is_file():
        return True
    return name != "lora_folders" and (_HUB_ID.fullmatch(value) is not None or Path(value).is_dir())


def build(config: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """The config with these values. Names of other configs are ignored."""
    own = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        if f.name in values:
            value = values[f.name]
            parse = _parser_of(f)
            if isinstance(value, str) and parse in _METAVARS:  # from a file, such as max-model-len: 32k
                with contextlib.suppress(argparse.ArgumentTypeError):  # the config names the field
                    value = _spelled_here(f.name, parse)(value)
            if str(f.type).startswith("tuple"):
                value = tuple(value) if isinstance(value, list) else (value,)
            own[f.name] = value
    return config(**own)


def _from_file(path: str | None, names: Collection[str], fields: Collection[str]) -> dict[str, Any]:
    """names: of all settings. fields: those that a hint may name."""
    if path is None:
        return {}
    values = {}
    for key, value in _read(Path(path)).items():
        name = str(key).replace("-", "_")
        if name not in names:
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
