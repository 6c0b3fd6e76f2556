"""Block arithmetic against a simulated sequence whose blocks are counted one by one."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minivllm.core.block_math import longest_sequence, max_blocks_held

WINDOWS = st.lists(st.sampled_from([None, 1, 2, 5, 16, 40]), min_size=1, max_size=3)
BLOCK_SIZES = st.integers(1, 20)
CHUNKS = st.integers(1, 30)


def blocks_held(num_tokens: int, block_size: int, window: int | None, chunk: int, first_chunk: int) -> int:
    """Maximum number of blocks of one group that a sequence holds while it is computed in chunks. The first chunk may be shorter.

    Before each chunk the sequence frees the blocks that no remaining query position can see.
    """
    held: set[int] = set()
    most = computed = 0
    while computed < num_tokens:
        count = min(chunk if computed else first_chunk, num_tokens - computed)
        if window is not None:
            held = {block for block in held if (block + 1) * block_size > computed - window + 1}
        held |= {position // block_size for position in range(computed, computed + count)}
        computed += count
        most = max(most, len(held))
    return most


@given(num_tokens=st.integers(0, 90), block_size=BLOCK_SIZES, windows=WINDOWS, chunk=CHUNKS, first_chunk=st.integers(1, 30))
def test_a_simulated_sequence_never_holds_more_blocks(
    num_tokens: int, block_size: int, windows: list[int | None], chunk: int, first_chunk: int,
) -> None:
    held = sum(blocks_held(num_tokens, block_size, window, chunk, min(first_chunk, chunk)) for window in windows)
    bound = max_blocks_held(num_tokens, block_size, windows, chunk)
    assert held <= bound
    if all(window is None for window in windows):
        assert held == bound


@given(block_size=BLOCK_SIZES, window=st.sampled_from([1, 2, 5, 16, 40]), chunk=CHUNKS)
def test_the_bound_of_a_window_is_reached_or_missed_by_one_block(block_size: int, window: int, chunk: int) -> None:
    """For some length of the first chunk, a long sequence holds as many blocks as the bound says, or one less."""
    length = 4 * (window + chunk + block_size)
    most = max(blocks_held(length, block_size, window, chunk, first) for first in range(1, chunk + 1))
    bound = max_blocks_held(length, block_size, (window,), chunk)
    assert bound - 1 <= most <= bound


@given(num_blocks=st.integers(1, 99), limit=st.integers(0, 120), block_size=BLOCK_SIZES, windows=WINDOWS, chunk=CHUNKS)
def test_the_longest_sequence_fits_and_one_more_token_does_not(
    num_blocks: int, limit: int, block_size: int, windows: list[int | None], chunk: int,
) -> None:
    fits = [n for n in range(limit + 1) if max_blocks_held(n, block_size, windows, chunk) <= num_blocks - 1]
    assert longest_sequence(num_blocks, limit, block_size, windows, chunk) == max(fits, default=0)


@given(block_size=BLOCK_SIZES, windows=WINDOWS, chunk=CHUNKS)
def test_the_number_of_blocks_never_falls_as_a_sequence_grows(block_size: int, windows: list[int | None], chunk: int) -> None:
    counts = [max_blocks_held(n, block_size, windows, chunk) for n in range(120)]
    assert counts == sorted(counts)


def test_the_null_block_is_part_of_the_pool_and_cannot_be_used() -> None:
    assert longest_sequence(num_blocks=1, limit=100, block_size=4, windows=(None,), chunk=8) == 0
    assert longest_sequence(num_blocks=5, limit=100, block_size=4, windows=(None,), chunk=8) == 16
    assert longest_sequence(num_blocks=5, limit=100, block_size=4, windows=(None, None), chunk=8) == 8


def test_one_window_by_hand() -> None:
    """Window 5, chunk 8, blocks of 4 tokens: 4 earlier keys and 8 new ones are 12 positions, in 3 blocks or, unaligned, in 4."""
    assert max_blocks_held(100, 4, (5,), 8) == 4
    assert max_blocks_held(100, 4, (5, None), 8) == 4 + 25
    assert max_blocks_held(6, 4, (5,), 8) == 2
