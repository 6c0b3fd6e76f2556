"""`minivllm chat [MODEL]`: a conversation in the terminal, streamed.

The whole conversation is sent each time; the engine finds all but the newest words in its prefix cache.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from minivllm.cli.flags import add_model_argument
from minivllm.cli.local import Local, add_flags
from minivllm.config import FLAGS_NOT_YET
from minivllm.errors import InvalidInput, nearest
from minivllm.server.terminal import print_status

HELP = "/reset forgets the conversation, /system TEXT begins one with this system message, /exit or Ctrl-D ends, Ctrl-C stops an answer"
COMMANDS = ("/reset", "/system", "/exit", "/help")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk to a model in the terminal", not_yet=FLAGS_NOT_YET,
                                 description=f"Talk to a model in the terminal. {HELP}.")
    add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    with Local.start(args) as local:
        Chat(local, args.system).run()
    return 0


class Chat:
    """A conversation and its commands."""

    def __init__(self, local: Local, system: str | None) -> None:
        tokenizer = local.engine.tokenizer
        assert tokenizer is not None  # skip_tokenizer_init is no flag here
        if tokenizer.chat_template is None:
            raise InvalidInput("this model has no chat template: use a chat model, or `minivllm complete`", "model")
        self.local = local
        self.tokenizer = tokenizer
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def run(self) -> None:
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() gets line editing and a history
            print_status(HELP)
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if line == "/exit":
                    return
                self._command(line)
            elif line:
                self._answer(line)

    def _read(self) -> str | None:
        """A line; None at the end of input."""
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:  # at the prompt there is nothing to stop
            print()
            print_status(HELP)
            return ""

    def _command(self, line: str) -> None:
        if line == "/reset":
            self.messages = list(self.opening)
            print_status("(a new conversation)")
        elif line == "/system" or line.startswith("/system "):
            system = line.removeprefix("/system").strip()
            self.opening = [{"role": "system", "content": system}] if system else []
            self.messages = list(self.opening)
            print_status("(a new conversation, with this system message)" if system else "(a new conversation, without a system message)")
        elif line == "/help":
            print_status(HELP)
        else:
            print_status(f"no command {line!r}{nearest(line, COMMANDS)}. {HELP}")

    def _answer(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        pieces = []
        try:
            prompt = self.tokenizer.apply_chat_template(self.messages)
            assert isinstance(prompt, list)
            for piece in self.local.stream(prompt):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except InvalidInput as error:  # most often: the conversation has outgrown the context
            self.messages.pop()
            print_status(f"error: {error} (/reset starts afresh)")
            return
        print()
        if self.local.interrupt.pressed:
            print_status("(stopped)")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
