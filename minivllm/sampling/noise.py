"""Noise keys: the noise of a sample is a function of counters, so there is no random generator with a state.

    seed, child        -> stream   64 bits, once per row
    stream, position   -> key      64 bits, once per row and step: two uint32 words for the kernels

A key depends neither on earlier samples nor on the other rows of the batch. So a request with a seed gets the same tokens alone, in any
batch, after a preemption and on another device, and the n children of one request get different tokens. The mixing is SplitMix64
(`minivllm/splitmix64.py`): key number i of a stream is its i-th output.
"""
from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from torch import Tensor

from minivllm.kernels.reference.sampling import KEYS_PER_POSITION, stream_keys
from minivllm.splitmix64 import GOLDEN, MULTIPLIERS, mix64


def stream_key(seed: int, child_index: int) -> int:
    """The stream of one child of one request; negative seeds count as their 64-bit pattern."""
    return mix64(mix64(seed + GOLDEN) + GOLDEN * child_index)


class Purpose(IntEnum):
    """What a key of a position is for: each position has KEYS_PER_POSITION."""

    TOKEN = 0  # the token that the target samples
    DRAFT = 1  # the draft that a draft model samples
    ACCEPTANCE = 2  # whether this draft is accepted
    RECOVERY = 3  # the token in place of a draft that is not


def row_keys(streams: np.ndarray[Any, Any], positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Keys [n, 2] int32 for streams [n] uint64 and the positions [n] of the tokens being chosen."""
    counter = positions.astype(np.uint64) * np.uint64(KEYS_PER_POSITION)  # the first key of each position
    x = streams + np.uint64(GOLDEN) * (counter + np.uint64(1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    x ^= x >> np.uint64(31)
    return x.astype("<u8").view("<i4").reshape(-1, 2)


def device_keys(streams: Tensor, positions: Tensor, purpose: Purpose = Purpose.TOKEN) -> Tensor:
    """The same on the device: streams [n] int64 (the bits of a uint64), positions [n] int64 -> [n, 2] int32."""
    return stream_keys(streams, positions * KEYS_PER_POSITION + int(purpose))
