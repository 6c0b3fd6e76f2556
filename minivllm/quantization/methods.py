"""Which method stores which linear layer, and the resulting parameters of a model."""
from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from minivllm.errors import InvalidInput
from minivllm.families import LinearSpec, ModelSpec, TensorSpec, embedding_spec, expert_specs, linear_specs, tensor_specs
from minivllm.parallel.shard import FIELD, grouped_spans, shard_spec, span
from minivllm.quantization import awq, bitsandbytes, compressed_tensors, fp8, gguf, gptq, mxfp4, online
from minivllm.quantization.base import DTYPE_BYTES, LinearMethod, MethodOf, ParamSpec
from minivllm.quantization.dense import DENSE

# quant_method of a checkpoint's config.json -> a function from its quantization_config to the method of each layer
Methods: TypeAlias = Mapping[str, Callable[[Mapping[str, Any]], MethodOf]]
METHODS: Methods = MappingProxyType({
    "awq": awq.method_of, "bitsandbytes": bitsandbytes.method_of, "compressed-tensors": compressed_tensors.method_of,
    "fp8": fp8.method_of, "gguf": gguf.method_of, "gptq": gptq.method_of,
    "mxfp4": mxfp4.method_of,
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
        return lambda linear: DENSE if linear.dense else online(linear)
    return methods[stored](quantization) if stored is not None else all_dense


QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # beside config.json; the first one counts


def quantization_elsewhere(config: Mapping[str, Any], files: Mapping[str, Any]) -> Any:
    """The quantization_config of a config.json that has none: under another name, or in a separate file. None: there is none.

    files: those of `QUANTIZATION_FILES` that exist. AutoAWQ and AutoGPTQ once wrote the first two, ModelOpt writes the third.
    """
    text = config.get("text_config")  # of a model for images and text
    for place, name in ((config, "quantization_config"), (config, "compression_config"), (text, "quantization_config")):
        if isinstance(place, Mapping) and place.get(name):
            return place[name]
    for name, found in files.items():
        if name == "hf_quant_config.json":
            return {"quant_method": "modelopt", **found}
        return {"quant_method": "awq" if "w_bit" in found or "zero_point" in found else "gptq", **found}
    return {"quant_method": "mlx", **config["quantization"]} if isinstance(config.get("quantization"), Mapping) else None


def kv_cache_notice(config: Mapping[str, Any], quantized: bool) -> str | None:
    """A line to print when a model whose checkpoint describes a quantized KV cache is loaded. quantized: the cache is, in any format."""
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    return None if quantized or not scheme else (
        "the KV cache is not quantized, although the checkpoint describes a quantized one (kv_cache_scheme): kv_cache_dtype can do it")


MOST_IN_WORD = 32  # numbers that one word of a packed tensor may store


class Source(NamedTuple):
    """One tensor of a checkpoint, named without the prefix ("model." and the like) that varies between exporters."""

    name: str
    shape: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...] | None = None  # (start, length) of what this rank holds along `shard_dim`. None: all of it


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of ours, and the checkpoint tensors it is joined from along `concat_dim`."""

    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    concat_dim: int = 0
    dtype: str | None = None  # None: the model's
    dummy: str | float | tuple[int | None, ...] = "normal"  # see ParamSpec
    shard_dim: int | None = None  # tensor-parallel ranks split each source along it; None: every rank holds all of it
    of_parts: tuple[int, ...] | None = None  # see ParamSpec
    padding: int = 0  # zeros at the end, along concat_dim: of the last ranks' part of a vocabulary

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def parameters(spec: ModelSpec, method: MethodOf = all_dense, rank: int = 0, size: int = 1) -> dict[str, Parameter]:
    """Every parameter of the model under our own name, e.g. `layers.3.qkv.weight`. With several ranks, the parts that this one holds.

    Raises `InvalidInput` if so many ranks cannot share it."""
    shard = shard_spec(spec, size)
    found = {tensor.name: _tensor(tensor, part, rank, size)
             for tensor, part in zip(tensor_specs(spec).values(), tensor_specs(shard).values(), strict=True)}
    for linear, part in zip(all_linears(spec), all_linears(shard), strict=True):
        stored = method(linear)
        found.update(linear_parameters(linear, stored) if size == 1 else _sharded(linear, part, stored, rank, size))
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


def _sharded(linear: LinearSpec, part: LinearSpec, method: LinearMethod, rank: int, size: int) -> Iterator[tuple[str, Parameter]]:
    """One rank's parameters of a linear layer. part: its layer of any rank."""
    whole, parts = dict(linear_parameters(linear, method)), dict(linear_parameters(part, method))
    by_outputs = linear.parallel == "column"
    if linear.parallel == "row" and method.reorders_inputs:
        raise InvalidInput(f"{FIELD} {size} does not fit the quantized weight of {linear.name}: its groups are not neighboring inputs "
                           "(desc_act, actorder); use one rank, or a checkpoint without it", FIELD)
    numbers = [*zip(linear.rows, part.rows, strict=True)] if by_outputs else [(linear.cols, part.cols)]
    spans = [span(total, here, rank, size) for total, here in numbers]
    starts = [*itertools.accumulate((total for total, _ in numbers), initial=0)]
    for name, param in whole.items():
        dim = param.shard_dim
        if dim is None or linear.parallel is None:
            yield name, param
            continue
        suffix, sources = name.removeprefix(f"{linear.name}."), []
        for source, i in zip(param.sources, param.of_parts or range(len(param.sources)), strict=True):
            own = range(len(numbers)) if linear.stored_rows != linear.rows and by_outputs else (i,)  # one tensor of all parts
            total, stored = sum(numbers[j][0] for j in own), source.shape[dim]
            if stored == 1 and total > MOST_IN_WORD:  # one scale for all, which every rank holds
                cuts = [(0, 1)]
            elif name in parts and (suffix == "bias" or _divides(method, part, suffix, dim)):
                ends = [(starts[j] * (len(own) > 1) + a, starts[j] * (len(own) > 1) + b) for j in own for a, b in (spans[j],)]
                if linear.heads is not None and linear.heads.grouped_qkv and by_outputs:
                    ends = grouped_spans(linear.heads, rank, size)
                cuts = [(a * stored // total, (b - a) * stored // total) for a, b in ends]
            else:
                here = sum(numbers[j][1] for j in own)
                raise InvalidInput(
                    f"{FIELD} {size} does not fit the quantized weight of {linear.name}: of its {total} "
                    f"{'outputs' if by_outputs else 'inputs'} a rank would have {here}, and the {stored} entries of {suffix} cannot be "
                    "divided so; use fewer ranks, or a checkpoint with smaller groups", FIELD)
            sources.append(source._replace(cuts=tuple(cuts)))
        shape, held = parts[name].shape, sum(length for source in sources for _, length in source.cuts or ())
        yield name, dataclasses.replace(param, shape=shape, sources=tuple(sources),
                                        padding=shape[dim] - held if dim == param.concat_dim else 0)


def _divides(method: LinearMethod, part: LinearSpec, suffix: str, dim: int) -> bool:
    """Whether entries of a tensor end where a rank's part does. Then those of 4096 parts are 4096 times as many."""
    one, many = method.parameters(part.rows, part.cols), method.parameters(tuple(4096 * n for n in part.rows), 4096 * part.cols)
    return suffix in many and all(b[dim] == 4096 * a[dim] for a, b in zip(one[suffix].parts, many[suffix].parts, strict=True))


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
    if spec.parameters:
        yield ResidentWeight("parameters", "", spec.parameters * itemsize)
        return
    for tensor in tensor_specs(spec).values():
        num_bytes = math.prod(tensor.shape) * (itemsize if tensor.dtype is None else DTYPE_BYTES[tensor.dtype])
        yield ResidentWeight(tensor.name.rpartition(".")[0], "", num_bytes)
    for experts in expert_specs(spec).values():  # dense, whatever the checkpoint stores
        yield ResidentWeight(experts.name, "", experts.size * itemsize)
    for linear in (embedding_spec(spec), *linear_specs(spec).values()):
        stored = DENSE if linear.dense else method(linear)
        for type_name, num_bytes in stored.bytes_by_type(linear.stored_rows, linear.cols, itemsize, on_gpu).items():
            yield ResidentWeight(linear.name, type_name, num_bytes)
        if linear.bias:
            yield ResidentWeight(linear.name, "", sum(linear.rows) * itemsize)
        if linear.heads is not None and not stored.rows_in_any_order:  # outputs are reordered after the product, by this index
            yield ResidentWeight(linear.name, "", sum(linear.rows) * DTYPE_BYTES["int64"])
    for i, attention in enumerate(layer.attention for layer in spec.layers):
        if attention.qk_norm == "head":  # one row per head, where checkpoints have one for q and one for k
            copies = attention.num_heads + attention.num_kv_heads - 2
            yield ResidentWeight(f"layers.{i}.qk_norm", "", copies * attention.head_dim * itemsize)


def layer_bytes(spec: ModelSpec, method: MethodOf, itemsize: int, on_gpu: bool) -> list[int]:
    """Bytes of each layer's weights, as `resident_bytes`."""
    found = [0] * len(spec.layers)
    for weight in resident_weights(spec, method, itemsize, on_gpu):
        if weight.name.startswith("layers."):
            found[int(weight.name.split(".")[1])] += weight.num_bytes
    return found


def _tensor(tensor: TensorSpec, part: TensorSpec, rank: int, size: int) -> Parameter:
    """part: of one rank. The weights of norms of heads are divided as the heads are."""
    count = len(tensor.checkpoint_names)
    each = tensor.shape[0] // count
    sources = [Source(name, (each, *tensor.shape[1:])) for name in tensor.checkpoint_names]
    if part.shape != tensor.shape:
        start, end = span(tensor.shape[0], part.shape[0], rank, size)
        bounds = ((max(start - i * each, 0), min(end - i * each, each)) for i in range(count))
        sources = [source._replace(cuts=((a, b - a),) if a < b else ()) for source, (a, b) in zip(sources, bounds, strict=True)]
    return Parameter(part.shape, tuple(sources), dtype=tensor.dtype, dummy=1.0 if tensor.is_scale else "normal",
                     shard_dim=None if part.shape == tensor.shape else 0)


def linear_parameters(linear: LinearSpec, method: LinearMethod) -> Iterator[tuple[str, Parameter]]:
    """Every parameter of a linear layer, under our own name."""
    tensors = method.parameters(linear.stored_rows, linear.cols)
    if linear.bias:  # split along the outputs. A row-parallel layer adds it once, after the sum over ranks
        tensors["bias"] = ParamSpec(tuple((n,) for n in linear.stored_rows), input_dim=None)
    for suffix, param in tensors.items():
        names = linear.checkpoint_names if param.of_parts is None else tuple(linear.checkpoint_names[i] for i in param.of_parts)
        sources = tuple(Source(f"{name}.{param.suffix or suffix}", shape) for name, shape in zip(names, param.parts, strict=True))
        shard_dim = {"column": param.output_dim, "row": param.input_dim, None: None}[linear.parallel]
        yield f"{linear.name}.{suffix}", Parameter(param.shape, sources, param.concat_dim, param.dtype, param.dummy, shard_dim,
                                                        param.of_parts)
