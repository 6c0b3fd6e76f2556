"""`minivllm serve [MODEL]`: the OpenAI-compatible server."""
from __future__ import annotations

import argparse
from typing import Any

from minivllm.cli.flags import CommandParser, add_config_file, add_config_flags, add_model_argument, build, given
from minivllm.config import EngineConfig, ServerConfig


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("serve", help="serve a model over HTTP, OpenAI-compatible",
                                 description="Serve a model over HTTP with OpenAI's API.")
    add_model_argument(parser)
    add_flags(parser)


def add_flags(parser: CommandParser) -> None:
    add_config_file(parser)
    add_config_flags(parser, ServerConfig, "server")
    add_config_flags(parser, EngineConfig, "engine")


def run(args: argparse.Namespace) -> int:
    values = given(args, ServerConfig, EngineConfig)
    server, engine = build(ServerConfig, values), build(EngineConfig, values)
    from minivllm.server.run import serve

    return serve(engine, server)
