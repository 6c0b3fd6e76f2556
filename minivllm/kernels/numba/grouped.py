"""Products with packed weights on a CPU: a few rows directly from the codes, many rows by dense products with parts of the weight.

For a few rows a product takes as long as reading the weight, so that 4 bits are several times as fast as 16. For many rows arithmetic
counts, and PyTorch's products are best at it: tiles of outputs are dequantized into a buffer that fits the caches, and multiplied there.
Weights that the kernels do not cover, such as rare shapes, stay in the reference's layout and are computed by it.
"""
from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from minivllm.kernels.grouped import GroupedWeight, dequantize
from minivllm.kernels.numba import grouped_kernels as code
from minivllm.kernels.numba import rows
from minivllm.kernels.numba.grouped_tiles import FLOAT16, FLOAT32, FP8, INT8, MINS, ONE_ZERO, TILE, UINT8, ZEROS
from minivllm.kernels.numba.threads import Arguments, Kernel, converts_float16
from minivllm.kernels.reference import grouped as reference
from minivllm.kernels.reference.linear import can_pack
from minivllm.kernels.tuning import CPU_DENSE_BYTES, CPU_PACKED_ROWS

KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # of x
PACKED_CODES = 1 << 22  # codes that are rearranged at a time: bounds the memory of packing


@dataclass(frozen=True, slots=True)
class PackedTiles:
    """A weight [N, K] in the layout of `grouped_tiles`. N is padded to whole tiles."""

    shape: tuple[int, int]
    form: tuple[int, int, int]  # bits, how scales are stored, kind of offsets
    zero: int  # of all codes, unless there are offsets
    group: int
    words: Tensor  # [tiles, K / 8 or K / 4, 16] int32
    high: Tensor | None  # [tiles, K / 32 or K / 16, 16] int32
    scales: Tensor  # [tiles, K / group, 16]
    offsets: Tensor | None  # the same
    supers: Tensor | None  # [tiles, super-groups, 1 or 2, 16] float16
    args: bytes  # the kernels' arguments about this weight
    product: Kernel
    values: Kernel


