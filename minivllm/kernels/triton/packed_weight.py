"""The layout in which Triton kernels read quantized weights, and how a weight is brought into it.

A word of 16 bits has four codes of four bits, or two of eight, whose inputs are 16 apart. Then a plane, the same bits of all words, is a
tile of codes in the order in which x is stored, and both halves of a register are unpacked at once:

    inputs of a chunk   0 .. 15        16 .. 31       32 .. 47       48 .. 63
    word j = 0 .. 15    bits 0 .. 3    bits 4 .. 7    bits 8 .. 11   bits 12 .. 15

The fifth and sixth bit of a code, if there are any, are in a second tensor with 4 or 8 bits for each word.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from minivllm.kernels import tuning
from minivllm.kernels.grouped import GroupedWeight
from minivllm.kernels.reference import grouped as reference
from minivllm.kernels.tuning import next_power_of_2

CHUNK = 64  # inputs; a weight's inputs are padded to a multiple
PLANE = 16  # inputs of a chunk that are in the same bits of its words
PACKED_CODES = 1 << 22  # codes that are packed at a time: bounds the memory of packing


class Format(NamedTuple):
    """What a kernel must know about a packed weight at compile time."""

    n: int  # outputs
    k: int  # inputs, padded
    inputs: int  # of x
    bits: int
    per_word: int  # codes in a word: planes
    fp8: bool
    group: int  # inputs per scale
    rows: int  # outputs per row of scales
    zero: int  # of every group; -1: each has its own, next to its scale
    mins: bool  # next to the scales
    super_group: int  # inputs per super-scale; 0: there are none
    half_scales: bool  # scales next to a zero or a min are float16, not bfloat16
    row_scale: bool  # one scale per output, applied to the sums


class Planes(NamedTuple):
    """The tensors of a packed weight. `words` stands for those that it does not have."""

    words: Tensor  # [N, K / 4 or K / 2] int16
    high: Tensor  # [N, K / 8] or [N, K / 4] uint8: the rest of 5-bit and 6-bit codes
    # [N / rows, K / group], in the order of `_group_order`: scales; or int32 with the scale in the low half and a zero or a min in the
    # high half; or, with super-scales, int16 with 8 bits of each
    scales: Tensor
    supers: Tensor  # [N, K / super_group] int32: float16 factors of scales (low half) and mins; int16 if there are no mins


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as these kernels read it."""

    planes: Planes
    form: Format
    finished: Tensor  # int32: number of splits that have finished each tile; 0 between kernels
    quantize_input: bool
    input_scale: Tensor | None


