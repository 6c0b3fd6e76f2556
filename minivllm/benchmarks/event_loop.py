"""The event loop of the load generator."""
from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

LoopResult = TypeVar("LoopResult")


def run_fast(work: Coroutine[Any, Any, LoopResult]) -> LoopResult:
    """Run on uvloop if it is installed: it reads sockets about twice as fast as asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
