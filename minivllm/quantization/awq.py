"""AWQ: 4-bit codes with a float16 scale and a 4-bit zero per group (Lin et al. 2023), in the layout of AutoAWQ's `gemm` kernels.

    qweight [K, N / 8] int32     eight outputs per word, in AWQ's order
    qzeros  [K / group, N / 8] int32
    scales  [K / group, N] float16     w = (code - zero) * scale
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.quantization.base import LinearMethod, MethodOf, ParamSpec
from minivllm.quantization.dense import DENSE
from minivllm.quantization.grouped import GroupedMatmul, grouped_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops

BITS = 4


@dataclass(frozen=True)
class AWQMethod(LinearMethod):
    """See `LinearMethod`."""

    group: int

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return "AWQ int4"

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`."""
        def tensor(k: int, per_word: int, dtype: str, dummy: str | float = "bits") -> ParamSpec:
            return ParamSpec(tuple((k, n // per_word) for n in rows), concat_dim=1, dtype=dtype, output_dim=1, input_dim=0,
                             dummy=dummy)  # type: ignore[arg-type]

        groups = cols // self.group
        return {"qweight": tensor(cols, 32 // BITS, "int32"), "qzeros": tensor(groups, 32 // BITS, "int32"),
                "scales": tensor(groups, 1, "float16", 0.003)}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> GroupedMatmul:
        """See `LinearMethod`."""
        from minivllm.kernels.grouped import GroupedWeight
        from minivllm.quantization.packing import unpack_awq

        return GroupedMatmul(GroupedWeight(
            codes=unpack_awq(tensors["qweight"]).t(), bits=BITS, scales=tensors["scales"].t().contiguous(),
            zeros=unpack_awq(tensors["qzeros"]).t().contiguous()), ops)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int) -> int:
        """See `LinearMethod`."""
        return grouped_bytes(sum(rows), cols, BITS, self.group, zero_bytes=1)


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From a quantization_config with quant_method "awq"."""
    method = AWQMethod(config["group_size"])
    return lambda linear: DENSE if linear.name in ("embed", "head") else method
