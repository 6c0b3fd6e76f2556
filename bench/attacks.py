"""The attacks of `bench.hostile`: one function each, bounded in bytes, connections and time."""
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys

from bench.hostile_client import Attack, Target, status_of, tally

MIB = 2**20


async def busy_processors(target: Target) -> str:
    """No request: a loop on every core, which is what an attacker's own work does to a server on the same machine."""
    code = f"import time\nend = time.monotonic() + {target.hold}\nwhile time.monotonic() < end: pass"
    loops = [await asyncio.create_subprocess_exec(sys.executable, "-c", code) for _ in range(os.cpu_count() or 1)]
    for loop in loops:
        await loop.wait()
    return f"{len(loops)} cores for {target.hold:g} s"


async def trailers(target: Target) -> str:
    """60 MiB of trailers behind a chunked body, without a key."""
    reader, writer = await target.connect()
    sent = 0
    with contextlib.suppress(ConnectionError):  # the server has closed the connection, as it should
        writer.write(target.head("/v1/completions", "transfer-encoding: chunked", key=None) + b"2\r\n{}\r\n0\r\n")
        line = b"x: " + b"y" * 60_000 + b"\r\n"
        while sent < 60 * MIB:
            writer.write(line)
            await writer.drain()
            sent += len(line)
    answer = b""
    with contextlib.suppress(TimeoutError, ConnectionError):  # then there is no answer, which the report says
        answer = await asyncio.wait_for(reader.read(64), 1)
    writer.close()
    return f"{status_of(answer) or 'closed'} after {sent / 1024:.0f} KiB"


async def silent_connections(target: Target) -> str:
    """400 connections that send half a head, and then a byte a second until the server's limit of 20 s is over."""
    connections = []
    for _ in range(400):
        with contextlib.suppress(OSError):  # refused: the report has the number of those that opened
            connections.append(await target.connect())
    statuses = await asyncio.gather(*(_drip(reader, writer) for reader, writer in connections))
    return f"{len(connections)} opened, {sum(status is not None for status in statuses)} closed by the server"


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
    """Send a head a byte a second. Returns the status of the answer once the server has closed the connection; None: it did not."""
    answer = asyncio.ensure_future(reader.read(-1))
    writer.write(b"GET /health HTTP/1.1\r\nx: ")
    for _ in range(25):
        await asyncio.wait((answer,), timeout=1)
        if answer.done():
            break
        writer.write(b"P")
    writer.transport.abort()
    if not answer.done():
        answer.cancel()
        return None
    return 0 if answer.exception() else status_of(answer.result())


async def unfinished_bodies(target: Target) -> str:
    """300 bodies of 4 MB that lack their last bytes."""
    head = target.head("/v1/completions", f"content-length: {4 * 10**6}")
    bodies = await asyncio.gather(*(_unfinished(target, head) for _ in range(300)))
    return f"300 bodies, refused with {tally(status for status in bodies if status)}"


async def _unfinished(target: Target, head: bytes) -> int:
    """The status of an answer that comes before the end of the body; 0: none came."""
    reader, writer = await target.connect()
    with contextlib.suppress(TimeoutError, ConnectionError):  # no answer
        async with asyncio.timeout(target.hold):
            writer.write(head + b" " * 3_900_000)
            return status_of(await reader.read(64))
    writer.transport.abort()
    return 0


async def pipelined(target: Target) -> str:
    """Ten times 12,000 small requests in a row on one connection, without a key and without reading an answer."""
    for _ in range(10):
        _, writer = await target.connect()
        writer.write(b"GET /health HTTP/1.1\r\n\r\n" * 12_000)
        await asyncio.sleep(0.5)
        writer.transport.abort()
    return "10 connections, left after 0.5 s"


async def many_children(target: Target) -> str:
    """As many children as are allowed, with long outputs, in several requests."""
    body = {"prompt": "x", "n": 128, "max_tokens": 900, "ignore_eos": True}
    await asyncio.gather(*(target.leave("/v1/completions", body, target.hold) for _ in range(6)))
    return f"6 requests, left after {target.hold:g} s"


async def long_tokenize(target: Target) -> str:
    """Six texts of almost 4 MB for /tokenize."""
    body = json.dumps({"prompt": "ab " * 1_300_000}).encode()
    return tally([status for status, _ in await asyncio.gather(*(target.post("/tokenize", body) for _ in range(6)))])


async def many_messages(target: Target) -> str:
    """60,000 empty messages, and one message with 3.9 MB of tool arguments."""
    empty = {"messages": [{"role": "user", "content": ""}] * 60_000, "max_tokens": 1}
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": json.dumps({"a": [1] * 1_200_000})}}
    long = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "max_tokens": 1}
    found = [await target.post("/v1/chat/completions", body) for body in (empty, long, empty, long)]
    return tally(status for status, _ in found)


async def many_logprobs(target: Target) -> str:
    """20 alternatives for each token of many children."""
    body = {"prompt": "x", "n": 128, "max_tokens": 500, "ignore_eos": True, "logprobs": 20}
    return tally([status for status, _ in await asyncio.gather(*(target.post("/v1/completions", body) for _ in range(3)))])


async def many_stop_tokens(target: Target) -> str:
    """A long list of stop tokens for many children, five times."""
    body = {"prompt": "x", "n": 128, "max_tokens": 50, "stop_token_ids": [*range(1, 320)] * 1500}
    return tally([(await target.post("/v1/completions", body))[0] for _ in range(5)])


async def long_names(target: Target) -> str:
    """Unknown fields with a name of 4 MB."""
    body = json.dumps({"prompt": "x", "temperatura" * 350_000: 1}).encode()
    return tally([(await target.post("/v1/completions", body))[0] for _ in range(5)])


async def administrate(target: Target) -> str:
    """Everything that only an administrator may do, with an ordinary key."""
    found = [await target.post("/abort_requests", {"all": True}), await target.post("/reset_prefix_cache", {})]
    return tally(status for status, _ in found)


async def flood(target: Target) -> str:
    """Ordinary requests, far more than the queue takes, from one key."""
    body = {"prompt": "x " * 400, "max_tokens": 400, "ignore_eos": True}
    await asyncio.gather(*(target.leave("/v1/completions", body, target.hold) for _ in range(300)))
    return f"300 requests, left after {target.hold:g} s"


REFERENCE = Attack("busy processors", "none: this is no attack", busy_processors)
ATTACKS = (
    REFERENCE,
    Attack("trailers", "bytes of a request that are neither head nor body", trailers, expected=r"after \d{1,4} KiB"),
    Attack("silent connections", "seconds for a head; connections", silent_connections, expected=r"^(\d+) opened, \1 closed"),
    Attack("unfinished bodies", "bytes of bodies that are being received", unfinished_bodies, expected="^300 bodies, refused with 429"),
    Attack("pipelined", "requests of a connection that are parsed before the first is answered", pipelined),
    Attack("many children", "rows shared between keys", many_children),
    Attack("long tokenize", "characters of a text", long_tokenize),
    Attack("many messages", "messages, and characters in all fields", many_messages),
    Attack("many logprobs", "choices x tokens x alternatives", many_logprobs),
    Attack("many stop tokens", "entries of a list", many_stop_tokens, expected="400 x 5"),
    Attack("long names", "characters of a name that is compared", long_names),
    Attack("administrate", "a separate key for administrators", administrate, expected="403 x 1"),
    Attack("flood", "queue and rows shared between keys", flood),
)
