"""bitsandbytes: 4-bit codes of a table of 16 numbers (nf4 or fp4), and LLM.int8.

    weight  uint8 [N * K / 2, 1]     two codes per byte, the first in the high half; rows of the matrix follow one another
    weight.absmax  [blocks] float32     w = table[code] * absmax of its block of 64; with double quantization uint8:
                                        absmax = nested_quant_map[absmax] * nested_absmax[block of 256] + nested_offset
    weight.quant_map  [16] float32      the table
    weight.quant_state.bitsandbytes__nf4  uint8     JSON: shape, blocksize, nested_offset, ...

    weight  int8 [N, K], SCB  [N] float32     LLM.int8: w = weight * SCB / 127

With the package bitsandbytes and a GPU, 4-bit weights stay packed and its kernels multiply. Otherwise they are dequantized on load.
"""
from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minivllm.errors import ModelError, NotSupportedYet, shown
from minivllm.families import Key, read
from minivllm.quantization.base import LinearMethod, Matmul, MethodOf, ParamSpec, StoredTensor
from minivllm.quantization.compressed_tensors import IntMethod
from minivllm.quantization.dense import DENSE
from minivllm.quantization.fp8 import reshaped
from minivllm.quantization.grouped import check_finite
from minivllm.quantization.modules import by_name, check_fields, listed, names, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops

PACKAGE = "bitsandbytes"
BLOCK = 64  # weights per absmax
SLICE = 1 << 18  # blocks dequantized at a time
STATE = "weight.quant_state.bitsandbytes__"
FIELDS = frozenset((
    "quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage", "llm_int8_skip_modules",
    # The tensors say whether scales are quantized too. Products are in the model's dtype, LLM.int8's without integer inputs.
    "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload"))
COMPUTE = ("float32", "float16", "bfloat16")


