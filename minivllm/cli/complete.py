"""`minivllm complete PROMPT`: continue a text, streamed to stdout."""
from __future__ import annotations

import argparse
import sys
from typing import Any

from minivllm.cli.local import add_flags, start
from minivllm.errors import InvalidInput

DEFAULT_TOKENS = 128  # unlike a chat's answer, a text rarely ends by itself


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("complete", help="continue a text",
                                 description="Continue a text. Only the continuation goes to stdout.")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; -: read it from stdin")
    add_flags(parser, f"maximum number of tokens of the continuation (default: {DEFAULT_TOKENS})")


def run(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise InvalidInput("the prompt is empty: give at least one character", "prompt")
    with start(args, max_tokens=DEFAULT_TOKENS) as model:
        for piece in model.complete(prompt):
            print(piece, end="", flush=True)
        print()
        return 130 if model.interrupt.pressed else 0
