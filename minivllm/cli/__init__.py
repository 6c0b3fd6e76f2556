"""The command line: `minivllm serve | chat | complete | pull | collect-env ...`.

Each command is a module with `add_parser(subparsers)` and `run(args)`; `main.COMMANDS` lists them. Flags come from the fields
of the config dataclasses (see `flags.py`). Nothing heavy is imported before a command runs, so `minivllm --help` is instant.
"""