class Bnb4Matmul(Matmul):
    """4-bit codes, multiplied by the package's kernels."""

    __slots__ = ("_matmul", "codes", "state")

    def __init__(self, codes: Tensor, state: Any) -> None:
        """codes: [N * K / 2, 1] uint8. state: a QuantState of the package."""
        self.codes, self.state, self._matmul = codes, state, importlib.import_module(PACKAGE).matmul_4bit

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K] -> [T, N]."""
        self.state.dtype = x.dtype  # in which the package dequantizes
        y: Tensor = self._matmul(x, self.codes.t(), quant_state=self.state, bias=bias)
        return y


@dataclass(frozen=True)
class Bnb4Method(LinearMethod):
    """A 4-bit checkpoint. See `LinearMethod`."""

    kind: str  # nf4 or fp4
    packed: bool  # on the device; else dequantized

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return self.kind if self.packed else ""

    @property
    def notice(self) -> str | None:
        """See `LinearMethod`."""
        return None if self.packed else (f"the {self.kind} weights of this checkpoint are dequantized while they are loaded: they stay "
                                         f"packed only on a GPU with the package {PACKAGE}")

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`. Rows that end within a block are dequantized."""
        if not self._packs(cols):
            return DENSE.parameters(rows, cols)
        return {"codes": ParamSpec(tuple((n, cols // 2) for n in rows), dtype="uint8", dummy="bits"),
                "absmax": ParamSpec(tuple((n, cols // BLOCK) for n in rows), dtype="float32", dummy=0.05)}

    def _packs(self, cols: int) -> bool:
        return self.packed and cols % BLOCK == 0

    def adapt(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """See `LinearMethod`. Reads the state, which holds the shape."""
        stored = {suffix: tensor for suffix, tensor in tensors.items() if suffix.startswith("weight")}
        state = stored.get(f"{STATE}{self.kind}")
        if state is None or not {"weight", "weight.absmax", "weight.quant_map"} <= stored.keys():
            return tensors
        facts = read_state(state, stored)
        rows, cols = facts["shape"]
        others = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in stored}
        if not self._packs(cols):
            return {**others, "weight": replace(stored["weight"], shape=(rows, cols), dtype="float32",
                                                read=lambda: dequantize(stored, facts).view(rows, cols))}
        shape, repeats = (rows, cols // BLOCK), facts["blocksize"] // BLOCK
        absmax = replace(stored["weight.absmax"], shape=shape, dtype="float32",
                         read=lambda: _absmax(stored, facts).repeat_interleave(repeats).view(shape))
        return {**others, "codes": reshaped(stored["weight"], (rows, cols // 2)), "absmax": absmax}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> Matmul:
        """See `LinearMethod`."""
        if "weight" in tensors:
            return DENSE.build(tensors, rows, ops)
        codes, functional = tensors["codes"], importlib.import_module(f"{PACKAGE}.functional")
        state = functional.QuantState(
            absmax=tensors["absmax"].flatten(), shape=(len(codes), codes.shape[1] * 2), blocksize=BLOCK, quant_type=self.kind,
            code=functional.get_4bit_type(self.kind, device=codes.device))
        return Bnb4Matmul(codes.view(-1, 1), state)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        return packed_bytes(sum(rows), cols) if self._packs(cols) else sum(rows) * cols * itemsize


@dataclass(frozen=True)
class OnlineBnb4Method(LinearMethod):
    """Plain matrices that the package quantizes to nf4 while they are loaded. See `LinearMethod`."""

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return "nf4"

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`."""
        return DENSE.parameters(rows, cols)

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> Matmul:
        """See `LinearMethod`."""
        functional = importlib.import_module(f"{PACKAGE}.functional")
        return Bnb4Matmul(*functional.quantize_4bit(tensors["weight"], blocksize=BLOCK, quant_type="nf4"))

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        return packed_bytes(sum(rows), cols)


@dataclass(frozen=True)
class LLMInt8Method(IntMethod):
    """An LLM.int8 checkpoint, with 16-bit inputs: rows of integers with a scale each. See `LinearMethod`."""

    def adapt(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """See `LinearMethod`. weight_format 0 is the plain order of rows. Others are unexpected tensors."""
        found = dict(tensors)
        if "weight_format" in found and not bool(found["weight_format"].read().any()):
            del found["weight_format"]
        if "SCB" in found:
            scb = found.pop("SCB")
            found["weight_scale"] = reshaped(replace(scb, dtype="float32", read=lambda: scb.read().float() / 127), (*scb.shape, 1))
        return found


def packed_bytes(rows: int, cols: int) -> int:
    """Bytes of a 4-bit weight: codes, an absmax per block, and the table of 16 numbers."""
    return rows * cols // 2 + 4 * -(-rows * cols // BLOCK) + 4 * 16


def read_state(state: StoredTensor, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The JSON object in a state tensor. Raises `ModelError` if a field is not a size, or if the other tensors do not have these sizes."""
    facts: Any = None
    with contextlib.suppress(ValueError, TypeError):
        facts = json.loads(bytes(state.read().tolist()))
    nested = "weight.nested_absmax" in stored
    sizes = {"blocksize": 1, "shape": 2} | ({"nested_blocksize": 1} if nested else {})
    for field, count in sizes.items():
        value = facts.get(field) if isinstance(facts, dict) else facts
        values = value if isinstance(value, list) else [value]
        if len(values) != count or any(type(size) is not int or size < 1 for size in values):
            raise _damaged(state, f"{field} must be {count} size{'s' * (count > 1)} of at least 1, got {shown(value)}")
    if nested and type(facts.get("nested_offset")) is not float:
        raise _damaged(state, f"nested_offset must be a number with a point, got {shown(facts.get('nested_offset'))}")
    size = math.prod(facts["shape"])
    blocks = -(-size // facts["blocksize"])
    counts = {"weight": -(-size // 2), "weight.absmax": blocks, "weight.quant_map": 16}
    if nested:
        counts |= {"weight.nested_absmax": -(-blocks // facts["nested_blocksize"]), "weight.nested_quant_map": 256}
    for suffix, count in counts.items():
        found = math.prod(stored[suffix].shape) if suffix in stored else 0
        if found != count:
            raise _damaged(state, f"by its shape and block sizes, {suffix} has {count} numbers, not {found}")
    return dict(facts)


def _damaged(state: StoredTensor, what: str) -> ModelError:
    return ModelError(f"{state.name} in {state.file} does not describe its weight: {what}: download the checkpoint again", "model")


def dequantize(stored: Mapping[str, StoredTensor], facts: Mapping[str, Any]) -> Tensor:
    """The tensors of a 4-bit weight, and its state -> [N * K] float32."""
    import torch

    table = stored["weight.quant_map"].read().float()
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)  # byte -> its two numbers: [256, 2]
    codes, absmax = stored["weight"].read().flatten(), _absmax(stored, facts)
    half = facts["blocksize"] // 2  # bytes per block
    out = torch.empty(len(codes), 2)
    for at in range(0, len(absmax), SLICE):
        part = codes[at * half : (at + SLICE) * half]
        scale = absmax[at : at + SLICE].repeat_interleave(half)[: len(part), None]  # the last block may be smaller
        torch.mul(pairs[part.int()], scale, out=out[at * half : at * half + len(part)])
    return out.flatten()


def _absmax(stored: Mapping[str, StoredTensor], facts: Mapping[str, Any]) -> Tensor:
    """-> [blocks] float32."""
    absmax = stored["weight.absmax"].read()
    if "weight.nested_absmax" in stored:
        table, scale = (stored[f"weight.nested_{name}"].read().float() for name in ("quant_map", "absmax"))
        absmax = table[absmax.int()] * scale.repeat_interleave(facts["nested_blocksize"])[: len(absmax)] + facts["nested_offset"]
    check_finite(absmax)
    return absmax.float()


def is_installed() -> bool:
    """Whether the package is here."""
    return importlib.util.find_spec(PACKAGE) is not None


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From a quantization_config with quant_method "bitsandbytes"."""
    eight = read(config, Key("load_in_8bit", bool, False))
    four = one_of(PACKAGE, "load_in_4bit", read(config, Key("load_in_4bit", bool, False)), (not eight,))
    check_fields(PACKAGE, config, FIELDS, {"_load_in_4bit": (four,), "_load_in_8bit": (eight,),
                                           "llm_int8_has_fp16_weight": (False,) if eight else (False, True)})
    one_of(PACKAGE, "bnb_4bit_compute_dtype", read(config, Key("bnb_4bit_compute_dtype", str, COMPUTE[0])), COMPUTE)
    read(config, Key("bnb_4bit_use_double_quant", bool, False))
    read(config, Key("llm_int8_threshold", float, 0.0))
    skipped = "llm_int8_skip_modules"
    dense = listed(names(config, skipped) if config.get(skipped) is not None else ["lm_head"], skipped)
    if eight:
        method: LinearMethod = LLMInt8Method(8, -1, symmetric=True, packed=False, quantized_inputs=True, scale_bytes=4)
    else:
        kind = one_of(PACKAGE, "bnb_4bit_quant_type", read(config, Key("bnb_4bit_quant_type", str, "fp4")), ("nf4", "fp4"))
        one_of(PACKAGE, "bnb_4bit_quant_storage", read(config, Key("bnb_4bit_quant_storage", str, "uint8")), ("uint8",))
        method = Bnb4Method(kind, packed=is_installed() and _on_gpu())
    return by_name(lambda name: DENSE if dense(name) else method)


def online() -> MethodOf:
    """The method of every layer of an unquantized checkpoint."""
    if not is_installed():
        raise NotSupportedYet(f"quantization 'bitsandbytes' of an unquantized checkpoint needs the package {PACKAGE}: run `pip install "
                              f"{PACKAGE}`, or use 'fp8' or 'int8'", "quantization")
    method = OnlineBnb4Method()
    return by_name(lambda name: DENSE if name == "lm_head" else method)
