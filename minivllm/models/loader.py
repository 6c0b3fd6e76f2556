"""From a checkpoint folder to a model. Loading is total: each tensor of the checkpoint is used, or a BUFFER, or an error.

All names and shapes are compared before the first weight is read, so a wrong folder fails at once, with all its problems listed.
A linear layer's method (`minivllm.quantization`) declares which tensors it has, so this one loader serves all methods.
Checkpoint files are memory-mapped. Each parameter is copied straight into its final tensor (three checkpoint tensors into one
fused qkv), so besides the model, at most one parameter is in memory at any time.
"""
from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minivllm.errors import ModelError
from minivllm.families import ModelSpec, linear_specs, parse_config
from minivllm.layers.build import BuildContext, Take
from minivllm.models.decoder import Decoder
from minivllm.models.experts import split_experts
from minivllm.models.gguf_weights import open_index
from minivllm.models.streaming import WeightStream
from minivllm.models.weight_files import GGUF_INDEX, find_weight_files
from minivllm.parallel.shard import shard_spec
from minivllm.quantization.base import LinearMethod, StoredTensor
from minivllm.quantization.methods import (
    METHODS,
    Parameter,
    Source,
    experts_notice,
    method_of,
    parameters,
    resident_bytes,
    stored_modules,
)

log = logging.getLogger(__name__)

# Exporters give the same tensors different prefixes: with or without an output head, the decoder alone, inside a larger model, or
# wrapped by torch.compile or by data parallelism. A name is compared without all of these.
PREFIXES = ("model.", "decoder.", "language_model.", "transformer.", "gpt_neox.", "base_model.", "module.", "_orig_mod.")


class Buffer(NamedTuple):
    """Tensors that some exporters wrote although config.json determines them."""

    name: str  # pattern of the last parts of the name
    shape: Callable[[tuple[int, ...]], bool]
    what: str


BUFFERS = (
    Buffer(r"(original_)?inv_freq|freqs_(cis|cos|sin)|(rotary\w*|rope)\.(freqs|_?(cos|sin)(_cached|_cache)?|cos_sin_cache)",
           lambda shape: True, "rotary frequencies, or their cosines and sines"),
    Buffer(r"(attn|self_attn|attention)\.(bias|mask|tril)|causal_mask|attention_mask",
           lambda shape: len(shape) >= 2 and shape[-1] == shape[-2], "causal mask"),
    Buffer(r"(attn|self_attn|attention)\.masked_bias", lambda shape: shape in ((), (1,)), "score of masked keys"),
    Buffer(r"position_ids", lambda shape: True, "0, 1, 2, ..."),
    Buffer(r"version", lambda shape: shape in ((), (1,)), "version of the exporter, in old OPT checkpoints"),
)
KV_SCALES = Buffer(r"\w*att\w*\.((\w+\.)?(q|k|v|kv)_(scale|zero_point)|(q|k|v)_proj\.output_(scale|zero_point))", lambda shape: True,
                   "scales of a quantized KV cache")
IMAGES = Buffer(r"(vision_tower|multi_modal_projector)\..*", lambda shape: True, "encoder of images")
# safetensors' names of dtypes, and torch's. A name that is not here is shown as it is.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}
CONVERTED = ("float64", "float32", "float16", "bfloat16")  # to the model's dtype, on copy
PROGRESS_FROM = 512 << 20  # bytes; smaller models load too fast for a progress bar
DUMMY_STD = 0.02
MAX_NAME = 1024  # characters of a tensor's name: names are compared with patterns


Checkpoint = Mapping[str, StoredTensor]  # name without prefix -> tensor


