"""`minivllm chat [MODEL]`: a conversation in the terminal, streamed.

Each prompt is the whole conversation. The engine finds all but the newest messages in its prefix cache.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from minivllm.cli.flags import add_model_argument
from minivllm.cli.local import LocalEngine, add_flags, start
from minivllm.cli.remote import Reasoning, RemoteServer
from minivllm.errors import InvalidInput, nearest
from minivllm.server.terminal import print_status

HELP = "/reset starts a new conversation, /system TEXT starts one with this system message, Ctrl-C stops an answer, /exit or Ctrl-D exits"
COMMANDS = ("/reset", "/system", "/exit", "/help")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("chat", help="chat with a model in the terminal",
                                 description=f"Chat with a model in the terminal. {HELP}.")
    add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    with start(args) as model:
        ChatSession(model, args.system).run()
    return 0


class ChatSession:
    """A conversation and its commands."""

    def __init__(self, model: LocalEngine | RemoteServer, system: str | None) -> None:
        model.check_chat()
        self.model = model
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def run(self) -> None:
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() line editing and a history
            print_status(HELP)
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if line == "/exit":
                    return
                self._command(line)
            elif line:
                self._answer(line)

    def _read(self) -> str | None:
        """The next line of input; None at its end."""
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:  # there is no answer to stop
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
            print_status("(a new conversation with this system message)" if system else "(a new conversation without a system message)")
        elif line == "/help":
            print_status(HELP)
        else:
            print_status(f"unknown command {line!r}{nearest(line, COMMANDS)}. {HELP}")

    def _answer(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        pieces = []
        try:
            for piece in self.model.chat(self.messages):
                if not isinstance(piece, Reasoning):
                    pieces.append(piece)
                print(piece, end="", flush=True)
        except InvalidInput as error:  # usually the conversation has become longer than the context
            self.messages.pop()
            print_status(f"error: {error} (/reset starts a new conversation)")
            return
        print()
        if self.model.interrupt.pressed:
            print_status("(stopped)")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
