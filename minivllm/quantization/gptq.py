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

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.errors import ModelError
from minivllm.families import Key, read
from minivllm.quantization.base import LinearMethod, Matmul, MethodOf, ParamSpec, StoredTensor
from minivllm.quantization.dense import DENSE
from minivllm.quantization.grouped import GroupedMatmul, grouped_bytes, spread
from minivllm.quantization.modules import by_name, contains_any, group_size, in_block, matched, one_of
from minivllm.quantization.parts import PartsMatmul

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops
    from minivllm.kernels.grouped import GroupedWeight

UNORDERED = -1  # every entry of a g_idx that a checkpoint lacks: groups are runs of neighboring inputs


@dataclass(frozen=True)
class GPTQMethod(LinearMethod):
    """See `LinearMethod`."""

    bits: int
    group: int  # -1: all inputs
    sym: bool  # every zero is 2^(bits - 1)
    desc_act: bool
    v1: bool  # zeros are stored minus one

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return f"GPTQ int{self.bits}"

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`."""
        def words(count: int) -> int:
            return -(-count * self.bits // 32)

        groups = 1 if self.group == -1 else -(-cols // self.group)
        columns = {"concat_dim": 1, "output_dim": 1, "input_dim": 0}
        return {"qweight": ParamSpec(tuple((words(cols), n) for n in rows), dtype="int32", dummy="bits", **columns),  # type: ignore[arg-type]
                "qzeros": ParamSpec(tuple((groups, words(n)) for n in rows), dtype="int32", dummy="bits", **columns),  # type: ignore[arg-type]
                "scales": ParamSpec(tuple((groups, n) for n in rows), dtype="float32", dummy=0.003, **columns),  # type: ignore[arg-type]
                "g_idx": ParamSpec(((cols,),) * len(rows), dtype="int32", output_dim=None, input_dim=0, dummy=float(UNORDERED))}

    def adapt(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """See `LinearMethod`. Some tools write no g_idx without desc_act."""
        if "g_idx" in tensors or "qweight" not in tensors or self.desc_act:
            return tensors
        like = tensors["qweight"]
        shape = (like.shape[0] * 32 // self.bits,)
        return {**tensors, "g_idx": StoredTensor(like.file, like.name, shape, "int32", lambda: _unordered(shape))}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> Matmul:
        """See `LinearMethod`."""
        from minivllm.kernels.grouped import GroupedWeight, smallest_exact
        from minivllm.quantization.packing import unpack_bits, unpack_gptq, unpack_gptq_zeros

        cols, qzeros = len(tensors["g_idx"]) // len(rows), tensors["qzeros"]
        codes = unpack_gptq(tensors["qweight"], self.bits)[:cols].t()
        zeros = (unpack_gptq_zeros(qzeros, self.bits) if self.v1 else unpack_bits(qzeros, self.bits, 1))[:, : sum(rows)].t()
        middle = 1 << self.bits - 1
        one_zero = self.sym and bool((zeros == middle).all())
        weight = GroupedWeight(
            codes=codes, bits=max(self.bits, 4), zeros=middle if one_zero else spread(zeros, self.group, cols).contiguous(),
            scales=spread(smallest_exact(tensors["scales"]).t(), self.group, cols).contiguous())
        orders = [self._order(g_idx) for g_idx in tensors["g_idx"].view(-1, cols)]
        if all(_equal(order, orders[0]) for order in orders):
            return _product(weight, orders[0], ops)
        starts = itertools.accumulate(rows, initial=0)
        return PartsMatmul([(_product(_some_rows(weight, start, n), order, ops), n)
                            for start, n, order in zip(starts, rows, orders, strict=False)])

    def _order(self, g_idx: Tensor) -> Tensor | None:
        """g_idx: [K] -> the inputs sorted by group, int32 [K]; None: they are sorted already."""
        import torch

        group = len(g_idx) if self.group == -1 else self.group
        sorted_groups = torch.arange(len(g_idx), device=g_idx.device) // group
        if bool((g_idx == UNORDERED).all()) or torch.equal(g_idx.long(), sorted_groups):
            return None
        groups, order = torch.sort(g_idx.long(), stable=True)
        if not torch.equal(groups, sorted_groups):
            raise ModelError(f"a g_idx of the weights does not divide its {len(g_idx)} inputs into groups of {group} (group_size in "
                             "quantization_config): correct group_size, or download the checkpoint again", "model")
        return order.int()

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int) -> int:
        """See `LinearMethod`. Parts of a fused layer share one order, which is so in checkpoints of all known tools."""
        order = 4 * cols if self.desc_act and 0 < self.group < cols else 0
        return order + grouped_bytes(sum(rows), cols, max(self.bits, 4), self.group, zero_bytes=0 if self.sym else 1)


def _unordered(shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.full(shape, UNORDERED, dtype=torch.int32)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.equal(b))


def _some_rows(weight: GroupedWeight, start: int, n: int) -> GroupedWeight:
    zeros = weight.zeros if isinstance(weight.zeros, int) else weight.zeros[start : start + n].contiguous()
    return dataclasses.replace(weight, codes=weight.codes[start : start + n], zeros=zeros,
                               scales=weight.scales[start : start + n].contiguous())


def _product(weight: GroupedWeight, order: Tensor | None, ops: Ops) -> GroupedMatmul:
    if order is None:
        return GroupedMatmul(weight, ops)
    return GroupedMatmul(dataclasses.replace(weight, codes=weight.codes.index_select(1, order)), ops, order)


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From a quantization_config with quant_method "gptq"."""
    one_of("gptq", "pack_dtype", read(config, Key("pack_dtype", str, "int32")), ("int32",))
    one_of("gptq", "is_marlin_format", read(config, Key("is_marlin_format", bool, False)), (False,))
    written = read(config, Key("checkpoint_format", str, None)) or read(config, Key("format", str, "gptq"))
    one_of("gptq", "checkpoint_format", written.lower(), ("gptq", "gptq_v2"))
    base = _method(config)
    dynamic: dict[str, Any] = read(config, Key("dynamic", dict, {}))
    only = [name for names in read(config, Key("modules_in_block_to_quantize", list, []))
            for name in (names if isinstance(names, list) else [names])]
    head = read(config, Key("lm_head", bool, False))
    overridden = {pattern: None if pattern.startswith("-:") else _method({**config, **_overrides(pattern, values)})
                  for pattern, values in dynamic.items()}

    def choose(name: str) -> LinearMethod:
        if not (in_block(name) or (head and name == "lm_head")) or (only and in_block(name) and not contains_any(name, only)):
            return DENSE
        for pattern, method in overridden.items():  # the first that matches counts
            if matched(name, pattern.removeprefix("-:").removeprefix("+:"), "dynamic"):
                return method or DENSE
        return base
    return by_name(choose)


def _method(config: Mapping[str, Any]) -> GPTQMethod:
    bits = one_of("gptq", "bits", read(config, Key("bits", int)), (2, 3, 4, 8))
    written = read(config, Key("checkpoint_format", str, None)) or read(config, Key("format", str, "gptq"))
    return GPTQMethod(bits, group_size(config), read(config, Key("sym", bool, True)), read(config, Key("desc_act", bool, False)),
                      v1=written.lower() == "gptq")


def _overrides(pattern: str, values: Any) -> Mapping[str, Any]:
    """The fields that GPTQModel's `dynamic` sets for the modules of a pattern."""
    if not isinstance(values, Mapping):
        raise ModelError(f"quantization_config: dynamic has no object of fields for {pattern!r}: correct it", "model")
    for field in ("format", "method", "quant_method", "pack_dtype", "adapter"):
        if field in values:
            one_of("gptq", f"{field} of dynamic", values[field], (None,))
    return values
