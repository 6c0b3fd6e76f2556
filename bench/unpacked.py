"""Weights that are packed for a GPU, as the reference reads them: the inverse of `kernels/triton/packed_weight.py`, in PyTorch.

The kernel check computes a model again with the reference's products. Its packed weights are unpacked here at each product, one at a
time: so the check needs no second copy of the model, and works with weights that are streamed from host memory.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from minivllm.kernels import REFERENCE, Ops, tuning
from minivllm.kernels.grouped import GroupedWeight, dequantize
from minivllm.kernels.reference import grouped as reference


def reference_ops() -> Ops:
    """The reference kernels, which also read weights that are packed for a GPU."""
    return dataclasses.replace(REFERENCE, grouped_linear=_grouped_linear, grouped_rows=_grouped_rows)


def unpack(packed: Any) -> GroupedWeight:
    """packed: a `PackedWeight` -> the weight that was packed, except that large groups may be divided into equal smaller ones."""
    planes, form = packed.planes, packed.form
    codes = _codes(planes.words, planes.high, form)
    scales, zeros, mins, supers, super_mins = _scales(planes, form), form.zero, None, None, None
    if form.super_group:
        both = planes.supers.view(torch.float16).view(form.n, -1, 2 if form.mins else 1)
        supers, super_mins = both[:, :, 0], both[:, :, 1] if form.mins else None
        if form.mins:
            scales, mins = (scales & 255).to(torch.uint8), (scales >> 8 & 255).to(torch.uint8)
    elif form.mins or form.zero < 0:
        number = torch.float16 if form.half_scales else torch.bfloat16
        low, high = scales.to(torch.int16), (scales >> 16).to(torch.int16)
        scales = low.view(number)
        if form.mins:
            mins = high.view(number)
        else:
            zeros = high.to(torch.uint8)
    return GroupedWeight(codes=codes, bits=form.bits, scales=scales, zeros=zeros, mins=mins, super_scales=supers, super_mins=super_mins,
                         quantize_input=packed.quantize_input, input_scale=packed.input_scale)


def _codes(words: Tensor, high: Tensor, form: Any) -> Tensor:
    """-> [N, inputs]. See the layout in `packed_weight`."""
    width = 16 // form.per_word
    chunks = words.view(form.n, -1, 16)
    # [N, chunks, planes, 16]
    codes = torch.stack([chunks >> width * i & (1 << width) - 1 for i in range(form.per_word)], 2).to(torch.uint8)
    if form.bits in (5, 6):
        rest = high.view(form.n, chunks.shape[1], -1)
        if form.bits == 5:
            rest = torch.stack((rest & 15, rest >> 4), -1).flatten(2)
        width = form.bits - 4
        codes |= torch.stack([rest >> width * i & (1 << width) - 1 for i in range(form.per_word)], 2) << 4
    codes = codes.flatten(1)[:, : form.inputs].contiguous()
    return codes.view(torch.float8_e4m3fn) if form.fp8 else codes


def _scales(planes: Any, form: Any) -> Tensor:
    """-> [N / rows, groups] in the order of the groups, without those of the padding."""
    if form.row_scale:
        return planes.scales
    chunk = 16 * form.per_word
    scales = planes.scales
    if form.group < chunk:
        scales = scales.view(len(scales), chunk // form.group, -1).transpose(1, 2).flatten(1)
    return scales[:, : form.inputs // form.group]


def _grouped_linear(x: Tensor, packed: Any, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None,
                    **options: Any) -> Tensor:
    """See `reference.grouped_linear`. The inputs are quantized where the GPU's kernels quantize them."""
    if isinstance(packed, reference.PackedGroups):
        return reference.grouped_linear(x, packed, bias, norm=norm, **options)
    if quantizes_input(x, packed):
        if norm is not None:
            x, norm = REFERENCE.rms_norm(x, *norm), None
        quantized, scales = reference.quantize_rows(x, packed.input_scale)
        x = (quantized.float() * scales).to(x.dtype)
    return reference.grouped_linear(x, reference.pack_groups(unpack(packed)), bias, norm=norm, **options)


def quantizes_input(x: Tensor, packed: Any) -> bool:
    """Whether the GPU's product of x and this weight multiplies fp8 numbers."""
    from minivllm.kernels.triton import grouped

    return packed.quantize_input and len(x) > tuning.PACKED_MAX_ROWS and grouped._multiplies_fp8(x, packed.form)


def _grouped_rows(packed: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.grouped_rows`."""
    if isinstance(packed, reference.PackedGroups):
        return reference.grouped_rows(packed, ids, dtype)
    return dequantize(unpack(packed)).index_select(0, ids).to(dtype)
