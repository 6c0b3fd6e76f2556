"""A running server instead of an engine in the command's own process, for `chat` and `complete`: OpenAI's protocol, streamed.

    --url URL    this server, minivllm or not
    --local      never a server
    neither      a minivllm server on the default port, unless the command has settings for an engine
"""
from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from minivllm.benchmarks.address import ServerAddress
from minivllm.cli.interrupt import Interrupt
from minivllm.config import ServerConfig
from minivllm.errors import InvalidInput, shown
from minivllm.server.terminal import print_status

DEFAULT_URL = f"http://127.0.0.1:{ServerConfig.port}"
PROBE_SECONDS, ANSWER_SECONDS = 1.0, 600.0  # how long to wait for a server that might be there, and for the next token
MAX_BODY = 1 << 20  # bytes of an error or of the list of models


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server", "A minivllm server on the default port is used, unless engine settings are given.")
    group.add_argument("--url", metavar="URL", help="use the server at this address, such as http://127.0.0.1:8000")
    group.add_argument("--local", action="store_true", help="load the model in this process even if a server runs")
    group.add_argument("--api-key", metavar="KEY",
                       help="key of the server (default: MINIVLLM_API_KEY or OPENAI_API_KEY in the environment)")


class NoServer(Exception):
    """Nothing answers at an address; the message is the reason."""


class Reasoning(str):
    """A piece of output that is shown, but is not part of the answer in later prompts."""

    __slots__ = ()


