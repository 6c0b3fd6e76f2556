"""Quantize an unquantized checkpoint while it is loaded: one layer at a time, so that there are never two copies of the model.

    fp8     e4m3 numbers with a scale per output; large products also quantize their inputs, with a scale per token
    int8    integers -127 .. 127 with a scale per output

The output head and the embedding table stay as they are.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from minivllm.quantization.base import LinearMethod, MethodOf, ParamSpec
from minivllm.quantization.dense import DENSE
from minivllm.quantization.grouped import GroupedMatmul, grouped_bytes
from minivllm.quantization.modules import by_name

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops
    from minivllm.kernels.grouped import GroupedWeight

SLICE = 1 << 24  # numbers quantized at a time, so that their float32 copies stay small
LARGEST = {"fp8": 448.0, "int8": 127.0}  # value of a code


@dataclass(frozen=True)
class OnlineMethod(LinearMethod):
    """See `LinearMethod`."""

    kind: Literal["fp8", "int8"]
    rows_in_any_order = True

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return self.kind

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`. The checkpoint holds plain matrices."""
        return DENSE.parameters(rows, cols)

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> GroupedMatmul:
        """See `LinearMethod`."""
        return GroupedMatmul(quantize(tensors["weight"], self.kind), ops)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        return grouped_bytes(sum(rows), cols, 8, -1, on_gpu, scale_bytes=4)


def quantize(weight: Tensor, kind: Literal["fp8", "int8"]) -> GroupedWeight:
    """weight: [N, K] -> 8-bit codes with a scale per output: the largest number of a row gets the largest code."""
    import torch

    from minivllm.kernels.grouped import GroupedWeight

    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn if kind == "fp8" else torch.uint8, device=weight.device)
    scales = weight.new_empty(len(weight), 1, dtype=torch.float32)
    step = max(1, SLICE // weight.shape[1])
    for at in range(0, len(weight), step):
        part = weight[at : at + step].float()
        # A row of zeros has any scale.
        scales[at : at + step] = scale = part.abs().amax(1, keepdim=True).div(LARGEST[kind]).clamp_min(torch.finfo(torch.float32).tiny)
        values = part / scale
        codes[at : at + step] = values if kind == "fp8" else values.round() + 128
    return GroupedWeight(codes=codes, bits=8, scales=scales, zeros=0 if kind == "fp8" else 128, quantize_input=kind == "fp8")


def method_of(kind: Literal["fp8", "int8"]) -> MethodOf:
    """The method of every layer of an unquantized checkpoint."""
    method = OnlineMethod(kind)
    return by_name(lambda name: DENSE if name == "lm_head" else method)
