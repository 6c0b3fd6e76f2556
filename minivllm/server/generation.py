"""A generation request on its way: prompts out to the engine, deltas back, bytes to the client.

    prompts ──▶ client.generate (one each) ──▶ merged ──▶ answer ──▶ send
                        ▲                                   │
                        └── closing a generator aborts ◀────┴── the client went away, or a prompt failed

Most deltas of a stream are one token's text. Those take a shortcut: they are sent from within the callback that brings a step's
deltas, without waking this request's task, unless its client reads too slowly (`started`).

The HTTP status is held back until the first token, so whatever goes wrong before is a real 4xx or 5xx; a stream that fails
later ends with an error event. A client that goes away is noticed at once, streaming or not, by listening beside the work.
"""
from __future__ import annotations

import asyncio
import re
import types
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Generator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.engine.client import EngineClient, Shortcut
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput
from minivllm.outputs import OutputDelta
from minivllm.server.answers import Answer, Job
from minivllm.server.door import RAW_SEND
from minivllm.server.errors import ApiError, generation_failed, json_response, to_api_error
from minivllm.server.protocol import ignored_header

_PREFIX = re.compile(r"^(cmpl-|chatcmpl-|resp_)")
Batch = tuple[int, list[OutputDelta]]  # index of the prompt, what is new for it

BODY_SECONDS = 60.0  # that a request's body may take to come
ENDING_SECONDS = 2.0  # likewise once the server was told to end


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down: send the request again later", headers={"retry-after": "5", "connection": "close"})


class Running:
    """The HTTP requests that are being answered, by their responses' ids, so that they can be ended."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._ids: dict[str, tuple[str, ...]] = {}  # of the response -> of its prompts in the engine
        self.ending = False  # the server has been told to end: streams that would go on for ever end now
        self.stopping = False
        self._bodies: set[asyncio.Timeout] = set()  # of requests that are still being received

    def __len__(self) -> int:
        return len(self._ids)

    @contextmanager
    def track(self, job: Job) -> Iterator[None]:
        if self.stopping:
            raise shutting_down()
        if job.id in self._ids:
            raise InvalidInput("request_id is in use by a running request: choose another", "request_id")
        self._ids[job.id] = tuple(request.request_id for request in job.requests)
        try:
            yield
        finally:
            del self._ids[job.id]

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        """Around the wait for a request's body, which takes no longer than `BODY_SECONDS`, and less if the server ends."""
        try:
            async with asyncio.timeout(ENDING_SECONDS if self.ending else BODY_SECONDS) as patience:
                self._bodies.add(patience)
                try:
                    yield
                finally:
                    self._bodies.discard(patience)
        except TimeoutError:
            if self.ending:
                raise shutting_down() from None
            message = f"the body did not come within {BODY_SECONDS:g} s: send it faster"
            raise ApiError(408, message, headers={"connection": "close"}) from None

    def hurry(self, seconds: float) -> None:
        """Wait no longer than this for the rest of what is being received."""
        for patience in self._bodies:
            until = asyncio.get_running_loop().time() + seconds
            patience.reschedule(min(until, patience.when() or until))

    def abort(self, names: Collection[str] | None) -> list[str]:
        """End the requests of these names (a response's id, or the `request_id` in it), or all. Returns the responses' ids."""
        ended = [i for i in self._ids if names is None or i in names or _PREFIX.sub("", i) in names]
        for request_id in ended:
            for prompt in self._ids[request_id]:
                self._client.abort(prompt)
        return ended

    def stop(self) -> None:
        """End every request now, with finish reason "abort", and let no other begin."""
        self.stopping = True
        self.hurry(0)
        self.abort(None)


