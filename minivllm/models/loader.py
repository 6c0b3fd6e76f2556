"""From a checkpoint folder to a model. Loading is total: each tensor of the checkpoint is used, or listed in IGNORED, or an error.

All names and shapes are compared before the first weight is read, so a wrong folder fails at once, with all its problems listed.
A linear layer's method (`minivllm.quantization`) declares which tensors it has, so this one loader serves all methods.
Checkpoint files are memory-mapped. Each parameter is copied straight into its final tensor (three checkpoint tensors into one
fused qkv), so besides the model, at most one parameter is in memory at any time.
"""
from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minivllm.errors import ModelError
from minivllm.families import ModelSpec
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.quantization.methods import Parameter, Source, parameters

# Exporters give the same tensors different prefixes: with or without an output head, decoder alone or inside a model.
PREFIXES = ("model.decoder.", "decoder.", "model.")
# Tensors that older exporters wrote, although config.json determines them.
IGNORED = {re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"): "recomputed from config.json"}
PROGRESS_FROM = 512 << 20  # bytes; smaller models load too fast for a progress bar
DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet."""

    file: str
    name: str  # in the file, with its prefix
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Checkpoint = Mapping[str, StoredTensor]  # name without prefix -> tensor


def load_model(spec: ModelSpec, folder: Path, load_format: str, build: BuildContext, seed: int = 0) -> Decoder:
    """The model of `spec` with the weights in `folder`, or with random ones for load_format "dummy".

    Raises `ModelError` naming the tensors that are missing, left over, or of another shape or dtype.
    """
    needed = parameters(spec, build.method)
    if load_format == "dummy":
        return _build_decoder(spec, build, _Dummy(needed, build, seed))
    with open_checkpoint(folder, safetensors_only=load_format == "safetensors") as checkpoint:
        check(spec, needed, checkpoint, folder)
        num_bytes = sum(p.size * _dtype(p, build).itemsize for p in needed.values())
        disable = None if num_bytes >= PROGRESS_FROM else True  # None: tqdm hides the bar unless the output is a terminal
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Loading weights", disable=disable) as bar:
            return _build_decoder(spec, build, _Stored(needed, checkpoint, build, bar))


def _build_decoder(spec: ModelSpec, build: BuildContext, take: _Stored | _Dummy) -> Decoder:
    model = Decoder(spec, build, take)
    assert not take.needed, f"parameters that no layer took: {list(take.needed)}"
    return model


def weight_bytes(spec: ModelSpec, build: BuildContext) -> int:
    """Bytes of all parameters once they are loaded."""
    return sum(p.size * _dtype(p, build).itemsize for p in parameters(spec, build.method).values())


def _dtype(param: Parameter, build: BuildContext) -> torch.dtype:
    if param.dtype is None:
        return build.dtype
    dtype = getattr(torch, param.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


class _Stored:
    """Gives each parameter once: joined from its checkpoint tensors, on the device, in its dtype."""

    def __init__(self, needed: Mapping[str, Parameter], checkpoint: Checkpoint, build: BuildContext, bar: tqdm[Any]) -> None:
        self.needed, self.checkpoint, self.build, self.bar = dict(needed), checkpoint, build, bar

    def __call__(self, name: str) -> Tensor:
        param = self.needed.pop(name)
        out = torch.empty(param.shape, dtype=_dtype(param, self.build), device=self.build.device)
        start = 0
        for source in param.sources:
            size = source.shape[param.concat_dim] if source.shape else 1  # scalars are joined to a vector
            out.narrow(param.concat_dim, start, size).copy_(_read(self.checkpoint[source.name], param))
            start += size
        assert start == param.shape[param.concat_dim]  # every element was written
        self.bar.update(out.nbytes)
        return out


def _read(stored: StoredTensor, param: Parameter) -> Tensor:
    """One tensor of the checkpoint. Only tensors in the model's dtype are converted on copy, and they must be floating point."""
    tensor = stored.read()
    if param.dtype is None and not tensor.is_floating_point():
        raise ModelError(f"{stored.name} in {stored.file} has dtype {tensor.dtype}: quantized weights are not supported yet", "model")
    if param.dtype is not None and tensor.dtype != getattr(torch, param.dtype):
        raise ModelError(f"{stored.name} in {stored.file} has dtype {tensor.dtype}, but its method needs {param.dtype}", "model")
    return tensor


class _Dummy:
    """Random weights about as large as trained ones: norms 1, the rest normal with a small deviation. Same seed, same weights."""

    def __init__(self, needed: Mapping[str, Parameter], build: BuildContext, seed: int) -> None:
        self.needed, self.build = dict(needed), build
        self.generator = torch.Generator(build.device).manual_seed(seed)

    def __call__(self, name: str) -> Tensor:
        param = self.needed.pop(name)
        out = torch.empty(param.shape, dtype=_dtype(param, self.build), device=self.build.device)
        if isinstance(param.dummy, float):
            return out.fill_(param.dummy)
        if param.dummy == "bits":
            out.view(torch.uint8).random_(0, 256, generator=self.generator)
            return out
        return out.normal_(0.0, DUMMY_STD, generator=self.generator)


# ---------------------------------------------------------------------------------------------------------------------
# Total loading
# ---------------------------------------------------------------------------------------------------------------------


def check(spec: ModelSpec, needed: Mapping[str, Parameter], checkpoint: Checkpoint, folder: Path) -> None:
    """Raise `ModelError` unless the checkpoint has exactly the tensors that the model needs, in their shapes."""
    sources: dict[str, Source] = {source.name: source for param in needed.values() for source in param.sources}
    problems = [f"missing: {s.name} {list(s.shape)}" for s in sources.values() if s.name not in checkpoint]
    for name, stored in checkpoint.items():
        if name in sources:
            if stored.shape != (expected := sources[name].shape):
                problems.append(f"wrong shape: {stored.name} in {stored.file} is {list(stored.shape)}, not {list(expected)}")
        elif not (any(p.fullmatch(name) for p in IGNORED) or _is_tied_head(spec, name, checkpoint)):
            problems.append(f"unexpected: {stored.name} {list(stored.shape)} in {stored.file}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"the weights in {folder} do not match its config.json ({spec.architecture}): {shown}", "model")


def _is_tied_head(spec: ModelSpec, name: str, checkpoint: Checkpoint) -> bool:
    """Whether this tensor is a stored copy of a tied output head, that is, of the embedding table. Other values are an error."""
    if not spec.tied or name != f"{spec.names['head'][0]}.weight":
        return False
    head, table = checkpoint[name], checkpoint.get(f"{spec.names['embed'][0]}.weight")
    if table is not None and (head.shape != table.shape or not torch.equal(head.read(), table.read())):
        raise ModelError(f"{head.name} in {head.file} differs from {table.name}, but config.json ties them: "
                         "set tie_word_embeddings to false there", "model")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def open_checkpoint(folder: Path, safetensors_only: bool = False) -> Iterator[Checkpoint]:
    """All tensors of a folder by name, memory-mapped while the context lasts."""
    files = find_weight_files(folder, safetensors_only)
    checkpoint: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        for file in files:
            for stored in _open_safetensors(file, stack) if file.suffix == ".safetensors" else _open_torch(file):
                name = _without_prefix(stored.name)
                if name in checkpoint:
                    first = checkpoint[name]
                    raise ModelError(f"a tensor is stored twice: {first.name} in {first.file}, {stored.name} in {stored.file}", "model")
                checkpoint[name] = stored
        yield checkpoint


def find_weight_files(folder: Path, safetensors_only: bool = False) -> list[Path]:
    """The weight files of a folder: safetensors before PyTorch's, sharded (with an index) or single."""
    for stem, suffix in (("model", "safetensors"),) if safetensors_only else (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        single = folder / f"{stem}.{suffix}"
        if index.exists():
            return _files_of_index(index)
        if single.exists():
            return [single]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    expected = "model.safetensors, model.safetensors.index.json" + ("" if safetensors_only else ", pytorch_model.bin")
    found = f" (several files, no index: {', '.join(f.name for f in others)})" if others else ""
    raise ModelError(f"no weights in {folder}{found}: expected one of {expected}", "model")


def _files_of_index(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{index} is not a valid weight index ({e!r})", "model") from e
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing:
        raise ModelError(f"{index.name} names {missing[0]}, which is not in {index.parent}; is the download complete?", "model")
    return [index.parent / name for name in names]


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _open_safetensors(file: Path, stack: ExitStack) -> list[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
        return [
            StoredTensor(file.name, name, tuple(handle.get_slice(name).get_shape()), partial(handle.get_tensor, name))
            for name in handle.keys()  # noqa: SIM118 - not a dict
        ]
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError(f"{file} is damaged or not a safetensors file ({e}); download it again", "model") from e


def _open_torch(file: Path) -> list[StoredTensor]:
    """A pickle can contain code. With weights_only=True none of it runs: only tensors are read."""
    try:
        state = None
        with contextlib.suppress(RuntimeError):  # files written by torch < 1.6 cannot be memory-mapped
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if state is None:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds of exceptions for damaged files
        raise ModelError(f"{file} is damaged or holds more than tensors ({type(e).__name__}: {str(e)[:80]})", "model") from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ModelError(f"{file} is not a dictionary of tensors", "model")
    return [StoredTensor(file.name, name, tuple(t.shape), partial(_itself, t)) for name, t in state.items()]


def _itself(tensor: Tensor) -> Tensor:
    return tensor