def pack_groups(weight: GroupedWeight) -> PackedWeight | reference.PackedGroups:
    """Pack a weight in the layout at the top of this file, or for the reference if the kernels do not cover it."""
    per_word = 2 if weight.bits == 8 else 4
    row_scale = weight.scales.shape[1] == 1 and isinstance(weight.zeros, int) and weight.mins is None and weight.super_scales is None
    group = None if row_scale else _stored_group(weight.group, per_word)
    if not _covers(weight) or (group is None and not row_scale):
        return reference.pack_groups(weight)
    n, k = weight.shape
    padded = triton.cdiv(k, CHUNK) * CHUNK
    words, high = _pack_words(weight.codes.view(torch.uint8), padded, weight.bits)
    scales, half_scales = _pack_scales(weight)
    supers, super_group = _pack_supers(weight)
    if group is None:
        group = next_power_of_2(padded)  # the kernels do not use it, and compile only powers of two
    else:
        scales = scales.repeat_interleave(weight.group // group, 1)
        scales = _group_order(F.pad(scales, (0, triton.cdiv(padded, group) - scales.shape[1])), padded, group, per_word)
    form = Format(
        n=n, k=padded, inputs=k, bits=weight.bits, per_word=per_word, fp8=weight.codes.is_floating_point(), group=group,
        rows=n // len(scales), zero=weight.zeros if isinstance(weight.zeros, int) else -1, mins=weight.mins is not None,
        super_group=super_group, half_scales=half_scales, row_scale=row_scale)
    planes = Planes(words, words if high is None else high, scales.contiguous(), words if supers is None else supers)
    finished = torch.zeros(triton.cdiv(n, 16) * tuning.PACKED_MAX_ROWS // 16, dtype=torch.int32, device=words.device)
    return PackedWeight(planes, form, finished, weight.quantize_input, weight.input_scale)


def _stored_group(group: int, per_word: int) -> int | None:
    """Inputs for which one scale is stored: at most `group`, so that a tile of words has whole groups, or is a part of one.

    Tiles are powers of two of words, at most UNPACK_WORDS. None: not even 16 inputs, one plane of a chunk, share a scale.
    """
    if group % (per_word * tuning.UNPACK_WORDS) == 0:
        return group
    power = group & -group  # the largest power of two that divides it
    return power if power >= PLANE else None


def _covers(weight: GroupedWeight) -> bool:
    """Whether the kernels know this combination of scales, zeros and mins. No format has others."""
    n, k = weight.shape
    others = [t for t in (weight.zeros, weight.mins) if isinstance(t, Tensor)]
    if n == 0 or n % len(weight.scales) or len(others) > 1 or any(t.shape != weight.scales.shape for t in others):
        return False
    if weight.super_scales is None:
        return True
    size = k // weight.super_scales.shape[1]
    if size % CHUNK or size & (size - 1) or len(weight.scales) != n or not isinstance(weight.zeros, int):
        return False
    return weight.super_mins is None if weight.mins is None else weight.super_mins is not None and weight.scales.dtype == torch.uint8


def _pack_supers(weight: GroupedWeight) -> tuple[Tensor | None, int]:
    """See `Planes.supers`. -> (them, inputs that share one)."""
    if weight.super_scales is None:
        return None, 0
    supers = weight.super_scales if weight.super_mins is None else torch.stack((weight.super_scales, weight.super_mins), -1)
    supers = supers.contiguous().view(torch.int16 if weight.super_mins is None else torch.int32).view(len(supers), -1)
    return supers, weight.shape[1] // supers.shape[1]


def _pack_scales(weight: GroupedWeight) -> tuple[Tensor, bool]:
    """Each group's numbers in one: see `Planes.scales`. -> (them, whether 16-bit scales are float16)."""
    scales, other = weight.scales, weight.mins
    if other is None and not isinstance(weight.zeros, int):
        other = weight.zeros
    if other is None:
        return scales, False
    if weight.super_scales is not None:
        return (scales.view(torch.uint8).short() | other.view(torch.uint8).short() << 8), False
    if scales.dtype == torch.float32:
        scales = scales.bfloat16()
    high = other.int() if other.dtype == torch.uint8 else other.to(scales.dtype).view(torch.int16).int()
    return scales.view(torch.int16).int() & 0xFFFF | high << 16, scales.dtype == torch.float16


def _group_order(scales: Tensor, k: int, group: int, per_word: int) -> Tensor:
    """Groups of fewer inputs than a chunk: first those of plane 0 of all chunks, and so on. So a plane's scales are loaded together."""
    chunk = PLANE * per_word
    return scales if group >= chunk else scales.view(len(scales), k // chunk, chunk // group).transpose(1, 2).flatten(1)


def _pack_words(codes: Tensor, k: int, bits: int) -> tuple[Tensor, Tensor | None]:
    """codes: [N, K] uint8 -> words [N, k / 4 or k / 2] int16, and the bits from the fifth on of 5-bit and 6-bit codes: uint8.

    k: inputs, padded. Some rows at a time, because temporary tensors take up to ten bytes per code.
    """
    n, step = len(codes), max(1, PACKED_CODES // k)
    words = torch.empty(n, k // (2 if bits == 8 else 4), dtype=torch.int16, device=codes.device)
    high = torch.empty(n, k * (bits - 4) // 8, dtype=torch.uint8, device=codes.device) if 4 < bits < 8 else None
    for first in range(0, n, step):
        some = F.pad(codes[first : first + step], (0, k - codes.shape[1]))
        words[first : first + step], rest = _pack_some(some, bits)
        if high is not None and rest is not None:
            high[first : first + step] = rest
    return words, high


def _pack_some(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """As `_pack_words`, of padded rows at once."""
    width = 8 if bits == 8 else 4
    planes = codes.view(len(codes), -1, 16 // width, PLANE)  # [N, chunks, planes, 16]
    words = torch.zeros_like(planes[:, :, 0], dtype=torch.int32)
    high = torch.zeros_like(planes[:, :, 0]) if 4 < bits < 8 else None
    for i in range(16 // width):
        words |= (planes[:, :, i].int() & ((1 << width) - 1)) << width * i
        if high is not None:
            high |= (planes[:, :, i] >> 4) << (bits - 4) * i
    words = words.to(torch.int16).flatten(1)
    if high is None or bits == 6:
        return words, None if high is None else high.flatten(1)
    return words, (high[:, :, ::2] | high[:, :, 1::2] << 4).flatten(1)
