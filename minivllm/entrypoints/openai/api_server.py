"""`python -m minivllm.entrypoints.openai.api_server --model MODEL`: the command of older tutorials, with the flags of `minivllm serve`."""
from __future__ import annotations

import sys
from collections.abc import Sequence

from minivllm.cli import serve
from minivllm.cli.flags import CommandParser, normalize
from minivllm.cli.main import guarded


def main(argv: Sequence[str] | None = None) -> int:
    prog = "python -m minivllm.entrypoints.openai.api_server"
    parser = CommandParser(prog=prog, usage=f"{prog} [FLAGS]", add_help=False, description="The same as `minivllm serve`.")
    serve.add_flags(parser)
    args, extras = parser.parse_known_args(normalize(sys.argv[1:] if argv is None else argv))
    if extras:
        parser.refuse(extras)
    return guarded(lambda: serve.run(args))


if __name__ == "__main__":
    sys.exit(main())
