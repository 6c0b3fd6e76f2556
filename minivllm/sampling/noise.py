"""Keys of the noise: a counter, not a generator with state.

    seed, child        -> stream   64 bits, once per row
    stream, position,
    purpose            -> key      64 bits, once per row and step: two uint32 words for the kernels

Nothing here depends on what was drawn before or on who shares the batch, so a seeded request draws the same tokens alone, in a
crowd, after a preemption or on another device, and the n children of one request differ. The mixing is SplitMix64
(`minivllm/splitmix64.py`): key number i of a stream is its i-th output.
"""
from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from minivllm.splitmix64 import GOLDEN, MULTIPLIERS, mix64


class Purpose(IntEnum):
    """What a random word decides; streams of different purposes are independent."""

    SAMPLE = 0  # the token itself
    ACCEPT = 1  # whether a draft is kept
    RECOVER = 2  # the token that replaces a rejected draft


def stream_key(seed: int, child_index: int) -> int:
    """The stream of one child of one request; negative seeds count as their 64-bit pattern."""
    return mix64(mix64(seed + GOLDEN) + GOLDEN * child_index)


def row_keys(streams: np.ndarray[Any, Any], positions: np.ndarray[Any, Any], purpose: Purpose = Purpose.SAMPLE) -> np.ndarray[Any, Any]:
    """Keys [n, 2] int32 for streams [n] uint64 and the positions [n] of the tokens being chosen."""
    counter = (positions.astype(np.uint64) << np.uint64(2)) | np.uint64(purpose)
    x = streams + np.uint64(GOLDEN) * (counter + np.uint64(1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    x ^= x >> np.uint64(31)
    return x.astype("<u8").view("<i4").reshape(-1, 2)
