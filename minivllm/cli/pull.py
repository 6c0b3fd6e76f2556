"""`minivllm pull [MODEL]`: download a model now, so that later starts are fast."""
from __future__ import annotations

import argparse
from typing import Any

from minivllm.cli.flags import add_config_flags, add_model_argument, build, given
from minivllm.config import EngineConfig

FIELDS = ("model", "tokenizer", "revision", "load_format", "trust_remote_code")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("pull", help="download a model into the cache",
                                 description="Download a model, and print its folder.")
    add_model_argument(parser)
    add_config_flags(parser, EngineConfig, "model", only=FIELDS)


def run(args: argparse.Namespace) -> int:
    from minivllm.models.hub import find_model
    from minivllm.models.transformers_spec import read_spec
    from minivllm.quantization.methods import METHODS, method_of

    config = build(EngineConfig, given(args, EngineConfig))

    def check(found: dict[str, Any]) -> None:
        read_spec(config, found, METHODS)  # runs in this engine's decoder, or in other code
        method_of(found)

    files = find_model(config, check)
    print(files.folder)
    return 0