def load_model(spec: ModelSpec, folder: Path, load_format: str, build: BuildContext, seed: int = 0,
               stream: WeightStream | None = None) -> Decoder:
    """The model of `spec` with the weights in `folder`, or with random ones for load_format "dummy"; this rank's part of it.

    stream: of the layers whose weights stay in host memory; the device never holds more than one of them while they are loaded.
    Raises `ModelError` naming the tensors that are missing, left over, or of another shape or dtype.
    """
    if load_format == "dummy":
        return _build_decoder(spec, build, DummyWeights(own_parameters(spec, build), build, seed), stream)
    with open_checkpoint(folder, safetensors_only=load_format == "safetensors") as found:
        spec, checkpoint = resolve_tied(spec, upright(spec, found))
        checkpoint = adapted(split_experts(spec, checkpoint), stored_modules(spec, build.method))
        needed = own_parameters(spec, build)
        check(spec, needed, checkpoint, folder)
        lines = list(dict.fromkeys(method.notice for method in stored_modules(spec, build.method).values()))
        if unused := sum(is_buffer(name, stored.shape, (KV_SCALES,)) for name, stored in checkpoint.items()):
            lines.append(f"{unused} scales for a quantized KV cache in the checkpoint are not used")
        if any(_of_extra_layers(spec, name) for name in checkpoint):
            lines.append("the layers that predict further tokens (num_nextn_predict_layers) are not used")
        if build.device.type == "cuda" and any(layer.attention.latent is not None for layer in spec.layers):
            lines.append("latent attention is computed by PyTorch's functions, and steps are not captured in CUDA graphs")
        lines.append(experts_notice(spec, build.method, str(build.dtype).removeprefix("torch.")))
        if images := sum(_of_images(spec, name) for name in checkpoint):
            lines.append(f"{images} tensors of the encoder of images are not used: this engine reads text only")
        for line in filter(None, lines):
            print(f"minivllm: {line}", file=sys.stderr, flush=True)
        num_bytes = parameter_bytes(needed, build.dtype)
        disable = None if num_bytes >= PROGRESS_FROM else True  # None: tqdm hides the bar unless the output is a terminal
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Loading weights", disable=disable) as bar:
            return _build_decoder(spec, build, _Stored(needed, checkpoint, build, bar), stream)


def _build_decoder(spec: ModelSpec, build: BuildContext, take: _Stored | DummyWeights, stream: WeightStream | None) -> Decoder:
    model = Decoder(shard_spec(spec, build.group.size), build, take, stream)
    assert not take.needed, f"parameters that no layer took: {list(take.needed)}"
    return model


def own_parameters(spec: ModelSpec, build: BuildContext) -> dict[str, Parameter]:
    """The parameters of this rank. Raises `InvalidInput` if so many ranks cannot share the model."""
    return parameters(spec, build.method, build.group.rank, build.group.size)


def take_from(needed: Mapping[str, Parameter], checkpoint: Checkpoint, build: BuildContext) -> Take:
    """Gives each of these parameters, which `check` has found in the checkpoint."""
    return _Stored(needed, checkpoint, build, tqdm(disable=True))


def weight_bytes(spec: ModelSpec, build: BuildContext) -> int:
    """Bytes of this rank's parameters once they are loaded."""
    return resident_bytes(shard_spec(spec, build.group.size), build.method, build.dtype.itemsize, build.device.type == "cuda")


def parameter_bytes(params: Mapping[str, Parameter], dtype: torch.dtype) -> int:
    """Bytes of these parameters in a model of this dtype."""
    return sum(p.size * _dtype(p, dtype).itemsize for p in params.values())


