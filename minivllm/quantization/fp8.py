"""FP8 (e4m3) weights: one scale for a layer, for each output, or for each block of 128 x 128 numbers.

    weight          [N, K] float8_e4m3fn
    weight_scale    [] or [N, 1], or [N / 128, K / 128] for blocks; called weight_scale_inv by DeepSeek, Qwen and Transformers;
                    float32 or another float type, or float8_e8m0fnu, which holds powers of two (scale_fmt "ue8m0")
    input_scale     [], with activation_scheme "static"; called activation_scale by Transformers

w = weight * weight_scale. Large products also quantize their inputs to fp8, with input_scale, or with a scale per token.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minivllm.errors import ModelError, shown
from minivllm.families import Key, read
from minivllm.quantization.base import LinearMethod, MethodOf, ParamSpec, StoredTensor
from minivllm.quantization.dense import DENSE
from minivllm.quantization.grouped import GroupedMatmul, grouped_bytes, spread
from minivllm.quantization.modules import by_name, check_fields, listed, names, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops

OTHER_NAMES = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
POWERS = "float8_e8m0fnu"
FIELDS = frozenset((
    "quant_method", "activation_scheme", "fmt", "modules_to_convert", "weight_block_size", "modules_to_not_convert", "ignored_layers",
    "kv_cache_scheme",
    "dequantize"))  # how Transformers loads it
ONLY: Mapping[str, tuple[Any, ...]] = {"scale_fmt": ("float", "ue8m0"), "expert_dtype": ("fp8",), "bits": (8,)}


@dataclass(frozen=True)
class FP8Method(LinearMethod):
    """See `LinearMethod`."""

    block: tuple[int, int] | None  # outputs and inputs that share a scale; None: a scale per output, or one for all
    quantize_input: bool
    input_scale: bool  # the checkpoint has one

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return "fp8"

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`. A scale for a whole layer is repeated for each output."""
        height, width = self.block or (1, cols)
        found = {"weight": ParamSpec(tuple((n, cols) for n in rows), dtype="float8_e4m3fn"),
                 "weight_scale": ParamSpec(tuple((-(-n // height), -(-cols // width)) for n in rows), dtype="float32", dummy=1.0,
                                           input_dim=1 if self.block else None)}
        if self.input_scale:
            found["input_scale"] = ParamSpec(((),) * len(rows), dtype="float32", output_dim=None, input_dim=None, dummy=1.0)
        return found

    def adapt(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """See `LinearMethod`. Names and shapes of scales differ between tools. Zeros of fp8 numbers are always 0."""
        zeros = ("weight_zero_point", "input_zero_point")
        found = {suffix if (usual := OTHER_NAMES.get(suffix, suffix)) in tensors else usual: stored for suffix, stored in tensors.items()
                 if suffix not in zeros or not all_zeros(stored)}
        if "weight_scale" in found and found["weight_scale"].dtype == POWERS:
            scale = found["weight_scale"]
            found["weight_scale"] = replace(scale, dtype="float32", read=lambda: scale.read().float())
        if self.block is None and "weight" in found and "weight_scale" in found:
            found["weight_scale"] = per_output(found["weight_scale"], found["weight"].shape[0])
        if "input_scale" in found and math.prod(found["input_scale"].shape) == 1:
            found["input_scale"] = reshaped(found["input_scale"], ())
        return found

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> GroupedMatmul:
        """See `LinearMethod`. Of the input scales of a fused layer, which are nearly equal, the largest is used, as in vLLM."""
        import torch

        from minivllm.kernels.grouped import GroupedWeight

        scales, cols = tensors["weight_scale"], tensors["weight"].shape[1]
        if self.block is not None:
            height, width = self.block
            parts = scales.split([-(-n // height) for n in rows])
            step = math.gcd(height, *rows)
            scales = torch.cat([part.repeat_interleave(height // step, 0)[: n // step] for part, n in zip(parts, rows, strict=True)])
            scales = spread(scales, width, cols)
        return GroupedMatmul(GroupedWeight(
            codes=tensors["weight"], bits=8, scales=scales.contiguous(), quantize_input=self.quantize_input,
            input_scale=tensors["input_scale"].amax() if self.input_scale else None), ops)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        height, width = self.block or (1, -1)
        packed = grouped_bytes(sum(rows), cols, 8, width, on_gpu, scale_bytes=4, rows_per_scale=math.gcd(height, *rows))
        return packed + 4 * self.input_scale


def reshaped(stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """The same tensor with another shape."""
    return replace(stored, shape=shape, read=lambda: stored.read().reshape(shape))


def all_zeros(stored: StoredTensor) -> bool:
    """Whether a zero point, which is read for this, changes nothing."""
    return not bool(stored.read().float().any())


def per_output(stored: StoredTensor, rows: int) -> StoredTensor:
    """A scale [], [1], [1, 1] or [N] as [N, 1]. Other shapes stay."""
    if math.prod(stored.shape) == 1:
        return replace(stored, shape=(rows, 1), read=lambda: stored.read().reshape(1, 1).expand(rows, 1))
    return reshaped(stored, (rows, 1)) if stored.shape == (rows,) else stored


def block_shape(value: Any, field: str) -> tuple[int, int]:
    """Outputs and inputs of a block, from a list of two numbers."""
    if not isinstance(value, list) or len(value) != 2 or any(type(size) is not int or size < 1 for size in value):
        raise ModelError(f"quantization_config: {field} must be a list of two sizes, got {shown(value)}: correct it", "model")
    return value[0], value[1]


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From a quantization_config with quant_method "fp8": of AutoFP8, DeepSeek, Qwen, Mistral or Transformers."""
    check_fields("fp8", config, FIELDS, ONLY)
    scheme = one_of("fp8", "activation_scheme", read(config, Key("activation_scheme", str, "dynamic")).lower(), ("dynamic", "static"))
    one_of("fp8", "fmt", read(config, Key("fmt", str, "e4m3")), ("e4m3", "float8_e4m3fn"))
    one_of("fp8", "modules_to_convert", config.get("modules_to_convert") or None, (None,))
    block = config.get("weight_block_size")
    method = FP8Method(None if block is None else block_shape(block, "weight_block_size"), quantize_input=True,
                       input_scale=scheme == "static")
    dense = listed([*names(config, "modules_to_not_convert"), *names(config, "ignored_layers"), "lm_head"], "modules_to_not_convert")
    return by_name(lambda name: DENSE if dense(name) else method)
