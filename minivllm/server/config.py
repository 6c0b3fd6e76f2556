"""Settings of the HTTP server; the engine's are in `minivllm.config`. Imports nothing else of the server, so `--help` is fast."""
from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import types
from dataclasses import dataclass
from typing import Any

from minivllm.config import NOT_YET as ENGINE_NOT_YET
from minivllm.config import check_types, option
from minivllm.errors import InvalidInput

# Flags of vLLM that are not built yet. They are refused by name and are not in the help.
NOT_YET = types.MappingProxyType({
    **ENGINE_NOT_YET,
    "enable_reasoning": "vLLM's older switch: --reasoning-parser alone turns it on",
    "ssl_keyfile": "TLS (put a reverse proxy in front)",
    "ssl_certfile": "TLS (put a reverse proxy in front)",
    "uds": "listening on a Unix socket",
    "root_path": "serving below a path",
    "chat_template_content_format": "templates that take content parts",
})
TOOL_CALL_PARSERS = ("hermes", "llama3_json", "pythonic")
REASONING_PARSERS = ("qwen3", "deepseek_r1")
LOG_LEVELS = ("debug", "info", "warning", "error")


def repeatable(help: str, *, metavar: str, nargs: str | int) -> Any:
    """A field with several strings. Its flag may be given more than once, with `nargs` values each time."""
    return dataclasses.field(default=(), metadata={"help": help, "choices": None, "metavar": metavar, "nargs": nargs})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server. Raises `InvalidInput` that names the field, the value and the allowed values."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: accept connections from other machines")
    port: int = option(8000, "port to listen on; 0: any free port")
    api_key: tuple[str, ...] = repeatable("key that clients must send as a bearer token; may be given several times "
                                          "(default: MINIVLLM_API_KEY in the environment)", metavar="KEY", nargs=1)
    served_model_name: tuple[str, ...] = repeatable("model names that clients may use (default: the model's own)",
                                                    metavar="NAME", nargs="+")
    chat_template: str | None = option(None, "file with a Jinja chat template that replaces the model's own; or tool_chatml, the built-in "
                                             "one for ChatML models whose own template has no tools", metavar="FILE")
    trust_request_chat_template: bool = option(False, "accept chat templates in requests; a template can use unlimited time and memory, so "
                                                      "turn this on only if you trust all clients")
    enable_auto_tool_choice: bool | None = option(None, "let the model decide whether to call tools (default: on if the format of its "
                                                        "calls is known)")
    tool_call_parser: str | None = option(None, "format of the model's tool calls (default: guessed from its chat template)",
                                          choices=TOOL_CALL_PARSERS)
    reasoning_parser: str | None = option(None, "separate the reasoning from the answer; deepseek_r1: outputs start with reasoning, qwen3: "
                                                "only outputs that open <think> do", choices=REASONING_PARSERS)
    max_body_size: int = option(4 * 2**20, "largest request body in bytes; parsing JSON takes many times as much memory", metavar="BYTES")
    max_choices: int = option(1024, "most completions (prompts times n) of one request")
    allowed_origins: tuple[str, ...] = repeatable("web origins whose pages may call this server (CORS), such as https://example.org; "
                                                  "*: all (default: none)", metavar="ORIGIN", nargs="+")
    allowed_methods: tuple[str, ...] = repeatable("methods that those pages may use (default: all)", metavar="METHOD", nargs="+")
    allowed_headers: tuple[str, ...] = repeatable("headers that those pages may send (default: all)", metavar="HEADER", nargs="+")
    allow_credentials: bool = option(False, "let those pages send cookies and HTTP credentials")
    permissive: bool = option(False, "ignore unknown request fields instead of refusing them; a response header names them")
    engine_process: bool = option(True, "run the engine in its own process; off: in a thread of the server")
    drain_timeout: float = option(30.0, "seconds that running requests have to finish after SIGTERM", metavar="SECONDS")
    access_log: bool = option(True, "log a line for each request")
    log_level: str = option("info", "lowest level of log messages", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.port <= 65535:
            raise InvalidInput(f"port must be between 0 and 65535, got {self.port}", "port")
        if self.max_body_size < 1024:
            raise InvalidInput(f"max_body_size must be at least 1024 bytes, got {self.max_body_size}", "max_body_size")
        if self.max_choices < 1:
            raise InvalidInput(f"max_choices must be at least 1, got {self.max_choices}", "max_choices")
        if self.drain_timeout < 0:
            raise InvalidInput(f"drain_timeout must be a number of seconds from 0, got {self.drain_timeout}", "drain_timeout")
        for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            object.__setattr__(self, name, _from_json_lists(name, getattr(self, name)))
        if self.allow_credentials and "*" in self.allowed_origins:
            raise InvalidInput("allow_credentials with allowed_origins '*' would let every web page use its visitor's credentials: name "
                               "the origins", "allow_credentials")
        for name in ("allowed_methods", "allowed_headers", "allow_credentials"):
            if getattr(self, name) and not self.allowed_origins:
                raise InvalidInput(f"{name} has no effect without allowed_origins: give both", name)
        for name in ("api_key", "served_model_name", "allowed_origins", "allowed_methods", "allowed_headers"):
            if any(not value.strip() for value in getattr(self, name)):
                raise InvalidInput(f"{name} must not be empty: give a value, or leave it out", name)
        if not all(key.isascii() for key in self.api_key):
            raise InvalidInput("api_key must be plain ASCII: HTTP headers allow nothing else", "api_key")

    def keys(self) -> tuple[str, ...]:
        """The valid API keys: the configured ones, else the environment's. Empty: requests need no key."""
        if self.api_key:
            return self.api_key
        key = os.environ.get("MINIVLLM_API_KEY", "").strip()
        return (key,) if key else ()


def _from_json_lists(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """A flag's values: plain words, or a JSON list in one argument as in vLLM."""
    found: list[str] = []
    for value in values:
        if not value.startswith("["):
            found.append(value)
            continue
        try:
            listed = json.loads(value)
        except ValueError:
            listed = None
        if not isinstance(listed, list) or not all(isinstance(v, str) for v in listed):
            raise InvalidInput(f"{name} must be words or a JSON list of strings, got {value!r}", name)
        found += listed
    return tuple(found)


def print_status(message: str) -> None:
    """Print a line for the user at the terminal, on stderr."""
    print(message, file=sys.stderr, flush=True)


def configure_logging(level: str) -> None:
    """Send log lines to stderr. Commands call this; imports do not."""
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for verbose in ("httpx", "httpx2", "filelock", "urllib3", "asyncio", "uvicorn.error"):
        logging.getLogger(verbose).setLevel("DEBUG" if level == "debug" else "ERROR" if level == "error" else "WARNING")
    logging.getLogger("numba").setLevel("ERROR" if level == "error" else "WARNING")  # at "debug" it logs each compiled instruction
