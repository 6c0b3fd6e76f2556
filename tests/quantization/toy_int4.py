"""A second linear method, in one file: group-wise int4, packed and transposed as in checkpoints of real methods.

    qweight  [K, N / 2] uint8     two outputs per byte, the even one in the low half
    scales   [K / GROUP, N]       weight = (q - zero) * scale
    zeros    [K / GROUP, N] uint8
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.families import LinearSpec
from minivllm.kernels import Ops
from minivllm.quantization.base import LinearMethod, Matmul, MethodOf, ParamSpec
from minivllm.quantization.dense import DENSE

GROUP = 16


class ToyInt4(LinearMethod):
    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        def tensor(shape: Any, dtype: str, dummy: Any) -> ParamSpec:
            return ParamSpec(tuple(shape(n) for n in rows), concat_dim=1, dtype=dtype, output_dim=1, input_dim=0, dummy=dummy)

        return {"qweight": tensor(lambda n: (cols, n // 2), "uint8", "bits"),
                "scales": tensor(lambda n: (cols // GROUP, n), "float32", 0.01),
                "zeros": tensor(lambda n: (cols // GROUP, n), "uint8", 8.0)}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> ToyInt4Matmul:
        return ToyInt4Matmul(**tensors)


class ToyInt4Matmul(Matmul):
    """Dequantizes for each product. It has no fused kernels."""

    def __init__(self, qweight: Tensor, scales: Tensor, zeros: Tensor) -> None:
        self.tensors = qweight, scales, zeros

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, dequantize(*self.tensors).to(x.dtype), bias)


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """This method for every layer except the output head, which most methods leave unquantized."""
    assert config["group_size"] == GROUP
    method = ToyInt4()

    def choose(linear: LinearSpec) -> LinearMethod:
        return DENSE if linear.name in ("embed", "head") else method

    return choose


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """weight: [N, K] -> the three tensors."""
    groups = weight.t().reshape(-1, GROUP, len(weight))  # [K / GROUP, GROUP, N]
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).clamp_min(1e-8)
    zeros = (-low / scales).round().clamp(0, 15)
    q = ((groups / scales[:, None]).round() + zeros[:, None]).clamp(0, 15).to(torch.uint8).reshape(-1, len(weight))
    return {"qweight": (q[:, ::2] | q[:, 1::2] << 4).contiguous(), "scales": scales.contiguous(), "zeros": zeros.to(torch.uint8)}


def dequantize(qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The three tensors -> weight: [N, K]."""
    q = torch.stack((qweight & 15, qweight >> 4), dim=-1).reshape(len(qweight), -1).float()
    groups = (q.reshape(-1, GROUP, q.shape[1]) - zeros.float()[:, None]) * scales[:, None]
    return groups.reshape(-1, q.shape[1]).t()
