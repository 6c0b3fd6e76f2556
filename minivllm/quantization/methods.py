"""Which method stores which linear layer, and the resulting parameters of a model."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from minivllm.errors import InvalidInput
from minivllm.families import LinearSpec, ModelSpec, TensorSpec, embedding_spec, expert_specs, linear_specs, tensor_specs
from minivllm.quantization import awq, bitsandbytes, compressed_tensors, fp8, gguf, gptq, online
from minivllm.quantization.base import DTYPE_BYTES, LinearMethod, MethodOf, ParamSpec
from minivllm.quantization.dense import DENSE

# quant_method of a checkpoint's config.json -> a function from its quantization_config to the method of each layer
Methods: TypeAlias = Mapping[str, Callable[[Mapping[str, Any]], MethodOf]]
METHODS: Methods = MappingProxyType({
    "awq": awq.method_of, "bitsandbytes": bitsandbytes.method_of, "compressed-tensors": compressed_tensors.method_of,
    "fp8": fp8.method_of, "gguf": gguf.method_of, "gptq": gptq.method_of,
})
# `EngineConfig.quantization` that quantizes an unquantized checkpoint -> the method of each layer
ONLINE: Mapping[str, Callable[[], MethodOf]] = MappingProxyType({
    "fp8": lambda: online.method_of("fp8"), "int8": lambda: online.method_of("int8"), "bitsandbytes": bitsandbytes.online,
})


def all_dense(linear: LinearSpec) -> LinearMethod:
    """Every weight is a plain matrix."""
    return DENSE


def method_of(config: Mapping[str, Any], methods: Methods = METHODS, wanted: str | None = None) -> MethodOf:
    """The methods that a parsed config.json names. `parse_config` has already refused names that are not in `methods`.

    wanted: `EngineConfig.quantization`. It must be the checkpoint's method, or one that quantizes an unquantized checkpoint.
    """
    quantization = config.get("quantization_config") or {}
    stored = quantization.get("quant_method")
    if wanted not in (None, stored):
        if stored is not None:
            raise InvalidInput(f"quantization is {wanted!r}, but the checkpoint is stored as {stored!r}: leave quantization out",
                               "quantization")
        if wanted not in ONLINE:
            raise InvalidInput(f"quantization is {wanted!r}, but the checkpoint is not quantized: leave quantization out, or name a "
                               f"checkpoint in that format; {', '.join(ONLINE)} quantize an unquantized one while it is loaded",
                               "quantization")
        online = ONLINE[wanted]()
        return lambda linear: DENSE if linear.expert else online(linear)
    return methods[stored](quantization) if stored is not None else all_dense


def of_separate_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config in a separate file, as AutoAWQ and AutoGPTQ once wrote it: quant_config.json or quantize_config.json."""
    return {"quant_method": "awq" if "w_bit" in config or "zero_point" in config else "gptq", **config}


class Source(NamedTuple):
    """One tensor of a checkpoint, named without the prefix ("model." and the like) that varies between exporters."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of ours, and the checkpoint tensors it is joined from along `concat_dim`."""

    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    concat_dim: int = 0
    dtype: str | None = None  # None: the model's
    dummy: str | float = "normal"  # see ParamSpec
    shard_dim: int | None = None  # tensor-parallel ranks split each source along it; None: every rank holds all of it

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def parameters(spec: ModelSpec, method: MethodOf = all_dense) -> dict[str, Parameter]:
    """Every parameter of the model under our own name, e.g. `layers.3.qkv.weight`."""
    found = {name: _tensor(tensor) for name, tensor in tensor_specs(spec).items()}
    for linear in all_linears(spec):
        found.update(linear_parameters(linear, method(linear)))
    return found


def all_linears(spec: ModelSpec) -> Iterator[LinearSpec]:
    """Every weight that a method may store: the embedding table, the linear layers, and each matrix of each expert."""
    yield embedding_spec(spec)
    yield from linear_specs(spec).values()
    for experts in expert_specs(spec).values():
        yield from experts.linears


