"""The one description of all quantized weights: small integers (or fp8 numbers) with a scale for each group of inputs.

    w[n, k] = scale[n, g] * (code[n, k] - zero[n, g]) - min[n, g]          g = k // group, the group of input k

AWQ, GPTQ, compressed-tensors, int8, fp8 and GGUF blocks are all of this form. Their methods (`minivllm.quantization`) bring a
checkpoint's tensors into it, and the kernels of a device pack it into the layout that they read fastest (`Ops.pack_groups`).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedWeight:
    """A weight [N, K] before it is packed.

    With `super_scales`, the scales and mins are small integers: scale = super_scale * scales, min = super_min * mins. K-quants of
    GGUF store them so, with one super-scale per 256 inputs.
    """

    codes: Tensor  # [N, K] uint8, below 2^bits; or float8_e4m3fn
    bits: int  # of a code: 4, 5, 6 or 8
    scales: Tensor  # [N or N / r, K / group] float16, bfloat16 or float32: one row for each r outputs; with super_scales int8 or uint8
    zeros: Tensor | int = 0  # [N, K / group] uint8, or one number for all
    mins: Tensor | None = None  # [N, K / group], as `scales`
    super_scales: Tensor | None = None  # [N, K / super-group] float16
    super_mins: Tensor | None = None  # the same for mins
    input_scale: Tensor | None = None  # [] float32: the static scale with which fp8 inputs are quantized
    quantize_input: bool = False  # fp8 only: products of many rows quantize their input too, per token if there is no input_scale

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs N, inputs K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]


def dequantize(weight: GroupedWeight) -> Tensor:
    """-> [N, K] float32, exactly the values that the checkpoint describes (up to float32's rounding)."""
    n, k = weight.shape
    scales = _real(weight.scales, weight.super_scales)
    scales = scales.repeat_interleave(n // scales.shape[0], 0)
    codes = weight.codes.float().view(n, -1, weight.group)
    if isinstance(weight.zeros, int):
        codes = codes - weight.zeros
    else:
        codes = codes - weight.zeros.float()[:, :, None]
    values = codes * scales[:, :, None]
    if weight.mins is not None:
        values -= _real(weight.mins, weight.super_mins)[:, :, None]
    return values.view(n, k)


def _real(small: Tensor, factors: Tensor | None) -> Tensor:
    """Integer scales times their super-scales, in float32."""
    if factors is None:
        return small.float()
    return small.float() * factors.float().repeat_interleave(small.shape[1] // factors.shape[1], 1)


def smallest_exact(values: Tensor) -> Tensor:
    """float32 numbers in 16 bits if float16 or bfloat16 represents all of them, else unchanged."""
    for dtype in (torch.float16, torch.bfloat16):
        if bool((values.to(dtype).float() == values).all()):
            return values.to(dtype)
    return values
