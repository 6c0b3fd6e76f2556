"""What the attacks of `bench.hostile` are made of: a server's address, HTTP written by hand, and one attack as data."""
from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

GOOD_KEY, HOSTILE_KEY, ADMIN_KEY = "good", "hostile", "admin"


@dataclass(frozen=True)
class Target:
    """The server under attack. The attacker is on the same machine and has one ordinary key."""

    port: int
    hold: float = 8.0  # seconds for which an attacker keeps its connections

    def head(self, path: str, *lines: str, method: str = "POST", key: str | None = HOSTILE_KEY) -> bytes:
        """A request head, with JSON as its content type."""
        keyed = () if key is None else (f"authorization: Bearer {key}",)
        start = (f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json")
        return "\r\n".join((*start, *keyed, *lines, "", "")).encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**26)

    async def post(self, path: str, body: Any, *, key: str | None = HOSTILE_KEY) -> tuple[int, bytes]:
        """Send JSON (or bytes) on a new connection. Returns the status and the body; status 0: the connection was closed."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        reader, writer = await self.connect()
        try:
            writer.write(self.head(path, f"content-length: {len(raw)}", "connection: close", key=key) + raw)
            answer = await reader.read(-1)
        except ConnectionError:
            return 0, b""
        finally:
            writer.close()
        return status_of(answer), answer.partition(b"\r\n\r\n")[2]

    async def leave(self, path: str, body: Any, seconds: float, *, key: str | None = HOSTILE_KEY) -> None:
        """Send JSON, wait, and close the connection without reading."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        _, writer = await self.connect()
        try:
            writer.write(self.head(path, f"content-length: {len(raw)}", key=key) + raw)
            await asyncio.sleep(seconds)
        finally:
            writer.transport.abort()


@dataclass(frozen=True)
class Attack:
    """One attack: `run` attacks and returns what the attacker got, such as "400 x 6"."""

    name: str
    limit: str  # what bounds it
    run: Callable[[Target], Awaitable[str]]
    flags: tuple[str, ...] = ()  # of the server
    seconds: float = 30.0  # after which the attacker gives up
    expected: str = ""  # pattern of what the attacker gets if the limit holds; empty: not checked


def status_of(answer: bytes) -> int:
    """The status of an HTTP response; 0: there is none."""
    parts = answer[:16].split(b" ", 2)
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


def tally(statuses: Iterable[int]) -> str:
    """"400 x 3, closed x 2"."""
    counts = Counter(statuses)
    return ", ".join(f"{status or 'closed'} x {count}" for status, count in sorted(counts.items(), reverse=True)) or "nothing"
