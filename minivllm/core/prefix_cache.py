"""The prefix cache: finds blocks that were computed before, by chained hashes of full blocks.

The keys and values in a block depend on every token up to its end. So a block's hash covers its own tokens *and* the hash of the
block before it. The first block's parent is a root hash of everything else that the content depends on (adapter) or that limits
which requests may share it (cache_salt). The adapter is the number of a load, so blocks of an adapter that was loaded again are not found:

    root = H(adapter, salt)      h0 = H(root, tokens 0..15)      h1 = H(h0, tokens 16..31)      ...

Two sequences have the same h1 exactly if their first 32 tokens, adapter and salt agree. H is SHA-256: with a hash that allows
collisions, a crafted prompt could read another user's cache. A block is cached when it is full and both its tokens and its content
are confirmed, by `Scheduler.update` and never by a plan, which might fail. Generated tokens are cached like prompt tokens, so the
next turn of a chat finds the previous answer.

A match must give *every* KV group what it needs to continue at the end of the match:

    tokens          | block 0 | block 1 | block 2 | block 3 | next token computed here
    full attention  |  need   |  need   |  need   |  need   |
    window (2 blk)  |    -    |    -    |  need   |  need   |      the last ceil((window - 1) / block_size) blocks

With CPU KV offload a block may be found in host memory instead; it then needs a device block and a move.
"""
from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.plan import NULL_BLOCK, BlockId

HASH_BATCH = 32  # blocks hashed at a time during a search that stops at the first miss


def root_hash(adapter: int, cache_salt: str | None) -> bytes:
    """The parent of a first block. adapter: number of a load; 0: the base model."""
    return sha256(repr((adapter, cache_salt)).encode()).digest()


def chain_hashes(parent: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """The hashes of the full blocks that hold `tokens`. `parent` is the hash of the block before them."""
    data, size, hashes = array("q", tokens).tobytes(), 8 * block_size, []
    for end in range(size, len(data) + 1, size):
        parent = sha256(parent + data[end - size:end]).digest()
        hashes.append(parent)
    return hashes


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest reusable prefix. Each of its blocks is a device block, a host block, or not needed (outside a window)."""

    num_blocks: int
    device: tuple[tuple[BlockId, ...], ...]  # [G][num_blocks]; NULL_BLOCK: not on the device
    host: tuple[tuple[int, int, int], ...] = ()  # (group, logical index, host block)

    @property
    def device_blocks(self) -> list[BlockId]:
        return [block for group in self.device for block in group if block != NULL_BLOCK]


class PrefixCache:
    """Finds full blocks of every KV group in the device pool, or else in the host pool."""

    __slots__ = ("_device", "_host", "_last_hashed", "block_size", "blocks_needed")

    def __init__(self, device: BlockPool, host: BlockPool | None, block_size: int, windows: Sequence[int | None]) -> None:
        self._device = device
        self._host = host
        self.block_size = block_size
        self._last_hashed: tuple[bytes, Sequence[int], list[bytes]] = b"", (), []  # the last new sequence: root, tokens, hashes
        # Blocks at the end of a match that each group needs; None: all of them.
        self.blocks_needed = tuple(None if w is None else -(-(w - 1) // block_size) for w in windows)

    def extend_hashes(
        self, hashes: list[bytes], root: bytes, tokens: Sequence[int], num_tokens: int, *, stop_at_miss: bool = False,
    ) -> None:
        """Append to a sequence's block hashes until they cover the full blocks of its first `num_tokens` tokens.

        stop_at_miss: hash HASH_BATCH blocks at a time, and stop when the last hashed block is not cached in a full-attention group,
        because no match can extend past it.
        """
        size, end = self.block_size, min(num_tokens, len(tokens)) // self.block_size
        if not hashes and end:
            hashes += self._hashes_of_shared_prefix(root, tokens, end)
            self._last_hashed = root, tokens, hashes
        full = next((group for group, needed in enumerate(self.blocks_needed) if needed is None), None) if stop_at_miss else None
        batch = end if full is None else HASH_BATCH
        while len(hashes) < end and not (full is not None and hashes and not self._is_cached(full, hashes[-1])):
            first = len(hashes)
            hashes += chain_hashes(hashes[-1] if hashes else root, tokens[first * size:min(end, first + batch) * size], size)

    def _hashes_of_shared_prefix(self, root: bytes, tokens: Sequence[int], end: int) -> list[bytes]:
        """Hashes of the blocks, at most `end`, that this sequence shares with the last new one. Comparing is cheaper than hashing."""
        other_root, other, hashes = self._last_hashed
        if root != other_root:
            return []
        size, same = self.block_size, 0
        while same < min(end, len(hashes)) and tokens[same * size:(same + 1) * size] == other[same * size:(same + 1) * size]:
            same += 1
        return hashes[:same]

    def match(self, hashes: Sequence[bytes]) -> PrefixMatch:
        """The longest prefix of `hashes` after which every group can continue. Takes no reference."""
        length = len(hashes)
        if self._host is None and all(needed is None for needed in self.blocks_needed):  # the common case: one lookup per block
            found = []
            for group in range(len(self.blocks_needed)):
                found.append(self._device.longest_prefix(group, hashes[:length]))
                length = len(found[-1])
            return PrefixMatch(length, tuple(tuple(blocks[:length]) for blocks in found))
        for group, needed in enumerate(self.blocks_needed):
            if needed is None:
                length = next((i for i in range(length) if not self._is_cached(group, hashes[i])), length)
        while length:  # when one group shortens the match, the others are checked again
            shortest = min(self._longest_for_group(group, hashes, length) for group in range(len(self.blocks_needed)))
            if shortest == length:
                break
            length = shortest
        return self._collect(hashes, length)

    def insert(self, table: BlockTable, hashes: Sequence[bytes], first: int, last: int) -> None:
        """Cache blocks first..last - 1 of this table under their hashes: from now on every sequence can find them."""
        cache = self._device.cache
        for group, blocks in enumerate(table.groups):
            for block, block_hash in zip(blocks[first:last], hashes[first:last], strict=True):
                if block != NULL_BLOCK:
                    cache(block, (group, block_hash))

    def _is_cached(self, group: int, block_hash: bytes) -> bool:
        key = (group, block_hash)
        return self._device.lookup(key) is not None or (self._host is not None and self._host.lookup(key) is not None)

    def _longest_for_group(self, group: int, hashes: Sequence[bytes], length: int) -> int:
        """The longest match, at most `length` blocks, whose last blocks this group has, as far as it needs them."""
        needed = self.blocks_needed[group]
        if needed is None:
            return length
        end, run = length, 0
        for index in range(length - 1, -1, -1):
            if run == needed:
                break
            run += 1
            if not self._is_cached(group, hashes[index]):
                end, run = index, 0
        return end

    def _collect(self, hashes: Sequence[bytes], length: int) -> PrefixMatch:
        device, host = [], []
        for group, needed in enumerate(self.blocks_needed):
            first = 0 if needed is None else max(0, length - needed)
            blocks = [NULL_BLOCK] * first
            for index in range(first, length):
                key = (group, hashes[index])
                block = self._device.lookup(key)
                if block is None:
                    assert self._host is not None
                    found = self._host.lookup(key)
                    assert found is not None
                    host.append((group, index, found))
                blocks.append(block or NULL_BLOCK)
            device.append(tuple(blocks))
        return PrefixMatch(length, tuple(device), tuple(host))
