"""Settings of the HTTP server; the engine's are in `minivllm.config`. Imports nothing of the server, so the help text is fast."""
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
from minivllm.config import option
from minivllm.errors import InvalidInput, nearest

# Flags vLLM users know that are not built yet: refused by name, absent from the help.
NOT_YET = types.MappingProxyType({
    **ENGINE_NOT_YET,
    "enable_reasoning": "vLLM's older switch: --reasoning-parser alone turns it on",
    "ssl_keyfile": "TLS (put a reverse proxy in front)",
    "ssl_certfile": "TLS (put a reverse proxy in front)",
    "uds": "listening on a Unix socket",
    "root_path": "serving below a path",
    "chat_template_content_format": "templates that take content parts",
})


def repeatable(help: str, *, metavar: str, nargs: str | int) -> Any:
    """A field that holds several strings: its flag may be given more than once, with `nargs` values each time."""
    return dataclasses.field(default=(), metadata={"help": help, "metavar": metavar, "nargs": nargs})


TOOL_CALL_PARSERS = ("hermes", "llama3_json", "pythonic")
REASONING_PARSERS = ("qwen3", "deepseek_r1")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server. Raises `InvalidInput` naming the field, the value and what is allowed."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8000, "port to listen on; 0: any free one")
    api_key: tuple[str, ...] = repeatable("key that clients must send as a bearer token; may be given several times; "
                                          "MINIVLLM_API_KEY in the environment if left out", metavar="KEY", nargs=1)
    served_model_name: tuple[str, ...] = repeatable("name (or names) that clients ask for; the model's own if left out",
                                                    metavar="NAME", nargs="+")
    chat_template: str | None = option(None, "file with a Jinja chat template, instead of the model's own; or tool_chatml, the built-in "
                                             "one for ChatML models whose own knows no tools", metavar="FILE")
    trust_request_chat_template: bool = option(False, "let requests bring their own chat template; it can take any time and memory, "
                                                      "so only where all clients are trusted")
    enable_auto_tool_choice: bool | None = option(None, "let the model decide whether to call tools; if left out: on where the format of "
                                                        "its calls is known")
    tool_call_parser: str | None = option(None, "format of the model's tool calls; guessed from its chat template if left out",
                                          choices=TOOL_CALL_PARSERS)
    reasoning_parser: str | None = option(None, "split what the model thinks from its answer; deepseek_r1: outputs begin with thinking, "
                                                "qwen3: where they say so", choices=REASONING_PARSERS)
    max_body_size: int = option(4 * 2**20, "largest request body in bytes; reading JSON takes many times as much", metavar="BYTES")
    max_choices: int = option(1024, "most completions (prompts times n) of one request")
    allowed_origins: tuple[str, ...] = repeatable("web origins whose pages may call this server (CORS), such as https://example.org; "
                                                  "*: all; none if left out", metavar="ORIGIN", nargs="+")
    allowed_methods: tuple[str, ...] = repeatable("methods that those pages may use; all if left out", metavar="METHOD", nargs="+")
    allowed_headers: tuple[str, ...] = repeatable("headers that those pages may send; all if left out", metavar="HEADER", nargs="+")
    allow_credentials: bool = option(False, "let those pages send cookies and HTTP credentials")
    permissive: bool = option(False, "ignore unknown request fields, naming them in a response header, instead of refusing them")
    engine_process: bool = option(True, "run the engine in a process of its own; off: in a thread of the server")
    drain_timeout: float = option(30.0, "seconds that running requests get to finish after SIGTERM", metavar="SECONDS")
    access_log: bool = option(True, "log a line for each request")
    log_level: str = option("info", "how much to log", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_type(f, getattr(self, f.name))
        if not 0 <= self.port <= 65535:
            raise InvalidInput(f"port must be between 0 and 65535, got {self.port}", "port")
        if self.max_body_size < 1024:
            raise InvalidInput(f"max_body_size must be at least 1024 bytes, got {self.max_body_size}", "max_body_size")
        if self.max_choices < 1:
            raise InvalidInput(f"max_choices must be at least 1, got {self.max_choices}", "max_choices")
        if not 0 <= self.drain_timeout < float("inf"):
            raise InvalidInput(f"drain_timeout must be a number of seconds from 0, got {self.drain_timeout}", "drain_timeout")
        for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            object.__setattr__(self, name, _from_json_lists(name, getattr(self, name)))
        if self.allow_credentials and "*" in self.allowed_origins:
            raise InvalidInput("allow_credentials with allowed_origins '*' would let every web page act with its visitor's credentials: "
                               "name the origins", "allow_credentials")
        for name in ("allowed_methods", "allowed_headers", "allow_credentials"):
            if getattr(self, name) and not self.allowed_origins:
                raise InvalidInput(f"{name} has no effect without allowed_origins: give both", name)
        for name in ("api_key", "served_model_name", "allowed_origins", "allowed_methods", "allowed_headers"):
            if any(not value.strip() for value in getattr(self, name)):
                raise InvalidInput(f"{name} must not be empty: give a value, or leave it out", name)
        if not all(key.isascii() for key in self.api_key):
            raise InvalidInput("api_key must be plain ASCII: HTTP headers carry nothing else", "api_key")

    def keys(self) -> tuple[str, ...]:
        """The API keys in force: those given, else the environment's; none means that no key is asked for."""
        if self.api_key:
            return self.api_key
        key = os.environ.get("MINIVLLM_API_KEY", "").strip()
        return (key,) if key else ()


def _from_json_lists(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """vLLM's flags take a JSON list in one argument; ours also plain words."""
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


def _check_type(f: dataclasses.Field[Any], value: Any) -> None:
    choices = f.metadata.get("choices")
    if choices and value not in choices and not (value is None and "None" in str(f.type)):
        raise InvalidInput(f"{f.name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}", f.name)
    wanted: dict[str, tuple[type | tuple[type, ...], str]] = {
        "bool": (bool, "True or False"), "bool | None": ((bool, types.NoneType), "True or False"),
        "int": (int, "a whole number"), "float": ((int, float), "a number"),
        "str": (str, "a string"), "str | None": ((str, types.NoneType), "a string"),
        "tuple[str, ...]": (tuple, "a list of strings"),
    }
    kind, words = wanted[str(f.type)]
    wrong = not isinstance(value, kind) or (isinstance(value, bool) and "bool" not in str(f.type))
    if wrong or (kind is tuple and not all(isinstance(v, str) for v in value)):
        raise InvalidInput(f"{f.name} must be {words}, got {value!r}", f.name)


def say(message: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(message, file=sys.stderr, flush=True)


def configure_logging(level: str) -> None:
    """Log lines to stderr. Called by the commands, never on import."""
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "httpx2", "filelock", "urllib3", "asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel("DEBUG" if level == "debug" else "ERROR" if level == "error" else "WARNING")
    logging.getLogger("numba").setLevel("ERROR" if level == "error" else "WARNING")  # at "debug" it prints each instruction it compiles
