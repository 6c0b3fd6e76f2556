"""`minivllm pull [MODEL]`: download a model now, so that later starts are fast."""
from __future__ import annotations

import argparse
from typing import Any

from minivllm.cli.flags import add_config_flags, add_model_argument, build, given
from minivllm.config import EngineConfig

FIELDS = ("model", "tokenizer", "revision", "load_format")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("pull", help="download a model into the cache",
                                 description="Download a model, and print its folder.")
    add_model_argument(parser)
    add_config_flags(parser, EngineConfig, "model", only=FIELDS)


def run(args: argparse.Namespace) -> int:
    from minivllm.models.hub import find_model

    files = find_model(build(EngineConfig, given(args, EngineConfig)))
    print(files.folder)
    return 0
