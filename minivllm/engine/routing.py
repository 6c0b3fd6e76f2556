"""Which replica gets a request: the one that is expected to start its output first.

Several replicas (engines with the same model) serve one endpoint. Each has its own prefix cache, so a request costs least where the
beginning of its prompt was computed before. But a replica that got every request with a popular beginning would have a queue.
One formula weighs both:

    work(replica) = tokens of the prompt that it must compute            the prompt without the blocks that it probably holds
                  + tokens of prompts that it has not yet computed       of the requests before this one
                  + DECODE_TOKENS for each of its unfinished requests    they share its steps

The replica with the least work is chosen. So a replica that holds a prefix of 1,000 tokens is preferred until it has 1,000 tokens more work
than another one. Then the other one gets a request, computes the prefix once, and holds it too.

What a replica holds is a guess: the hashes of the prompt blocks that were sent to it, the most recent ones first, as many as its KV cache
has blocks. It needs no message from the replica, and a wrong guess costs time only. Plain Python: no torch, no clock, no randomness.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from minivllm.core.prefix_cache import chain_hashes

# A request that decodes delays a new prompt about as much as so many prompt tokens: it has a part in each step until then.
DECODE_TOKENS = 32


@dataclass(slots=True)
class _RoutedRequest:
    replica: int
    prompt_tokens: int  # that the replica must still compute; 0: its output has begun


@dataclass(slots=True)
class _ReplicaState:
    held: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # block hashes, the least recently used one first
    prompt_tokens: int = 0  # of requests whose output has not begun
    num_requests: int = 0

    @property
    def load(self) -> int:
        return self.prompt_tokens + DECODE_TOKENS * self.num_requests


class Router:
    """Chooses replicas, and remembers what they hold and which requests they have."""

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int) -> None:
        """block_size: tokens per KV block. num_blocks: KV blocks of one replica, which bounds what is remembered of it."""
        self._replicas = [_ReplicaState() for _ in range(num_replicas)]
        self._requests: dict[str, _RoutedRequest] = {}
        self._block_size = block_size
        self._num_blocks = num_blocks

    def choose(self, request_id: str, tokens: Sequence[int], live: Collection[int], *, namespace: tuple[object, ...] = ()) -> int:
        """The replica for a new request, one of `live`, which must not be empty.

        namespace: what else cached blocks depend on, such as adapter and cache salt.
        """
        try:
            hashes = chain_hashes(sha256(repr(namespace).encode()).digest(), tokens, self._block_size)
        except (OverflowError, TypeError):  # not token ids: the engine refuses them by name
            hashes = []
        missing = {index: len(tokens) - self._block_size * self._num_held(index, hashes) for index in live}
        chosen = min(live, key=lambda index: (missing[index] + self._replicas[index].load, len(self._replicas[index].held), index))
        replica = self._replicas[chosen]
        replica.prompt_tokens += missing[chosen]
        replica.num_requests += 1
        self._requests[request_id] = _RoutedRequest(chosen, missing[chosen])
        self._remember(replica, hashes)
        return chosen

    def _num_held(self, index: int, hashes: Sequence[bytes]) -> int:
        """Number of leading blocks that a replica probably holds."""
        held = self._replicas[index].held
        return next((count for count, block_hash in enumerate(hashes) if block_hash not in held), len(hashes))

    def _remember(self, replica: _ReplicaState, hashes: Sequence[bytes]) -> None:
        """Note that a replica will hold these blocks. The first ones, which other prompts share, are forgotten last."""
        for block_hash in reversed(hashes[:self._num_blocks]):
            replica.held[block_hash] = None
            replica.held.move_to_end(block_hash)
        while len(replica.held) > self._num_blocks:
            replica.held.popitem(last=False)

    def begun(self, request_id: str) -> None:
        """The output of a request has begun, so its prompt is computed."""
        request = self._requests[request_id]
        self._replicas[request.replica].prompt_tokens -= request.prompt_tokens
        request.prompt_tokens = 0

    def ended(self, request_id: str) -> None:
        """A request has ended, or has left its replica."""
        self.begun(request_id)
        self._replicas[self._requests.pop(request_id).replica].num_requests -= 1

    def forget(self, replica: int | None = None) -> None:
        """The prefix cache of a replica, or of all, is empty now."""
        for state in self._replicas if replica is None else (self._replicas[replica],):
            state.held.clear()

    def load(self, replica: int) -> int:
        """Work of a replica's unfinished requests, in tokens."""
        return self._replicas[replica].load
