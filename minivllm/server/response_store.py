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

OVERHEAD = 384  # bytes that Python needs for an object and the references to it, rounded up


@dataclass(slots=True, eq=False)
class StoredItem:
    """An item of an input or output, as JSON: Python's objects would take many times as much memory."""

    id: str
    content: bytes
    users: int = 0  # stored responses that have it: those that continue another share the other's items


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A complete response and its conversation."""

    body: bytes  # JSON
    input: tuple[StoredItem, ...]  # the items that it answers
    output: tuple[StoredItem, ...]
    expires: float

    @property
    def conversation(self) -> tuple[StoredItem, ...]:
        return (*self.input, *self.output)

    @property
    def size(self) -> int:
        """Bytes of memory at most: shared items are counted for each response."""
        return sum(len(part) + OVERHEAD for part in (self.body, *(item.content for item in self.conversation)))


class ResponseStore:
    """All stored responses. Only the event loop's thread uses it."""

    def __init__(self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._kept: dict[str, OrderedDict[str, StoredResponse]] = {}  # owner (an API key's label) -> responses by id, oldest first
        self._items: dict[tuple[str, str], list[StoredItem]] = {}  # by owner and id, which a client may give to several items
        self._sizes: Counter[str] = Counter()  # bytes by owner

    @property
    def size(self) -> int:
        return self._sizes.total()

    def put(self, owner: str, body: dict[str, Any], earlier: Sequence[StoredItem], items: Sequence[dict[str, Any]]) -> bool:
        """Keep a response to `items`, which follow the items `earlier` of the response that it continues. False: it is too large."""
        self.delete(owner, body["id"])  # a client may choose the same id twice
        new, output = (tuple(StoredItem(item["id"], encode(item)) for item in group) for group in (items, body["output"]))
        stored = StoredResponse(encode(body), (*earlier, *new), output, self._clock() + self._seconds)
        if stored.size > self.max_bytes:
            return False
        self._kept.setdefault(owner, OrderedDict())[body["id"]] = stored
        for item in stored.conversation:
            if not item.users:
                self._items.setdefault((owner, item.id), []).append(item)
            item.users += 1
        self._sizes[owner] += stored.size
        self._make_room()
        return True

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        self._make_room()
        return self._kept.get(owner, OrderedDict()).get(response_id)

    def item(self, owner: str, item_id: str) -> dict[str, Any]:
        """An item of an earlier input or output."""
        self._make_room()
        found = self._items.get((owner, item_id))
        if found is None:
            raise ApiError(404, f"Item with id '{item_id}' not found. Items of a request with store set to false are not kept, and others "
                                f"for {self._seconds:g} s at most: send the item itself", param="input")
        return dict(json.loads(found[-1].content))

    def delete(self, owner: str, response_id: str) -> bool:
        responses = self._kept.get(owner, OrderedDict())
        stored = responses.pop(response_id, None)
        if stored is None:
            return False
        if not responses:
            del self._kept[owner]
        for item in stored.conversation:
            item.users -= 1
            if not item.users:
                self._items[owner, item.id].remove(item)
                if not self._items[owner, item.id]:
                    del self._items[owner, item.id]
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
