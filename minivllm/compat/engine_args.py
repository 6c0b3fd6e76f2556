"""`EngineArgs` and `FlexibleArgumentParser`: how scripts written for vLLM take engine settings from a command line.

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args()
    llm = LLM(**vars(args))                                      # or LLMEngine.from_engine_args(EngineArgs.from_cli_args(args))
"""
from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, Self

from minivllm.cli.flags import CommandParser, add_config_flags, normalize
from minivllm.compat.settings import ENGINE_ALIASES, ENGINE_SETTINGS, LLM_SETTINGS, SERVER_SETTINGS
from minivllm.config import EngineConfig
from minivllm.errors import nearest

_DEFAULTS: dict[str, Any] = {
    **{f.name: f.default for f in dataclasses.fields(EngineConfig)},
    **{setting.name: setting.default for setting in (*ENGINE_SETTINGS, *LLM_SETTINGS, *SERVER_SETTINGS)},
    **{alias.name: None for alias in ENGINE_ALIASES},
}
_Fields: Any = dataclasses.make_dataclass(
    "_Fields", [(name, Any, dataclasses.field(default=default)) for name, default in _DEFAULTS.items()])


class FlexibleArgumentParser(CommandParser):
    """An `ArgumentParser` that takes `--max_model_len` and `--max-model-len`, and JSON by keys (`--hf-overrides.rope_theta 1e6`)."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else list(args)
        kept = {arg for arg in given if arg.partition("=")[0] in self._option_string_actions}  # a script may define --with_underscores
        return super().parse_known_args(normalize(given, keep=kept), namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, extras = self.parse_known_args(args, namespace)
        if extras:
            self.refuse(extras)
        return found


class EngineArgs(_Fields):
    """The keywords of `LLM(...)` as attributes, with vLLM's own ones. They are checked by `create_engine_config`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in _DEFAULTS:
                raise TypeError(f"{type(self).__name__} has no setting {name!r}{nearest(name, _DEFAULTS)}")
        super().__init__(*args, **kwargs)

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser, async_args_only: bool = False) -> argparse.ArgumentParser:
        """Add a flag for each setting. The parsed arguments have all settings, with their defaults.

        async_args_only: only those of the server, of which this engine has none.
        """
        if async_args_only:
            return parser
        add_config_flags(parser, EngineConfig, "engine")
        parser.set_defaults(**_DEFAULTS)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        return cls(**{name: getattr(args, name) for name in _DEFAULTS if hasattr(args, name)})

    def create_engine_config(self, usage_context: Any = None) -> EngineConfig:
        """The checked settings. Raises as `EngineConfig.from_kwargs` does. usage_context: vLLM's; nothing is reported from here."""
        return EngineConfig.from_kwargs(**dataclasses.asdict(self))


class AsyncEngineArgs(EngineArgs):
    """The same for `AsyncLLM`."""
