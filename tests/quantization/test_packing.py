"""Codes in 32-bit words: round trips, and equality with the loops of the tools that defined the layouts."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivllm.quantization.packing import (
    codes_per_period,
    pack_awq,
    pack_bits,
    pack_gptq,
    pack_gptq_zeros,
    unpack_awq,
    unpack_bits,
    unpack_gptq,
    unpack_gptq_zeros,
)

BITS = (2, 3, 4, 8)
SEEDS = st.integers(0, 2**32 - 1)


def random_codes(seed: int, bits: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8))


@given(SEEDS, st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 5), st.sampled_from((0, 1)))
def test_bits_round_trip_along_both_dimensions(seed: int, bits: int, periods: int, others: int, dim: int) -> None:
    shape = (periods * codes_per_period(bits), others)
    codes = random_codes(seed, bits, *(shape if dim == 0 else shape[::-1]))
    words = pack_bits(codes, bits, dim)
    assert words.dtype == torch.int32 and words.shape[dim] * 32 == codes.shape[dim] * bits
    assert torch.equal(unpack_bits(words, bits, dim), codes)
    assert torch.equal(pack_bits(unpack_bits(words, bits, dim), bits, dim), words)


@given(SEEDS, st.integers(1, 4), st.integers(1, 4))
def test_awq_round_trip(seed: int, rows: int, words: int) -> None:
    codes = random_codes(seed, 4, rows, words * 8)
    assert torch.equal(unpack_awq(pack_awq(codes)), codes)


@given(SEEDS, st.sampled_from(BITS))
def test_gptq_zeros_round_trip(seed: int, bits: int) -> None:
    zeros = random_codes(seed, bits, 2, 2 * codes_per_period(bits))
    assert torch.equal(unpack_gptq_zeros(pack_gptq_zeros(zeros, bits), bits), zeros)


def autogptq_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The loop of AutoGPTQ's `QuantLinear.pack`, with its separate case for 3 bits. codes: [K, N] -> int32 [K * bits / 32, N]"""
    codes = codes.astype(np.uint32)
    words = np.zeros((len(codes) * bits // 32, codes.shape[1]), dtype=np.uint32)
    i = row = 0
    while row < len(words):
        if bits != 3:
            for j in range(i, i + 32 // bits):
                words[row] |= codes[j] << (bits * (j - i))
            i, row = i + 32 // bits, row + 1
            continue
        for j in range(i, i + 10):
            words[row] |= codes[j] << (3 * (j - i))
        words[row] |= codes[i + 10] << 30
        words[row + 1] |= (codes[i + 10] >> 2) & 1
        for j in range(i + 11, i + 21):
            words[row + 1] |= codes[j] << (3 * (j - i - 11) + 1)
        words[row + 1] |= codes[i + 21] << 31
        words[row + 2] |= (codes[i + 21] >> 1) & 3
        for j in range(i + 22, i + 32):
            words[row + 2] |= codes[j] << (3 * (j - i - 22) + 2)
        i, row = i + 32, row + 3
    return words.view(np.int32)


@pytest.mark.parametrize("bits", BITS)
def test_gptq_words_equal_those_of_autogptq(bits: int) -> None:
    codes = random_codes(1, bits, 64, 5)
    words = pack_gptq(codes, bits)
    assert torch.equal(words, torch.from_numpy(autogptq_pack(codes.numpy(), bits)))
    assert torch.equal(unpack_gptq(words, bits), codes)


def test_a_symmetric_4_bit_zero_is_stored_as_7() -> None:
    assert pack_gptq_zeros(torch.full((1, 8), 8, dtype=torch.uint8), 4).tolist() == [[0x77777777]]


def test_a_zero_of_0_borrows_from_the_next_one_as_in_gptqmodel() -> None:
    zeros = torch.tensor([[0, 5, 1, 1, 1, 1, 1, 1]], dtype=torch.uint8)
    assert pack_gptq_zeros(zeros, 4).tolist() == [[0x3F]]
    assert torch.equal(unpack_gptq_zeros(torch.tensor([[0x3F]], dtype=torch.int32), 4), zeros)


def test_awq_words_have_the_even_columns_in_the_lower_half() -> None:
    assert pack_awq(torch.arange(8, dtype=torch.uint8)[None]).tolist() == [[0x75316420]]
