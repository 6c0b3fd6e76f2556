"""Finding blocks that were computed before: chained hashes of full blocks.

The keys and values in a block depend on every token up to its end, so a block's name is a hash of its own tokens *and* of its
parent's name; the first parent stands for what else the content depends on (adapter) or may be seen by (cache_salt):

    root = H(adapter, salt)      d0 = H(root, tokens 0..15)      d1 = H(d0, tokens 16..31)      ...

Two sequences have the same d1 exactly if their first 32 tokens, adapter and salt agree. H is SHA-256: with a hash that can be
made to collide, a crafted prompt would read another user's cache. Only full blocks whose tokens and content are confirmed get
a key (`Scheduler.update` commits them, never a plan that might still fail), prompts and generated tokens alike, so the next
turn of a chat finds the answer to the last one.

A hit must give *every* KV group what it needs to go on at its end. What that is, is the group's rule:

    tokens          | block 0 | block 1 | block 2 | block 3 | next token computed here
    full attention  |  need   |  need   |  need   |  need   |
    window (2 blk)  |    -    |    -    |  need   |  need   |      a window reaches ceil((window - 1) / block_size) blocks back

With a host-memory tier a block may be found there instead; it then needs a device block and a move.
"""
from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.plan import NULL_BLOCK, BlockId

AHEAD = 32  # blocks that are named at a time while a match is looked for


def root_digest(adapter: str | None, cache_salt: str | None) -> bytes:
    """The parent of a first block."""
    return sha256(repr((adapter, cache_salt)).encode()).digest()


def chain_digests(parent: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """The names of the full blocks that hold `tokens` after what `parent` names: each name depends on all before it."""
    data, size, names = array("q", tokens).tobytes(), 8 * block_size, []
    for end in range(size, len(data) + 1, size):
        parent = sha256(parent + data[end - size:end]).digest()
        names.append(parent)
    return names


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest usable beginning: by group and logical index, a device block, or a host block, or neither (outside a window)."""

    num_blocks: int
    device: tuple[tuple[BlockId, ...], ...]  # [G][num_blocks]; NULL_BLOCK where it is not on the device
    host: tuple[tuple[int, int, int], ...] = ()  # (group, logical index, host block)

    @property
    def hits(self) -> list[BlockId]:
        return [block for group in self.device for block in group if block != NULL_BLOCK]


class PrefixCache:
    """Which full blocks of which KV groups can be found in the device pool, or else in the host pool."""

    __slots__ = ("_device", "_host", "_named", "block_size", "reach")

    def __init__(self, device: BlockPool, host: BlockPool | None, block_size: int, windows: Sequence[int | None]) -> None:
        self._device = device
        self._host = host
        self.block_size = block_size
        self._named: tuple[bytes, Sequence[int], list[bytes]] = b"", (), []  # the sequence named last: root, tokens, digests
        # How many blocks before its end a hit needs, by group; None: all of them.
        self.reach = tuple(None if w is None else -(-(w - 1) // block_size) for w in windows)

    def extend_digests(
        self, digests: list[bytes], root: bytes, tokens: Sequence[int], num_tokens: int, *, while_present: bool = False,
    ) -> None:
        """Bring a sequence's digests up to its first `num_tokens` tokens; those already there are kept.

        while_present: no more is computed than a match can reach, or up to AHEAD blocks: that stops once a group without a window
        lacks the last.
        """
        size, end = self.block_size, min(num_tokens, len(tokens)) // self.block_size
        if not digests and end:
            digests += self._as_named_before(root, tokens, end)
            self._named = root, tokens, digests
        whole = next((group for group, reach in enumerate(self.reach) if reach is None), None) if while_present else None
        ahead = end if whole is None else AHEAD
        while len(digests) < end and not (whole is not None and digests and not self._present(whole, digests[-1])):
            first = len(digests)
            digests += chain_digests(digests[-1] if digests else root, tokens[first * size:min(end, first + ahead) * size], size)

    def _as_named_before(self, root: bytes, tokens: Sequence[int], end: int) -> list[bytes]:
        """The names of at most `end` blocks in which a sequence begins like the one before it: comparing is cheaper than naming."""
        other_root, other, names = self._named
        if root != other_root:
            return []
        size, same = self.block_size, 0
        while same < min(end, len(names)) and tokens[same * size:(same + 1) * size] == other[same * size:(same + 1) * size]:
            same += 1
        return names[:same]

    def match(self, digests: Sequence[bytes]) -> PrefixMatch:
        """The longest beginning of `digests` after which every group could go on. Takes no reference."""
        length = len(digests)
        if self._host is None and all(reach is None for reach in self.reach):  # one look at each block is enough
            found = []
            for group in range(len(self.reach)):
                found.append(self._device.beginning(group, digests[:length]))
                length = len(found[-1])
            return PrefixMatch(length, tuple(tuple(blocks[:length]) for blocks in found))
        for group, reach in enumerate(self.reach):
            if reach is None:
                length = next((i for i in range(length) if not self._present(group, digests[i])), length)
        while length:  # each group may shorten the match; then the others must look again
            shortest = min(self._longest_ending(group, digests, length) for group in range(len(self.reach)))
            if shortest == length:
                break
            length = shortest
        return self._collect(digests, length)

    def commit(self, table: BlockTable, digests: Sequence[bytes], first: int, last: int) -> None:
        """Blocks first..last - 1 of this table hold what their digests say, from now on for everybody."""
        commit = self._device.commit
        for group, blocks in enumerate(table.groups):
            for block, digest in zip(blocks[first:last], digests[first:last], strict=True):
                if block != NULL_BLOCK:
                    commit(block, (group, digest))

    def _present(self, group: int, digest: bytes) -> bool:
        key = (group, digest)
        return self._device.lookup(key) is not None or (self._host is not None and self._host.lookup(key) is not None)

    def _longest_ending(self, group: int, digests: Sequence[bytes], length: int) -> int:
        """The longest match, at most `length`, whose last `reach` blocks this group has."""
        reach = self.reach[group]
        if reach is None:
            return length
        end, run = length, 0
        for index in range(length - 1, -1, -1):
            if run == reach:
                break
            run += 1
            if not self._present(group, digests[index]):
                end, run = index, 0
        return end

    def _collect(self, digests: Sequence[bytes], length: int) -> PrefixMatch:
        device, host = [], []
        for group, reach in enumerate(self.reach):
            first = 0 if reach is None else max(0, length - reach)
            blocks = [NULL_BLOCK] * first
            for index in range(first, length):
                key = (group, digests[index])
                block = self._device.lookup(key)
                if block is None:
                    assert self._host is not None
                    found = self._host.lookup(key)
                    assert found is not None
                    host.append((group, index, found))
                blocks.append(block or NULL_BLOCK)
            device.append(tuple(blocks))
        return PrefixMatch(length, tuple(device), tuple(host))
