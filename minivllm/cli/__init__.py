"""The command line: `minivllm serve | chat | complete | pull | collect-env ...`.

Each command is a module with `add_parser(subparsers)` and `run(args)`; `main.COMMANDS` lists them. Flags are generated from the fields
of the config dataclasses (see `flags.py`). Slow imports happen only when a command runs, so `minivllm --help` is fast.
"""
