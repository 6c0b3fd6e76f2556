"""The requests that the server is receiving or answering, so that an operator or a shutdown can end them."""
from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager

from minivllm.core.admission import QueueFull
from minivllm.engine.client import EngineClient
from minivllm.errors import InvalidInput
from minivllm.server.cost import MAX_BODY_BYTES, MAX_KEPT_ENTRIES, MAX_KEPT_NUMBERS, MAX_PENDING_TOKENS, CostLedger
from minivllm.server.errors import RETRY_AFTER, ApiError, to_api_error

_PREFIX = re.compile(r"^(cmpl-|chatcmpl-|resp_|embd-|score-)")

BODY_SECONDS = 60.0  # time limit for receiving a request's body
ENDING_SECONDS = 2.0  # the same once the server is shutting down


class RunningRequests:
    """The HTTP requests that are being answered, by their owner and the id of their response."""

    def __init__(self, client: EngineClient, most_receiving: int) -> None:
        self._client = client
        self._most_receiving = most_receiving  # bodies of one owner: each holds a connection
        self._num_requests: Counter[str] = Counter()  # in the engine, by owner
        self._engine_ids: dict[tuple[str, str], tuple[str, ...]] = {}  # owner and response id -> ids of its prompts in the engine
        self._receiving: dict[asyncio.Timeout, str] = {}  # time limits of the bodies that are being received, and their owners
        self.entries = CostLedger(MAX_KEPT_ENTRIES, "log-probabilities of answers that are not streamed")
        self.bodies = CostLedger(MAX_BODY_BYTES, "bytes of bodies")
        self._tokens = CostLedger(MAX_PENDING_TOKENS, "prompt tokens")
        self._numbers = CostLedger(MAX_KEPT_NUMBERS, "numbers of vectors")
        self.ending = False  # the server is shutting down: streams that would never end stop now
        self.stopping = False  # no further request may start

    def __len__(self) -> int:
        return len(self._engine_ids)

    def check_room(self, owner: str) -> None:
        """Refuse a request that the engine would refuse, before its body is read, checked and tokenized."""
        most = self._client.info.max_requests  # with replicas, it changes with their number
        if most is not None and self._num_requests[owner] >= most:
            raise to_api_error(QueueFull(f"Rate limit reached: this key has {most} unfinished requests, as many as run and "
                                         "wait at most (--max-num-seqs and --max-queue): try again later", "max_queue"))

    @contextmanager
    def track(
        self, owner: str, response_id: str, engine_ids: tuple[str, ...], tokens: int, parallel: int | None = None,
    ) -> Iterator[None]:
        """Keep a request in the table while it is being answered. `tokens`: of its prompts. `parallel`: most prompts in the engine at a
        time; None: all."""
        in_engine = len(engine_ids) if parallel is None else min(parallel, len(engine_ids))
        if self.stopping:
            raise _shutting_down()
        if (owner, response_id) in self._engine_ids:
            raise InvalidInput("request_id is in use by a running request: choose another", "request_id")
        self._tokens.add(owner, tokens)
        self._engine_ids[owner, response_id] = engine_ids
        self._num_requests[owner] += in_engine
        try:
            yield
        finally:
            del self._engine_ids[owner, response_id]
            self._num_requests[owner] -= in_engine
            self._tokens.release(owner, tokens)

    @contextmanager
    def charged(self, owner: str, numbers: int) -> Iterator[None]:
        """Charge the numbers of the vectors that an answer will have, while it is being built."""
        self._numbers.add(owner, numbers)
        try:
            yield
        finally:
            self._numbers.release(owner, numbers)

    @asynccontextmanager
    async def receiving(self, owner: str) -> AsyncIterator[None]:
        """Limit the time in which a request's body is received: `BODY_SECONDS`, less during a shutdown; and their number."""
        if len(self._receiving) >= self._most_receiving and sum(map(owner.__eq__, self._receiving.values())) >= self._most_receiving:
            raise ApiError(429, f"{self._most_receiving} bodies of this key are being received, which takes half of all connections: "
                           "send them faster", code="rate_limit_exceeded", headers={"retry-after": RETRY_AFTER})
        try:
            async with asyncio.timeout(ENDING_SECONDS if self.ending else BODY_SECONDS) as limit:
                self._receiving[limit] = owner
                try:
                    yield
                finally:
                    del self._receiving[limit]
        except TimeoutError:
            if self.ending:
                raise _shutting_down() from None
            message = f"the body was not complete after {BODY_SECONDS:g} s: send it faster"
            raise ApiError(408, message, headers={"connection": "close"}) from None

    def limit_body_wait(self, seconds: float) -> None:
        """Lower the remaining time for every body that is being received."""
        for limit in self._receiving:
            end = asyncio.get_running_loop().time() + seconds
            limit.reschedule(min(end, limit.when() or end))

    def abort(self, ids: Collection[str] | None, owner: str | None = None) -> list[str]:
        """End the requests with these ids, or all: those of one owner, or of all. Returns the responses' ids.

        An id is a response's, with or without its prefix.
        """
        aborted = [(o, i) for o, i in self._engine_ids if owner in (None, o) and (ids is None or i in ids or _PREFIX.sub("", i) in ids)]
        for key in aborted:
            for engine_id in self._engine_ids[key]:
                self._client.abort(engine_id)
        return [response_id for _, response_id in aborted]

    def stop(self) -> None:
        """End every request now, with finish reason "abort", and let no other start."""
        self.stopping = True
        self.limit_body_wait(0)
        self.abort(None)


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down: send the request again later", headers={"retry-after": "5", "connection": "close"})
