"""Text tokens are sent from the callback that delivers them. A client that reads slowly still gets every token, in order."""
from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path

import pytest

from minivllm.server.generation import start_now
from tests.server.scripted import EOS, ScriptedEngine, scripted_server

PIECES = ["begin", *(f"{i:04d}" * 25_000 for i in range(100))]  # 100 kB each: far more than the buffers of sockets and uvicorn


def ask(sock: socket.socket, body: dict[str, object]) -> None:
    raw = json.dumps(body).encode()
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
                 b"content-length: %d\r\n\r\n" % len(raw) + raw)


def read_events(sock: socket.socket) -> list[str]:
    """The data of every event. Also checks that the chunks are well-formed."""
    pieces = []
    while piece := sock.recv(1 << 20):
        pieces.append(piece)
    rest, body = b"".join(pieces).partition(b"\r\n\r\n")[2], b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if not (length := int(size, 16)):
            break
        body, rest = body + rest[:length], rest[length + 2:]
    return [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event]


def test_a_client_that_reads_late_gets_every_token_once_and_in_order(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(0))
    engine.script = lambda prompt, params, child: [*(((7,), piece) for piece in PIECES), ((EOS,), "end")]
    with scripted_server(engine) as live, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", int(live.url.rpartition(":")[2])))
        ask(sock, {"prompt": [5, 6], "max_tokens": 200, "stream": True, "stream_options": {"include_usage": True}})
        engine.wait_until(lambda: len(engine.seen) == 1)
        for step in range(len(PIECES) + 1):  # generate the whole output before anything is read
            engine.run_until(lambda step=step: engine.steps > step)  # type: ignore[misc]
            live.wait_until(lambda step=step: live.client.stats().num_steps > step)  # type: ignore[misc]
            turns = iter(range(10))
            live.wait_until(lambda turns=turns: next(turns, None) is None)  # run the waiting callbacks and the tasks that they start
        *chunks, usage, done = read_events(sock)
    assert done == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == "".join(PIECES) + "end"
    assert json.loads(usage)["usage"]["completion_tokens"] == len(PIECES) + 1


def test_a_coroutine_that_does_not_wait_is_done_at_once() -> None:
    seen: list[int] = []

    async def write() -> None:
        seen.append(1)

    assert start_now(write().__await__()) is None
    assert seen == [1]


def test_a_coroutine_that_waits_continues_in_a_task() -> None:
    async def main() -> None:
        first, second = asyncio.Event(), asyncio.Event()
        seen: list[int] = []

        async def write() -> None:
            seen.append(1)
            await first.wait()
            seen.append(2)
            await second.wait()
            seen.append(3)

        task = start_now(write().__await__())
        assert task is not None
        assert seen == [1]
        first.set()
        second.set()
        await task
        assert seen == [1, 2, 3]

    asyncio.run(main())


@pytest.mark.parametrize("waits", [False, True])
def test_an_exception_is_raised_where_the_rest_is_awaited(waits: bool) -> None:
    async def main() -> None:
        async def write() -> None:
            if waits:
                await asyncio.sleep(0)
            raise OSError("gone")

        rest = start_now(write().__await__())
        assert rest is not None
        with pytest.raises(OSError, match="gone"):
            await rest

    asyncio.run(main())
