"""MXFP4 experts of gpt-oss: 4-bit floats (e2m1), each 32 inputs with one scale, a power of two (OCP Microscaling Formats 1.0, 2023).

    blocks [N, K / 2] uint8     two codes per byte, the first one in the low half
    scales [N, K / 32] uint8    exponent + 127

The weights are dequantized while they are loaded: every value is exact in bfloat16. Only experts are stored like this.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minivllm.families import LinearSpec
from minivllm.quantization.base import LinearMethod, Matmul, MethodOf, ParamSpec
from minivllm.quantization.dense import DENSE
from minivllm.quantization.modules import check_fields, listed, names

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops

GROUP = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; 8 to 15 are the same with a minus
DUMMY_BELOW = 128  # random bytes below it give scales of at most 1


class MXFP4Method(LinearMethod):
    """See `LinearMethod`."""

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`."""
        return {"blocks": ParamSpec(tuple((n, cols // 2) for n in rows), dtype="uint8", dummy="bits"),
                "scales": ParamSpec(tuple((n, cols // GROUP) for n in rows), dtype="uint8", dummy=DUMMY_BELOW)}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> Matmul:
        """See `LinearMethod`."""
        return DENSE.build({"weight": dequantize(tensors["blocks"], tensors["scales"])}, rows, ops)


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """-> [N, K] float32."""
    import torch

    values = torch.tensor([*VALUES, *(-value for value in VALUES)], device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(1)
    return torch.ldexp(values[codes.long()].unflatten(1, (-1, GROUP)), scales.int()[..., None] - 127).flatten(1)


METHOD = MXFP4Method()


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From a quantization_config with quant_method "mxfp4": every expert that is not excluded, and nothing else."""
    excluded = "modules_to_not_convert"
    check_fields("mxfp4", config, ("quant_method", excluded, "dequantize"))  # dequantize: how Transformers loads it
    dense = listed(names(config, excluded), excluded)

    def choose(linear: LinearSpec) -> LinearMethod:
        return METHOD if linear.dense and not dense(linear.checkpoint_names[0]) else DENSE
    return choose