class GenerationResponse(Response):
    """An ASGI response that does the generating itself, because only it can hear the client hang up."""

    def __init__(self, client: EngineClient, running: Running, answer: Answer) -> None:
        self._client = client
        self._running = running
        self._answer = answer
        self._job = answer.job
        self._notes = ignored_header(answer.job.ignored)
        self._send_plain: Send | None = None  # set while the shortcut is open
        self._unsent: asyncio.Future[None] | None = None  # what the client has no room for yet
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_listening(self._work(scope, receive, send), receive)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._running.track(self._job):
                shortcut = self._shortcut if self._job.stream else None
                async with aclosing(merged(self._client, self._job.requests, shortcut)) as batches:
                    if self._job.stream:
                        await self._stream(batches, send, scope.get(RAW_SEND, send))
                        return
                    async for prompt, deltas in batches:
                        self._answer.keep(prompt, _unless_failed(deltas))
                    response = json_response(self._answer.whole(), headers=self._notes)
        except Exception as error:
            response = to_api_error(error).response()
        await response(scope, receive, send)

    def _shortcut(self, deltas: list[OutputDelta]) -> bool:
        """Send deltas at once if they are plain text and the client keeps up."""
        if self._send_plain is None or self._unsent is not None:
            return False
        data = self._answer.plain(deltas)
        if data:
            self._unsent = started(self._send_plain({"type": "http.response.body", "body": data, "more_body": True}).__await__())
        return data is not None

    async def _stream(self, batches: AsyncGenerator[Batch, None], send: Send, raw_send: Send) -> None:
        """Raises only before the first byte."""
        answer = self._answer
        prompt, deltas = await anext(batches)
        opening = answer.first() + answer.chunk(prompt, _unless_failed(deltas))
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode("latin-1")) for name, value in self._notes.items()),
        ]})
        if opening:
            await send({"type": "http.response.body", "body": opening, "more_body": True})
        try:
            self._send_plain = raw_send
            async for prompt, deltas in batches:
                if self._unsent is not None:
                    await self._unsent
                    self._unsent = None
                if data := answer.chunk(prompt, _unless_failed(deltas)):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            ending = answer.last()
        except Exception as error:
            ending = answer.failed(to_api_error(error))
        self._send_plain = None
        await send({"type": "http.response.body", "body": ending, "more_body": False})


def _unless_failed(deltas: list[OutputDelta]) -> list[OutputDelta]:
    for delta in deltas:
        if delta.finish_reason == "error":
            raise generation_failed() if delta.error_param is None else ApiError(400, delta.error or "", param=delta.error_param)
    return deltas


async def while_listening(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`, but no longer than its client stays: a server's `send` does not tell."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()  # does nothing if it is done
        gone.cancel()
        results = await asyncio.gather(task, gone, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def started(work: Generator[Any, Any, None]) -> asyncio.Future[None] | None:
    """Run an awaitable at once, up to its first wait. None if it had none, else a future for the rest, or for what went wrong.

    (What `asyncio.eager_task_factory` does, from Python 3.12 on.)
    """
    try:
        waits_for = next(work)
    except StopIteration:
        return None
    except Exception as error:
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(error)
        return failed
    return asyncio.ensure_future(_rest(work, waits_for))


@types.coroutine
def _rest(work: Generator[Any, Any, None], waits_for: Any) -> Generator[Any, None, None]:
    yield waits_for
    yield from work


async def merged(
    client: EngineClient, requests: tuple[EngineRequest, ...], shortcut: Shortcut | None = None,
) -> AsyncGenerator[Batch, None]:
    """What the engine says about several requests, as it comes. The first failure ends them all; so does closing.

    `shortcut` is for a request that is alone (see `EngineClient.outputs`): several would overtake each other.
    """
    if len(requests) == 1:
        async with aclosing(client.generate(requests[0], shortcut)) as stream:
            async for deltas in stream:
                yield 0, deltas
        return
    arrived: asyncio.Queue[tuple[int, list[OutputDelta] | Exception | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async with aclosing(client.generate(requests[index])) as stream:
                async for deltas in stream:
                    arrived.put_nowait((index, deltas))
            arrived.put_nowait((index, None))
        except Exception as error:
            arrived.put_nowait((index, error))

    pumps = [asyncio.create_task(pump(index)) for index in range(len(requests))]
    try:
        unfinished = len(pumps)
        while unfinished:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
