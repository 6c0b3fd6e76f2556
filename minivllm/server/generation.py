"""The response to a generation request: engine requests go out, deltas come back, bytes go to the client.

    engine requests ──▶ client.generate (one each) ──▶ merge_streams ──▶ formatter ──▶ send
                              ▲                                             │
                              └── closing a stream aborts its request ◀─────┴── the client disconnected, or a prompt failed

Most deltas of a stream are the text of one token. The callback that delivers a step's deltas sends these itself, without waking the
request's task, unless the client reads too slowly (see `start_now`).

The HTTP status is sent with the first token, so every failure before it is a real 4xx or 5xx. A stream that fails later ends with an
error event. A task beside the work waits for the client's disconnect, for streamed and complete responses alike.
"""
from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.engine.client import EngineClient, Shortcut
from minivllm.engine.replicas import MAX_ATTEMPTS
from minivllm.engine_request import EngineRequest
from minivllm.errors import ReplicaLost
from minivllm.outputs import OutputDelta
from minivllm.server.authentication import RAW_SEND
from minivllm.server.errors import ApiError, generation_failed, json_response, to_api_error
from minivllm.server.formatters import ResponseFormatter
from minivllm.server.protocol import ignored_header
from minivllm.server.running import RunningRequests

PromptDeltas: TypeAlias = tuple[int, list[OutputDelta]]  # index of the prompt, and its new deltas
LARGE_ANSWER = 4096  # log-probabilities; a larger answer, or part of it, is written by a thread
Value = TypeVar("Value")
EVENT_STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class GenerationResponse(Response):
    """An ASGI response that runs the generation itself, because `receive` reports the client's disconnect only here."""

    def __init__(self, client: EngineClient, running: RunningRequests, make_formatter: Callable[[], ResponseFormatter]) -> None:
        """make_formatter: the response of one attempt; a complete answer may take several."""
        self._client = client
        self._running = running
        self._make_formatter = make_formatter
        self._formatter = make_formatter()
        self._request = self._formatter.request
        self._extra_headers = ignored_header(self._request.ignored)
        self._fast_send: Send | None = None  # set while deltas may be sent from the callback
        self._unsent: asyncio.Future[None] | None = None  # the rest of a send that has to wait for the client
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(self._answer(scope, receive, send), receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._request
        try:
            if request.stream:
                async with self._deltas(request.prompts, self._send_text) as stream:
                    await self._stream(stream, send, scope.get(RAW_SEND, send))
                return
            response = await self._whole()
        except Exception as error:
            response = to_api_error(error).response()
        await response(scope, receive, send)

    @asynccontextmanager
    async def _deltas(
        self, prompts: tuple[EngineRequest, ...], shortcut: Shortcut | None = None,
    ) -> AsyncGenerator[AsyncGenerator[PromptDeltas, None], None]:
        engine_ids, tokens = zip(*((prompt.request_id, len(prompt.prompt_token_ids)) for prompt in prompts), strict=True)
        with self._running.track(self._request.owner, self._request.id, engine_ids, sum(tokens)):
            async with aclosing(merge_streams(self._client, prompts, shortcut)) as stream:
                yield stream

    async def _whole(self) -> Response:
        """The complete answer. The client has seen nothing of it before, so it is computed again if its replica ends."""
        prompts = self._request.prompts
        for attempt in range(1, MAX_ATTEMPTS):
            try:
                async with self._deltas(prompts) as stream:
                    return await self._complete(stream)
            except ReplicaLost:
                self._formatter = self._make_formatter()
                prompts = tuple(replace(prompt, request_id=f"{prompt.request_id}~{attempt}") for prompt in self._request.prompts)
        async with self._deltas(prompts) as stream:
            return await self._complete(stream)

    async def _complete(self, stream: AsyncGenerator[PromptDeltas, None]) -> Response:
        """The whole answer. Its log-probabilities are charged to the owner while they are kept."""
        owner, ledger, entries = self._request.owner, self._running.entries, 0
        try:
            async for prompt, deltas in stream:
                if new := self._formatter.num_entries(prompt, deltas):
                    ledger.add(owner, new)
                    entries += new
                await _write(new, partial(self._formatter.collect, prompt, _checked(deltas)))
            return await _write(entries, lambda: json_response(self._formatter.body(), headers=self._extra_headers))
        finally:
            ledger.release(owner, entries)

    def _send_text(self, deltas: list[OutputDelta]) -> bool:
        """Send deltas at once if they are text only and the client keeps up. False: the task has to send them."""
        if self._fast_send is None or self._unsent is not None:
            return False
        data = self._formatter.text_events(deltas)
        if data:
            self._unsent = start_now(self._fast_send(body_message(data)).__await__())
        return data is not None

    async def _stream(self, stream: AsyncGenerator[PromptDeltas, None], send: Send, raw_send: Send) -> None:
        """Raises only before the first byte is sent."""
        formatter = self._formatter
        prompt, deltas = await anext(stream)
        opening = formatter.first_events() + await self._events(prompt, deltas)
        headers = {**EVENT_STREAM_HEADERS, **self._extra_headers}
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]})
        if opening:
            await send(body_message(opening))
        try:
            self._fast_send = raw_send
            async for prompt, deltas in stream:
                if self._unsent is not None:
                    await self._unsent
                    self._unsent = None
                if data := await self._events(prompt, deltas):
                    await send(body_message(data))
            ending = formatter.last_events()
        except Exception as error:
            ending = formatter.error_events(to_api_error(error))
        self._fast_send = None
        await send(body_message(ending, more=False))

    async def _events(self, prompt: int, deltas: list[OutputDelta]) -> bytes:
        return await _write(self._formatter.num_entries(prompt, deltas), partial(self._formatter.events, prompt, _checked(deltas)))


