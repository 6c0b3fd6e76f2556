"""AWQ: 4-bit codes with a float16 scale and a 4-bit zero per group (Lin et al. 2023), in the layout of AutoAWQ's `gemm` kernels.

    qweight [K, N / 8] int32     eight outputs per word, in AWQ's order
    qzeros  [K / group, N / 8] int32
    scales  [K / group, N] float16     w = (code - zero) * scale
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.errors import NotSupportedYet
from minivllm.families import Key, read
from minivllm.quantization.base import DUMMY_SCALE, LinearMethod, MethodOf, ParamSpec
from minivllm.quantization.dense import DENSE
from minivllm.quantization.grouped import GroupedMatmul, grouped_bytes, spread
from minivllm.quantization.modules import (
    INTEGERS,
    RECORDED,
    by_name,
    check_block_name,
    check_fields,
    contains_any,
    dynamic,
    group_size,
    in_block,
    names,
    one_of,
    same,
)

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops

BITS = 4
# Transformers' names of kernels for the layout above. "llm-awq" is another layout.
BACKENDS = ("auto", "autoawq", "auto_trainable", "gemm", "gemm_triton", "machete", "marlin", "exllama_v1", "exllama_v2", "torch_awq",
            "torch_fused_awq")
FIELDS = frozenset((
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "checkpoint_format", "backend",
    "pack_dtype", "modules_to_not_convert", "block_name_to_quantize", "lm_head", "dynamic",
    "sym", "desc_act",  # of GPTQModel and Transformers. A file has zeros with either `sym`, and its inputs are always in order
    "do_fuse", "fuse_max_seq_len", "modules_to_fuse"))  # Transformers' kernels


@dataclass(frozen=True)
class AWQMethod(LinearMethod):
    """See `LinearMethod`."""

    group: int  # -1: all inputs

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return "AWQ int4"

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`."""
        if any(n % (32 // BITS) for n in rows):
            raise NotSupportedYet(f"AWQ stores {32 // BITS} outputs in a word, and a layer has {list(rows)}, which this does not divide: "
                                  "use a checkpoint in another format", "model")

        def tensor(k: int, per_word: int, dtype: str, dummy: str | float = "bits") -> ParamSpec:
            return ParamSpec(tuple((k, n // per_word) for n in rows), concat_dim=1, dtype=dtype, output_dim=1, input_dim=0,
                             dummy=dummy)  # type: ignore[arg-type]

        groups = 1 if self.group == -1 else -(-cols // self.group)
        return {"qweight": tensor(cols, 32 // BITS, "int32"), "qzeros": tensor(groups, 32 // BITS, "int32"),
                "scales": tensor(groups, 1, "float32", DUMMY_SCALE)}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> GroupedMatmul:
        """See `LinearMethod`."""
        from minivllm.kernels.grouped import GroupedWeight, smallest_exact
        from minivllm.quantization.packing import unpack_awq

        codes = unpack_awq(tensors["qweight"]).t()
        scales, zeros = (spread(t.t().contiguous(), self.group, codes.shape[1])
                         for t in (smallest_exact(tensors["scales"]), unpack_awq(tensors["qzeros"])))
        return GroupedMatmul(GroupedWeight(codes=codes, bits=BITS, scales=scales, zeros=zeros), ops)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        return grouped_bytes(sum(rows), cols, BITS, self.group, on_gpu, zeros=True)


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From a quantization_config with quant_method "awq". AutoAWQ's own file has other names for two fields."""
    check_fields("awq", config, FIELDS | RECORDED, INTEGERS)
    check_block_name("awq", config)
    read(config, Key("zero_point", bool, True))
    for field in ("checkpoint_format", "format", "version"):
        one_of("awq", field, (read(config, Key(field, str, None)) or "gemm").lower(), ("gemm",))
    one_of("awq", "backend", (read(config, Key("backend", str, None)) or "auto").lower(), BACKENDS)
    one_of("awq", "pack_dtype", read(config, Key("pack_dtype", str, "int32")), ("int32",))
    method, override = _method(config), dynamic("awq", config, ("bits", "group_size", "sym", "desc_act"), _method)
    dense = names(config, "modules_to_not_convert")  # AutoAWQ leaves out each module whose name contains one of these
    head = read(config, Key("lm_head", bool, False))

    def choose(name: str) -> LinearMethod:
        if not (in_block(name) or (head and name == "lm_head")) or contains_any(name, dense):
            return DENSE
        return override(name) or method
    return by_name(choose)


def _method(config: Mapping[str, Any]) -> AWQMethod:
    one_of("awq", "bits", same(config, ("bits", "w_bit"), int, BITS), (BITS,))
    same(config, ("group_size", "q_group_size"), int, None)
    return AWQMethod(group_size(config, "q_group_size" if "q_group_size" in config and "group_size" not in config else "group_size"))