def experts_notice(spec: ModelSpec, method: MethodOf, dtype: str) -> str | None:
    """A line to print when a quantized model with experts is loaded. dtype: of the loaded experts."""
    types = sorted({method(linear).type_name for experts in expert_specs(spec).values() for linear in experts.linears} - {""})
    if types:
        return f"the experts' weights ({', '.join(types)}) are dequantized to {dtype} while loading: no kernel multiplies packed ones"
    if expert_specs(spec) and any(method(linear) is not DENSE for linear in linear_specs(spec).values()):
        return f"the experts' weights are kept in {dtype}: no kernel multiplies packed ones"
    return None


def stored_modules(spec: ModelSpec, method: MethodOf) -> dict[str, LinearMethod]:
    """Every module of a checkpoint that stores a linear layer, or a part of a fused one -> its method."""
    return {name: method(linear).of_part(i) for linear in all_linears(spec) for i, name in enumerate(linear.checkpoint_names)}


def resident_bytes(spec: ModelSpec, method: MethodOf, itemsize: int, on_gpu: bool) -> int:
    """Bytes of the loaded model's weights. itemsize: of its dtype. More than the checkpoint's if a method keeps its scales unpacked."""
    return sum(weight.num_bytes for weight in resident_weights(spec, method, itemsize, on_gpu))


class ResidentWeight(NamedTuple):
    """A part of the loaded model's weights."""

    name: str  # of the module: layers.3.qkv
    type_name: str  # see `LinearMethod`
    num_bytes: int


def resident_weights(spec: ModelSpec, method: MethodOf, itemsize: int, on_gpu: bool) -> Iterator[ResidentWeight]:
    """The weights of the loaded model, each module by type."""
    for tensor in tensor_specs(spec).values():
        num_bytes = math.prod(tensor.shape) * (itemsize if tensor.dtype is None else DTYPE_BYTES[tensor.dtype])
        yield ResidentWeight(tensor.name.rpartition(".")[0], "", num_bytes)
    for experts in expert_specs(spec).values():  # dense, whatever the checkpoint stores
        yield ResidentWeight(experts.name, "", experts.size * itemsize)
    for linear in (embedding_spec(spec), *linear_specs(spec).values()):
        rows = linear.rows if len(linear.checkpoint_names) == len(linear.rows) else (sum(linear.rows),)
        for type_name, num_bytes in method(linear).bytes_by_type(rows, linear.cols, itemsize, on_gpu).items():
            yield ResidentWeight(linear.name, type_name, num_bytes)
        if linear.bias:
            yield ResidentWeight(linear.name, "", sum(linear.rows) * itemsize)


def layer_bytes(spec: ModelSpec, method: MethodOf, itemsize: int, on_gpu: bool) -> list[int]:
    """Bytes of each layer's weights, as `resident_bytes`."""
    found = [0] * len(spec.layers)
    for weight in resident_weights(spec, method, itemsize, on_gpu):
        if weight.name.startswith("layers."):
            found[int(weight.name.split(".")[1])] += weight.num_bytes
    return found


def _tensor(tensor: TensorSpec) -> Parameter:
    parts = len(tensor.checkpoint_names)
    shape = (tensor.shape[0] // parts, *tensor.shape[1:])
    return Parameter(tensor.shape, tuple(Source(name, shape) for name in tensor.checkpoint_names), dtype=tensor.dtype,
                     dummy=1.0 if tensor.kind == "scale" else "normal")


def linear_parameters(linear: LinearSpec, method: LinearMethod) -> Iterator[tuple[str, Parameter]]:
    """Every parameter of a linear layer, under our own name."""
    # A checkpoint may hold the parts of a fused layer as one tensor already.
    rows = linear.rows if len(linear.checkpoint_names) == len(linear.rows) else (sum(linear.rows),)
    tensors = method.parameters(rows, linear.cols)
    if linear.bias:  # split along the outputs. A row-parallel layer adds it once, after the sum over ranks
        tensors["bias"] = ParamSpec(tuple((n,) for n in rows), input_dim=None)
    for suffix, param in tensors.items():
        names = linear.checkpoint_names if param.of_parts is None else tuple(linear.checkpoint_names[i] for i in param.of_parts)
        sources = tuple(Source(f"{name}.{param.suffix or suffix}", shape) for name, shape in zip(names, param.parts, strict=True))
        shard_dim = {"column": param.output_dim, "row": param.input_dim, None: None}[linear.parallel]
        yield f"{linear.name}.{suffix}", Parameter(param.shape, sources, param.concat_dim, param.dtype, param.dummy, shard_dim)