async def _write(entries: int, work: Callable[[], Value]) -> Value:
    """Write so many log-probabilities: at once, or by a thread if they are many."""
    return work() if entries <= LARGE_ANSWER else await asyncio.to_thread(work)


def body_message(data: bytes, more: bool = True) -> dict[str, Any]:
    """ASGI's message for a part of a body."""
    return {"type": "http.response.body", "body": data, "more_body": more}


def _checked(deltas: list[OutputDelta]) -> list[OutputDelta]:
    """The deltas, unless one of them reports a failure."""
    for delta in deltas:
        if delta.finish_reason == "error":
            raise generation_failed() if delta.error_param is None else ApiError(400, delta.error or "", param=delta.error_param)
    return deltas


async def until_disconnect(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`, and cancel it if the client disconnects: `send` does not report that."""
    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()  # no effect if it is done
        disconnect.cancel()
        results = await asyncio.gather(task, disconnect, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def start_now(work: Generator[Any, Any, None]) -> asyncio.Future[None] | None:
    """Run an awaitable up to its first wait. None if it finished, else a future for its rest or for its exception.

    (`asyncio.eager_task_factory` does the same from Python 3.12 on.)
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


async def merge_streams(
    client: EngineClient, requests: tuple[EngineRequest, ...], shortcut: Shortcut | None = None, parallel: int | None = None,
) -> AsyncGenerator[PromptDeltas, None]:
    """The deltas of several engine requests, in the order of arrival. The first failure ends all of them; so does closing.

    `shortcut` is passed on only for a single request (see `EngineClient.outputs`): several could send out of order.
    parallel: most requests in the engine at a time; None: all.
    """
    if len(requests) == 1:
        async with aclosing(client.generate(requests[0], shortcut)) as stream:
            async for deltas in stream:
                yield 0, deltas
        return
    arrived: asyncio.Queue[tuple[int, list[OutputDelta] | Exception | None]] = asyncio.Queue()

    remaining = iter(range(len(requests)))

    async def forward() -> None:
        for index in remaining:  # all tasks share it
            try:
                async with aclosing(client.generate(requests[index])) as stream:
                    async for deltas in stream:
                        arrived.put_nowait((index, deltas))
                arrived.put_nowait((index, None))
            except Exception as error:
                arrived.put_nowait((index, error))

    tasks = [asyncio.create_task(forward()) for _ in range(min(parallel or len(requests), len(requests)))]
    try:
        unfinished = len(requests)
        while unfinished:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
