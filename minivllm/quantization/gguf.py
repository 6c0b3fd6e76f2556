"""GGUF: rows of blocks, each with its scales and small integers (codes), in the layouts of llama.cpp. Weights stay packed.

    Q4_1     scale, min | 16 bytes of codes                                              32 weights
    Q4_K     super-scale, super-min | 8 scales and 8 mins of 6 bits | 128 bytes          256 weights in 8 groups
    Q6_K     128 bytes of low codes | 64 bytes of high codes | 16 scales | super-scale   256 weights in 16 groups
    MXFP4    exponent | 16 bytes of codes                                                32 weights: gpt-oss's experts

A code of more than four bits is stored as its low four bits and, elsewhere in the block, the rest. Types that are not in `PACKED` are
dequantized while they are loaded. Source of the layouts: ggml's `ggml-common.h`, and `gguf.quants`, which is the oracle of the tests.
"""
from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from minivllm.errors import ModelError
from minivllm.quantization import mxfp4
from minivllm.quantization.base import LinearMethod, Matmul, MethodOf, ParamSpec
from minivllm.quantization.dense import DENSE
from minivllm.quantization.grouped import GroupedMatmul, grouped_bytes
from minivllm.quantization.parts import PartsMethod

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops
    from minivllm.kernels.grouped import GroupedWeight

SLICE = 1 << 24  # codes unpacked at a time, so that temporary tensors stay small
DUMMY_STD = 0.02  # standard deviation of random weights


@dataclass(frozen=True)
class Block:
    """The layout of one type.

    fields: name -> bytes, in their order in a block: scale and min (float16; super-scale and super-min if the block has more scales),
    six (scales and mins of 6 bits), scales (int8), low and high (codes).
    """

    weights: int
    bits: int  # of a code
    fields: Mapping[str, int]
    group: int = 32  # weights per scale
    zero: int = 0
    # Byte i holds the codes of weights i, i + run, i + 2 run, ..., lowest bits first; after `run` bytes the next weights follow.
    low_run: int = 16
    high_run: int = 1

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.fields.values())

    @property
    def dummy(self) -> tuple[int | None, ...]:
        """Bytes of random weights with the mean 0: see `ParamSpec`. Codes, and scales and mins of few bits, are random (None)."""
        middle, code = (2**self.bits - 1) / 2, 2**self.bits / 12**0.5  # mean and standard deviation of random codes
        unit = code  # standard deviation of weights with the scale 1
        if "scales" in self.fields:
            unit *= 2**8 / 12**0.5
        if "six" in self.fields:  # (code - middle) * scale + middle * (scale - min), with scales and mins from 0 to 63
            unit = ((code * 63 / 3**0.5) ** 2 + 2 * (middle * 64 / 12**0.5) ** 2) ** 0.5
        scale = DUMMY_STD / unit
        numbers = {"scale": scale, "min": middle * scale if "six" in self.fields else -middle * scale}
        found: list[int | None] = []
        for name, size in self.fields.items():
            found += struct.pack("<e", numbers[name]) if name in numbers else [None] * size
        return tuple(found)


BLOCKS: Mapping[str, Block] = MappingProxyType({
    "Q4_0": Block(32, 4, {"scale": 2, "low": 16}, zero=8),
    "Q4_1": Block(32, 4, {"scale": 2, "min": 2, "low": 16}),
    "Q5_0": Block(32, 5, {"scale": 2, "high": 4, "low": 16}, zero=16),
    "Q5_1": Block(32, 5, {"scale": 2, "min": 2, "high": 4, "low": 16}),
    "Q8_0": Block(32, 8, {"scale": 2, "low": 32}, zero=128),
    "Q4_K": Block(256, 4, {"scale": 2, "min": 2, "six": 12, "low": 128}, low_run=32),
    "Q5_K": Block(256, 5, {"scale": 2, "min": 2, "six": 12, "high": 32, "low": 128}, low_run=32, high_run=32),
    "Q6_K": Block(256, 6, {"low": 128, "high": 64, "scales": 16, "scale": 2}, group=16, zero=32, low_run=64, high_run=32),
})


@dataclass(frozen=True)
class GGUFMethod(LinearMethod):
    """Weights of one type. See `LinearMethod`."""

    kind: str
    rows_in_any_order = True
    block: Block = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", BLOCKS[self.kind])

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return self.kind

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """The blocks as bytes."""
        width = cols // self.block.weights * self.block.size
        return {"weight": ParamSpec(tuple((n, width) for n in rows), dtype="uint8", dummy=self.block.dummy)}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> GroupedMatmul:
        """See `LinearMethod`."""
        return GroupedMatmul(unpack(tensors["weight"], self.block), ops)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        fields, super_group = self.block.fields, 256 if self.block.weights == 256 else 0
        each = 1 if super_group else 2  # bytes of a scale
        return grouped_bytes(sum(rows), cols, self.block.bits, self.block.group, on_gpu, scale_bytes=each,
                             mins="min" in fields, super_group=super_group)


