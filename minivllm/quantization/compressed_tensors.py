"""compressed-tensors, the format of llm-compressor: groups of layers, each with a type of numbers and a layout.

    float-quantized   weight float8 [N, K], as in fp8.py
    int-quantized     weight int8 [N, K], weight_scale [N, K / group], weight_zero_point int8 [N, K / group] if not symmetric
    naive-quantized   one of the two above
    pack-quantized    weight_packed int32 [N, K * bits / 32], one stream of bits along each row, of codes = value + 2^(bits - 1)
                      weight_scale [N, K / group], weight_zero_point int32 [N * bits / 32, K / group] packed down the columns
                      weight_shape int64 [2], weight_g_idx int32 [K] with actorder "group"

w = (value - zero) * scale. Integer weights are used with 16-bit inputs, also where the configuration quantizes inputs to int8.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.errors import ModelError, NotSupportedYet, shown
from minivllm.families import Key, read
from minivllm.quantization.base import DUMMY_SCALE, LinearMethod, Matmul, MethodOf, ParamSpec, StoredTensor
from minivllm.quantization.dense import DENSE
from minivllm.quantization.fp8 import FP8Method, all_zeros, block_shape, per_output
from minivllm.quantization.grouped import grouped_bytes, spread
from minivllm.quantization.modules import (
    by_name,
    check_fields,
    compiled,
    full_names,
    group_size,
    matched,
    names,
    one_of,
    unsupported,
)
from minivllm.quantization.order import UNORDERED, order_bytes, ordered_matmul, unordered

if TYPE_CHECKING:
    from torch import Tensor

    from minivllm.kernels import Ops

NAME = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
FIELDS = frozenset((
    "quant_method", "format", "config_groups", "ignore", "sparsity_config", "transform_config", "kv_cache_scheme",
    "global_compression_ratio", "version", "provider", "run_compressed", "dequantize", "use_optimized_inference"))  # change no weight
# How far the tool had come. The dtypes of the tensors say whether they are compressed.
STATUS = ("compressed", "frozen", "calibration", "initialized")
OF_GROUPS = ("targets", "weights", "input_activations", "output_activations", "format")
OF_NUMBERS = frozenset((
    "num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "actorder", "block_structure",
    "observer", "observer_kwargs", "scale_dtype", "zp_dtype"))  # how the scales were found, whose tensors have a dtype


@dataclass(frozen=True)
class IntMethod(LinearMethod):
    """Integers in `pack-quantized` or `int-quantized` layout. See `LinearMethod`."""

    bits: int
    group: int  # -1: all inputs
    symmetric: bool
    packed: bool
    ordered: bool = False  # the checkpoint has a g_idx
    quantized_inputs: bool = False  # in the checkpoint's description
    scale_bytes: int = 2  # 2: as in checkpoints of 16-bit models

    @property
    def type_name(self) -> str:
        """See `LinearMethod`."""
        return f"int{self.bits}"

    @property
    def notice(self) -> str | None:
        """See `LinearMethod`."""
        return f"inputs of the int{self.bits} weights stay in 16 bits, where the checkpoint describes 8" if self.quantized_inputs else None

    @property
    def reorders_inputs(self) -> bool:
        """See `LinearMethod`."""
        return self.ordered and self.group != -1

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """See `LinearMethod`."""
        def words(count: int) -> int:
            return -(-count * self.bits // 32) if self.packed else count

        def tensor(dtype: str, shape: Any, dummy: Any = "bits") -> ParamSpec:
            return ParamSpec(tuple(shape(n) for n in rows), dtype=dtype, dummy=dummy)

        groups, integer = 1 if self.group == -1 else -(-cols // self.group), "int32" if self.packed else "int8"
        found = {"weight_packed" if self.packed else "weight": tensor(integer, lambda n: (n, words(cols))),
                 "weight_scale": tensor("float32", lambda n: (n, groups), DUMMY_SCALE)}
        if not self.symmetric:
            found["weight_zero_point"] = tensor(integer, lambda n: (words(n), groups))
        if self.packed or self.ordered:
            found["weight_g_idx"] = ParamSpec(((cols,),) * len(rows), dtype="int32", output_dim=None, input_dim=0, dummy=float(UNORDERED))
        return found

    def adapt(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """See `LinearMethod`. Drops what describes inputs, and zeros of symmetric weights."""
        weight = tensors.get("weight_packed" if self.packed else "weight")
        unused = ["input_scale", "input_zero_point"]
        if weight is not None and _rows(tensors.get("weight_shape"), weight.shape[0]) == weight.shape[0]:
            unused.append("weight_shape")
        found = {suffix: stored for suffix, stored in tensors.items() if suffix not in unused and not (
            self.symmetric and suffix == "weight_zero_point" and all_zeros(stored))}
        scale = found.get("weight_scale")
        if weight is not None and scale is not None:
            found["weight_scale"] = per_output(scale, weight.shape[0])
            if self.packed and not self.ordered and "weight_g_idx" not in found:
                found["weight_g_idx"] = unordered(weight, _cols(tensors.get("weight_shape"), weight.shape[1] * 32 // self.bits))
        return found

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> Matmul:
        """See `LinearMethod`."""
        import torch

        from minivllm.kernels.grouped import GroupedWeight, smallest_exact
        from minivllm.quantization.packing import unpack_bits

        middle, zero_points = 1 << self.bits - 1, tensors.get("weight_zero_point")
        if self.packed:
            cols = len(tensors["weight_g_idx"]) // len(rows)
            codes = unpack_bits(tensors["weight_packed"], self.bits, 1)[:, :cols]
            if zero_points is not None:
                parts = zero_points.split([-(-n * self.bits // 32) for n in rows])
                zero_points = torch.cat([unpack_bits(part, self.bits, 0)[:n] for part, n in zip(parts, rows, strict=True)])
        else:
            codes, cols = _unsigned(tensors["weight"]), tensors["weight"].shape[1]
            zero_points = None if zero_points is None else _unsigned(zero_points)
        scales = smallest_exact(tensors["weight_scale"]) if self.scale_bytes == 2 else tensors["weight_scale"]
        weight = GroupedWeight(
            codes=codes, bits=max(self.bits, 4), scales=spread(scales, self.group, cols),
            zeros=middle if zero_points is None else spread(zero_points, self.group, cols))
        g_idx = tensors.get("weight_g_idx", torch.full((cols,), UNORDERED))
        return ordered_matmul(weight, g_idx, self.group, rows, ops)

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """See `LinearMethod`."""
        return order_bytes(self.ordered, self.group, cols) + grouped_bytes(
            sum(rows), cols, max(self.bits, 4), self.group, on_gpu, scale_bytes=self.scale_bytes,
            zeros=not self.symmetric)


def _unsigned(values: Tensor) -> Tensor:
    """int8 -> uint8 with 128 added."""
    import torch

    return values.view(torch.uint8) ^ 128


def _cols(weight_shape: StoredTensor | None, default: int) -> int:
    """Inputs of a packed layer, whose last word may have unused bits."""
    return default if (shape := _shape(weight_shape)) is None else shape[1]


def _rows(weight_shape: StoredTensor | None, default: int) -> int:
    """Outputs of a packed layer."""
    return default if (shape := _shape(weight_shape)) is None else shape[0]


def _shape(weight_shape: StoredTensor | None) -> list[int] | None:
    if weight_shape is None or weight_shape.shape != (2,) or not weight_shape.dtype.startswith("int"):
        return None
    shape: list[int] = weight_shape.read().tolist()
    return shape


def method_of(config: Mapping[str, Any]) -> MethodOf:
    """From a quantization_config with quant_method "compressed-tensors"."""
    check_fields(NAME, config, FIELDS, {"quantization_status": STATUS})
    read(config, Key("kv_cache_scheme", dict, {}))
    sparsity = read(config, Key("sparsity_config", dict, {}))
    one_of(NAME, "sparsity_config.format", sparsity.get("format") or "dense", ("dense",))
    if read(config, Key("transform_config", dict, {})).get("config_groups"):
        raise NotSupportedYet("quantized weights (compressed-tensors with transform_config) are not supported yet: use a checkpoint "
                              "without rotations, or the unquantized one", "model")
    groups = []
    for label, group in read(config, Key("config_groups", dict)).items():
        if not isinstance(group, Mapping):
            raise ModelError(f"quantization_config: config_groups.{label} must be an object, got {shown(group)}: correct it", "model")
        check_fields(NAME, group, OF_GROUPS, within=f"quantization_config.config_groups.{label}")
        method = _method(group, read(group, Key("format", str, None)) or read(config, Key("format", str)))
        groups.append((_Targets(names(group, "targets"), "targets"), method))
    if not groups:
        raise ModelError("quantization_config: config_groups is empty, so that no layer is quantized: correct it", "model")
    ignored = _Targets(names(config, "ignore"), "ignore")

    def choose(name: str) -> LinearMethod:
        ranks = [targets.rank(name) for targets, _ in groups]
        if ignored.rank(name) is not None or not any(ranks):
            return DENSE
        return groups[ranks.index(min(filter(None, ranks)))][1]
    return by_name(choose)


class _Targets:
    """A list of names, regular expressions ("re:..") and classes of modules, of which "Linear" is the only one here."""

    def __init__(self, targets: list[str], field: str) -> None:
        for target in targets:  # a name of a module has no capital at its beginning
            if field == "targets" and target.isidentifier() and target[0].isupper():
                one_of(NAME, field, target, ("Linear",))
        self._exact = set(targets)
        self._patterns = [compiled(target[3:], field) for target in targets if target.startswith("re:")]

    def rank(self, name: str) -> int | None:
        """1 if a name matches, 2 if a pattern does, 3 if the class does: names come before patterns, and patterns before classes."""
        if not self._exact.isdisjoint(full_names(name)):
            return 1
        if any(matched(name, pattern) for pattern in self._patterns):
            return 2
        return 3 if "Linear" in self._exact else None


def _method(group: Mapping[str, Any], layout: str) -> LinearMethod:
    """The method of one group of layers."""
    if layout not in FORMATS:
        raise unsupported(NAME, "format", layout, " or ".join(FORMATS))
    one_of(NAME, "output_activations", group.get("output_activations") or None, (None,))
    weights, inputs = read(group, Key("weights", dict)), read(group, Key("input_activations", dict, None))
    check_fields(NAME, weights, OF_NUMBERS, within="quantization_config: weights")
    one_of(NAME, "dynamic of weights", read(weights, Key("dynamic", bool, False)), (False,))
    kind, bits = read(weights, Key("type", str, "int")).lower(), read(weights, Key("num_bits", int, 8))
    strategy = read(weights, Key("strategy", str, None)) or ("group" if weights.get("group_size") else "tensor")
    one_of(NAME, "strategy", strategy, ("tensor", "channel", "group", *(("block",) if kind == "float" else ())))
    if strategy != "block" and weights.get("block_structure") is not None:
        raise ModelError(f"quantization_config: block_structure {shown(weights['block_structure'])} needs strategy 'block', got "
                         f"{strategy!r}: correct one of them", "model")
    if kind == "float":
        one_of(NAME, "num_bits of float weights", bits, (8,))
        one_of(NAME, "format of float weights", layout, FORMATS[2:])
        one_of(NAME, "strategy of float weights", strategy, ("tensor", "channel", "block"))
        block = block_shape(weights.get("block_structure"), "block_structure") if strategy == "block" else None
        one_of(NAME, "symmetric of float weights", read(weights, Key("symmetric", bool, True)), (True,))
        return FP8Method(block, quantize_input=inputs is not None, input_scale=inputs is not None and _static(inputs, "float", block))
    one_of(NAME, "type", kind, ("int",))
    if inputs is not None:
        _static(inputs, read(inputs, Key("type", str, "int")).lower(), None)
    packed = layout == "pack-quantized"
    one_of(NAME, f"num_bits in format {layout}", bits, (2, 3, 4, 8) if packed else (8,))
    order = str(weights.get("actorder")).lower()
    one_of(NAME, "actorder", order, ("none", "false", "true", "group", "dynamic", "weight", "static"))
    return IntMethod(bits, group_size(weights) if strategy == "group" else -1, read(weights, Key("symmetric", bool, True)), packed,
                     ordered=order in ("true", "group", "dynamic"), quantized_inputs=inputs is not None)


def _static(inputs: Mapping[str, Any], kind: str, block: tuple[int, int] | None) -> bool:
    """Whether inputs are quantized with a scale of the checkpoint. kind: of the numbers; block: of the weights."""
    check_fields(NAME, inputs, OF_NUMBERS, within="quantization_config: input_activations")
    one_of(NAME, "type of input_activations", read(inputs, Key("type", str, "int")).lower(), (kind,) if kind == "float" else ("int",))
    one_of(NAME, "num_bits of input_activations", read(inputs, Key("num_bits", int, 8)), (8,))
    dynamic = read(inputs, Key("dynamic", bool, False))
    strategy = read(inputs, Key("strategy", str, None)) or ("group" if inputs.get("group_size") else "tensor")
    per_group = ("group",) if block is not None or kind == "int" else ()
    one_of(NAME, "strategy of input_activations", strategy, ("tensor", "token", *per_group) if dynamic else ("tensor",))
    if kind == "float":  # integers are not used: see above
        one_of(NAME, "symmetric of input_activations", read(inputs, Key("symmetric", bool, True)), (True,))
    return not dynamic
