"""Pacing of requests, so that a burst of one key does not hold the event loop.

Reading, checking and tokenizing a small request takes 1 to 3 ms on the event loop. If 300 of them arrive at once, all are ready in the same
pass of the loop, and every stream waits for the whole pass. So each owner may begin only a few requests in one pass.
"""
from __future__ import annotations

import asyncio
from collections import Counter, deque

PER_PASS = 2  # requests of an owner that begin in one pass of the event loop


class RequestTurns:
    """Only the event loop's thread uses it."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()  # requests in this pass, by owner
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by owner, the oldest first
        self._scheduled = False

    async def wait(self, owner: str) -> None:
        """Return when a request of this owner may begin: at once, unless it has begun several in this pass."""
        self._schedule()
        if self._begun[owner] < PER_PASS and owner not in self._waiting:
            self._begun[owner] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        await turn

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._next_pass)

    def _next_pass(self) -> None:
        self._scheduled = False
        self._begun.clear()
        for owner, turns in list(self._waiting.items()):
            while turns and self._begun[owner] < PER_PASS:
                turn = turns.popleft()
                if not turn.done():  # canceled
                    turn.set_result(None)
                    self._begun[owner] += 1
            if not turns:
                del self._waiting[owner]
        if self._begun:
            self._schedule()