def _dtype(param: Parameter, model: torch.dtype) -> torch.dtype:
    if param.dtype is None:
        return model
    dtype = getattr(torch, param.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


class _Stored:
    """Gives each parameter once: joined from its checkpoint tensors, on the device, in its dtype."""

    def __init__(self, needed: Mapping[str, Parameter], checkpoint: Checkpoint, build: BuildContext, bar: tqdm[Any]) -> None:
        self.needed, self.checkpoint, self.build, self.bar = dict(needed), checkpoint, build, bar

    def __call__(self, name: str) -> Tensor:
        param = self.needed.pop(name)
        out = torch.empty(param.shape, dtype=_dtype(param, self.build.dtype), device=self.build.device)
        start = 0
        for source in param.sources:
            for piece in pieces(self.checkpoint[source.name].read(), source, param):
                size = piece.shape[param.concat_dim] if source.shape else 1  # scalars are joined to a vector
                out.narrow(param.concat_dim, start, size).copy_(piece)
                start += size
        assert start == param.shape[param.concat_dim] - param.padding  # every element was written
        out.narrow(param.concat_dim, start, param.padding).zero_()
        self.bar.update(out.nbytes)
        return out


def pieces(tensor: Tensor, source: Source, param: Parameter) -> Iterator[Tensor]:
    """What this rank holds of a checkpoint's tensor. Memory-mapped pages that no rank's part touches are not read."""
    if source.cuts is None or param.shard_dim is None:
        yield tensor
        return
    for start, length in source.cuts:
        yield tensor.narrow(param.shard_dim, start, length)


class DummyWeights:
    """Random weights about as large as trained ones: norms 1, the rest normal with a small deviation. Same seed, same weights,
    whatever the number of ranks."""

    def __init__(self, needed: Mapping[str, Parameter], build: BuildContext, seed: int) -> None:
        self.needed, self.build = dict(needed), build
        self.generator = torch.Generator(build.device).manual_seed(seed)

    def __call__(self, name: str) -> Tensor:
        param = self.needed.pop(name)
        if all(source.cuts is None for source in param.sources):
            return self._random(param, param.shape)
        sizes = [source.shape[param.concat_dim] for source in param.sources]
        whole = list(param.sources[0].shape)
        whole[param.concat_dim] = sum(sizes)
        split = self._random(param, tuple(whole)).split(sizes, param.concat_dim)
        own = [piece for part, source in zip(split, param.sources, strict=True) for piece in pieces(part, source, param)]
        out = torch.zeros(param.shape, dtype=own[0].dtype, device=own[0].device)
        torch.cat(own, param.concat_dim, out=out.narrow(param.concat_dim, 0, out.shape[param.concat_dim] - param.padding))
        return out

    def _random(self, param: Parameter, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape, dtype=_dtype(param, self.build.dtype), device=self.build.device)
        if isinstance(param.dummy, float):
            return out.fill_(param.dummy)
        if param.dummy == "bits" or isinstance(param.dummy, int):
            out.view(torch.uint8).random_(0, 256 if isinstance(param.dummy, str) else param.dummy, generator=self.generator)
            return out
        if isinstance(param.dummy, tuple):
            blocks = out.random_(0, 256, generator=self.generator).view(-1, len(param.dummy))
            for i, byte in enumerate(param.dummy):
                if byte is not None:
                    blocks[:, i] = byte
            return out
        if not out.is_floating_point() or out.itemsize > 1:
            return out.normal_(0.0, DUMMY_STD, generator=self.generator)
        wide = torch.empty(out.shape, dtype=self.build.dtype, device=out.device)
        return out.copy_(wide.normal_(0.0, DUMMY_STD, generator=self.generator))


# ---------------------------------------------------------------------------------------------------------------------
# Total loading
# ---------------------------------------------------------------------------------------------------------------------


def check(spec: ModelSpec, needed: Mapping[str, Parameter], checkpoint: Checkpoint, folder: Path) -> None:
    """Raise `ModelError` unless the checkpoint has exactly the tensors that the model needs, in their shapes and dtypes."""
    sources: dict[str, tuple[Source, Parameter]] = {s.name: (s, param) for param in needed.values() for s in param.sources}
    foreign = _foreign_prefix(checkpoint, sources)
    renamed = {_without_prefix(name.removeprefix(foreign)): stored for name, stored in checkpoint.items()}
    checkpoint = renamed if foreign else checkpoint
    absent = [source for source, _ in sources.values() if source.name not in checkpoint]
    problems = [f"missing: {_spelled(source.name, checkpoint, spec)} {list(source.shape)}" for source in absent]
    head = f"{spec.names['head'][0]}.weight"
    if [source.name for source in absent] == [head]:
        problems[0] += " (if the model uses its embedding table as output head, set tie_word_embeddings to true in config.json)"
    if foreign:
        example = next(stored.name for name, stored in checkpoint.items() if name in sources and foreign in stored.name)
        problems.insert(0, f"unknown prefix: names begin with {foreign!r}, such as {example}: save the tensors without it")
    for name, stored in checkpoint.items():
        if name in sources:
            problems += _mismatches(stored, *sources[name])
        elif not (is_buffer(name, stored.shape) or _of_images(spec, name) or _of_extra_layers(spec, name) or (spec.tied and name == head)
                  or _is_zero_bias(name, stored, sources)):
            problems.append(f"unexpected: {stored.name} {list(stored.shape)} in {stored.file}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"the weights in {folder} do not match its config.json ({spec.architecture}): {shown}", "model")


def adapted(checkpoint: Checkpoint, modules: Mapping[str, LinearMethod]) -> Checkpoint:
    """The checkpoint with the tensors of each linear layer as its method names them (`LinearMethod.adapt`). modules: `stored_modules`."""
    others: dict[str, StoredTensor] = {}
    of_module: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in checkpoint.items():
        parts = name.split(".")
        module = next((m for i in range(len(parts) - 1, 0, -1) if (m := ".".join(parts[:i])) in modules), None)
        if module is None:
            others[name] = stored
        else:
            of_module.setdefault(module, {})[name[len(module) + 1 :]] = stored
    for module, tensors in of_module.items():
        others.update({f"{module}.{suffix}": stored for suffix, stored in modules[module].adapt(tensors).items()})
    return others


def check_header(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], int]], where: str) -> None:
    """`check` for a checkpoint of which only config.json and the headers were read.

    tensors: name -> (dtype as safetensors spells it, shape, bytes)."""
    spec, method = parse_config(config, methods=METHODS), method_of(config)
    checkpoint: Checkpoint = {
        _without_prefix(name): StoredTensor("a safetensors file", name, shape, DTYPES.get(dtype, dtype), partial(torch.zeros, ()))
        for name, (dtype, shape, _) in tensors.items() if not name.endswith(".weight_shape")}  # compressed-tensors: numbers, not a weight
    spec, checkpoint = resolve_tied(spec, upright(spec, checkpoint))  # two stored copies of a tied matrix count as equal
    check(spec, parameters(spec, method), adapted(split_experts(spec, checkpoint), stored_modules(spec, method)), Path(where))


