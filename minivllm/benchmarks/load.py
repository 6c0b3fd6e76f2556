"""Requests sent when they are due, from one process or several, and what each of them brought.

    calls (body, when) ──▶ shared out over processes ──▶ each: sleep until due, wait for a free place, send ──▶ outcomes

One Python process reads some ten thousand events a second per core; a faster server needs several (`--client-processes`), or the
figure is the generator's own. All processes begin at one moment; clocks are the machine's, so their times can be put together.
"""
from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any, TypeVar

from minivllm.benchmarks.client import Address, Client, Outcome
from minivllm.errors import InvalidInput

REPORT_SECONDS = 0.25  # between two reports of progress by a client process
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Call:
    """One request: its JSON body, and when it is due (seconds after the start)."""

    body: bytes
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """All requests of one run, and where they go."""

    address: Address
    path: str
    calls: Sequence[Call]
    max_concurrency: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Progress:
    """Counts so far."""

    requests: int = 0
    tokens: int = 0


def run_fast(work: Coroutine[Any, Any, Result]) -> Result:
    """Run on uvloop where it is installed: it reads sockets about twice as fast as asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def run_load(load: Load, processes: int, progress: Callable[[Progress], None] = lambda _: None) -> tuple[float, list[Outcome]]:
    """Send everything: (when it began, outcomes in the order of the calls)."""
    processes = min(processes, len(load.calls), load.max_concurrency or len(load.calls))
    if processes > 1:
        return _run_in_processes(load, processes, progress)
    begin = time.perf_counter()
    return begin, run_fast(_drive(load, begin, progress))


async def _drive(load: Load, begin: float, progress: Callable[[Progress], None]) -> list[Outcome]:
    client = Client(load.address, load.headers)
    outcomes = [Outcome() for _ in load.calls]
    places = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else contextlib.nullcontext()
    so_far = Progress()

    async def send(index: int, request: bytes) -> None:
        async with places:
            outcomes[index] = outcome = await client.post(request)
        so_far.requests += 1
        so_far.tokens += outcome.tokens
        progress(so_far)

    prepared = [client.prepare(load.path, call.body) for call in load.calls]
    gc.collect()
    gc.freeze()  # the requests live to the end: no collection needs to look at them
    try:
        async with asyncio.TaskGroup() as tasks:
            for index, (call, request) in enumerate(zip(load.calls, prepared, strict=True)):
                if (early := begin + call.at - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                tasks.create_task(send(index, request))
    finally:
        gc.unfreeze()
        client.close()
    return outcomes


# -- several processes ------------------------------------------------------------------------------------------------


def _run_in_processes(load: Load, count: int, progress: Callable[[Progress], None]) -> tuple[float, list[Outcome]]:
    """Every `count`-th call goes to the same process."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Pipe] = []
    children = []
    try:
        for i in range(count):
            ours, theirs = context.Pipe()
            share = replace(load, calls=load.calls[i::count], max_concurrency=_share(load.max_concurrency, i, count))
            child = context.Process(target=_client_process, args=(share, theirs), daemon=True)
            child.start()
            theirs.close()  # so that a child's death ends its pipe
            pipes.append(ours)
            children.append(child)
        for pipe in pipes:
            _receive(pipe)  # ready
        begin = time.perf_counter() + 0.02
        for pipe in pipes:
            pipe.send(begin)
        results = _collect(pipes, progress)
    finally:
        for child in children:
            child.kill()
            child.join()
    outcomes = [Outcome() for _ in load.calls]
    for i, pipe in enumerate(pipes):
        outcomes[i::count] = results[pipe]
    return begin, outcomes


def _share(limit: int | None, index: int, count: int) -> int | None:
    return None if limit is None else limit // count + (index < limit % count)


def _receive(pipe: Pipe) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise InvalidInput("a client process ended before its work was done: try fewer (--client-processes)", "client_processes") from None


def _collect(pipes: Sequence[Pipe], progress: Callable[[Progress], None]) -> dict[Pipe, list[Outcome]]:
    latest = {pipe: Progress() for pipe in pipes}
    results: dict[Pipe, list[Outcome]] = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for pipe in pipes if pipe not in results]):
            assert isinstance(pipe, Pipe)
            message = _receive(pipe)
            if isinstance(message, Progress):
                latest[pipe] = message
                progress(Progress(sum(p.requests for p in latest.values()), sum(p.tokens for p in latest.values())))
            else:
                results[pipe] = message
    return results


def _client_process(load: Load, pipe: Pipe) -> None:
    last = time.perf_counter()

    def report(so_far: Progress) -> None:
        nonlocal last
        if time.perf_counter() - last > REPORT_SECONDS:
            last = time.perf_counter()
            pipe.send(so_far)

    pipe.send("ready")
    begin = pipe.recv()
    pipe.send(run_fast(_drive(load, begin, report)))
