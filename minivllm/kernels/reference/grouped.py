"""Products with quantized weights, in PyTorch: unpack, then multiply. The specification of the kernels for packed weights.

A packed weight keeps its codes at their number of bits. Codes of more than four bits are split into two planes:

    low    [N, K / 2] uint8     the lower four bits of two codes per byte, k in the low half and k + K / 2 in the high half
    high   [N, K / 8 * (bits - 4)] uint8     the remaining one or two bits of 8 or 4 codes, in the same way
"""
from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.kernels.grouped import GroupedWeight, dequantize
from minivllm.kernels.reference.activation import silu_and_mul
from minivllm.kernels.reference.norm import rms_norm


@dataclasses.dataclass(frozen=True, slots=True)
class PackedGroups:
    """A `GroupedWeight` with its codes packed."""

    planes: tuple[Tensor, ...]  # of codes: (8 bits,), (4 bits,) or (4 bits, the rest)
    rest: GroupedWeight  # everything but the codes, which are an empty tensor here
    shape: tuple[int, int]


def pack_groups(weight: GroupedWeight) -> PackedGroups:
    """Pack the codes; scales stay as they are."""
    if weight.bits == 8:
        planes: tuple[Tensor, ...] = (weight.codes,)
    else:
        planes = (_pack(weight.codes & 15, 4),)
        if weight.bits > 4:
            planes += (_pack(weight.codes >> 4, weight.bits - 4),)
    return PackedGroups(planes, dataclasses.replace(weight, codes=weight.codes.new_empty(0, 0)), weight.shape)


def unpack_groups(packed: PackedGroups) -> GroupedWeight:
    """The inverse of `pack_groups`."""
    codes = packed.planes[0]
    if packed.rest.bits < 8:
        codes = _unpack(codes, 4)
        if len(packed.planes) == 2:
            codes = codes | _unpack(packed.planes[1], packed.rest.bits - 4) << 4
    return dataclasses.replace(packed.rest, codes=codes)


def grouped_linear(
    x: Tensor, packed: PackedGroups, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None, gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As `fused_linear`, for a packed weight: x: [T, K] -> [T, N], or [T, N / 2] if gated. `residual` may be overwritten."""
    if norm is not None:
        x = rms_norm(x, *norm)
    y = F.linear(x, dequantize(unpack_groups(packed)).to(x.dtype), bias)
    if gated:
        y = silu_and_mul(y)
    return y if residual is None else residual.add_(y)


def quantize_rows(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x: [T, K] -> (e4m3 [T, K], scales [T, 1] float32) with x = e4m3 * scale. input_scale: []; None: the largest value becomes 448."""
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448 if input_scale is None else input_scale.expand(len(x), 1)
    return (wide / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def grouped_rows(packed: PackedGroups, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table: ids [T] -> [T, K] in `dtype`."""
    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.index_select(0, ids)

    rest = packed.rest
    per_scale = packed.shape[0] // len(rest.scales)  # rows: of fp8 blocks, several share a scale
    some = dataclasses.replace(
        rest, scales=rest.scales.index_select(0, ids // per_scale),
        zeros=rest.zeros if isinstance(rest.zeros, int) else rest.zeros.index_select(0, ids),
        mins=rows(rest.mins), super_scales=rows(rest.super_scales), super_mins=rows(rest.super_mins))
    planes = tuple(plane.index_select(0, ids) for plane in packed.planes)
    return dequantize(unpack_groups(PackedGroups(planes, some, (len(ids), packed.shape[1])))).to(dtype)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[N, K] uint8 below 2^bits -> [N, K * bits / 8]: byte j holds codes j, j + K * bits / 8, ..."""
    packed = torch.zeros(codes.shape[0], codes.shape[1] * bits // 8, dtype=torch.uint8, device=codes.device)
    for i, part in enumerate(codes.chunk(8 // bits, dim=1)):
        packed |= part << (i * bits)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    return torch.cat([packed >> (i * bits) & ((1 << bits) - 1) for i in range(8 // bits)], dim=1)
