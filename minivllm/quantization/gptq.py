"""GPTQ: 2, 3, 4 or 8-bit codes with a float16 scale and a zero per group (Frantar et al. 2022), in the layout of AutoGPTQ.

    qweight [K * bits / 32, N] int32     one stream of bits down each column (see packing.py)
    qzeros  [groups, N * bits / 32] int32     minus one in checkpoint_format "gptq", exact in "gptq_v2"
    scales  [groups, N] float16     w[k, n] = (code - zero[g_idx[k], n]) * scale[g_idx[k], n]
    g_idx   [K] int32     group of each input

With `desc_act` the inputs were quantized in descending order of their activations, and neighbors in that order share a group. The
columns of the weight are sorted by group here, and the inputs are reordered at each product (`GroupedMatmul.order`). Codes of 2 and
3 bits are stored in 4 bits.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.errors import ModelError
from minivllm.families import Key, read
from minivllm.quantization.base import DUMMY_SCALE, LinearMethod, Matmul, MethodOf, ParamSpec, StoredTensor
from minivllm.quantization.dense import DENSE
from minivllm.quantization.grouped import grouped_bytes, spread
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
from minivllm.quantization.order import UNORDERED, order_bytes, ordered_matmul, unordered

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops

OF_MODULES = ("bits", "group_size", "sym", "desc_act", "static_groups")  # fields that `dynamic` can replace
FIELDS = frozenset((
    *OF_MODULES,
    "quant_method", "checkpoint_format", "format", "pack_dtype", "is_marlin_format", "modules_in_block_to_quantize",
    "block_name_to_quantize", "lm_head", "dynamic",
    "backend"))  # Transformers' kernel


@dataclass(frozen=True)
class GPTQMethod(LinearMethod):
    """See `LinearMethod`."""

    bits: int
    group: int  # -1: all inputs
    sym: bool | None  # every zero is 2^(bits - 1). None: very old files do not say it
    desc_act: bool  # inputs are in another order, as g_idx says
    v1: bool  # zeros are stored minus one

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return f"GPTQ int{self.bits}"

    @property
    def reorders_inputs(self) -> bool:
        """See `LinearMethod`."""
        return self.desc_act and self.group != -1

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`."""
        def words(count: int) -> int:
            return -(-count * self.bits // 32)

        middle = (1 << self.bits - 1) - self.v1
        word = sum(middle << shift for shift in range(0, 32, self.bits))
        zeros = float((word ^ 1 << 31) - (1 << 31)) if self.sym is not False and self.bits != 3 else "bits"  # as a signed number
        groups = 1 if self.group == -1 else -(-cols // self.group)
        columns = {"concat_dim": 1, "output_dim": 1, "input_dim": 0}
        return {"qweight": ParamSpec(tuple((words(cols), n) for n in rows), dtype="int32", dummy="bits", **columns),  # type: ignore[arg-type]
                "qzeros": ParamSpec(tuple((groups, words(n)) for n in rows), dtype="int32", dummy=zeros, **columns),  # type: ignore[arg-type]
                "scales": ParamSpec(tuple((groups, n) for n in rows), dtype="float32", dummy=DUMMY_SCALE, **columns),  # type: ignore[arg-type]
                "g_idx": ParamSpec(((cols,),) * len(rows), dtype="int32", output_dim=None, input_dim=0, dummy=float(UNORDERED))}

    def adapt(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """See `LinearMethod`. Some tools write no g_idx without desc_act."""
        if "g_idx" in tensors or "qweight" not in tensors or self.desc_act:
            return tensors
        like = tensors["qweight"]
        return {**tensors, "g_idx": unordered(like, like.shape[0] * 32 // self.bits)}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> Matmul:
        """See `LinearMethod`."""
        import torch

        from minivllm.kernels.grouped import GroupedWeight, smallest_exact
        from minivllm.quantization.packing import unpack_bits, unpack_gptq, unpack_gptq_zeros

        cols, qzeros = len(tensors["g_idx"]) // len(rows), tensors["qzeros"]
        codes = unpack_gptq(tensors["qweight"], self.bits)[:cols].t()
        words = qzeros.split([-(-n * self.bits // 32) for n in rows], dim=1)  # the last word of a part may have unused bits
        zeros = torch.cat([(unpack_gptq_zeros(part, self.bits) if self.v1 else unpack_bits(part, self.bits, 1))[:, :n]
                           for part, n in zip(words, rows, strict=True)], dim=1).t()
        middle = 1 << self.bits - 1
        one_zero = self.sym is not False and bool((zeros == middle).all())
        if self.sym and not one_zero and bool((zeros == zeros[0, 0]).all()):
            layout = "gptq" if self.v1 else "gptq_v2"
            raise ModelError(f"the zeros of its quantized weight are {int(zeros[0, 0])} as {layout} stores them, and with sym they are "
                             f"{middle}: correct checkpoint_format in quantization_config (gptq or gptq_v2), or sym", "model")
        weight = GroupedWeight(
            codes=codes, bits=max(self.bits, 4), zeros=middle if one_zero else spread(zeros, self.group, cols).contiguous(),
            scales=spread(smallest_exact(tensors["scales"]).t(), self.group, cols).contiguous())
        return ordered_matmul(weight, tensors["g_idx"], self.group, rows, ops)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        packed = grouped_bytes(sum(rows), cols, max(self.bits, 4), self.group, on_gpu, zeros=self.sym is False)
        return packed + order_bytes(self.desc_act, self.group, cols)


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From a quantization_config with quant_method "gptq"."""
    check_fields("gptq", config, FIELDS | RECORDED, INTEGERS)
    check_block_name("gptq", config)
    one_of("gptq", "pack_dtype", read(config, Key("pack_dtype", str, "int32")), ("int32",))
    one_of("gptq", "is_marlin_format", read(config, Key("is_marlin_format", bool, False)), (False,))
    base, override = _method(config), dynamic("gptq", config, OF_MODULES, _method)
    key = "modules_in_block_to_quantize"  # a list of names, or of lists of names
    only = names({key: [name for entry in read(config, Key(key, list, []))
                        for name in (entry if isinstance(entry, list) else [entry])]}, key)
    head = read(config, Key("lm_head", bool, False))

    def choose(name: str) -> LinearMethod:
        if not (in_block(name) or (head and name == "lm_head")) or (only and in_block(name) and not contains_any(name, only)):
            return DENSE
        return override(name) or base
    return by_name(choose)


def _method(config: Mapping[str, Any]) -> GPTQMethod:
    bits = one_of("gptq", "bits", read(config, Key("bits", int)), (2, 3, 4, 8))
    layout = one_of("gptq", "checkpoint_format", same(config, ("checkpoint_format", "format"), str, "gptq"), ("gptq", "gptq_v2"))
    # With static groups, the order decides in which order the inputs were rounded, and groups are runs of neighbors as without it.
    desc_act, static_groups = (read(config, Key(field, bool, False)) for field in ("desc_act", "static_groups"))
    return GPTQMethod(bits, group_size(config), read(config, Key("sym", bool, None)), desc_act and not static_groups, v1=layout == "gptq")
