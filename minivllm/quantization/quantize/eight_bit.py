"""Eight bits with one scale per row, which need no calibration: fp8 and int8, in compressed-tensors' layouts."""
from __future__ import annotations

import torch
from torch import Tensor

from minivllm.quantization.packing import pack_bits


def fp8(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Layout "float-quantized". weight: float32 [N, K] -> float8_e4m3fn [N, K] and scales [N, 1] in the model's dtype."""
    scales = _scales(weight, 448.0, dtype)
    codes = (weight / scales.float()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}


def int8(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Layout "pack-quantized" with 8 bits: four codes + 128 along K in an int32 word. weight: float32 [N, K], K a multiple of 4."""
    scales = _scales(weight, 127.0, dtype)
    codes = (weight / scales.float()).round().clamp(-128, 127) + 128
    return {"weight_packed": pack_bits(codes.to(torch.uint8), 8, 1), "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape)}


def _scales(weight: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """[N, 1], rounded to the dtype in which they are stored, so that codes are computed with the same values."""
    return (weight.abs().amax(1, keepdim=True) / largest).clamp_min(2.0**-14).to(dtype)