class _Scratch(threading.local):
    """Memory that is used again by each call of a thread."""

    def __init__(self) -> None:
        self.args = Arguments(code.NUM_ARGS)
        self._memory: dict[torch.dtype, Tensor] = {}

    def take(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] of any content, until the next call with this dtype."""
        memory = self._memory.get(dtype)
        if memory is None or len(memory) < size:
            memory = self._memory[dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return memory[:size]


_scratch = _Scratch()


# --- packing -------------------------------------------------------------------------------------------------------


def pack_groups(weight: GroupedWeight) -> PackedTiles | reference.PackedGroups:
    """Pack a weight for the kernels, or for the reference if they do not cover it. Compiles the kernels that it needs."""
    original, weight = weight, _fp8_octets(weight) if weight.codes.dtype == torch.float8_e4m3fn else weight
    form = _form_of(weight)
    if form is None:
        return reference.pack_groups(original)
    if original is not weight:
        form = *form[:2], FP8
    (n, k), bits = weight.shape, form[0]
    tiles = -(-n // TILE)
    words = torch.empty(tiles, k * (8 if bits == 8 else 4) // 32, TILE, dtype=torch.int32, device="cpu")
    high = torch.empty(tiles, k * (bits - 4) // 32, TILE, dtype=torch.int32, device="cpu") if bits in (5, 6) else None
    step = max(1, PACKED_CODES // (k * TILE))
    for first in range(0, tiles, step):
        codes = weight.codes[first * TILE : (first + step) * TILE]
        low = codes if bits == 8 else (codes[:, ::2] & 15) | codes[:, 1::2] << 4
        words[first : first + step] = _tiles(low.contiguous().view(torch.int32))
        if high is not None:
            high[first : first + step] = _tiles(_high_bits(codes >> 4, bits - 4))
    number = {FLOAT16: torch.float16, FLOAT32: torch.float32, UINT8: torch.uint8, INT8: torch.int8}[form[1]]
    scales = _tiles(weight.scales.to(number))
    offsets = supers = None
    if not isinstance(weight.zeros, int):
        offsets = _tiles(weight.zeros)
    elif weight.mins is not None:
        offsets = _tiles(weight.mins.to(number))
    if weight.super_scales is not None:
        both = [weight.super_scales] if weight.super_mins is None else [weight.super_scales, weight.super_mins]
        supers = _tiles(torch.stack(both, dim=2).flatten(1)).view(tiles, -1, len(both), TILE)
    zero = weight.zeros if isinstance(weight.zeros, int) else 0
    args: list[int] = []
    for t in (words, high, scales, offsets, supers):
        args += [0, 0] if t is None else [t.data_ptr(), t.stride(0) * t.itemsize]
    num_supers, groups, codes_of_word = 1 if supers is None else supers.shape[1], scales.shape[1], 4 if bits == 8 else 8
    args += [num_supers, groups // num_supers, weight.group // codes_of_word, codes_of_word, weight.group]
    code.inputs_kernel()
    return PackedTiles(weight.shape, form, zero, weight.group, words, high, scales, offsets, supers,
                       code.WEIGHT_ARGS.pack(*args, zero), code.product_kernel(*form), code.values_kernel(*form))


def _fp8_octets(weight: GroupedWeight) -> GroupedWeight:
    """An fp8 weight with its codes as bytes and a row of scales per output. Unchanged if it contains NaN: kernels would lose it."""
    octets = weight.codes.view(torch.uint8)
    if bool(((octets & 127) == 127).any()):
        return weight
    return dataclasses.replace(weight, codes=octets, scales=weight.scales.repeat_interleave(len(octets) // len(weight.scales), 0))


def _form_of(weight: GroupedWeight) -> tuple[int, int, int] | None:
    """(bits, how scales are stored, kind of offsets); None: there is no kernel for it."""
    n, k = weight.shape
    one_zero = isinstance(weight.zeros, int)
    if weight.codes.dtype != torch.uint8 or weight.codes.device.type != "cpu" or not converts_float16():
        return None
    if n == 0 or weight.scales.shape[0] != n or k % 32 or weight.group % {5: 32, 6: 16}.get(weight.bits, 8):
        return None
    if weight.mins is not None and (not one_zero or weight.zeros != 0):
        return None
    offset = ZEROS if not one_zero else ONE_ZERO if weight.mins is None else MINS
    numbers = [weight.scales.dtype] if weight.mins is None else [weight.scales.dtype, weight.mins.dtype]
    if weight.super_scales is None:
        return weight.bits, FLOAT16 if numbers[0] == numbers[-1] == torch.float16 else FLOAT32, offset
    supers = [weight.super_scales] if weight.super_mins is None else [weight.super_scales, weight.super_mins]
    if numbers[0] != numbers[-1] or len(numbers) != len(supers):
        return None
    if any(t.dtype != torch.float16 or t.shape != supers[0].shape for t in supers):
        return None
    return weight.bits, UINT8 if numbers[0] == torch.uint8 else INT8, offset


def _tiles(t: Tensor) -> Tensor:
    """[N, J] -> [tiles, J, 16], filled up with zeros."""
    missing = -len(t) % TILE
    if missing:
        t = torch.cat((t, t.new_zeros(missing, t.shape[1])))
    return t.reshape(-1, TILE, t.shape[1]).transpose(1, 2).contiguous()


def _high_bits(high: Tensor, width: int) -> Tensor:
    """The upper `width` bits of codes: [N, K] uint8 -> [N, K * width / 32] int32."""
    n, k = high.shape
    parts = 4 // width
    high = high.view(n, -1, parts, 4, 2)  # word, byte, code of the byte
    packed = torch.zeros(n, high.shape[1], 4, dtype=torch.uint8, device=high.device)
    for j in range(parts):
        for i in range(2):
            packed |= high[:, :, j, :, i] << (width * j + 4 * i)
    return packed.view(torch.int32).view(n, k * width // 32)


# --- products ------------------------------------------------------------------------------------------------------


def grouped_linear(
    x: Tensor, packed: PackedTiles | reference.PackedGroups, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None,
    gated: bool = False, residual: Tensor | None = None,
) -> Tensor:
    """As `fused_linear`, for a packed weight: x: [T, K] -> [T, N], or [T, N / 2] if gated. `residual` may be overwritten."""
    if isinstance(packed, reference.PackedGroups):
        return reference.grouped_linear(x, packed, bias, norm=norm, gated=gated, residual=residual)
    if len(x) > CPU_PACKED_ROWS[x.dtype is torch.bfloat16 and can_pack(x.dtype)]:
        y = _dense_product(_normalized(x, norm), packed, bias)
    else:
        added = residual if not gated and x.dtype in KERNEL_DTYPES and _covers(residual, x.dtype, packed) else None
        y = _product(x, packed, bias, norm, added)
        if added is not None:
            return y
    if gated:
        y = rows.silu_and_mul(y)
    return y if residual is None else residual.add_(y)


def _product(x: Tensor, packed: PackedTiles, bias: Tensor | None, norm: tuple[Tensor, float] | None, residual: Tensor | None) -> Tensor:
    """x: [T, K] -> [T, N], of a few rows; into `residual` if there is one."""
    (n, k), dtype = packed.shape, x.dtype
    if dtype not in KERNEL_DTYPES:
        y = _product(_normalized(x, norm).float(), packed, None if bias is None else bias.float(), None, None)
        return y.to(dtype)
    if norm is not None and (norm[0].shape != (k,) or norm[0].dtype != dtype or not norm[0].is_contiguous()):
        x, norm = _normalized(x, norm), None
    if x.stride(1) != 1:
        x = x.contiguous()
    assert x.shape[1] == k and x.device.type == "cpu"
    t, padded = len(x), len(packed.words) * TILE
    out = x.new_empty(t, padded) if residual is None else residual
    some = bias if bias is not None and _covers(bias, dtype, packed) else None
    args, floats = _scratch.args, _scratch.take((t + 4) * k + (t + 3) * (k // packed.group), torch.float32)
    inputs = floats.data_ptr()
    code.CALL_ARGS.pack_into(
        args.memory, 0, 0, len(packed.words), out.data_ptr(), out.stride(0) * out.itemsize, dtype == torch.bfloat16,
        0 if residual is None else residual.data_ptr(), 0 if residual is None else residual.stride(0) * residual.itemsize,
        0 if some is None else some.data_ptr(), x.data_ptr(), x.stride(0) * x.itemsize, t, 0 if norm is None else norm[0].data_ptr(),
        inputs, inputs + 4 * (t + 4) * k, 0, 0.0 if norm is None else norm[1], packed.args)
    code.inputs_kernel().run(args.address, 1)
    if args.memory[8 * code.FLAG] != b"\0":
        return _non_finite_product(x, packed, bias, norm, residual)
    packed.product.run(args.address, len(packed.words))
    y = out if n == padded else out[:, :n].contiguous()
    return y if bias is some or bias is None else y + bias


def _covers(t: Tensor | None, dtype: torch.dtype, packed: PackedTiles) -> bool:
    """Whether the kernel can add bias or residual: its last dimension is whole tiles, one number after the other."""
    return t is not None and t.dtype == dtype and t.stride(-1) == 1 and t.shape[-1] == len(packed.words) * TILE


def _non_finite_product(x: Tensor, packed: PackedTiles, bias: Tensor | None, norm: tuple[Tensor, float] | None, residual: Tensor | None,
                        ) -> Tensor:
    """As `_product`. The kernel adds sums of x, so that infinity minus infinity gives NaN where the product with the weight is infinite."""
    x = _normalized(x, norm)
    finite = x.isfinite().all(1)
    y = x.new_empty(len(x), packed.shape[0])
    if finite.any():
        y[finite] = _product(x[finite], packed, bias, None, None)
    y[~finite] = _dense_product(x[~finite], packed, bias)
    return y if residual is None else residual.add_(y)


def _normalized(x: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
    return x if norm is None else rows.rms_norm(x, *norm)


def _dense_product(x: Tensor, packed: PackedTiles, bias: Tensor | None) -> Tensor:
    """x: [T, K] -> [T, N], of many rows: dequantize some tiles, multiply, and again. In float32 where bfloat16 would be slow."""
    (n, k), tiles, dtype = packed.shape, len(packed.words), x.dtype
    if dtype != torch.bfloat16 or not can_pack(dtype):
        x = x.float()
    y = x.new_empty(len(x), n)
    step = 2 * max(1, CPU_DENSE_BYTES // (2 * k * TILE * x.itemsize))
    args = _scratch.args
    for first in range(0, tiles, step):
        last = min(tiles, first + step)
        values = _scratch.take(k * (last - first) * TILE, x.dtype).view(k, -1)
        code.CALL_ARGS.pack_into(
            args.memory, 0, first // 2, last, values.data_ptr() - first * TILE * x.itemsize, values.stride(0) * x.itemsize,
            x.dtype == torch.bfloat16, *(0 for _ in range(10)), 0.0, packed.args)
        packed.values.run(args.address, (last - first) // 2)
        end = min(n, last * TILE)
        torch.mm(x, values[:, : end - first * TILE], out=y[:, first * TILE : end])
    y = y.to(dtype)
    return y if bias is None else y.add_(bias)


# --- rows of a table -----------------------------------------------------------------------------------------------


def grouped_rows(packed: PackedTiles | reference.PackedGroups, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a packed table: ids [T] -> [T, K] in `dtype`."""
    if isinstance(packed, reference.PackedGroups):
        return reference.grouped_rows(packed, ids, dtype)
    tiles, lanes, bits = ids // TILE, ids % TILE, packed.form[0]

    def some(t: Tensor) -> Tensor:
        return t[tiles, :, lanes]

    codes = some(packed.words).contiguous().view(torch.uint8)
    if bits < 8:
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
    if packed.high is not None:
        codes |= _unpack_high_bits(some(packed.high), bits - 4) << 4
    supers = None if packed.supers is None else packed.supers[tiles, :, :, lanes]
    if packed.form[2] == FP8:
        codes = codes.view(torch.float8_e4m3fn)
    offsets = None if packed.offsets is None else some(packed.offsets)
    mins = offsets if packed.form[2] == MINS else None
    zeros = packed.zero if offsets is None or mins is not None else offsets
    return dequantize(GroupedWeight(
        codes=codes, bits=bits, scales=some(packed.scales), zeros=zeros, mins=mins,
        super_scales=None if supers is None else supers[:, :, 0],
        super_mins=None if supers is None or mins is None else supers[:, :, 1])).to(dtype)


def _unpack_high_bits(packed: Tensor, width: int) -> Tensor:
    """The inverse of `_high_bits`."""
    n, words = packed.shape
    octets, parts, mask = packed.contiguous().view(torch.uint8).view(n, words, 4), 4 // width, (1 << width) - 1
    codes = [octets >> (width * j + 4 * i) & mask for j in range(parts) for i in range(2)]
    return torch.stack(codes, dim=3).view(n, words, 4, parts, 2).transpose(2, 3).reshape(n, -1)