class RemoteServer:
    """One model of a server. It sends one request at a time."""

    def __init__(self, url: str, key: str | None) -> None:
        try:
            self.address = ServerAddress.of(url)
        except InvalidInput as error:
            raise InvalidInput(error.message.replace("base_url", "url"), "url") from None
        if key is not None and not key.isascii():
            raise InvalidInput("api_key must be plain ASCII: HTTP headers allow nothing else", "api_key")
        self.url = url
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self.interrupt = Interrupt()
        self.model = ""
        self.sampling: dict[str, Any] = {}

    def models(self, timeout: float) -> list[dict[str, Any]]:
        """The cards of the server's models. Raises `NoServer`, or `InvalidInput` with the server's own error."""
        connection = self._connect(timeout)
        try:
            connection.request("GET", f"{self.address.prefix}/v1/models", headers=self._headers)
            cards = json.loads(_successful(connection.getresponse()).read(MAX_BODY))["data"]
            return [card for card in cards if isinstance(card["id"], str)]
        except InvalidInput:
            raise
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise NoServer(f"it does not speak OpenAI's protocol ({type(error).__name__})") from error
        finally:
            connection.close()

    def check_chat(self) -> None:
        """A server says itself if its model has no chat template."""

    def chat(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The answer in pieces, `Reasoning` included. Ctrl-C ends it early and sets `interrupt.pressed`."""
        reasoned = False
        for choice in self._stream("/v1/chat/completions", {"messages": messages}):
            delta = choice.get("delta") or {}
            if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                reasoned = True
                yield Reasoning(thought)
            if text := delta.get("content"):
                if reasoned:
                    yield Reasoning("\n\n")
                reasoned = False
                yield text

    def complete(self, text: str) -> Iterator[str]:
        for choice in self._stream("/v1/completions", {"prompt": text}):
            yield choice.get("text") or ""

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.address.secure else http.client.HTTPConnection
        connection = kind(self.address.host, self.address.port, timeout=timeout)
        try:
            connection.connect()
        except OSError as error:
            raise NoServer(error.strerror or str(error) or type(error).__name__) from error
        return connection

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The first choice of each event. On Ctrl-C the connection is shut down, so the server aborts the request."""
        try:
            connection = self._connect(ANSWER_SECONDS)
        except NoServer as error:
            raise InvalidInput(f"no server answers at {self.url} ({error})", "url") from None
        channel = connection.sock
        with self.interrupt.recording(lambda: channel.shutdown(socket.SHUT_RDWR)):
            try:
                payload = json.dumps({"model": self.model, "stream": True, **self.sampling, **body}).encode()
                connection.request("POST", self.address.prefix + path, payload, self._headers)
                yield from _choices(_successful(connection.getresponse()))
            except InvalidInput:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not self.interrupt.pressed:
                    reason = str(error) or type(error).__name__
                    raise InvalidInput(f"the server at {self.url} ended the answer early ({reason})", "url") from None
            finally:
                connection.close()


def _successful(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if response.status == 200:
        return response
    text = response.read(MAX_BODY).decode(errors="replace")
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = shown(text, 200)
    hint = "; give --api-key" if response.status == 401 else ""
    raise InvalidInput(f"the server answered with status {response.status}: {message}{hint}")


def _choices(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        name, _, data = line.decode().strip().partition(":")
        if name != "data":
            continue
        if data.strip() == "[DONE]":
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"an event is no object: {shown(event)}")
        if (error := event.get("error")) is not None:
            raise InvalidInput(f"the server's answer failed: {error.get('message') if isinstance(error, dict) else shown(error, 200)}")
        yield from (event.get("choices") or [])[:1]
    raise ValueError("the connection was closed")


# ---- which server

def find_server(args: argparse.Namespace, settings: Mapping[str, Any]) -> RemoteServer | None:
    """The server that a command is to use. None: load the model here. settings: those for an engine that the user gave."""
    if args.local and args.url:
        raise InvalidInput("--local and --url contradict each other: give one of them", "local")
    if args.local:
        return None
    key = args.api_key or os.environ.get("MINIVLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    server = RemoteServer(args.url or DEFAULT_URL, key)
    others = [f"--{name.replace('_', '-')}" for name in settings if name not in ("model", "seed")]
    return _named(server, settings, others) if args.url else _default(server, settings, others)


def _named(server: RemoteServer, settings: Mapping[str, Any], others: list[str]) -> RemoteServer:
    """The server of --url."""
    if others:
        raise InvalidInput(f"{', '.join(others)}: a setting of an engine in this process, but --url names a server: leave one of them out",
                           "url")
    try:
        cards = server.models(PROBE_SECONDS * 10)
    except NoServer as error:
        raise InvalidInput(f"no server answers at {server.url} ({error}): start one with `minivllm serve`, or check the address",
                           "url") from None
    model = settings.get("model")
    names = [card["id"] for card in cards]
    if not names or (model is not None and (model := _served(cards, model)) is None):
        raise InvalidInput(f"the server at {server.url} has {', '.join(names[:5]) or 'no model'}, not {settings.get('model')!r}", "model")
    return _with(server, model or names[0], settings)


def _default(server: RemoteServer, settings: Mapping[str, Any], others: list[str]) -> RemoteServer | None:
    """A minivllm server on the default port, if it has the wanted model. One line says what is used."""
    try:
        cards = server.models(PROBE_SECONDS)
    except NoServer:
        return None
    except InvalidInput as error:
        if "status 401" in error.message:
            print_status(f"(a server runs at {server.url}, but it needs a key: give --api-key; loading a second model here)")
        return None
    if not cards or cards[0].get("owned_by") != "minivllm":
        return None
    model = settings.get("model")
    name = cards[0]["id"] if model is None else _served(cards, model)
    if others or name is None:
        why = f"{others[0]} is a setting of an engine here" if others else f"it has {cards[0]['id']}, not {model}"
        print_status(f"(a server runs at {server.url}, but {why}: loading a second model)")
        return None
    print_status(f"(using {name} of the server at {server.url}; --local loads a model here instead)")
    return _with(server, name, settings)


def _with(server: RemoteServer, model: str, settings: Mapping[str, Any]) -> RemoteServer:
    server.model = model
    server.sampling = {"seed": settings["seed"]} if "seed" in settings else {}
    return server


def _served(cards: list[dict[str, Any]], model: str) -> str | None:
    """The server's name of this model."""
    return next((card["id"] for card in cards if model in (card["id"], card.get("root"))), None)