def unpack(raw: Tensor, block: Block) -> GroupedWeight:
    """Rows of blocks, [N, bytes] uint8 -> the weight [N, K]."""
    import torch

    from minivllm.kernels.grouped import GroupedWeight

    blocks = raw.unflatten(1, (-1, block.size))  # [N, blocks, bytes]
    codes = raw.new_empty(len(raw), blocks.shape[1] * block.weights)
    step = max(1, SLICE // codes.shape[1])
    for at in range(0, len(raw), step):
        codes[at : at + step] = _codes(_fields(blocks[at : at + step], block), block).flatten(1)
    fields = _fields(blocks, block)
    scale, low = (fields[name].contiguous().view(torch.float16).flatten(1) if name in fields else None for name in ("scale", "min"))
    assert scale is not None
    if "six" in fields:
        scales, mins = (six.flatten(1) for six in _six_bits(fields["six"]))
        return GroupedWeight(codes=codes, bits=block.bits, scales=scales, mins=mins, super_scales=scale, super_mins=low)
    if "scales" in fields:
        scales = fields["scales"].contiguous().view(torch.int8).flatten(1)
        return GroupedWeight(codes=codes, bits=block.bits, scales=scales, zeros=block.zero, super_scales=scale)
    return GroupedWeight(codes=codes, bits=block.bits, scales=scale, zeros=block.zero, mins=None if low is None else -low)


class MXFP4BlocksMethod(LinearMethod):
    """Experts in MXFP4: the codes of `mxfp4.MXFP4Method` in llama.cpp's order, with the exponent in front of each block."""

    type_name = "MXFP4"

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """The blocks as bytes. Random ones have the exponent 2^-7, which makes weights of about `DUMMY_STD`."""
        width = cols // mxfp4.GROUP * MXFP4_SIZE
        return {"weight": ParamSpec(tuple((n, width) for n in rows), dtype="uint8", dummy=(127 - 7, *[None] * (MXFP4_SIZE - 1)))}

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> Matmul:
        """See `LinearMethod`."""
        blocks, scales = repacked_mxfp4(tensors["weight"])
        return mxfp4.METHOD.build({"blocks": blocks, "scales": scales}, rows, ops)


MXFP4_SIZE = 1 + mxfp4.GROUP // 2  # bytes of a block
PACKED: Mapping[str, LinearMethod] = MappingProxyType({**{kind: GGUFMethod(kind) for kind in BLOCKS}, "MXFP4": MXFP4BlocksMethod()})


def repacked_mxfp4(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of MXFP4 blocks, [N, bytes] uint8 -> blocks [N, K / 2] and scales [N, K / 32] of `mxfp4`.

        llama.cpp    exponent | w0 w16 | w1 w17 | .. | w15 w31        here    w0 w1 | w2 w3 | .. | w30 w31        low half first
    """
    import torch

    each = raw.unflatten(1, (-1, MXFP4_SIZE))
    codes = torch.cat((each[..., 1:] & 15, each[..., 1:] >> 4), dim=-1)  # [N, K / 32, 32]
    return (codes[..., ::2] | codes[..., 1::2] << 4).flatten(1), each[..., 0].contiguous()


def _fields(blocks: Tensor, block: Block) -> dict[str, Tensor]:
    """[.., bytes of a block] -> views [.., bytes of the field]."""
    return dict(zip(block.fields, blocks.split(list(block.fields.values()), dim=-1), strict=True))


def _codes(fields: Mapping[str, Tensor], block: Block) -> Tensor:
    """[.., weights of a block] uint8."""
    if block.bits == 8:
        return fields["low"] ^ 128  # int8 + 128
    codes = _split(fields["low"], 4, block.low_run)
    if "high" in fields:
        codes |= _split(fields["high"], block.bits - 4, block.high_run) << 4
    return codes


def _split(packed: Tensor, bits: int, run: int) -> Tensor:
    """Codes of `bits` bits, [.., n] -> [.., n * 8 / bits]. Each run of bytes holds its lowest codes first, then the next ones, ..."""
    import torch

    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = packed.unflatten(-1, (-1, 1, run)) >> shifts[:, None]
    return codes.bitwise_and_((1 << bits) - 1).flatten(-3)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 mins. The last four of each lack two bits, which are the highest bits of the first four.

        bytes 0-3: scales 0-3     bytes 4-7: mins 0-3     bytes 8-11: scales 4-7 (low half) and mins 4-7 (high half)
    """
    import torch

    first, second, third = packed.split(4, dim=-1)
    scales = torch.cat([first & 63, third & 15 | first >> 2 & 48], dim=-1)
    mins = torch.cat([second & 63, third >> 4 | second >> 2 & 48], dim=-1)
    return scales, mins


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From {"quant_method": "gguf", "types": {"layers.0.mlp.up_proj": "Q4_K", ..}}, which `models.gguf` writes."""
    if not isinstance(types := config.get("types"), Mapping):
        raise ModelError("quantization_config: quant_method 'gguf' stands in no config.json: name the .gguf file as the model", "model")
    found: Mapping[str, str] = types
    return lambda linear: PartsMethod.of(tuple(PACKED.get(found.get(name, ""), DENSE) for name in linear.checkpoint_names))
