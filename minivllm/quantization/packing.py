"""How checkpoints of quantized weights store small integers (codes) in 32-bit words.

    GPTQ    one stream of bits down each column of [K, N], lowest bits first. With 4 bits, word r of a column has rows 8r .. 8r + 7:
            bits   31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
            row    8r + 7  8r + 6  8r + 5  8r + 4  8r + 3  8r + 2  8r + 1  8r        3 bits: 32 rows in 3 words, some across two words
    AWQ     8 columns in a word, permuted so that a kernel gets the even and the odd columns with one mask each:
            column 8c + 7  8c + 5  8c + 3  8c + 1  8c + 6  8c + 4  8c + 2  8c

Sources: AutoGPTQ's `QuantLinear.pack` (checkpoint_format "gptq", also called v1), AutoAWQ's `WQLinear_GEMM.from_linear`.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the i-th lowest 4 bits of a word hold this one of its 8 columns


def codes_per_period(bits: int) -> int:
    """Codes after which the bit stream is at the start of a word again: 16, 32, 8, 4 for 2, 3, 4, 8 bits."""
    return math.lcm(32, bits) // bits


def pack_bits(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of `bits` bits as one bit stream along a dimension of length n, a multiple of `codes_per_period`.

    codes: uint8 [.., n, ..] -> int32 [.., n * bits / 32, ..]
    """
    period = codes_per_period(bits)
    groups = codes.unflatten(dim, (-1, period)).movedim(dim, 0).movedim(dim + 1, 1)  # [n / period, period, ..]
    words = torch.zeros(len(groups), period * bits // 32, *groups.shape[2:], dtype=torch.int32, device=codes.device)
    for j in range(period):
        word, shift = divmod(j * bits, 32)
        code = groups[:, j].int()
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.flatten(0, 1).movedim(0, dim).contiguous()


def unpack_bits(words: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `pack_bits`. words: int32 [.., m, ..] -> uint8 [.., m * 32 / bits, ..], or a few more: whole periods."""
    period = codes_per_period(bits)
    if missing := -words.shape[dim] % (period * bits // 32):  # a vocabulary may end within a period
        words = torch.cat([words, torch.zeros_like(words.narrow(dim, 0, missing))], dim)
    groups = words.unflatten(dim, (-1, period * bits // 32)).movedim(dim, 0).movedim(dim + 1, 1)
    codes = torch.empty(len(groups), period, *groups.shape[2:], dtype=torch.uint8, device=words.device)
    for j in range(period):
        word, shift = divmod(j * bits, 32)
        code = groups[:, word] >> shift  # copies the sign bit in from the left; the masks remove it
        if shift + bits > 32:
            code = code & ((1 << (32 - shift)) - 1) | groups[:, word + 1] << (32 - shift)
        codes[:, j] = code & ((1 << bits) - 1)
    return codes.flatten(0, 1).movedim(0, dim).contiguous()


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """codes: uint8 [K, N] -> qweight int32 [K * bits / 32, N]."""
    return pack_bits(codes, bits, 0)


def unpack_gptq(qweight: Tensor, bits: int) -> Tensor:
    """qweight: int32 [K * bits / 32, N] -> codes uint8 [K, N]."""
    return unpack_bits(qweight, bits, 0)


def pack_gptq_zeros(zeros: Tensor, bits: int) -> Tensor:
    """zeros: uint8 0 .. 2^bits - 1, [groups, N] -> qzeros int32 [groups, N * bits / 32], as checkpoint_format "gptq" (v1) has them.

    The file holds zero - 1. Tools subtract from whole words, so a zero of 0 borrows from the next one. Other readers decode each
    zero by itself. Both agree if no zero is 0.
    """
    return _add_to_zeros(pack_bits(zeros, bits, 1), bits, -1)


def unpack_gptq_zeros(qzeros: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_gptq_zeros`. qzeros: int32 [groups, N * bits / 32] -> uint8 0 .. 2^bits - 1, [groups, N]."""
    return unpack_bits(_add_to_zeros(qzeros, bits, 1), bits, 1)


def _add_to_zeros(words: Tensor, bits: int, step: int) -> Tensor:
    """GPTQModel's `convert_gptq_v1_to_v2_format_module`: words of 3-bit zeros are shared, so there each zero is changed by itself."""
    if bits == 3:
        return pack_bits(unpack_bits(words, 3, 1) + step & 7, 3, 1)
    return words + step * sum(1 << shift for shift in range(0, 32, bits))


def pack_awq(codes: Tensor) -> Tensor:
    """codes: uint8 0 .. 15, [K, N] -> int32 [K, N / 8]. Used for weights and for zeros."""
    columns = codes.unflatten(1, (-1, 8))
    words = torch.zeros(columns.shape[:2], dtype=torch.int32, device=codes.device)
    for i, column in enumerate(AWQ_ORDER):
        words |= columns[..., column].int() << (4 * i)
    return words


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [K, N / 8] -> codes uint8 [K, N]."""
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for i, column in enumerate(AWQ_ORDER):
        codes[..., column] = (words >> (4 * i)) & 15
    return codes.flatten(1)