def _mismatches(stored: StoredTensor, source: Source, param: Parameter) -> Iterator[str]:
    """What is wrong with one tensor. Only tensors in the model's dtype are converted, and only from a dtype without scales."""
    if stored.shape != source.shape:
        yield f"wrong shape: {stored.name} in {stored.file} is {list(stored.shape)}, not {list(source.shape)}"
    if param.dtype is None and stored.dtype not in CONVERTED:
        yield f"wrong dtype: {stored.name} in {stored.file} has dtype {stored.dtype}, which its config.json does not announce"
    if param.dtype is not None and stored.dtype != param.dtype and not {stored.dtype, param.dtype} <= set(CONVERTED):
        yield f"wrong dtype: {stored.name} in {stored.file} has dtype {stored.dtype}, but its method needs {param.dtype}"


def is_buffer(name: str, shape: tuple[int, ...], buffers: Collection[Buffer] = (*BUFFERS, KV_SCALES)) -> bool:
    """Whether the model does not need this tensor: config.json determines it, or it is for a quantized KV cache."""
    return any(re.fullmatch(rf"(.*\.)?({buffer.name})", name) is not None and buffer.shape(shape) for buffer in buffers)


def _of_images(spec: ModelSpec, name: str) -> bool:
    """Whether this tensor belongs to the encoder of images of a model whose decoder runs here."""
    return spec.architecture.endswith("ForConditionalGeneration") and is_buffer(name, (), (IMAGES,))


def _of_extra_layers(spec: ModelSpec, name: str) -> bool:
    """Whether this is of a layer that predicts further tokens (DeepSeek-V3's multi-token prediction)."""
    match = re.match(r"layers\.(\d{1,9})\.", name)
    return match is not None and spec.num_layers <= int(match[1]) < spec.num_layers + spec.extra_layers


def _is_zero_bias(name: str, stored: StoredTensor, needed: Collection[str]) -> bool:
    """Whether this is the bias of a packed layer that has none. AutoGPTQ writes zeros for it."""
    module, _, suffix = name.rpartition(".")
    return suffix == "bias" and f"{module}.qweight" in needed and not bool(stored.read().any())


def _foreign_prefix(checkpoint: Checkpoint, needed: Collection[str]) -> str:
    """A prefix that no known exporter writes, in front of most tensors that are missing without it. Empty: there is none."""
    absent, modules = set(needed) - checkpoint.keys(), {name.split(".")[0] for name in needed}
    found: Counter[str] = Counter()
    for name in checkpoint.keys() - needed:
        parts = name.split(".")
        for i in range(1, len(parts) if parts[0] not in modules else 0):
            if _without_prefix(".".join(parts[i:])) in absent:
                found[".".join(parts[:i]) + "."] += 1
                break
    prefix, count = max(found.items(), key=lambda item: item[1], default=("", 0))
    return prefix if 2 * count > len(absent) else ""


def _spelled(name: str, checkpoint: Checkpoint, spec: ModelSpec) -> str:
    """A missing tensor's name with the prefix that this checkpoint gives to tensors like it."""
    prefixes: dict[str, Counter[str]] = {}
    for ours, stored in checkpoint.items():
        for part in (ours.split(".")[0], ""):  # those of the same module, and all
            prefixes.setdefault(part, Counter())[stored.name.removesuffix(ours)] += 1
    module = name.split(".")[0]
    if module not in prefixes and (module == spec.names["head"][0] or not prefixes):
        return name  # Transformers gives the output head no prefix
    return prefixes.get(module, prefixes[""]).most_common(1)[0][0] + name


