"""A server that does no work: it streams prepared events as fast as its sockets accept them.

A load generator's rate against this server is the load generator's own limit. Figures measured with it are meaningful only well below
that limit. In each turn of the event loop every stream gets one event, in one write, as in the steps of a real server.
"""
from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import socket
from multiprocessing.connection import Connection
from typing import cast

from minivllm.benchmarks.event_loop import run_fast

_HEAD = (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
         b"transfer-encoding: chunked\r\n\r\n")
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


def _chunk(event: dict[str, object] | str) -> bytes:
    data = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
    body = f"data: {data}\n\n".encode()
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


def _event(text: str, finish: str | None = None) -> dict[str, object]:
    return {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 0, "model": "canned", "system_fingerprint": "fp_0",
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}]}


_TOKEN = _chunk(_event(" word"))
_MODEL_LIST = json.dumps({"object": "list", "data": [{"id": "canned", "object": "model"}]}).encode()
_MODELS = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_MODEL_LIST) + _MODEL_LIST


class CannedConnection(asyncio.Protocol):
    """One connection. The response has `max_tokens` events, whatever the prompt."""

    def __init__(self, streams: set[CannedConnection]) -> None:
        self._streams = streams  # the connections with an unfinished response; shared with `_serve`
        self._buffer = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's

    def connection_lost(self, error: Exception | None) -> None:
        self._streams.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if not end or len(body) < size:
            return
        self._buffer = body[size:]
        if head.startswith(b"GET"):
            self._transport.write(_MODELS)
            return
        self._max_tokens = int(json.loads(body[:size]).get("max_tokens") or 16)
        self._left = self._max_tokens
        self._transport.write(_HEAD)
        self._streams.add(self)

    def advance(self) -> bool:
        """Send one event. False: it was the last one."""
        self._left -= 1
        if self._left > 0:
            self._transport.write(_TOKEN)
            return True
        counts = {"prompt_tokens": 1, "completion_tokens": self._max_tokens, "total_tokens": self._max_tokens + 1}
        usage = {**_event(""), "choices": [], "usage": counts}
        self._transport.write(_chunk(_event(" end", "length")) + _chunk(usage) + _chunk("[DONE]") + b"0\r\n\r\n")
        return False


async def _serve(listener: socket.socket) -> None:
    streams: set[CannedConnection] = set()
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: CannedConnection(streams), sock=listener)
    while True:
        for stream in list(streams):
            if not stream.advance():
                streams.discard(stream)
        await asyncio.sleep(0 if streams else 0.001)


def _main(port: int, ready: Connection) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # several processes share one port
    listener.bind(("127.0.0.1", port))
    listener.listen(1024)
    ready.send(listener.getsockname()[1])
    run_fast(_serve(listener))


class CannedServers:
    """Canned servers, each in its own process, all on one port."""

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = []
        self.port = 0
        for _ in range(processes):
            pipe, child_end = context.Pipe()
            process = context.Process(target=_main, args=(self.port, child_end), daemon=True)
            process.start()
            self.port = pipe.recv()
            self._processes.append(process)

    def __enter__(self) -> CannedServers:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
