"""`minivllm rm NAME`: remove models from this machine's disk, and only from the caches that `minivllm list` shows."""
from __future__ import annotations

import argparse
import sys
from typing import Any

from minivllm.cli.list import readable
from minivllm.errors import InvalidInput, nearest
from minivllm.server.terminal import print_status


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("rm", help="remove models from the cache",
                                 description="Remove models from the cache. They are downloaded or converted again when they are needed.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name that `minivllm list` shows; never a path")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask for confirmation")


def run(args: argparse.Namespace) -> int:
    from minivllm.models.cache import entries

    found = entries()
    known = sorted({entry.name for entry in found})
    for name in args.names:
        if name not in known:
            raise InvalidInput(f"{name!r} is not in the cache{nearest(name, known) or ': `minivllm list` shows its names'}", "names")
    chosen = [entry for entry in found if entry.name in args.names]
    for entry in chosen:
        print_status(f"{entry.name} ({entry.kind}, {readable(entry.size)})")
    if not args.yes and not _confirmed(f"remove {'it' if len(chosen) == 1 else 'these'}? [y/N] "):
        print_status("nothing was removed")
        return 1
    for entry in chosen:
        try:
            entry.remove()
        except OSError as error:
            raise InvalidInput(f"cannot remove {entry.name}: {error.strerror or error}", "names") from None
    print_status(f"removed, {readable(sum(entry.size for entry in chosen))} free")
    return 0


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise InvalidInput("there is no terminal to confirm in: give --yes", "yes")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