def upright(spec: ModelSpec, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with plain matrices as [outputs, inputs], if it stores those of layers the other way round (GPT-2)."""
    names = {f"{name}.weight" for linear in linear_specs(spec).values() if linear.transposed for name in linear.checkpoint_names}
    return {name: dataclasses.replace(stored, shape=stored.shape[::-1], read=partial(_transposed, stored))
            if name in names and len(stored.shape) == 2 and stored.dtype in CONVERTED else stored for name, stored in checkpoint.items()}


def _transposed(stored: StoredTensor) -> Tensor:
    return stored.read().T


def resolve_tied(spec: ModelSpec, checkpoint: Checkpoint) -> tuple[ModelSpec, Checkpoint]:
    """A tied matrix may be stored as embedding table, as output head, or as both. As in Transformers, two unequal ones are not tied."""
    table_name, head_name = (f"{spec.names[module][0]}.weight" for module in ("embed", "head"))
    table, head = checkpoint.get(table_name), checkpoint.get(head_name)
    if not spec.tied or head is None:
        return spec, checkpoint
    if table is None:
        return spec, {table_name if name == head_name else name: stored for name, stored in checkpoint.items()}
    if (table.dtype, table.shape) == (head.dtype, head.shape) and torch.equal(table.read(), head.read()):
        return spec, checkpoint
    log.warning("%s and %s differ, so both are used, although config.json ties them (tie_word_embeddings)", table.name, head.name)
    return dataclasses.replace(spec, tied=False), checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def open_checkpoint(folder: Path, safetensors_only: bool = False) -> Iterator[Checkpoint]:
    """All tensors of a folder by name, memory-mapped while the context lasts."""
    weights = find_weight_files(folder, safetensors_only)
    checkpoint: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        for file in weights.files:
            shown = file.relative_to(folder).as_posix()  # as an index spells it
            for stored in _open(file, shown, stack):
                name = _without_prefix(stored.name)
                first = checkpoint.setdefault(name, stored)
                if first is stored:
                    continue
                if first.name != stored.name:
                    raise ModelError(f"a tensor is stored twice: {first.name} in {first.file}, {stored.name} in {stored.file}", "model")
                # Two files have it. The index says which one counts; without its word it is the last one, as in Transformers.
                if weights.file_of.get(stored.name) != first.file:
                    checkpoint[name] = stored
        yield checkpoint


def _open(file: Path, shown: str, stack: ExitStack) -> list[StoredTensor]:
    if file.name == GGUF_INDEX:
        return open_index(file)
    return _open_safetensors(file, shown, stack) if file.suffix == ".safetensors" else _open_torch(file, shown)


def _without_prefix(name: str) -> str:
    while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
        name = name[len(prefix) :]
    return f"lm_head.{name[len('embed_out.') :]}" if name.startswith("embed_out.") else name  # GPT-NeoX's name of the output head


def _open_safetensors(file: Path, shown: str, stack: ExitStack) -> list[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
        found = []
        for name in handle.keys():  # noqa: SIM118 - not a dict
            if len(name) > MAX_NAME:
                raise ValueError(f"a tensor's name has {len(name):,} characters")
            part = handle.get_slice(name)
            dtype = DTYPES.get(part.get_dtype(), part.get_dtype())
            found.append(StoredTensor(shown, name, tuple(part.get_shape()), dtype, partial(handle.get_tensor, name)))
        return found
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError(f"{file} is damaged or not a safetensors file ({e}); download it again", "model") from e


def _open_torch(file: Path, shown: str) -> list[StoredTensor]:
    """A pickle can contain code. With weights_only=True none of it runs: only tensors are read."""
    try:
        state = None
        with contextlib.suppress(RuntimeError):  # files written by torch < 1.6 cannot be memory-mapped
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if state is None:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds of exceptions for damaged files
        raise ModelError(f"{file} is damaged or holds more than tensors ({type(e).__name__}: {str(e)[:80]})", "model") from e
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()):
        raise ModelError(f"{file} is not a dictionary of tensors", "model")
    for name, t in state.items():
        if t.layout != torch.strided or t.device.type == "meta":
            raise ModelError(f"{name} in {file} has no plain values ({t.layout}, {t.device}): save it as a dense tensor", "model")
    return [StoredTensor(shown, name, tuple(t.shape), str(t.dtype).removeprefix("torch."), partial(_itself, t))
            for name, t in state.items()]


def _itself(tensor: Tensor) -> Tensor:
    return tensor
