"""The responses that `/v1/responses` keeps in memory, so that a later request can continue one or name an item of it.

    put      when a response is complete, unless the request has `store: false`
    get      `previous_response_id`, `GET /v1/responses/{id}`; an item alone: `item_reference`
    dropped  after `response_store_seconds`, on DELETE, or the oldest first when all together need more than `response_store_size` bytes

Each API key has its own responses, which no other key can read. When memory is short, the key that holds the most bytes loses its oldest
response, so one busy client does not drop the responses of the others.
"""
from __future__ import annotations

import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.server.errors import ApiError, encode

OVERHEAD = 256  # bytes that Python needs for an object and the references to it, rounded up


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A complete response and its conversation, as JSON: Python's objects would take many times as much memory."""

    body: bytes
    input: tuple[bytes, ...]  # the items that it answers; a response that continues another shares the other's
    output: dict[str, bytes]  # its items, by id
    expires: float

    @property
    def conversation(self) -> tuple[bytes, ...]:
        return (*self.input, *self.output.values())

    @property
    def size(self) -> int:
        """Bytes of memory at most: shared items are counted for each response."""
        return sum(len(part) + OVERHEAD for part in (self.body, *self.conversation))


class ResponseStore:
    """All stored responses. Only the event loop's thread uses it."""

    def __init__(self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._kept: dict[bytes, OrderedDict[str, StoredResponse]] = {}  # owner (an API key's digest) -> responses by id, oldest first
        self._items: dict[tuple[bytes, str], bytes] = {}  # owner and item id -> an item of an output
        self._sizes: Counter[bytes] = Counter()  # bytes by owner

    @property
    def size(self) -> int:
        return self._sizes.total()

    def put(self, owner: bytes, body: dict[str, Any], earlier: Sequence[bytes], items: Sequence[dict[str, Any]]) -> None:
        """Keep a response to `items`, which follow the items `earlier` of the response that it continues."""
        output = {item["id"]: encode(item) for item in body["output"]}
        stored = StoredResponse(encode(body), (*earlier, *map(encode, items)), output, self._clock() + self._seconds)
        self.delete(owner, body["id"])  # a client may choose the same id twice
        self._kept.setdefault(owner, OrderedDict())[body["id"]] = stored
        self._items |= {(owner, name): item for name, item in output.items()}
        self._sizes[owner] += stored.size
        self._make_room()

    def get(self, owner: bytes, response_id: str) -> StoredResponse | None:
        self._make_room()
        return self._kept.get(owner, OrderedDict()).get(response_id)

    def item(self, owner: bytes, item_id: str) -> dict[str, Any]:
        """An item of an earlier output."""
        self._make_room()
        found = self._items.get((owner, item_id))
        if found is None:
            raise ApiError(404, f"Item with id '{item_id}' not found. Items of a request with store set to false are not kept, and others "
                                f"for {self._seconds:g} s at most: send the item itself", param="input")
        return dict(json.loads(found))

    def delete(self, owner: bytes, response_id: str) -> bool:
        responses = self._kept.get(owner, OrderedDict())
        stored = responses.pop(response_id, None)
        if stored is None:
            return False
        if not responses:
            del self._kept[owner]
        for name in stored.output:
            del self._items[owner, name]
        self._sizes[owner] -= stored.size
        return True

    def _make_room(self) -> None:
        now = self._clock()
        for owner, responses in list(self._kept.items()):
            while responses and next(iter(responses.values())).expires <= now:
                self.delete(owner, next(iter(responses)))
        while self.size > self.max_bytes:
            owner, _ = self._sizes.most_common(1)[0]
            self.delete(owner, next(iter(self._kept[owner])))
