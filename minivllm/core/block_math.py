"""How many KV blocks a sequence needs, and how long a sequence a number of blocks can hold. Pure arithmetic, used by both planes.

A sequence is computed in steps of at most `chunk` tokens. Each KV group keeps what later tokens can see:

    full attention    ceil(num_tokens / block_size) blocks
    window W          at most ceil((W - 1 + chunk) / block_size) + 1 blocks: the W - 1 keys before the chunk, the chunk itself,
                      and one block because that span may start inside a block

`windows` has one entry per KV group: None for full attention, else the window in tokens (the query's own token included).
"""
from __future__ import annotations

from collections.abc import Sequence


def max_blocks_held(num_tokens: int, block_size: int, windows: Sequence[int | None], chunk: int) -> int:
    """Maximum number of blocks, over all groups, that one sequence holds while its first `num_tokens` tokens are computed.

    The null block is not counted.
    """
    total, all_blocks = 0, -(-num_tokens // block_size)
    for window in windows:
        if window is None:
            total += all_blocks
        else:
            total += min(all_blocks, -(-(window - 1 + min(chunk, num_tokens)) // block_size) + 1)
    return total


def longest_sequence(num_blocks: int, limit: int, block_size: int, windows: Sequence[int | None], chunk: int) -> int:
    """Maximum number of tokens, up to `limit`, that one sequence can have computed if no other sequence uses the pool.

    `num_blocks` is the size of the pool and includes the null block, so `num_blocks - 1` blocks can be used. (A request may be
    one token longer: its last sampled token is never computed.)
    """
    low, high = 0, limit  # bisection: the number of blocks never falls as a sequence grows
    while low < high:
        middle = (low + high + 1) // 2
        if max_blocks_held(middle, block_size, windows, chunk) <= num_blocks - 1:
            low = middle
        else:
            high = middle - 1
    return low
