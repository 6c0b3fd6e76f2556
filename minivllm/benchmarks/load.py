"""Sends requests when they are due, from one process or several, and collects their outcomes.

    timed requests ──▶ divided among processes ──▶ each: sleep until due, wait for a free slot, send ──▶ outcomes

One Python process reads about a hundred thousand events per second and core. A faster server needs several processes
(`--client-processes`), or the result is the load generator's own limit. All processes start at the same moment
and read the same clock, so their times can be combined.
"""
from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from minivllm.benchmarks.address import ServerAddress
from minivllm.benchmarks.client import LoadClient
from minivllm.benchmarks.event_loop import run_fast
from minivllm.benchmarks.outcome import RequestOutcome
from minivllm.errors import InvalidInput

REPORT_SECONDS = 0.25  # between two progress reports of a client process


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request: its JSON body, and the seconds after the start at which it is due."""

    body: bytes
    due: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """All requests of one run, and their destination."""

    address: ServerAddress
    path: str
    requests: Sequence[TimedRequest]
    max_concurrency: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class LoadProgress:
    """Finished requests and their tokens."""

    requests: int = 0
    tokens: int = 0


def run_load(
    load: Load, processes: int, progress: Callable[[LoadProgress], None] = lambda _: None,
) -> tuple[float, list[RequestOutcome]]:
    """Send everything. Returns the start time, and the outcomes in the order of the requests."""
    processes = min(processes, len(load.requests), load.max_concurrency or len(load.requests))
    if processes > 1:
        return _run_in_processes(load, processes, progress)
    begin = time.perf_counter()
    return begin, run_fast(_send_all(load, begin, progress))


async def _send_all(load: Load, begin: float, progress: Callable[[LoadProgress], None]) -> list[RequestOutcome]:
    client = LoadClient(load.address, load.headers)
    outcomes = [RequestOutcome() for _ in load.requests]
    slots = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else contextlib.nullcontext()
    so_far = LoadProgress()

    async def send(index: int, data: bytes) -> None:
        async with slots:
            outcomes[index] = outcome = await client.post(data)
        so_far.requests += 1
        so_far.tokens += outcome.tokens
        progress(so_far)

    prepared = [client.prepare(load.path, request.body) for request in load.requests]
    gc.collect()
    gc.freeze()  # the requests live until the end, so no collection has to visit them
    try:
        async with asyncio.TaskGroup() as tasks:
            for index, (request, data) in enumerate(zip(load.requests, prepared, strict=True)):
                if (early := begin + request.due - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                tasks.create_task(send(index, data))
    finally:
        gc.unfreeze()
        client.close()
    return outcomes


# -- several processes ------------------------------------------------------------------------------------------------


def _run_in_processes(
    load: Load, count: int, progress: Callable[[LoadProgress], None],
) -> tuple[float, list[RequestOutcome]]:
    """Process i gets every `count`-th request, starting with request i."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    children = []
    try:
        for i in range(count):
            pipe, child_end = context.Pipe()
            share = replace(load, requests=load.requests[i::count], max_concurrency=_share(load.max_concurrency, i, count))
            child = context.Process(target=_client_process, args=(share, child_end), daemon=True)
            child.start()
            child_end.close()  # then the pipe ends if the child dies
            pipes.append(pipe)
            children.append(child)
        for pipe in pipes:
            _receive(pipe)  # the child is ready
        begin = time.perf_counter() + 0.02
        for pipe in pipes:
            pipe.send(begin)
        results = _collect(pipes, progress)
    finally:
        for child in children:
            child.kill()
            child.join()
    outcomes = [RequestOutcome() for _ in load.requests]
    for i, pipe in enumerate(pipes):
        outcomes[i::count] = results[pipe]
    return begin, outcomes


def _share(limit: int | None, index: int, count: int) -> int | None:
    return None if limit is None else limit // count + (index < limit % count)


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise InvalidInput("a client process ended before its requests were done: try fewer (--client-processes)",
                           "client_processes") from None


def _collect(
    pipes: Sequence[Connection], progress: Callable[[LoadProgress], None],
) -> dict[Connection, list[RequestOutcome]]:
    latest = {pipe: LoadProgress() for pipe in pipes}
    results: dict[Connection, list[RequestOutcome]] = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for pipe in pipes if pipe not in results]):
            assert isinstance(pipe, Connection)
            message = _receive(pipe)
            if isinstance(message, LoadProgress):
                latest[pipe] = message
                progress(LoadProgress(sum(p.requests for p in latest.values()), sum(p.tokens for p in latest.values())))
            else:
                results[pipe] = message
    return results


def _client_process(load: Load, pipe: Connection) -> None:
    last = time.perf_counter()

    def report(so_far: LoadProgress) -> None:
        nonlocal last
        if time.perf_counter() - last > REPORT_SECONDS:
            last = time.perf_counter()
            pipe.send(so_far)

    pipe.send("ready")
    begin = pipe.recv()
    pipe.send(run_fast(_send_all(load, begin, report)))
