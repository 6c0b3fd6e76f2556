"""`minivllm`: runs a command, and turns errors into one line and an exit status.

Exit status: 0 success, 1 an error that the user can fix (one line describes it), 2 a wrong command line, 130 interrupted.
"""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from minivllm import __version__
from minivllm.cli import spellings
from minivllm.cli.flags import CommandParser, normalize
from minivllm.errors import EngineDead, InvalidInput, nearest
from minivllm.server.terminal import print_status

COMMANDS = (  # modules of this package
    "serve", "chat", "complete", "run_batch", "bench", "plan", "quantize", "train_draft", "pull", "list", "rm", "trace", "course",
    "collect_env")


def build_parser() -> tuple[CommandParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line, and the parser of each command."""
    parser = CommandParser(prog="minivllm", description="A compact LLM serving engine that is meant to be read.")
    parser.add_argument("--version", action="version", version=f"minivllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    for name in COMMANDS:
        importlib.import_module(f"minivllm.cli.{name}").add_parser(commands)
    return parser, dict(commands.choices)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    # OpenMP threads synchronize at each of a step's hundreds of operations. GNU's threads spin for milliseconds by default, which makes
    # generation many times slower as soon as another program uses a core. This must be set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    parser, commands = build_parser()
    args, extras = parser.parse_known_args(_spelled(normalize(sys.argv[1:] if argv is None else argv), parser, commands))
    if extras:
        command = getattr(args, "command_parser", commands[args.command])  # the parser of `bench serve`, not of `bench`
        (command if isinstance(command, CommandParser) else parser).refuse(extras)
    module = importlib.import_module(f"minivllm.cli.{args.command.replace('-', '_')}")
    return guarded(lambda: module.run(args))


def _spelled(argv: list[str], parser: CommandParser, commands: Collection[str]) -> list[str]:
    """The arguments with the command's own name. Exits with a hint for a command of another program."""
    if not argv or argv[0].startswith("-") or argv[0] in commands:
        return argv
    name = argv[0]
    if name not in spellings.COMMANDS:
        _refuse_command(name, parser, commands)
    return [spellings.COMMANDS[name], *argv[1:]]


def _refuse_command(name: str, parser: CommandParser, commands: Collection[str]) -> NoReturn:
    hint = f": {spellings.COMMAND_HINTS[name]}" if name in spellings.COMMAND_HINTS else nearest(name, [*commands, *spellings.COMMANDS])
    parser.error(f"unknown command {name!r}{hint}")


def guarded(run: Callable[[], int | None]) -> int:
    """Run a command. An error that the user can fix becomes one line instead of a traceback."""
    try:
        status = run() or 0
        sys.stdout.flush()
        return status
    except (InvalidInput, EngineDead) as error:
        print_status(f"minivllm: error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the program that reads the output has ended, as in `minivllm complete ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit fails again
        return 141
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "minivllm":
            raise
        print_status(f"minivllm: error: the package {error.name!r} is missing: pip install {error.name}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
